"""Where batches come from: samples by stream position, of a latent cache, of image shards, or of several of either.

The stream is a line of positions 0, 1, 2, ...; an order says which sample each one means. Whatever is random about a
sample (caption, crop, mirror image, the one that takes the place of a bad one) depends on its position alone.

Letters: B samples of a batch, M H W moments, S image side.
"""

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Generic, Protocol, Self, TypeVar

import numpy as np
import torch
from torch import Tensor

from ldm_scale.core import rng, storage
from ldm_scale.core.tensors import from_uint8
from ldm_scale.data.cache import LatentCache
from ldm_scale.data.captions import CaptionOverlay
from ldm_scale.data.mixture import Mixture
from ldm_scale.data.order import Order
from ldm_scale.data.samples import MalformedMember, Sample, Task
from ldm_scale.data.shards import CorruptSample, RemovedSample, ShardSet
from ldm_scale.images.decode import UndecodableImage, decode
from ldm_scale.images.resize import UNIFORMS, ImageTransform, RejectedImage

Prepare = Callable[[list[str]], Tensor]
"""Captions to conditioning inputs, one row each, on the CPU; called in the loader's thread."""
OnBad = Callable[[str, str, int], None]
"""Called with (key, reason, stream position) of a sample that could not be read."""

_MAX_SUBSTITUTES = 16  # in a row, for one position; a set where this happens is not worth training on
_FLOOR = 1000  # samples below which the share of bad ones is not judged


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


@dataclass(frozen=True, slots=True)
class Buffer:
    """Memory for a batch, by row.

    samples  moments or images
    inputs   conditioning inputs that are read along with them; None where they are prepared from captions
    """

    samples: Tensor
    inputs: Tensor | None = None


class TooManyBadSamples(RuntimeError):
    """More samples are unreadable than data.max_bad_share allows."""


class Substitutes:
    """Replaces unreadable samples by others that depend on the position only; counts, reports, stops at too many.

    Removed samples are replaced alike, but it is no fault that they are gone: each is reported once.
    """

    def __init__(self, *, n: int, seed: int, max_bad_share: float, on_bad: OnBad | None = None) -> None:
        self.bad, self.removed, self.seen = 0, 0, 0
        self._n, self._seed, self._max_bad_share, self._on_bad = n, seed, max_bad_share, on_bad
        self._known_removed: set[str] = set()
        self._lock = threading.Lock()

    def count(self, seen: int) -> None:
        """Note that so many samples were asked for."""
        self.seen += seen

    def report(self, key: str, reason: str, position: int) -> None:
        """Count and report one bad or removed sample.

        raises  TooManyBadSamples
        """
        with self._lock:
            is_known = key in self._known_removed
            if reason == RemovedSample.REASON:
                self.removed += 1
                self._known_removed.add(key)
            else:
                self.bad += 1
            bad, seen = self.bad, max(self.seen, _FLOOR)
        if self._on_bad is not None and not is_known:
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


class AnyBatch(Protocol):
    """What the loader asks of a batch."""

    def to(self, device: torch.device) -> Self: ...


BatchOut = TypeVar("BatchOut", bound=AnyBatch, covariant=True)


class StreamOrder(Protocol):
    """Who is read when: an `Order`, or several of them joined."""

    n: int

    def __call__(self, positions_B: np.ndarray) -> np.ndarray:
        """Sample numbers, (B,) int64, at stream positions (B,)."""
        ...

    def state(self) -> dict[str, Any]:
        """What a checkpoint records."""
        ...

    def require_same(self, state: Mapping[str, Any]) -> None:
        """Refuse to go on with a stream that another order began."""
        ...


