"""Image shards to shards of latents: the pipeline between a queue of tars and a folder.

    claimed, read whole -> decoded -> encoded -> written, published

Each arrow is a bounded queue between two threads, so all of it overlaps, across the ends of shards too. Any number of
processes on any hosts share the queue through claims. A shard is written in a place of its own and moved to its name
when it is whole, its record last: processes may come, go and be killed, and work done twice is merely done for nothing.

Letters: B images of a batch, M channels of the moments, H W height and width of images, h w of latents, L D tokens of
a caption and their width.
"""

import glob
import os
import queue
import shutil
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import numpy as np
import torch
from torch import Tensor

from ldm_scale.conditioning.clip_text import ClipTextConditioner
from ldm_scale.core import progress, runtime, storage
from ldm_scale.data.cache import (
    MIRRORED,
    TEXT,
    CacheShardWriter,
    ShardRecord,
    done_record,
    fingerprint,
    finished_shard,
    npy_header,
)
from ldm_scale.data.index import Rejection
from ldm_scale.data.samples import MalformedMember, Sample, Task
from ldm_scale.data.shards import SIDECARS, CorruptSample, RemovedSample, ShardSet
from ldm_scale.data.sources import TooManyBadSamples
from ldm_scale.data.views import REMOVED, RemovalList
from ldm_scale.first_stage.base import MomentsKind
from ldm_scale.images.decode import UndecodableImage, decode
from ldm_scale.images.resize import ImageTransform, RejectedImage
from ldm_scale.jobs.claims import Claims
from ldm_scale.jobs.image_encoder import Auditor, Decoded, ImageEncoder, has_white_bars
from ldm_scale.jobs.image_tars import ImageTars
from ldm_scale.jobs.schemas.precompute import PrecomputeConfig

STAGING = ".staging"
"""Folder in a cache where shards are written before they are whole."""
_KEPT_MEMBERS = ("cls", "boxes.json", "seg.png")
_TARS_AHEAD, _BATCHES_AHEAD, _ENCODED_AHEAD = 1, 2, 16  # the last so many because publishing a shard takes a while
_WAIT_S, _POLL_S = 0.1, 1.0
_ASKED_FOR = ("border", "too_small", RemovedSample.REASON)  # reasons that settings name; not damage
_FLOOR = 1000  # images below which the share of bad ones is not judged
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheIdentity:
    """What decides a cached number, and who says so."""

    first_stage: dict[str, Any]
    """kind, config, sha256 of the weights."""
    transform: dict[str, Any]
    kind: MomentsKind
    text: dict[str, Any] | None
    """kind, config, sha256 of the weights, vocabulary and shape of the text encoder, if one embeds the captions."""

    @property
    def fingerprint(self) -> str:
        return fingerprint(
            first_stage_kind=self.first_stage["kind"],
            first_stage_sha256=self.first_stage["sha256"],
            transform=self.transform,
            kind=str(self.kind),
        )


@dataclass(slots=True)
class _Shard:
    """One shard on its way through the pipeline."""

    tar: int
    images: ShardSet
    ids: list[int]
    """Samples to encode, by key."""
    auditor: Auditor
    rejected: list[Rejection]
    decoded: Decoded | None = None


@dataclass(frozen=True, slots=True)
class _Image:
    """One decoded image, with what the cache keeps of its sample; pixels (H, W, 3) uint8."""

    key: str
    caption: str
    members: dict[str, bytes]
    pixels: np.ndarray
    has_bars: bool = False
    is_blank: bool = False
    """It was removed, and only its place is kept."""


@dataclass(frozen=True, slots=True)
class _Batch:
    """Decoded images of one shard, in key order.

    pixels  (B, H, W, 3) uint8; None where B = 0, which happens at the end of a shard only
    """

    shard: _Shard
    images: list[_Image]
    pixels: Tensor | None
    is_last: bool


@dataclass(frozen=True, slots=True)
class _Encoded:
    """A batch with its moments, and the tokens of its captions.

    moments  (B, M, h, w) float16 on the device, then those of the mirrored images where wanted; none where B = 0
    text     (B, L, D) float16 on the device; None where not wanted, or B = 0
    """

    batch: _Batch
    moments: list[Tensor]
    text: Tensor | None


