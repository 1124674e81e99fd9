"""Where the time of training goes: the parts of a step on this rank, who keeps the others waiting, and starting up.

A timeline is marked wherever a part ends. On a GPU a mark is an event on the stream that computes: nobody waits for it,
and a part lasts as long as the device was at it, or idle until it could begin.

    data               waiting for a micro batch
    forward_backward   up to the moment when the last gradient of this rank is known
    communication      from then until gradients are reduced: what the backward pass does not hide
    optimizer          norm, clipping, new weights; under ZeRO also gathering them
    ema                averages
    other              judging, logging, garbage
    evaluation, checkpoint     pauses, left out of the rates

zero2 and zero3 communicate in the middle of their passes. There `communication` cannot be told from
`forward_backward`, and is part of it.
"""

import socket
import statistics
import time
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
import torch
import torch.distributed as dist

from ldm_scale.core import runtime
from ldm_scale.training.engine import Engine

STEP_PARTS = ("data", "forward_backward", "communication", "optimizer", "ema", "other")

_Stamp = float | torch.cuda.Event


class Timeline:
    """Seconds of this rank by part, without a gap."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self.restart()

    def restart(self) -> None:
        """Forget what was, and begin here."""
        self._seconds: dict[str, float] = defaultdict(float)
        self._under_way: deque[tuple[str, _Stamp]] = deque()
        self._last = self._now()

    def mark(self, part: str) -> None:
        """Everything since the last mark was `part`."""
        self._under_way.append((part, self._now()))
        while self._under_way and _is_reached(self._under_way[0][1]):
            self._take()

    @contextmanager
    def pause(self, part: str) -> Iterator[None]:
        """`part` is what happens inside."""
        self.mark("other")
        try:
            yield
        finally:
            self.mark(part)

    def read(self) -> dict[str, float]:
        """Seconds since the last reading. Waits for the device."""
        self.mark("other")
        if self._on_gpu:
            torch.cuda.synchronize()
        while self._under_way:
            self._take()
        read, self._seconds = dict(self._seconds), defaultdict(float)
        return read

    def _now(self) -> _Stamp:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _take(self) -> None:
        part, stamp = self._under_way.popleft()
        self._seconds[part] += _seconds_between(self._last, stamp)
        self._last = stamp


def _is_reached(stamp: _Stamp) -> bool:
    return isinstance(stamp, float) or stamp.query()


def _seconds_between(begin: _Stamp, end: _Stamp) -> float:
    if isinstance(begin, float) or isinstance(end, float):
        assert isinstance(begin, float) and isinstance(end, float)
        return end - begin
    return begin.elapsed_time(end) / 1e3


@dataclass(frozen=True, kw_only=True, slots=True)
class Straggler:
    """A rank that the others wait for, several log intervals in a row."""

    rank: int
    host: str
    own_ms: float
    """Its own work in a step, before others are waited for."""
    median_ms: float
    """The median rank's."""
    share: float
    """The difference as a share of a step."""


class Ranks:
    """Numbers of every rank. Collective to make."""

    def __init__(self, engine: Engine, *, straggler: float, straggler_intervals: int) -> None:
        """Look for stragglers.

        straggler            share of a step that the median rank waits for the slowest one; more is too much
        straggler_intervals  readings in a row that must find the same rank too slow
        """
        self._device, self._world = engine.device, engine.world
        self._limit, self._patience = straggler, straggler_intervals
        self._suspect, self._times = -1, 0
        self.hosts = runtime.gathered(socket.gethostname())

    def gather(self, mine: Mapping[str, float]) -> dict[str, list[float]]:
        """Numbers by name, one of each rank. Collective."""
        ours = torch.tensor(list(mine.values()), device=self._device)
        everyone = [ours]
        if self._world > 1:
            everyone = [torch.empty_like(ours) for _ in range(self._world)]
            dist.all_gather(everyone, ours)
        return dict(zip(mine, torch.stack(everyone).T.tolist(), strict=True))

    def straggler(self, own_ms: list[float], step_ms: float) -> Straggler | None:
        """The rank that is too slow, once an episode."""
        slowest, median = max(own_ms), statistics.median_low(own_ms)
        rank, share = own_ms.index(slowest), (slowest - median) / step_ms
        if share <= self._limit:
            self._suspect, self._times = -1, 0
            return None
        self._times = self._times + 1 if rank == self._suspect else 1
        self._suspect = rank
        if self._times != self._patience:
            return None
        return Straggler(rank=rank, host=self.hosts[rank], own_ms=slowest, median_ms=median, share=share)


_LAUNCHES = iter([psutil.Process().create_time()])  # a process's first training began with it, any later one by itself


class Startup:
    """Seconds from the launch of a training to its first step, by phase."""

    def __init__(self) -> None:
        self.launched = next(_LAUNCHES, time.time())
        """Seconds since the epoch."""
        self.seconds: dict[str, float] = {}
        self.is_over = False
        self._last = self.launched
        self.mark("imports")

    def mark(self, phase: str) -> None:
        """Everything since the last mark was `phase`."""
        now = time.time()
        self.seconds[phase], self._last = now - self._last, now

    def finish(self) -> None:
        """The first step is done."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.mark("first_step")
        self.is_over = True