class SampleSource(ABC, Generic[BatchOut]):
    """Reads samples by stream position into a buffer, and makes a batch of them."""

    order: StreamOrder
    order_id: str
    """Which samples the numbers mean."""
    prepare: Prepare | None
    bytes_read = 0
    """So far in this process: of latents and embeddings, or of images as they are stored."""

    @abstractmethod
    def buffer(self, batch: int, *, pinned: bool) -> Buffer:
        """Memory for a batch."""

    @abstractmethod
    def announce(self, ids: np.ndarray) -> None:
        """Say that these samples will be read soon, so that what lies behind a network is on its way."""

    @abstractmethod
    def fill(
        self, out: Buffer, rows: Sequence[int], positions: np.ndarray, ids: np.ndarray
    ) -> tuple[list[str], list[str]]:
        """Read the samples `ids`, at stream `positions`, into these rows of `out`; returns their keys and captions."""

    @abstractmethod
    def batch(
        self, positions_B: Tensor, keys: list[str], captions: list[str], samples: Tensor, inputs: Tensor | None
    ) -> BatchOut:
        """What was read, as one batch."""

    @abstractmethod
    def counts(self, position: int) -> dict[str, float]:
        """How far the stream has come at `position`, by name; the same in every process."""

    @abstractmethod
    def shares(self) -> dict[str, float]:
        """Which shares of the samples that this process asked for are not what was asked for, by name."""

    def read(self, positions: np.ndarray, *, ids: np.ndarray | None = None, out: Buffer | None = None) -> BatchOut:
        """The batch at stream `positions`, (B,) int64, in that order.

        ids  the samples there, where the caller has computed `order(positions)` already
        out  a `buffer` of B samples to read into
        """
        positions = np.array(positions, np.int64)
        out = self.buffer(len(positions), pinned=False) if out is None else out
        keys, captions = self.fill(out, range(len(positions)), positions, self.order(positions) if ids is None else ids)
        inputs = out.inputs if self.prepare is None else self.prepare(captions)
        return self.batch(torch.from_numpy(positions), keys, captions, out.samples, inputs)


class LatentSource(SampleSource[LatentBatch]):
    """Reads a latent cache in some order."""

    def __init__(
        self,
        cache: LatentCache,
        order: Order,
        prepare: Prepare | None = None,
        *,
        captions: CaptionOverlay | None = None,
        mirror: bool = False,
        text: bool = False,
        max_bad_share: float = 0.01,
        on_bad: OnBad | None = None,
    ) -> None:
        """Join a cache with an order.

        captions  where captions come from, if not from the cache
        mirror    read each image or its mirror image, by chance
        text      inputs are the embeddings of the captions that the cache holds, (B, L, D) float16
        raises    ValueError where the order is of another number of samples, or there are no mirror images
        """
        assert not text or (cache.holds_text and prepare is None and captions is None), "embeddings are as they are"
        _require_order(order, cache.n)
        if mirror and not cache.holds_mirrored:
            raise ValueError(
                f"data.mirror=true, but {cache.folder} holds no latents of mirror images: leave it out, or precompute "
                "them with precompute.flip=true"
            )
        self.cache, self.order, self.prepare = cache, order, prepare
        self.order_id = cache.order_id
        self._seed, self._captions, self._mirror, self._text = order.seed, captions, mirror, text
        self.substitutes = Substitutes(n=cache.n, seed=order.seed, max_bad_share=max_bad_share, on_bad=on_bad)

    def buffer(self, batch: int, *, pinned: bool) -> Buffer:
        """(B, M, H, W) float16, and (B, L, D) where embeddings are read."""

        def memory(shape: tuple[int, ...]) -> Tensor:
            return torch.empty((batch, *shape), dtype=torch.float16, pin_memory=pinned)

        return Buffer(memory(self.cache.shape), memory(self.cache.text_shape) if self._text else None)

    def announce(self, ids: np.ndarray) -> None:
        self.cache.announce(ids)

    def fill(
        self, out: Buffer, rows: Sequence[int], positions: np.ndarray, ids: np.ndarray
    ) -> tuple[list[str], list[str]]:
        attempts: dict[int, int] = {}

        def substitute(i: int, bad: CorruptSample) -> int:
            position, attempt = int(positions[i]), attempts.get(i, 0)
            attempts[i] = attempt + 1
            self.substitutes.report(bad.key, bad.reason, position)
            return self.substitutes.choose(position, attempt)

        self.substitutes.count(len(positions))
        self.bytes_read += sum(part[0].nbytes for part in (out.samples, out.inputs) if part is not None) * len(rows)
        mirrored = None
        if self._mirror:
            mirrored = (rng.uniform(self._seed, "mirror", torch.from_numpy(positions)) < 0.5).tolist()
        _, captions, keys = self.cache.read(
            ids,
            out.samples.numpy(),
            into=rows,
            mirrored=mirrored,
            text=None if out.inputs is None else out.inputs.numpy(),
            substitute=substitute,
        )
        return keys, captions if self._captions is None else self._captions(keys, captions, positions)

    def batch(
        self, positions_B: Tensor, keys: list[str], captions: list[str], samples: Tensor, inputs: Tensor | None
    ) -> LatentBatch:
        return LatentBatch(positions_B, keys, captions, samples, inputs)

    def counts(self, position: int) -> dict[str, float]:
        return {"data/epoch": position / self.order.n}

    def shares(self) -> dict[str, float]:
        return _shares(self.substitutes, self._captions)