class Pipeline:
    """Encodes shards until none is left to encode."""

    def __init__(
        self,
        config: PrecomputeConfig,
        tars: ImageTars,
        encoder: ImageEncoder,
        identity: CacheIdentity,
        folder: Path,
        claims: Claims,
        *,
        task: Task,
        transform: ImageTransform,
        threads: int,
        max_bad_share: float,
        preemption: runtime.Preemption,
        text_encoder: ClipTextConditioner | None = None,
    ) -> None:
        self.tars, self.identity, self.folder = tars, identity, folder
        self._config, self._encoder, self._claims, self._preemption = config, encoder, claims, preemption
        self._fields, self._transform, self._threads = task.fields, transform, threads
        self._max_bad_share, self._text_encoder = max_bad_share, text_encoder
        self._blank = RemovalList.read([own] if storage.exists(own := f"{folder}/{SIDECARS}/{REMOVED}") else [])
        self._read, self._bad = 0, 0

    def target(self, tar: int) -> Path:
        """Where the latents of an image shard go."""
        return self.folder / self.tars.names[tar]

    def finished(self, tar: int) -> ShardRecord | None:
        """The record of a shard that needs no more work; None too where its source is unknown or may be edited."""
        if not self.target(tar).exists() or self._may_be_edited(tar):
            return None
        summary = self.tars.summary(tar)
        return None if summary is None else self._finished(tar, summary.sha256)

    def run(self, tars: Iterable[int], bar: progress.Bar) -> None:
        """Encode those of `tars` that nobody has encoded; returns when all are done, by whomever, or on a wish to stop.

        raises  AuditFailed where latents do not decode to their images; nothing is published of that shard then
                TooManyBadSamples
        """
        with _Stages() as stages:
            held = stages.ahead(self._held(tars, stages), _TARS_AHEAD)
            decoded = stages.ahead(self._decoded(held), _BATCHES_AHEAD)
            self._write(stages.ahead(self._encoded(decoded), _ENCODED_AHEAD), bar)

    def _finished(self, tar: int, source_sha256: str) -> ShardRecord | None:
        return finished_shard(self.target(tar), self.identity.fingerprint, source_sha256)

    def _may_be_edited(self, tar: int) -> bool:
        """Whether a source was written after it was encoded: other bytes of the same size, or the same copied anew."""
        try:
            encoded_ns = done_record(self.target(tar)).stat().st_mtime_ns
        except FileNotFoundError:  # not encoded yet, or just now being replaced
            return False
        return self.tars.is_newer(tar, encoded_ns)

    def _claimed(self, tars: Iterable[int], stages: "_Stages") -> Iterator[int]:
        """Claim one tar after another; those in other hands are looked at again until they are done or given up."""
        left = list(tars)
        while left:
            others: list[int] = []
            for tar in left:
                if self._preemption.received:
                    return
                if self.finished(tar) is not None:
                    continue
                if self._claims.take(self.tars.names[tar]):
                    yield tar
                else:
                    others.append(tar)
            if len(others) == len(left) and stages.wait(_POLL_S):
                return
            left = others

    def _held(self, tars: Iterable[int], stages: "_Stages") -> Iterator[_Shard]:
        """Tars in memory, without those that turn out to be done: there was no index to tell by, or it was just now."""
        for tar in self._claimed(tars, stages):
            may_be_edited = self._may_be_edited(tar)
            images = self.tars.hold(tar, index_again=may_be_edited)
            if self._finished(tar, images.summaries[0].sha256) is not None:
                if may_be_edited:  # it was not: the record is from now on newer
                    os.utime(done_record(self.target(tar)))
                self._claims.release(self.tars.names[tar])
                continue
            ids = self.tars.chosen(images)
            auditor = Auditor(self._config, self._transform.config.border, len(ids))
            yield _Shard(tar, images, ids, auditor, images.shard_rejected(0))

    def _decoded(self, shards: Iterable[_Shard]) -> Iterator[_Batch]:
        batch = self._config.batch
        with ThreadPoolExecutor(self._threads, thread_name_prefix="decode") as pool:
            for shard in shards:
                good: list[_Image] = []
                for found in _in_order(pool, partial(self._decode, shard.images), shard.ids, ahead=2 * batch):
                    if isinstance(found, Rejection):
                        shard.rejected.append(found)
                        continue
                    good.append(found)
                    if len(good) == batch:
                        yield self._batch(shard, good)
                        good = []
                yield self._batch(shard, good, is_last=True)

    def _decode(self, images: ShardSet, sample_id: int) -> "_Image | Rejection":
        key = images.keys(np.array([sample_id]))[0]
        try:
            members = images.read(np.array([sample_id]), (*self._fields, *_KEPT_MEMBERS))[0]
            sample = Sample.parse(key, members)
            assert sample.image is not None, "the shard set requires an image"
            pixels = self._transform(decode(sample.image), original_size=sample.original_size)
        except (UndecodableImage, RejectedImage, MalformedMember) as error:
            return Rejection(error.reason, key, 0)
        except RemovedSample as error:
            if key not in self._blank.of(images.names[0]):
                return Rejection(error.reason, key, 0)
            side = self._transform.config.size  # it was in this cache before, so others keep their numbers
            return _Image(key, "", {}, np.zeros((side, side, 3), np.uint8), is_blank=True)
        except CorruptSample:
            return Rejection("checksum", key, 0)
        kept = {field: members[field] for field in _KEPT_MEMBERS if field in members}
        return _Image(key, sample.caption, kept, pixels, has_bars=has_white_bars(pixels))

    def _batch(self, shard: _Shard, images: "list[_Image]", *, is_last: bool = False) -> _Batch:
        if not images:
            return _Batch(shard, images, None, is_last)
        pixels_BHWC = torch.from_numpy(np.stack([image.pixels for image in images]))
        return _Batch(shard, images, self._encoder.pinned(pixels_BHWC), is_last)

    def _encoded(self, batches: Iterable[_Batch]) -> Iterator[_Encoded]:
        for batch in batches:
            moments, text = list[Tensor](), None
            if batch.pixels is not None:
                moments = [self._encoder(batch.pixels)]
                if self._config.flip:
                    moments.append(self._encoder(batch.pixels, mirrored=True))
                with_bars = sum(image.has_bars for image in batch.images)
                if self._text_encoder is not None:
                    text = self._text_encoder.encode([image.caption for image in batch.images]).half()
                batch.shard.auditor.take(batch.pixels, moments[0], with_bars=with_bars)
            if batch.is_last:
                batch.shard.decoded = batch.shard.auditor.decode(self._encoder)
            yield _Encoded(batch, moments, text)

    def _write(self, batches: Iterable[_Encoded], bar: progress.Bar) -> None:
        writer: _Writer | None = None
        try:
            for encoded in batches:
                if self._preemption.received:
                    return
                shard = encoded.batch.shard
                if writer is None:
                    writer = _Writer(self._staged(shard.tar), self.identity)
                shard.rejected.extend(writer.add(encoded))
                bar.advance(len(encoded.batch.images), self.tars.names[shard.tar])
                if encoded.batch.is_last:
                    self._publish(shard, writer)
                    writer = None
        finally:
            if writer is not None:
                writer.discard()

    def _staged(self, tar: int) -> Path:
        """Where this process writes a shard before it is whole."""
        target = self.target(tar)
        return self.folder / STAGING / f"{target.name}.{self._claims.owner}" / target.name

    def _publish(self, shard: _Shard, writer: "_Writer") -> None:
        """Move a shard to its name, its record last; unless another process took it over in the meantime."""
        staged, target = self._staged(shard.tar), self.target(shard.tar)
        record: ShardRecord | None = None
        if self._claims.holds(target.name):
            record = writer.finish(self.tars.urls[shard.tar], shard)
            done_record(target).unlink(missing_ok=True)
            for path in (staged, staged.with_suffix(".parquet"), _index(staged), done_record(staged)):
                final = self.folder / path.relative_to(staged.parent)
                final.parent.mkdir(exist_ok=True)
                os.replace(path, final)
            for leftover in (self.folder / STAGING).glob(f"{glob.escape(target.name)}.*/"):  # of killed processes
                shutil.rmtree(leftover, ignore_errors=True)
        writer.discard()
        self._claims.release(target.name)
        if record is not None:
            self._require_few_bad(record)

    def _require_few_bad(self, record: ShardRecord) -> None:
        self._read += record.read
        self._bad += sum(count for reason, count in record.rejected.items() if reason not in _ASKED_FOR)
        if self._bad > self._max_bad_share * max(self._read, _FLOOR):
            raise TooManyBadSamples(
                f"{self._bad} of {self._read} samples could not be used, the last ones of {record.name}: "
                f"{record.rejected}; data.max_bad_share={self._max_bad_share} allows no more. Repair or leave out the "
                "shards, or allow more"
            )


