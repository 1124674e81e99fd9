"""Batches of a training stream: where samples come from, in which order, and the thread that reads ahead.

The stream is a line of positions 0, 1, 2, ...; images seen is the position. A global batch is the next `global_batch`
positions, of which rank r of W takes those congruent r (mod W), micro batch by micro batch; so the global batch is the
same for every world. Latents are copied from the mapped shards straight into reused buffers, images are decoded by a
pool of threads; worker processes would cost more in handing over than they save.

Letters: B samples of a micro batch, M H W moments, S image side.
"""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Generic, Protocol, Self, TypeVar

import numpy as np
import torch
from torch import Tensor

from ldm_scale.core import rng
from ldm_scale.core.tensors import from_uint8
from ldm_scale.data.cache import LatentCache
from ldm_scale.data.order import Order, OrderPreset, preset_order
from ldm_scale.data.samples import MalformedMember, Sample, Task
from ldm_scale.data.shards import CorruptSample, ShardSet
from ldm_scale.images.decode import UndecodableImage, decode
from ldm_scale.images.resize import UNIFORMS, ImageTransform, ImageTransformConfig, RejectedImage

Prepare = Callable[[list[str]], Tensor]
"""Captions to conditioning inputs, one row each, on the CPU; called in the loader's thread."""
OnBad = Callable[[str, str, int], None]
"""Called with (key, reason, stream position) of a sample that could not be read."""

