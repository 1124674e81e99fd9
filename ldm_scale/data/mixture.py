"""Several sources mixed by weight: stream position -> (source, its sample), in closed form.

Time is cut into periods of 2^14 positions. The weights become whole numbers c_s that sum to 2^14, by largest remainder,
and each period reads source s exactly c_s times, by one table. So the position in a source's own stream, where its
`Order` goes on, is a division and a look-up: any position costs the same, only the table is stored (made again from
weights and seed), and the mixture can be inverted. It is as elastic and resumable as an order.

How even: after any number p of positions, source s has been read within 1 of p * c_s / 2^14 times, and exactly so at
the end of a period; c_s / 2^14 is within 2^-14 of the weight's share.

Letters: B positions asked for, S sources, P positions of a period.
"""

import heapq
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from math import isfinite
from typing import Any

import numpy as np

from ldm_scale.core.rng import stream_key
from ldm_scale.data.order import GOLDEN, Order, OrderPreset, known_algorithm, mix, preset_order, require_same


class Schedule(ABC):
    """One way to share a stream among sources."""

    @abstractmethod
    def __call__(self, positions_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Source, and position in that source's own stream, of each stream position; (B,) int64 both."""

    @abstractmethod
    def inverse(self, source: int, own_B: np.ndarray) -> np.ndarray:
        """The stream positions, (B,) int64, at which a source's own positions come."""

    @abstractmethod
    def counts(self, position: int) -> np.ndarray:
        """(S,) int64: how often each source is read before `position`."""


class QuotaWalk(Schedule):
    """A periodic table, as random as evenness allows.

    It begins as the schedule that serves the earliest deadline first, where read j of source s is due while the source
    stays within 1 of its share (Tijdeman 1980 shows that some schedule does). Then neighbours are swapped at random,
    wherever both sources stay within 1: without that, a source of weight 1/2 would always fall to the same ranks.
    """

    PERIOD = 1 << 14
    _SWEEPS = 32

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        self.shares_S = np.array(whole_shares(weights, self.PERIOD), np.int64)
        self._table_P = self._earliest_deadline()
        self._shuffle(np.uint64(stream_key(seed, "mixture") % (1 << 64)))
        self._before_PS = self._counts()[:-1]
        self._slots = np.argsort(self._table_P, kind="stable")  # of source 0, then of source 1, ...
        self._first_S = np.cumsum(self.shares_S) - self.shares_S

    def __call__(self, positions_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        period_B, slot_B = np.divmod(positions_B, self.PERIOD)
        source_B = self._table_P[slot_B]
        return source_B, period_B * self.shares_S[source_B] + self._before_PS[slot_B, source_B]

    def inverse(self, source: int, own_B: np.ndarray) -> np.ndarray:
        period_B, rank_B = np.divmod(own_B, self.shares_S[source])
        return period_B * self.PERIOD + self._slots[self._first_S[source] + rank_B]

    def counts(self, position: int) -> np.ndarray:
        period, slot = divmod(position, self.PERIOD)
        return period * self.shares_S + self._before_PS[slot]

    def _earliest_deadline(self) -> np.ndarray:
        """(P,) int64 sources. Read j of a source may come in the slots j P / c - 1 .. (j + 1) P / c."""
        sources, share_P = np.arange(len(self.shares_S)), np.repeat(self.shares_S, self.shares_S)
        source_P, first_S = np.repeat(sources, self.shares_S), np.cumsum(self.shares_S) - self.shares_S
        read_P = np.arange(self.PERIOD) - first_S[source_P]
        opens_P = -(-read_P * self.PERIOD // share_P) - 1
        due_P = (read_P + 1) * self.PERIOD // share_P * len(sources) + source_P  # one number for both: a fast heap
        by_opening = np.argsort(opens_P, kind="stable")
        ends_P = np.searchsorted(opens_P[by_opening], np.arange(self.PERIOD), side="right").tolist()
        waiting, table, begin = due_P[by_opening].tolist(), [], 0
        heap: list[int] = []
        for end in ends_P:
            for due in waiting[begin:end]:
                heapq.heappush(heap, due)
            table.append(heapq.heappop(heap))
            begin = end
        return np.array(table, np.int64) % len(sources)

    def _shuffle(self, key: np.uint64) -> None:
        """Swap neighbours at random, those at even slots and those at odd ones by turns."""
        table_P = self._table_P
        share_PS = np.arange(self.PERIOD + 1)[:, None] * self.shares_S
        ahead_PS = self._counts() * self.PERIOD - share_PS  # of its share, in reads times P, before each slot
        for sweep in range(self._SWEEPS):
            slot = np.arange(sweep % 2, self.PERIOD - 1, 2)
            coin = mix(key + (slot + sweep * self.PERIOD + 1).astype(np.uint64) * GOLDEN) >> np.uint64(63)
            first, second = table_P[slot], table_P[slot + 1]
            may = (ahead_PS[slot + 1, first] >= 0) & (ahead_PS[slot + 1, second] <= 0) & (first != second)
            swap, first, second = (values[may & (coin == 1)] for values in (slot, first, second))
            table_P[swap], table_P[swap + 1] = second, first
            ahead_PS[swap + 1, first] -= self.PERIOD
            ahead_PS[swap + 1, second] += self.PERIOD

    def _counts(self) -> np.ndarray:
        """(P + 1, S) int64: reads of each source before each slot."""
        counts_PS = np.zeros((self.PERIOD + 1, len(self.shares_S)), np.int64)
        counts_PS[np.arange(1, self.PERIOD + 1), self._table_P] = 1
        return counts_PS.cumsum(axis=0)


ALGORITHMS: Mapping[str, Callable[[Sequence[float], int], Schedule]] = {"quota-walk/1": QuotaWalk}
"""Every schedule that a checkpoint may name. Added to, never edited."""


class Mixture:
    """Orders of several sources, read in turns by weight; a source that comes to its end begins its next epoch.

    orders   one a source
    weights  of each source, in any unit: only their ratios count
    seed     of the schedule
    """

    def __init__(
        self, orders: Sequence[Order], weights: Sequence[float], *, seed: int, algorithm: str = "quota-walk/1"
    ) -> None:
        if len(orders) != len(weights):
            raise ValueError(f"{len(orders)} sources with {len(weights)} weights; one weight a source")
        self.orders, self.weights, self.seed, self.algorithm = list(orders), list(weights), seed, algorithm
        self.schedule = known_algorithm(ALGORITHMS, algorithm)(self.weights, seed)

    def __call__(self, positions_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Source and number of the sample in that source, (B,) int64 both, at stream positions (B,)."""
        positions_B = np.asarray(positions_B, np.int64)
        if len(positions_B) and positions_B.min() < 0:
            raise ValueError(f"stream position {positions_B.min()}; positions start at 0")
        source_B, own_B = self.schedule(positions_B)
        sample_B = np.empty_like(own_B)
        for source in np.unique(source_B).tolist():
            here = source_B == source
            sample_B[here] = self.orders[source](own_B[here])
        return source_B, sample_B

    def inverse(self, source: int, ids_B: np.ndarray, epoch: int) -> np.ndarray:
        """The stream positions, (B,) int64, at which `epoch` (0, 1, ...) of a source reads these samples of it."""
        return self.schedule.inverse(source, self.orders[source].inverse(ids_B, epoch))

    def counts(self, position: int) -> list[int]:
        """How many samples of each source are read before `position`: what the mixture realises."""
        return [int(count) for count in self.schedule.counts(position)]

    def state(self) -> dict[str, Any]:
        """What a checkpoint records; the position is the trainer's images_seen."""
        return {
            "algorithm": self.algorithm,
            "weights": self.weights,
            "seed": self.seed,
            "orders": [order.state() for order in self.orders],
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "Mixture":
        """The mixture that `state` describes.

        raises  ValueError naming the algorithms that are known where it was made by another one
        """
        orders = [Order.from_state(order) for order in state["orders"]]
        return cls(orders, state["weights"], seed=state["seed"], algorithm=state["algorithm"])

    def require_same(self, state: Mapping[str, Any]) -> None:
        """Refuse to go on with a stream that another mixture began.

        raises  ValueError naming what differs, with both sides
        """
        require_same(self.state(), state)


def whole_shares(weights: Sequence[float], total: int) -> list[int]:
    """Whole numbers that sum to `total`, in the ratios of the weights, by largest remainder.

    raises  ValueError for a weight that is not positive, or so small that nothing is left of it
    """
    if not weights:
        raise ValueError("a mixture of no sources; give at least one")
    for source, weight in enumerate(weights):
        if not (isfinite(weight) and weight > 0):
            raise ValueError(f"weight {weight} of source {source}; must be positive: leave the source out instead")
    exact = [Fraction(weight) * total / sum(map(Fraction, weights)) for weight in weights]
    shares = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda source: shares[source] - exact[source])
    for source in by_remainder[: total - sum(shares)]:
        shares[source] += 1
    if 0 in shares:
        source = shares.index(0)
        raise ValueError(
            f"weight {weights[source]} of source {source} is less than one read in {total}: raise it, leave the source "
            "out, or join it to another one with `::`"
        )
    return shares


def preset_mixture(preset: OrderPreset, *, sizes: Sequence[int], weights: Sequence[float], seed: int) -> Mixture:
    """The mixture of sources of so many samples, each in the order of a preset.

    Each source has its own seed: two versions of one set are not read in step.
    """
    seeds = [stream_key(seed, f"source/{source}") % (1 << 63) for source in range(len(sizes))]
    orders = [preset_order(preset, n=n, seed=own) for n, own in zip(sizes, seeds, strict=True)]
    return Mixture(orders, weights, seed=seed)