class _Writer:
    """Writes one shard of a cache from batches."""

    def __init__(self, path: Path, identity: CacheIdentity) -> None:
        self._kind = identity.kind
        self._shard = CacheShardWriter(path, fingerprint=identity.fingerprint, kind=str(identity.kind))
        self._lowest, self._highest = np.inf, -np.inf

    def add(self, encoded: _Encoded) -> list[Rejection]:
        """Append a batch; returns the images whose moments or tokens are no numbers in float16."""
        text = [] if encoded.text is None else [encoded.text]
        stored = [part.cpu().numpy() for part in (*encoded.moments, *text)]
        names = [MIRRORED] * (len(encoded.moments) - 1) + [TEXT] * len(text)
        rejected: list[Rejection] = []
        for image, *arrays in zip(encoded.batch.images, *stored, strict=True):
            if not all(np.isfinite(array).all() for array in arrays):
                rejected.append(Rejection("not_finite", image.key, 0))
                continue
            if image.is_blank:
                arrays = [np.zeros_like(array) for array in arrays]
            moments_Mhw, *others = arrays
            extra = {name: npy_header(a.shape) + a.tobytes() for name, a in zip(names, others, strict=True)}
            self._shard.add(image.key, moments_Mhw, image.caption, members=image.members | extra)
            mean = moments_Mhw if self._kind is MomentsKind.POINT else np.split(moments_Mhw, 2)[0]
            self._lowest = min(self._lowest, float(mean.min()))
            self._highest = max(self._highest, float(mean.max()))
        return rejected

    def finish(self, where: str, shard: _Shard) -> ShardRecord:
        """Judge the shard and write what is left of it, under the name it was opened with.

        raises  AuditFailed
        """
        audit, measured, found = None, {}, self._shard.statistics
        if found is not None and shard.decoded is not None:
            audit = shard.auditor.judge(where, shard.decoded, found)
            measured = {
                "lowest": self._lowest, "highest": self._highest, "float32_error": shard.decoded.float32_error
            }  # fmt: skip
        summary = shard.images.summaries[0]
        record = self._shard.finish(
            source=summary.name,
            source_sha256=summary.sha256,
            rejected=sorted(shard.rejected, key=lambda entry: (entry.key or "", entry.offset, entry.reason)),
            audit=audit,
        )
        record = replace(record, statistics=record.statistics | measured)
        storage.write_json(done_record(self._shard.path), asdict(record))
        return record

    def discard(self) -> None:
        """Leave nothing behind of what was not moved away."""
        self._shard.abort()
        shutil.rmtree(self._shard.path.parent, ignore_errors=True)


