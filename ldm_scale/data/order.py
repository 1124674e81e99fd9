"""Who is read when: stream position -> sample number, in closed form.

Epoch e holds positions e * n .. (e + 1) * n - 1, and an algorithm says in which order it reads the samples: each comes
exactly once an epoch for any n, any position costs the same, nothing is stored, and the order can be inverted. Pure
arithmetic: knows no files and no ranks.

A checkpoint's position means nothing without its algorithm. So one that was ever released stays in `ALGORITHMS` as it
is, pinned by golden vectors; a better one is added under another name.

Letters: B positions asked for.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from math import isqrt
from typing import Any, TypeVar

import numpy as np

from ldm_scale.core.rng import stream_key

Known = TypeVar("Known")

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_ROUND_KEYS = np.arange(1, 7, dtype=np.uint64).reshape(3, 2) * GOLDEN


def mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele et al. 2014): a bijection of 64-bit words."""
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return x ^ (x >> np.uint64(31))


class Permutation:
    """Keyed permutations of 0 .. n - 1: an alternating Feistel network of six rounds, walked until it lands inside.

    The network permutes a x b >= n numbers, a and b next to the square root of n (Black & Rogaway 2002), so that few
    steps of the walk are needed. Each element may have its own key, and then belongs to that key's permutation.
    """

    def __init__(self, n: int) -> None:
        self.n = n
        low = isqrt(n - 1) + 1
        self._low, self._high = np.uint64(low), np.uint64(-(-n // low))

    def __call__(self, x_B: np.ndarray, key_B: np.ndarray) -> np.ndarray:
        """Image of each element under the permutation of its key; int64 in and out, keys uint64."""
        return self._walk(self._forward, x_B, key_B)

    def inverse(self, y_B: np.ndarray, key_B: np.ndarray) -> np.ndarray:
        """The element whose image is `y`."""
        return self._walk(self._backward, y_B, key_B)

    def _walk(self, network: Callable[..., np.ndarray], x_B: np.ndarray, key_B: np.ndarray) -> np.ndarray:
        out = network(x_B.astype(np.uint64), key_B)
        while len(outside := np.flatnonzero(out >= np.uint64(self.n))):
            out[outside] = network(out[outside], key_B[outside])
        return out.astype(np.int64)

    def _forward(self, x: np.ndarray, key: np.ndarray) -> np.ndarray:
        high, low = np.divmod(x, self._low)
        for first, second in _ROUND_KEYS:
            low = (low + mix(high + key + first) % self._low) % self._low
            high = (high + mix(low + key + second) % self._high) % self._high
        return high * self._low + low

    def _backward(self, y: np.ndarray, key: np.ndarray) -> np.ndarray:
        high, low = np.divmod(y, self._low)
        for first, second in _ROUND_KEYS[::-1]:
            high = (high + self._high - mix(low + key + second) % self._high) % self._high
            low = (low + self._low - mix(high + key + first) % self._low) % self._low
        return high * self._low + low


@dataclass(frozen=True, slots=True)
class _Epoch:
    """What one epoch's arithmetic needs: two keys, the rotation, and the slot that holds the short last block."""

    block_key: np.uint64
    window_key: np.uint64
    rotation: int
    short_slot: int


class Algorithm(ABC):
    """One way through the epochs of `n` samples."""

    parameters: dict[str, int]
    """What it was given besides n and the seed, as a checkpoint records it."""

    @abstractmethod
    def samples(self, epoch: int, p_B: np.ndarray) -> np.ndarray:
        """Sample numbers, (B,) int64, at places 0 .. n - 1 of an epoch."""

    @abstractmethod
    def places(self, epoch: int, ids_B: np.ndarray) -> np.ndarray:
        """Places in an epoch, (B,) int64, of sample numbers: `samples` backwards."""


class FeistelWindow(Algorithm):
    """Blocks shuffled over the whole set, samples shuffled within windows of blocks.

    Sample numbers are rotated and cut into blocks; a Feistel permutation (Luby & Rackoff 1988) shuffles the blocks, and
    each run of `window` blocks is shuffled sample by sample. In a whole window, place q belongs to lane q mod `lanes`,
    and each lane keeps to its own window / lanes blocks, so that rank r of W reads 1 / W of the window where W divides
    `lanes`.

    block   consecutive samples that travel together between windows, so that a disk or a store is read in long runs
    window  blocks among which samples are shuffled one by one
    lanes   interleaved parts of a whole window, each with its own blocks; divides `window`
    """

    def __init__(self, *, n: int, seed: int, block: int = 64, window: int = 4096, lanes: int = 256) -> None:
        if min(block, window, lanes) < 1 or window % lanes:
            raise ValueError(f"order with block={block}, window={window}, lanes={lanes}; lanes must divide window")
        self.parameters = {"block": block, "window": window, "lanes": lanes}
        self.n, self.seed, self.block, self.window, self.lanes = n, seed, block, window, lanes
        self._blocks = -(-n // block)
        self._lack = self._blocks * block - n  # samples that the short block lacks
        self._whole = window * block  # samples of a whole window
        self._shuffle_blocks = Permutation(self._blocks)
        self._shuffle_lane = Permutation(self._whole // lanes)
        self._epoch = lru_cache(maxsize=8)(self._make_epoch)

    def samples(self, epoch: int, p_B: np.ndarray) -> np.ndarray:
        return self._samples(self._epoch(epoch), p_B)

    def places(self, epoch: int, ids_B: np.ndarray) -> np.ndarray:
        return self._places(self._epoch(epoch), ids_B)

    def _make_epoch(self, epoch: int) -> _Epoch:
        block_key, window_key, rotation = (
            np.uint64(stream_key(self.seed, f"order/{epoch}/{name}") % (1 << 64))
            for name in ("blocks", "windows", "rotation")
        )
        last = np.array([self._blocks - 1])
        short_slot = int(self._shuffle_blocks.inverse(last, np.array([block_key]))[0])
        return _Epoch(block_key, window_key, int(rotation) % self.n, short_slot)

    def _samples(self, epoch: _Epoch, p_B: np.ndarray) -> np.ndarray:
        window_B = p_B // self._whole
        window_B += p_B >= self._start(epoch, window_B + 1)  # the short block moves later windows forward
        q_B = p_B - self._start(epoch, window_B)
        # Place among the window's samples, laid out slot by slot as if all blocks were whole.
        sample_B = np.empty_like(p_B)
        whole_B = self._is_whole(epoch, window_B)
        w, q = window_B[whole_B], q_B[whole_B]
        lane, step = q % self.lanes, q // self.lanes
        sample_B[whole_B] = lane * self._shuffle_lane.n + self._shuffle_lane(step, self._key(epoch, w, lane))
        for window in np.unique(window_B[~whole_B]).tolist():
            here = window_B == window
            shuffle, key_B, cut = self._partial(epoch, window, int(here.sum()))
            place = shuffle(q_B[here], key_B)
            sample_B[here] = place + np.where(place >= cut, self._lack, 0)
        slot_B = window_B * self.window + sample_B // self.block
        keys_B = np.full(len(p_B), epoch.block_key)
        number_B = self._shuffle_blocks(slot_B, keys_B) * self.block + sample_B % self.block
        return (number_B + epoch.rotation) % self.n

    def _places(self, epoch: _Epoch, ids_B: np.ndarray) -> np.ndarray:
        number_B = (ids_B - epoch.rotation) % self.n
        slot_B = self._shuffle_blocks.inverse(number_B // self.block, np.full(len(ids_B), epoch.block_key))
        window_B = slot_B // self.window
        sample_B = slot_B % self.window * self.block + number_B % self.block
        q_B = np.empty_like(ids_B)
        whole_B = self._is_whole(epoch, window_B)
        w, (lane, place) = window_B[whole_B], np.divmod(sample_B[whole_B], self._shuffle_lane.n)
        q_B[whole_B] = self._shuffle_lane.inverse(place, self._key(epoch, w, lane)) * self.lanes + lane
        for window in np.unique(window_B[~whole_B]).tolist():
            here = window_B == window
            shuffle, key_B, cut = self._partial(epoch, window, int(here.sum()))
            place = sample_B[here] - np.where(sample_B[here] >= cut, self._lack, 0)
            q_B[here] = shuffle.inverse(place, key_B)
        return self._start(epoch, window_B) + q_B

    def _start(self, epoch: _Epoch, window_B: np.ndarray) -> np.ndarray:
        """Place of the epoch at which each window begins."""
        slot_B = np.minimum(window_B * self.window, self._blocks)
        return slot_B * self.block - np.where(slot_B > epoch.short_slot, self._lack, 0)

    def _is_whole(self, epoch: _Epoch, window_B: np.ndarray) -> np.ndarray:
        return self._start(epoch, window_B + 1) - self._start(epoch, window_B) == self._whole

    def _partial(self, epoch: _Epoch, window: int, count: int) -> tuple[Permutation, np.ndarray, int]:
        """A window that is not whole: its permutation, `count` keys, and the place behind its short block."""
        begin, end = self._start(epoch, np.array([window, window + 1])).tolist()
        first = window * self.window
        holds_short = first <= epoch.short_slot < first + self.window
        cut = (epoch.short_slot - first + 1) * self.block - self._lack if holds_short else self._whole
        key = self._key(epoch, np.array([window]), np.array([self.lanes]))
        return Permutation(end - begin), np.full(count, key[0]), cut

    def _key(self, epoch: _Epoch, window_B: np.ndarray, lane_B: np.ndarray) -> np.ndarray:
        """A key for each lane of each window; lane number `lanes` stands for a window without lanes."""
        name_B = (window_B * (self.lanes + 1) + lane_B).astype(np.uint64)
        return mix(epoch.window_key + (name_B + np.uint64(1)) * GOLDEN)


ALGORITHMS: Mapping[str, Callable[..., Algorithm]] = {"feistel-window/1": FeistelWindow}
"""Every order that a checkpoint may name. Added to, never edited."""


class Order:
    """The order of a training stream over `n` samples, by one of the `ALGORITHMS` and its parameters."""

    def __init__(self, *, n: int, seed: int, algorithm: str = "feistel-window/1", **parameters: int) -> None:
        if n < 1:
            raise ValueError(f"order over n={n} samples; at least 1")
        self.n, self.seed, self.algorithm = n, seed, algorithm
        self._algorithm = known_algorithm(ALGORITHMS, algorithm)(n=n, seed=seed, **parameters)

    def __call__(self, positions_B: np.ndarray) -> np.ndarray:
        """Sample numbers, (B,) int64, at stream positions (B,), which may span epochs."""
        positions_B = np.asarray(positions_B, np.int64)
        if len(positions_B) and positions_B.min() < 0:
            raise ValueError(f"stream position {positions_B.min()}; positions start at 0")
        epochs_B = positions_B // self.n
        out_B = np.empty_like(positions_B)
        for epoch in np.unique(epochs_B).tolist():
            here = epochs_B == epoch
            out_B[here] = self._algorithm.samples(epoch, positions_B[here] - epoch * self.n)
        return out_B

    def inverse(self, ids_B: np.ndarray, epoch: int) -> np.ndarray:
        """The stream positions, (B,) int64, at which `epoch` (0, 1, ...) reads these samples."""
        ids_B = np.asarray(ids_B, np.int64)
        if len(ids_B) and not (ids_B.min() >= 0 and ids_B.max() < self.n):
            raise ValueError(f"sample numbers {ids_B.min()} .. {ids_B.max()} outside 0 .. {self.n - 1}")
        return self._algorithm.places(epoch, ids_B) + epoch * self.n

    def state(self) -> dict[str, Any]:
        """What a checkpoint records; the position is the trainer's images_seen."""
        return {
            "algorithm": self.algorithm,
            "n": self.n,
            "seed": self.seed,
            "parameters": dict(self._algorithm.parameters),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "Order":
        """The order that `state` describes.

        raises  ValueError naming the algorithms that are known where it was made by another one
        """
        return cls(n=state["n"], seed=state["seed"], algorithm=state["algorithm"], **state["parameters"])

    def require_same(self, state: Mapping[str, Any]) -> None:
        """Refuse to go on with a stream that another order began.

        raises  ValueError naming what differs, with both sides
        """
        require_same(self.state(), state)


def known_algorithm(table: Mapping[str, Known], name: str) -> Known:
    """The algorithm of that name.

    raises  ValueError naming those that are known
    """
    if name not in table:
        raise ValueError(
            f"the data order was made by {name!r}; this version knows {', '.join(map(repr, table))}: resume with the "
            "version that began the run, or branch from its weights"
        )
    return table[name]


def require_same(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """Refuse a state of the data order that is not ours.

    raises  ValueError naming what differs, with both sides
    """
    different = [key for key in ours if theirs.get(key) != ours[key]]
    if different:
        sides = "; ".join(f"{key} was {theirs.get(key)!r}, is now {ours[key]!r}" for key in different)
        raise ValueError(f"this is not the data order that began the run: {sides}")


class OrderPreset(Enum):
    """How far apart samples may lie that are read together."""

    random_access = "random_access"
    """Local disk or memory: small blocks, the best shuffle."""
    window = "window"
    """Network file system or object store: blocks of 256 samples, long reads."""


_PRESETS: Mapping[OrderPreset, Mapping[str, Any]] = {
    OrderPreset.random_access: {"algorithm": "feistel-window/1", "block": 64, "window": 4096, "lanes": 256},
    OrderPreset.window: {"algorithm": "feistel-window/1", "block": 256, "window": 4096, "lanes": 256},
}


def preset_order(preset: OrderPreset, *, n: int, seed: int) -> Order:
    """The order of a preset."""
    return Order(n=n, seed=seed, **_PRESETS[preset])