class ImageSource(SampleSource[ImageBatch]):
    """Reads, decodes and transforms images in some order. Crops and flips depend on (seed, position) only."""

    def __init__(
        self,
        shards: ShardSet,
        order: Order,
        transform: ImageTransform,
        seed: int,
        prepare: Prepare | None = None,
        *,
        captions: CaptionOverlay | None = None,
        task: Task = Task.text,
        threads: int = 4,
        max_bad_share: float = 0.01,
        on_bad: OnBad | None = None,
    ) -> None:
        _require_order(order, shards.n)
        self.shards, self.order, self.transform, self.seed, self.prepare = shards, order, transform, seed, prepare
        self.order_id = shards.order_id
        self._fields, self._captions = task.fields, captions
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        self.substitutes = Substitutes(n=shards.n, seed=seed, max_bad_share=max_bad_share, on_bad=on_bad)

    def buffer(self, batch: int, *, pinned: bool) -> Buffer:
        """(B, 3, S, S) float32."""
        side = self.transform.config.size
        return Buffer(torch.empty((batch, 3, side, side), dtype=torch.float32, pin_memory=pinned))

    def announce(self, ids: np.ndarray) -> None:
        self.shards.announce(ids)

    def fill(
        self, out: Buffer, rows: Sequence[int], positions: np.ndarray, ids: np.ndarray
    ) -> tuple[list[str], list[str]]:
        self.substitutes.count(len(positions))
        uniforms = rng.uniform(self.seed, "transform", torch.from_numpy(positions), (UNIFORMS,)).numpy()

        def one(i: int) -> Sample:
            sample, pixels = self._read_or_substitute(int(positions[i]), int(ids[i]), uniforms[i])
            out.samples[rows[i]] = from_uint8(torch.from_numpy(pixels)).permute(2, 0, 1)
            return sample

        read = list(self._pool.map(one, range(len(positions))))
        self.bytes_read += sum(len(sample.image or b"") for sample in read)
        keys, captions = [sample.key for sample in read], [sample.caption for sample in read]
        return keys, captions if self._captions is None else self._captions(keys, captions, positions)

    def batch(
        self, positions_B: Tensor, keys: list[str], captions: list[str], samples: Tensor, inputs: Tensor | None
    ) -> ImageBatch:
        return ImageBatch(positions_B, keys, captions, samples, inputs)

    def counts(self, position: int) -> dict[str, float]:
        return {"data/epoch": position / self.order.n}

    def shares(self) -> dict[str, float]:
        return _shares(self.substitutes, self._captions)

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