_MAX_SUBSTITUTES = 16  # in a row, for one position; a set where this happens is not worth training on
_FLOOR = 1000  # samples below which the share of bad ones is not judged
_LOOKAHEAD = 2048  # positions whose samples are computed at once, since the arithmetic likes long arrays


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Where samples are, and how they are read."""

    images: str | None = None
    """Image shards: directory, brace range, glob, list file or tar; local or remote; several joined by `::`."""
    latents: str | None = None
    """Latent cache: its directory, or some of its tars; local or remote."""
    validation: str | None = None
    """Held-out image shards, of which scores and sample grids are made; never trained on."""
    index_dir: str | None = None
    """Folder for indexes and manifests of sources that are remote or read-only; None puts them beside the shards."""
    transform: ImageTransformConfig
    """How an image becomes what the first stage sees."""
    task: Task = Task.text
    """What a sample must have beside its image."""
    order: OrderPreset = OrderPreset.random_access
    """How far apart samples may lie that are read together: random_access for local disks, window for network ones."""
    max_bad_share: float = 0.01
    """Share of samples, 0 to 1, that may be unreadable before the job stops."""
    threads: int = 4
    """Threads that decode images, per process."""

    def __post_init__(self) -> None:
        if not 0 <= self.max_bad_share <= 1:
            raise ValueError(f"data.max_bad_share={self.max_bad_share}; a share, 0 to 1")
        if self.threads < 1:
            raise ValueError(f"data.threads={self.threads}; at least 1")
        for name, source in (("images", self.images), ("latents", self.latents), ("validation", self.validation)):
            if source is not None and any(part.startswith("pipe:") for part in source.split("::")):
                raise ValueError(
                    f"data.{name}={source!r} would run a shell command; give an fsspec URL instead of pipe:"
                )

    def open_images(self) -> ShardSet:
        """The image shards, indexed if need be.

        raises  ValueError or FileNotFoundError naming the key and the path
        """
        if not self.images:
            raise ValueError("data.images is not set: give a directory, brace range, glob or list of image shards")
        return ShardSet.open(self.images, self.index_dir, require=self.task.require)

    def open_validation(self) -> ShardSet:
        """The held-out image shards, indexed if need be.

        raises  ValueError or FileNotFoundError naming the key and the path
        """
        if not self.validation:
            raise ValueError("data.validation is not set: give held-out image shards, for scores and sample grids")
        return ShardSet.open(self.validation, self.index_dir, require=self.task.require)

    def open_latents(self) -> LatentCache:
        """The latent cache.

        raises  ValueError or FileNotFoundError naming the key and the path
        """
        if not self.latents:
            raise ValueError("data.latents is not set: give the directory that precompute_latents wrote")
        return LatentCache.open(self.latents, self.index_dir)

    def order_of(self, n: int, seed: int) -> Order:
        """The order in which `n` samples are read."""
        return preset_order(self.order, n=n, seed=seed)


@dataclass(frozen=True, slots=True)
class LatentBatch:
    """A micro batch of cached latents.

    positions  (B,) int64 stream positions
    moments    (B, M, H, W) float16, unscaled
    inputs     (B, ...) conditioning inputs; None for an unconditional model
    """

    positions: Tensor
    keys: list[str]
    captions: list[str]
    moments: Tensor
    inputs: Tensor | None

    def to(self, device: torch.device) -> Self:
        """On `device`, copied without waiting where memory is pinned."""
        return replace(
            self,
            positions=self.positions.to(device, non_blocking=True),
            moments=self.moments.to(device, non_blocking=True),
            inputs=None if self.inputs is None else self.inputs.to(device, non_blocking=True),
        )


@dataclass(frozen=True, slots=True)
class ImageBatch:
    """A micro batch of images.

    positions  (B,) int64 stream positions
    images     (B, 3, S, S) float32 in [-1, 1]
    inputs     (B, ...) conditioning inputs; None for an unconditional model
    """

    positions: Tensor
    keys: list[str]
    captions: list[str]
    images: Tensor
    inputs: Tensor | None

    def to(self, device: torch.device) -> Self:
        """On `device`, copied without waiting where memory is pinned."""
        return replace(
            self,
            positions=self.positions.to(device, non_blocking=True),
            images=self.images.to(device, non_blocking=True),
            inputs=None if self.inputs is None else self.inputs.to(device, non_blocking=True),
        )


class AnyBatch(Protocol):
    """What the loader asks of a batch."""

    def to(self, device: torch.device) -> Self: ...


Batch = TypeVar("Batch", bound=AnyBatch)
BatchOut = TypeVar("BatchOut", bound=AnyBatch, covariant=True)


class TooManyBadSamples(RuntimeError):
    """More samples are unreadable than data.max_bad_share allows."""


class Substitutes:
    """Replaces unreadable samples by others that depend on the position only; counts, reports, stops at too many."""

    def __init__(self, *, n: int, seed: int, max_bad_share: float, on_bad: OnBad | None = None) -> None:
        self.bad, self.seen = 0, 0
        self._n, self._seed, self._max_bad_share, self._on_bad = n, seed, max_bad_share, on_bad
        self._lock = threading.Lock()

    def count(self, seen: int) -> None:
        """Note that so many samples were asked for."""
        self.seen += seen

    def report(self, key: str, reason: str, position: int) -> None:
        """Count and report one bad sample.

        raises  TooManyBadSamples
        """
        with self._lock:
            self.bad += 1
            bad, seen = self.bad, max(self.seen, _FLOOR)
        if self._on_bad is not None:
            self._on_bad(key, reason, position)
        if bad > self._max_bad_share * seen:
            raise TooManyBadSamples(
                f"{bad} of {self.seen} samples could not be read, the last one {key!r}: {reason}; "
                f"data.max_bad_share={self._max_bad_share} allows no more. Repair or remove the shards, or allow more"
            )

    def choose(self, position: int, attempt: int) -> int:
        """Number of the sample to read at `position` after `attempt` (0, 1, ...) others failed there.

        raises  TooManyBadSamples where none of many can be read
        """
        if attempt >= _MAX_SUBSTITUTES:
            raise TooManyBadSamples(f"none of {attempt} substitutes at stream position {position} can be read")
        draw = rng.integers(self._seed, f"substitute/{attempt}", torch.tensor([position]), 1 << 31)
        return int(draw) * self._n >> 31


class Source(Protocol[BatchOut]):
    """Something that reads samples by stream position."""

    order: Order

    def buffer(self, batch: int, *, pinned: bool) -> Tensor:
        """Memory that `read` fills."""
        ...

    def read(self, positions: np.ndarray, *, ids: np.ndarray | None = None, out: Tensor | None = None) -> BatchOut:
        """The batch at `positions`, (B,) int64, in that order.

        ids  the samples there, where the caller has computed `order(positions)` already
        out  a `buffer` of B samples to read into
        """
        ...


class LatentSource:
    """Reads a latent cache in some order."""

    def __init__(
        self,
        cache: LatentCache,
        order: Order,
        prepare: Prepare | None = None,
        *,
        max_bad_share: float = 0.01,
        on_bad: OnBad | None = None,
    ) -> None:
        _require_order(order, cache.n)
        self.cache, self.order, self.prepare = cache, order, prepare
        self.substitutes = Substitutes(n=cache.n, seed=order.seed, max_bad_share=max_bad_share, on_bad=on_bad)

    def buffer(self, batch: int, *, pinned: bool) -> Tensor:
        """(B, M, H, W) float16."""
        return torch.empty((batch, *self.cache.shape), dtype=torch.float16, pin_memory=pinned)

    def read(self, positions: np.ndarray, *, ids: np.ndarray | None = None, out: Tensor | None = None) -> LatentBatch:
        """The batch at stream positions (B,) int64."""
        out = self.buffer(len(positions), pinned=False) if out is None else out
        attempts: dict[int, int] = {}

        def substitute(i: int, bad: CorruptSample) -> int:
            position, attempt = int(positions[i]), attempts.get(i, 0)
            attempts[i] = attempt + 1
            self.substitutes.report(bad.key, bad.reason, position)
            return self.substitutes.choose(position, attempt)

        self.substitutes.count(len(positions))
        samples = self.order(positions) if ids is None else ids
        _, captions, keys = self.cache.read(samples, out.numpy(), substitute=substitute)
        inputs = None if self.prepare is None else self.prepare(captions)
        return LatentBatch(torch.from_numpy(np.array(positions, np.int64)), keys, captions, out, inputs)


class ImageSource:
    """Reads, decodes and transforms images in some order. Crops and flips depend on (seed, position) only."""

    def __init__(
        self,
        shards: ShardSet,
        order: Order,
        transform: ImageTransform,
        seed: int,
        prepare: Prepare | None = None,
        *,
        task: Task = Task.text,
        threads: int = 4,
        max_bad_share: float = 0.01,
        on_bad: OnBad | None = None,
    ) -> None:
        _require_order(order, shards.n)
        self.shards, self.order, self.transform, self.seed, self.prepare = shards, order, transform, seed, prepare
        self._fields = task.fields
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        self.substitutes = Substitutes(n=shards.n, seed=seed, max_bad_share=max_bad_share, on_bad=on_bad)

    def buffer(self, batch: int, *, pinned: bool) -> Tensor:
        """(B, 3, S, S) float32."""
        side = self.transform.config.size
        return torch.empty((batch, 3, side, side), dtype=torch.float32, pin_memory=pinned)

    def read(self, positions: np.ndarray, *, ids: np.ndarray | None = None, out: Tensor | None = None) -> ImageBatch:
        """The batch at stream positions (B,) int64."""
        out = self.buffer(len(positions), pinned=False) if out is None else out
        positions_B = torch.from_numpy(np.array(positions, np.int64))
        self.substitutes.count(len(positions))
        samples = self.order(positions) if ids is None else ids
        uniforms = rng.uniform(self.seed, "transform", positions_B, (UNIFORMS,)).numpy()

        def one(i: int) -> Sample:
            sample, pixels = self._read_or_substitute(int(positions[i]), int(samples[i]), uniforms[i])
            out[i] = from_uint8(torch.from_numpy(pixels)).permute(2, 0, 1)
            return sample

        read = list(self._pool.map(one, range(len(positions))))
        captions = [sample.caption for sample in read]
        inputs = None if self.prepare is None else self.prepare(captions)
        return ImageBatch(positions_B, [sample.key for sample in read], captions, out, inputs)

    def _read_or_substitute(self, position: int, sample_id: int, u: np.ndarray) -> tuple[Sample, np.ndarray]:
        attempt = 0
        while True:
            try:
                return self._read_one(sample_id, u)
            except (CorruptSample, UndecodableImage, RejectedImage, MalformedMember) as bad:
                key = self.shards.keys(np.array([sample_id]))[0]
                self.substitutes.report(key, bad.reason, position)
                sample_id = self.substitutes.choose(position, attempt)
                attempt += 1

    def _read_one(self, sample_id: int, u: np.ndarray) -> tuple[Sample, np.ndarray]:
        ids = np.array([sample_id])
        sample = Sample.parse(self.shards.keys(ids)[0], self.shards.read(ids, self._fields)[0])
        if sample.image is None:
            raise UndecodableImage("empty", f"{sample.key} has no image")
        return sample, self.transform(decode(sample.image), original_size=sample.original_size, u=u)


def _require_order(order: Order, n: int) -> None:
    if order.n != n:
        raise ValueError(
            f"the order is over {order.n} samples, the data set has {n}: it is another set or another view"
        )


@dataclass(slots=True)
class _Failure:
    """What the thread ran into, on its way to the consumer."""

    error: BaseException


@dataclass(slots=True)
class _Slot:
    """A buffer of the ring, and the event after which the device no longer reads it."""

    buffer: Tensor
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
            ids = self._source.order(np.concatenate(some)).reshape(len(some), -1)
            yield from zip(some, ids, strict=True)