class _Stages:
    """Threads that make items ahead of whoever takes them; stopped and joined at the end, whatever ends it."""

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []

    def wait(self, seconds: float) -> bool:
        """Sleep; True where it is time to stop."""
        return self._stop.wait(seconds)

    def ahead(self, items: Iterable[Item], depth: int) -> Iterator[Item]:
        """`items`, made by a thread of their own, at most `depth` of them waiting; what it raises is raised here."""
        ready: queue.Queue[_Made[Item]] = queue.Queue(depth)
        thread = threading.Thread(target=self._make, args=(items, ready), daemon=True)
        self._threads.append(thread)
        thread.start()
        return self._taken(ready)

    def _make(self, items: Iterable[Item], ready: "queue.Queue[_Made[Item]]") -> None:
        try:
            for item in items:
                if not self._put(ready, _Made([item])):
                    return
            self._put(ready, _Made([]))
        except BaseException as error:
            self._put(ready, _Made([], error))

    def _put(self, ready: "queue.Queue[_Made[Item]]", made: "_Made[Item]") -> bool:
        while not self._stop.is_set():
            try:
                ready.put(made, timeout=_WAIT_S)
                return True
            except queue.Full:
                continue
        return False

    def _taken(self, ready: "queue.Queue[_Made[Item]]") -> Iterator[Item]:
        while not self._stop.is_set():
            try:
                made = ready.get(timeout=_WAIT_S)
            except queue.Empty:
                continue
            if made.error is not None:
                raise made.error
            if not made.items:
                return
            yield made.items[0]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


@dataclass(frozen=True, slots=True)
class _Made(Generic[Item]):
    """One item, or none: the end, or what went wrong."""

    items: list[Item]
    error: BaseException | None = None


def _in_order(
    pool: ThreadPoolExecutor, function: Callable[[Item], Result], items: Iterable[Item], *, ahead: int
) -> Iterator[Result]:
    """Results in the order of `items`, at most so many computed ahead."""
    pending: deque[Future[Result]] = deque()
    for item in items:
        pending.append(pool.submit(function, item))
        if len(pending) > ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def _index(shard: Path) -> Path:
    return shard.parent / SIDECARS / f"{shard.stem}.idx"