class MixedSource(SampleSource[BatchOut]):
    """Several sources of one kind, in turns by weight."""

    def __init__(self, sources: Mapping[str, SampleSource[BatchOut]], mixture: Mixture) -> None:
        """Join sources, by name, in the order of the mixture.

        raises  ValueError where their samples differ in shape
        """
        self.sources, self.mixture = dict(sources), mixture
        self._joined = self.order = JoinedOrder(mixture)
        self._first = next(iter(self.sources.values()))
        self.prepare = self._first.prepare
        self.order_id = joined_id({name: source.order_id for name, source in self.sources.items()})
        buffers = {name: source.buffer(1, pinned=False) for name, source in self.sources.items()}
        shapes = {name: tuple(buffer.samples.shape[1:]) for name, buffer in buffers.items()}
        if len(set(shapes.values())) > 1:
            raise ValueError(f"data.mixture joins samples of different shapes: {shapes}; one shape fits a batch")

    def buffer(self, batch: int, *, pinned: bool) -> Buffer:
        return self._first.buffer(batch, pinned=pinned)

    def announce(self, ids: np.ndarray) -> None:
        source_B, own_B = self._joined.split(ids)
        for number, source in enumerate(self.sources.values()):
            source.announce(own_B[source_B == number])

    def fill(
        self, out: Buffer, rows: Sequence[int], positions: np.ndarray, ids: np.ndarray
    ) -> tuple[list[str], list[str]]:
        keys, captions = [""] * len(ids), [""] * len(ids)
        source_B, own_B = self._joined.split(ids)
        for number, source in enumerate(self.sources.values()):
            here: list[int] = np.flatnonzero(source_B == number).tolist()
            if here:
                found = source.fill(out, [rows[i] for i in here], positions[here], own_B[here])
                for i, key, caption in zip(here, *found, strict=True):
                    keys[i], captions[i] = key, caption
        self.bytes_read = sum(source.bytes_read for source in self.sources.values())
        return keys, captions

    def batch(
        self, positions_B: Tensor, keys: list[str], captions: list[str], samples: Tensor, inputs: Tensor | None
    ) -> BatchOut:
        return self._first.batch(positions_B, keys, captions, samples, inputs)

    def counts(self, position: int) -> dict[str, float]:
        """Of each source too how many of its samples are due by weight, and how many were read."""
        counts: dict[str, float] = {}
        total, reads = sum(self.mixture.weights), self.mixture.counts(position)
        for (name, source), weight, read in zip(self.sources.items(), self.mixture.weights, reads, strict=True):
            counts |= _within(name, source.counts(read))
            counts |= {f"data/{name}/asked": position * weight / total, f"data/{name}/read": float(read)}
        return counts

    def shares(self) -> dict[str, float]:
        return {
            key: share for name, source in self.sources.items() for key, share in _within(name, source.shares()).items()
        }


def joined_id(order_ids: Mapping[str, str]) -> str:
    """Which samples the numbers of several sources mean, by name, in order."""
    return storage.digest([list(pair) for pair in order_ids.items()])


class JoinedOrder:
    """A mixture as one order: the sources laid end to end, their samples numbered throughout."""

    def __init__(self, mixture: Mixture) -> None:
        self._mixture = mixture
        self._starts = np.cumsum([0, *(order.n for order in mixture.orders)])
        self.n = int(self._starts[-1])

    def __call__(self, positions_B: np.ndarray) -> np.ndarray:
        source_B, sample_B = self._mixture(positions_B)
        return self._starts[source_B] + sample_B

    def split(self, ids_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Source, and number in that source, of each sample."""
        source_B = np.searchsorted(self._starts, ids_B, side="right") - 1
        return source_B, ids_B - self._starts[source_B]

    def state(self) -> dict[str, Any]:
        return self._mixture.state()

    def require_same(self, state: Mapping[str, Any]) -> None:
        self._mixture.require_same(state)


def _shares(substitutes: Substitutes, captions: CaptionOverlay | None) -> dict[str, float]:
    asked = max(substitutes.seen, 1)
    shares = {"data/bad": substitutes.bad / asked, "data/removed": substitutes.removed / asked}
    return shares if captions is None else shares | {"data/own_caption": captions.missing / asked}


def _within(name: str, values: Mapping[str, float]) -> dict[str, float]:
    """Values of one source, by names that say so."""
    return {key.replace("data/", f"data/{name}/"): value for key, value in values.items()}


def _require_order(order: Order, n: int) -> None:
    if order.n != n:
        raise ValueError(
            f"the order is over {order.n} samples, the data set has {n}: it is another set or another view"
        )
