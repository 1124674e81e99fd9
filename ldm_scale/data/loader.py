"""The thread that reads a training stream ahead of its consumer.

A global batch is the next `global_batch` positions of the stream, of which rank r of W takes those congruent r (mod W),
micro batch by micro batch; so the global batch is the same for every world. Latents are copied from the mapped shards
straight into reused buffers, images are decoded by a pool of threads; worker processes would cost more in handing over
than they save.

Letters: B samples of a micro batch.
"""

import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Generic, Protocol, Self, TypeVar

import numpy as np
import torch

from ldm_scale.data.sources import AnyBatch, StreamOrder

_LOOKAHEAD = 2048  # positions whose samples are computed at once, since the arithmetic likes long arrays

Batch = TypeVar("Batch", bound=AnyBatch)
BatchOut = TypeVar("BatchOut", bound=AnyBatch, covariant=True)


class Source(Protocol[BatchOut]):
    """What the loader asks of a `SampleSource`."""

    order: StreamOrder

    def buffer(self, batch: int, *, pinned: bool) -> Any:
        """Memory that `read` fills."""
        ...

    def announce(self, ids: np.ndarray) -> None:
        """Say which samples will be read soon."""
        ...

    def read(self, positions: np.ndarray, *, ids: np.ndarray | None = None, out: Any = None) -> BatchOut:
        """The batch at `positions`, (B,) int64, in that order.

        ids  the samples there, `order(positions)`
        out  a `buffer` of B samples to read into
        """
        ...


@dataclass(slots=True)
class _Failure:
    """What the thread ran into, on its way to the consumer."""

    error: BaseException


@dataclass(slots=True)
class _Slot:
    """A buffer of the ring, and the event after which the device no longer reads it."""

    buffer: Any
    copied: "torch.cuda.Event | None" = field(default=None)

    def wait(self) -> None:
        if self.copied is not None:
            self.copied.synchronize()


class Loader(Generic[Batch]):
    """Micro batches of this rank, read ahead by one thread into a ring of reused buffers.

    A batch on the CPU lies in its buffer: it may be used until the second `next` after the one that gave it. With a
    CUDA `device`, buffers are pinned, batches are copied there, and a buffer is reused once its copy is done.
    """

    def __init__(
        self,
        source: Source[Batch],
        *,
        global_batch: int,
        micro_batch: int,
        rank: int = 0,
        world: int = 1,
        device: torch.device | None = None,
        ahead: int = 3,
    ) -> None:
        if global_batch < 1 or micro_batch < 1 or global_batch % (micro_batch * world):
            raise ValueError(
                f"global_batch={global_batch} is no multiple of micro_batch={micro_batch} x world={world}: change one"
            )
        if not 0 <= rank < world:
            raise ValueError(f"rank={rank} in a world of {world}")
        self.source, self.global_batch, self.micro_batch, self.rank, self.world = (
            source,
            global_batch,
            micro_batch,
            rank,
            world,
        )
        self.wait_s = 0.0
        """Seconds that the consumer has waited for data so far."""
        self._device = device if device is not None and device.type == "cuda" else None
        self._ahead = max(1, ahead)
        self._running: _Prefetch[Batch] | None = None

    def positions(self, start: int) -> Iterator[np.ndarray]:
        """Stream positions of this rank's micro batches, (B,) int64 each; the first global batch begins at `start`."""
        mine = np.arange(self.rank, self.global_batch, self.world, dtype=np.int64)
        while True:
            yield from (start + mine).reshape(-1, self.micro_batch)
            start += self.global_batch

    def batches(self, start: int) -> Iterator[Batch]:
        """Micro batches without end, beginning with the global batch at stream position `start`.

        raises  whatever reading raised, at the batch it concerns
        """
        self.close()
        positions = self.positions(start)
        self._running = _Prefetch(self.source, positions, self.micro_batch, self._ahead, self._device)
        return self._drain(self._running)

    def _drain(self, prefetch: "_Prefetch[Batch]") -> Iterator[Batch]:
        held: list[_Slot] = []
        while True:
            began = time.perf_counter()
            slot, batch = prefetch.take()
            self.wait_s += time.perf_counter() - began
            if self._device is not None:
                batch = batch.to(self._device)
                slot.copied = torch.cuda.Event()
                slot.copied.record(torch.cuda.current_stream(self._device))
                prefetch.give_back(slot)
            else:
                held.append(slot)
            yield batch
            if len(held) > 1:
                prefetch.give_back(held.pop(0))

    def close(self) -> None:
        """Stop the thread. Safe at any time, any number of times."""
        if self._running is not None:
            self._running.close()
            self._running = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class _Prefetch(Generic[Batch]):
    """The thread, its ring of free buffers and its queue of ready batches."""

    def __init__(
        self,
        source: Source[Batch],
        positions: Iterator[np.ndarray],
        micro_batch: int,
        ahead: int,
        device: torch.device | None,
    ) -> None:
        self._source, self._positions, self._micro_batch = source, positions, micro_batch
        self._free: queue.SimpleQueue[_Slot | None] = queue.SimpleQueue()
        self._ready: queue.SimpleQueue[tuple[_Slot, Batch] | _Failure] = queue.SimpleQueue()
        self._stopped = False
        for _ in range(ahead + 2):
            self._free.put(_Slot(source.buffer(micro_batch, pinned=device is not None)))
        self._thread = threading.Thread(target=self._run, name="prefetch", daemon=True)
        self._thread.start()

    def take(self) -> tuple[_Slot, Batch]:
        """The next batch, in the slot that must be given back."""
        item = self._ready.get()
        if isinstance(item, _Failure):
            self._ready.put(item)
            raise item.error
        return item

    def give_back(self, slot: _Slot) -> None:
        self._free.put(slot)

    def close(self) -> None:
        self._stopped = True
        self._free.put(None)
        self._ready.put(_Failure(RuntimeError("the loader was closed")))
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        try:
            for positions, ids in self._numbered():
                slot = self._free.get()
                if self._stopped or slot is None:
                    return
                slot.wait()
                self._ready.put((slot, self._source.read(positions, ids=ids, out=slot.buffer)))
        except BaseException as error:
            self._ready.put(_Failure(error))

    def _numbered(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Positions of each micro batch with their samples, computed for many batches at once."""
        count = -(-min(_LOOKAHEAD, self._source.order.n) // self._micro_batch)
        while True:
            some = [next(self._positions) for _ in range(count)]
            ids = self._source.order(np.concatenate(some))
            self._source.announce(ids)
            yield from zip(some, ids.reshape(len(some), -1), strict=True)
