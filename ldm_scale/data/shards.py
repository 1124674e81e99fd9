"""A set of WebDataset shards as one array of samples, read by number through their indexes.

Shards are local or remote (any fsspec URL). Their indexes and one manifest lie in a folder `.ldm/` beside them, or in
`index_dir` where the source is read-only or remote; missing ones are made when the set is opened. Knows nothing of what
members mean beyond which fields stand for an image.

In a job of many ranks, open the set on one rank first, so that the others find the indexes made.
"""

import mmap
import os
import resource
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from ldm_scale.core import storage, traffic
from ldm_scale.data.index import FIELDS, IMAGE_FIELDS, Rejection, ShardIndex, index_shard
from ldm_scale.data.remote import RemoteReader, TarCache
from ldm_scale.data.selected import LostKeys, Numbering, SelectedRows
from ldm_scale.data.tar import ShardWriter
from ldm_scale.data.views import REMOVED, RemovalList

__all__ = ["CorruptSample", "RemovedSample", "ShardSet", "ShardSummary", "ShardWriter", "Sidecars", "open_shard_limit"]

SIDECARS = ".ldm"
MANIFEST_FORMAT = 1
_DESCRIPTORS_LEFT_TO_OTHERS = 256
_STAT_THREADS = 16
_TOUCHERS = 8
_TOUCHED_TOGETHER = 256  # samples that one of them asks for
_PROBE, _IN_MEMORY_S = 32, 5e-4  # so many samples are touched in this time where hardly one must come from a disk

Progress = Callable[[int, int], None]


class CorruptSample(ValueError):
    """A sample whose bytes are not the ones that were indexed."""

    def __init__(self, key: str, reason: str, where: str) -> None:
        super().__init__(f"sample {key!r} of {where}: {reason}")
        self.key, self.reason = key, reason


class RemovedSample(CorruptSample):
    """A sample that a removal list names: not a fault of the data, and never to be read."""

    REASON = "removed"

    def __init__(self, key: str, where: str) -> None:
        super().__init__(key, self.REASON, where)


@dataclass(frozen=True, slots=True)
class ShardSummary:
    """One shard in the manifest of a dataset."""

    name: str
    n: int
    bytes: int
    sha256: str
    keys_sha256: str
    combinations: dict[str, int]
    """How many samples have exactly these fields, `jpg+txt: 9990`."""
    rejected: dict[str, int]
    """What the tar holds besides whole samples, by reason."""

    @classmethod
    def of(cls, name: str, index: ShardIndex) -> "ShardSummary":
        head = index.header
        return cls(name, head.n, head.tar_bytes, head.sha256, head.keys_sha256, head.combinations, head.rejected_counts)

    def count_with(self, groups: Sequence[Sequence[str]]) -> int:
        """Samples that have a member of every group of fields."""
        return sum(
            count
            for fields, count in self.combinations.items()
            if all(set(group) & set(fields.split("+")) for group in groups)
        )


@dataclass(frozen=True, slots=True)
class Sidecars:
    """Where the index and the manifest of shards are looked for, and where new ones go."""

    index_dir: str | None
    cache: TarCache | None = None
    """Where the tars of remote shards that must be indexed are fetched to, to stay."""

    def folders(self, url: str) -> list[str]:
        """Folders of a shard's sidecars: beside it, then in `index_dir`; the last one is written to."""
        parent = _parent(url)
        beside = f"{parent}/{SIDECARS}"
        if self.index_dir is None:
            return [beside]
        label = parent.rstrip("/").rpartition("/")[2] or "shards"
        return [beside, f"{self.index_dir}/{label}-{storage.digest(_identity(parent))[:8]}"]

    def read(self, url: str, size: int) -> ShardIndex | None:
        """The index of a shard, if there is one that fits a tar of `size` bytes."""
        for folder in sorted(self.folders(url), key=storage.is_remote):  # what is here answers faster
            try:
                index = ShardIndex.open(f"{folder}/{_stem(url)}.idx")
            except (OSError, ValueError):
                continue
            if index.header.tar_bytes == size:
                return self._keep_here(url, index) if storage.is_remote(folder) and self.index_dir else index
        return None

    def _keep_here(self, url: str, index: ShardIndex) -> ShardIndex:
        """Copy a remote index to `index_dir`, where all processes of the host map it into memory once."""
        path = Path(self.writable(url)) / f"{_stem(url)}.idx"
        with storage.atomic_write(path) as file:
            file.write(index.to_bytes())
        return ShardIndex.open(path)

    def build(self, url: str) -> ShardIndex:
        """Index one shard.

        raises  ValueError naming data.index_dir where the index cannot be written
        """
        folder = self.writable(url)
        return index_shard(url, Path(folder) / f"{_stem(url)}.idx", self.cache)

    def writable(self, url: str) -> str:
        """The folder that new sidecars of this shard go to, made if need be.

        raises  ValueError naming data.index_dir where nothing can be written
        """
        folder = self.folders(url)[-1]
        try:
            if storage.is_remote(folder):
                raise OSError("the shards are remote")
            Path(folder).mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK):
                raise OSError("the folder is read-only")
        except OSError as error:
            raise ValueError(
                f"no index can be written for {url} to {folder} ({error.strerror or error}): set data.index_dir to a "
                "local folder that this job may write"
            ) from error
        return folder

    def removal_lists(self, url: str) -> list[str]:
        """The removal lists of the folder that a shard lies in."""
        return [path for folder in self.folders(url) if storage.exists(path := f"{folder}/{REMOVED}")]

    def read_summaries(self, url: str) -> dict[str, ShardSummary]:
        """The manifest of the folder that a shard lies in, by shard name; empty where there is none of this format."""
        for folder in self.folders(url):
            try:
                manifest = storage.read_json(f"{folder}/manifest.json")
                if manifest["format"] == MANIFEST_FORMAT:
                    return {entry["name"]: ShardSummary(**entry) for entry in manifest["shards"]}
            except (OSError, ValueError, KeyError, TypeError):
                continue
        return {}

    def write_summaries(self, url: str, summaries: Sequence[ShardSummary]) -> None:
        """Write the manifest of the folder that a shard lies in."""
        ordered = sorted(summaries, key=lambda summary: summary.name)
        content = {
            "format": MANIFEST_FORMAT,
            "order_id": order_id(ordered),
            "content_id": content_id(ordered),
            "n": sum(summary.n for summary in ordered),
            "shards": [asdict(summary) for summary in ordered],
        }
        storage.write_json(Path(self.writable(url)) / "manifest.json", content)


def order_id(shards: Sequence[ShardSummary], groups: Sequence[Sequence[str]] = (), selected: str = "") -> str:
    """Digest of what numbers the samples: shard names, counts and keys, and which samples are left out.

    selected  digest of the selected rows; empty where there is no selection
    """
    return storage.digest(
        {
            "shards": [[shard.name, shard.count_with(groups), shard.keys_sha256] for shard in shards],
            "require": [list(group) for group in groups],
            **({"selected": selected} if selected else {}),
        }
    )


def content_id(shards: Sequence[ShardSummary]) -> str:
    """Digest of the shards' bytes."""
    return storage.digest([[shard.name, shard.sha256] for shard in shards])


def open_shard_limit() -> int:
    """How many shards may stay open at once: half of what the process's limit on file descriptors leaves."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(64, min(1 << 14, (soft - _DESCRIPTORS_LEFT_TO_OTHERS) // 2))


class ShardSet:
    """Samples 0 .. n - 1 of some shards, in the order of shard names and then of the tar.

    `require` names what a sample must have to be counted in, such as ("image", "txt"); `image` stands for any image
    field. Reading is safe from several threads.
    """

    def __init__(
        self,
        urls: Sequence[str],
        summaries: Sequence[ShardSummary],
        sidecars: Sidecars,
        require: Sequence[str] = (),
        *,
        selected: SelectedRows | None = None,
        removed: RemovalList | None = None,
        remote: RemoteReader | None = None,
    ) -> None:
        self.urls, self.summaries, self.sidecars = list(urls), list(summaries), sidecars
        self.selected, self.removed = selected, removed or RemovalList({})
        self.remote = remote or RemoteReader()
        self._require_names = tuple(require)
        self.require = tuple(IMAGE_FIELDS if field == "image" else (field,) for field in require)
        for (field,) in (group for group in self.require if len(group) == 1):
            if field not in FIELDS:
                raise ValueError(f"require={field!r}; choose image or one of {', '.join(FIELDS)}")
        self.names = [summary.name for summary in summaries]
        self._whole = np.array([summary.count_with(self.require) for summary in summaries], np.int64)
        self.counts = self._whole if selected is None else np.diff(selected.starts)
        self.starts = np.concatenate([[0], np.cumsum(self.counts)])
        self.n = int(self.starts[-1])
        self.is_remote = any(map(storage.is_remote, self.urls))
        self._open: OrderedDict[int, OpenShard] = OrderedDict()
        self._lock = threading.Lock()
        self._limit = open_shard_limit()

    @classmethod
    def open(
        cls,
        source: str,
        index_dir: str | None = None,
        *,
        require: Sequence[str] = (),
        remote: RemoteReader | None = None,
        progress: Progress | None = None,
    ) -> "ShardSet":
        """Open every shard that `source` names, making the indexes that are missing or no longer fit their tar.

        source    directory, brace range, glob, list file or one tar; local or remote; several joined by `::`
        remote    how remote shards are read; by blocks if None
        progress  called with (shards ready, shards) after each one that had to be indexed
        raises    FileNotFoundError naming a part of `source` that is not there
                  ValueError naming data.index_dir where an index is missing and cannot be written,
                  or saying that no sample is left
        """
        urls = storage.expand(source)
        remote = remote or RemoteReader()
        sidecars = Sidecars(index_dir.rstrip("/") if index_dir else None, remote.cache)
        summaries: dict[str, ShardSummary] = {}
        for parent in sorted({_parent(url) for url in urls}):
            group = [url for url in urls if _parent(url) == parent]
            summaries |= _summarise(group, sidecars, progress)
        shards = cls(urls, [summaries[url] for url in urls], sidecars, require, remote=remote)
        if shards.n == 0:
            raise ValueError(f"{source!r}: no sample in {len(urls)} shards; left out: {shards.rejected or 'nothing'}")
        return shards

    def view(
        self, selection: Sequence[str] = (), removed: Sequence[str] = (), *, lost: LostKeys = lambda shard: ()
    ) -> "ShardSet":
        """The same shards as a training reads them: samples that are selected, none that was removed.

        selection  files; samples count that all of them name
        removed    removal lists, beside the shards' own ones, which always hold
        lost       keys of a shard that a selection may name though they are not there
        raises     ValueError for a selection of other shards, or one that leaves nothing
        """
        own = (path for url in self._one_of_folder() for path in self.sidecars.removal_lists(url))
        removals = RemovalList.read([*removed, *own])
        selected = None
        if selection:
            numbering = Numbering(self.names, self._index, self.require, lost)
            selected = numbering.rows(selection, lambda: self.sidecars.writable(self.urls[0]), order_id(self.summaries))
        shards = ShardSet(
            self.urls,
            self.summaries,
            self.sidecars,
            self._require_names,
            selected=selected,
            removed=removals,
            remote=self.remote,
        )
        if shards.n == 0:
            raise ValueError(f"data.selection={', '.join(selection)} leaves no sample; left out: {shards.rejected}")
        return shards

    @cached_property
    def order_id(self) -> str:
        """Digest of shard names, counts and keys: equal exactly where sample numbers mean the same samples."""
        return order_id(self.summaries, self.require, "" if self.selected is None else self.selected.digest)

    @cached_property
    def content_id(self) -> str:
        """Digest of the shards' bytes."""
        return content_id(self.summaries)

    @cached_property
    def rejected(self) -> dict[str, int]:
        """What the shards hold besides these samples, by reason; `missing_{field}` for what `require` leaves out."""
        counts: Counter[str] = Counter()
        for summary in self.summaries:
            counts.update(summary.rejected)
            kept = summary.n
            for i, group in enumerate(self.require):
                left = summary.count_with(self.require[: i + 1])
                counts[_missing(group)] += kept - left
                kept = left
        counts["not_selected"] = int(self._whole.sum()) - self.n
        return {reason: count for reason, count in counts.items() if count}

    def shard_ids(self, shard: int, *, by_key: bool = False) -> np.ndarray:
        """Sample numbers of one shard, in the tar's order or sorted by key."""
        ids = np.arange(self.starts[shard], self.starts[shard + 1])
        if not by_key:
            return ids
        keys = self.keys(ids)
        return ids[sorted(range(len(ids)), key=keys.__getitem__)]

    def shard_rejected(self, shard: int) -> list[Rejection]:
        """What one shard holds besides its samples, with keys where they are known."""
        index = self.opened(shard).index
        rejected, kept = list(index.header.rejected), np.arange(index.header.n)
        sieve = [(_missing(group), index.rows_with(self.require[: i + 1])) for i, group in enumerate(self.require)]
        if self.selected is not None:
            sieve.append(("not_selected", self.selected.of(shard)))
        for reason, left in sieve:
            for row in np.setdiff1d(kept, left, assume_unique=True).tolist():
                rejected.append(Rejection(reason, index.key(row), int(index.offsets[row].max())))
            kept = left
        return rejected

    def locate(self, sample_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Shard number and place among the shard's samples, of each sample.

        raises  IndexError for a number outside 0 .. n - 1
        """
        ids = np.asarray(sample_ids, np.int64)
        if len(ids) and not (ids.min() >= 0 and ids.max() < self.n):
            raise IndexError(f"sample numbers {ids.min()} .. {ids.max()} outside 0 .. {self.n - 1}")
        shards = np.searchsorted(self.starts, ids, side="right") - 1
        return shards, ids - self.starts[shards]

    def keys(self, sample_ids: np.ndarray) -> list[str]:
        """The key of each sample."""
        return [shard.index.key(row) for shard, row in self._places(sample_ids)]

    def read(self, sample_ids: np.ndarray, fields: Sequence[str]) -> list[dict[str, bytes]]:
        """The members of each sample that are among `fields`; a member that it lacks is left out.

        raises  CorruptSample where the bytes are not the indexed ones, RemovedSample for a removed sample
        """
        if self.is_remote:
            self.announce(sample_ids)
        return [shard.members(row, fields) for shard, row in self._places(sample_ids)]

    def announce(self, sample_ids: np.ndarray) -> None:
        """Say that these samples will be read soon: they then come into memory side by side. Returns before they do."""
        if self.is_remote:
            for shard, row in self._places(sample_ids):
                shard.announce(row)
            return
        began = time.perf_counter()
        self._touch(sample_ids[:_PROBE])
        if time.perf_counter() - began < _IN_MEMORY_S:
            return  # so, most likely, is the rest; threads that find nothing to do would only hold Python's lock
        for begin in range(_PROBE, len(sample_ids), _TOUCHED_TOGETHER):
            self._touchers.submit(self._touch, sample_ids[begin : begin + _TOUCHED_TOGETHER])

    def _touch(self, sample_ids: np.ndarray) -> None:
        """Have the disk read samples that are not in memory, while no one waits for it and Python's lock is free."""
        for shard, places, _ in self.by_shard(sample_ids):
            self.opened(shard).touch(places)

    @cached_property
    def _touchers(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(_TOUCHERS, thread_name_prefix="touch")

    def by_shard(self, sample_ids: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Samples in the order in which they lie: shard number, places in the shard, places in `sample_ids`."""
        order = np.argsort(sample_ids, kind="stable")
        shards, places = self.locate(sample_ids[order])
        ends = [*(np.flatnonzero(np.diff(shards)) + 1).tolist(), len(order)] if len(order) else []
        for begin, end in zip([0, *ends], ends, strict=False):
            yield int(shards[begin]), places[begin:end], order[begin:end]

    def opened(self, shard: int) -> "OpenShard":
        """One shard, opened for reading; the least recently used one is closed when too many are."""
        with self._lock:
            if shard in self._open:
                self._open.move_to_end(shard)
                return self._open[shard]
        opened = self._open_shard(shard)
        with self._lock:
            self._open[shard] = opened
            if len(self._open) > self._limit:
                self._open.popitem(last=False)
        return opened

    def _places(self, sample_ids: np.ndarray) -> Iterator[tuple["OpenShard", int]]:
        shards, rows = self.locate(sample_ids)
        for shard, row in zip(shards.tolist(), rows.tolist(), strict=True):
            opened = self.opened(shard)
            yield opened, opened.row(row)

    def _one_of_folder(self) -> list[str]:
        """One shard of each folder that shards lie in."""
        return list({_parent(url): url for url in self.urls}.values())

    def _index(self, shard: int) -> ShardIndex:
        url, summary = self.urls[shard], self.summaries[shard]
        index = self.sidecars.read(url, summary.bytes) or self.sidecars.build(url)
        if (index.header.n, index.header.keys_sha256) != (summary.n, summary.keys_sha256):
            raise ValueError(
                f"{url} holds {index.header.n} samples and {index.header.tar_bytes} bytes, but the manifest says "
                f"{summary.n} and {summary.bytes}: it was replaced; open the set again"
            )
        return index

    def _open_shard(self, shard: int) -> "OpenShard":
        url, index = self.urls[shard], self._index(shard)
        rows = self._rows(shard, index)
        is_remote = storage.is_remote(url)
        opened = RemoteShard(url, index, rows, self.remote) if is_remote else LocalShard(url, index, rows)
        opened.remove(self.removed.of(self.names[shard]))
        return opened

    def _rows(self, shard: int, index: ShardIndex) -> np.ndarray | None:
        """Index rows of the samples that count; None for all."""
        if self.selected is not None:
            return self.selected.of(shard)
        return None if self._whole[shard] == index.header.n else index.rows_with(self.require)


class OpenShard:
    """One shard with its index. `rows` are the index rows of the samples that count, or None for all."""

    def __init__(self, url: str, index: ShardIndex, rows: np.ndarray | None) -> None:
        self.url, self.index, self._rows = url, index, rows
        self.removed_rows: frozenset[int] = frozenset()
        """Index rows that `require_kept` refuses."""

    def remove(self, keys: frozenset[str]) -> None:
        """Refuse to read the samples of these keys from now on; keys of no sample are ignored."""
        if keys:
            rows = pc.index_in(pa.array(sorted(keys), pa.large_string()), value_set=self.index.key_array())
            self.removed_rows = frozenset(rows.drop_null().to_pylist())

    def require_kept(self, row: int) -> None:
        """Refuse a removed sample.

        raises  RemovedSample
        """
        if row in self.removed_rows:
            raise RemovedSample(self.index.key(row), self.url)

    def row(self, place: int) -> int:
        """Index row of the shard's sample at `place`."""
        return place if self._rows is None else int(self._rows[place])

    def rows(self, places: np.ndarray) -> np.ndarray:
        """Index rows of the shard's samples at `places`."""
        return places if self._rows is None else self._rows[places]

    def members(self, row: int, fields: Sequence[str]) -> dict[str, bytes]:
        """The verified bytes of a sample's members."""
        self.require_kept(row)
        index, found = self.index, {}
        for field in fields:
            column = index.column.get(field)
            if column is None or not (offset := int(index.offsets[row, column])):
                continue
            data = self.read(offset, int(index.lengths[row, column]))
            self.verify(row, column, data)
            found[field] = data
        return found

    def verify(self, row: int, column: int, data: bytes | memoryview) -> None:
        """Compare bytes with their checksum.

        raises  CorruptSample where they differ
        """
        if xxhash.xxh3_64_intdigest(data) != self.index.xxh3[row, column]:
            raise CorruptSample(self.index.key(row), f"checksum_{self.index.header.fields[column]}", self.url)

    def read(self, offset: int, length: int) -> bytes:
        """Bytes of the tar."""
        raise NotImplementedError

    def view(self, offset: int, length: int) -> np.ndarray:
        """Bytes of the tar, (length,) uint8, read only; without a copy where the tar is mapped into memory."""
        raise NotImplementedError

    @property
    def content(self) -> "Content":
        """The tar's bytes, to be sliced."""
        return _Views(self)

    def announce(self, row: int) -> None:
        """Say that a sample of a remote shard will be read soon."""

    def touch(self, places: np.ndarray) -> None:
        """Read a byte of the samples at `places` of a local shard, so that they come into memory."""


class Content(Protocol):
    """Bytes that can be sliced."""

    def __getitem__(self, where: slice) -> memoryview: ...


class _Views:
    """Content that `view` gives piece by piece."""

    def __init__(self, shard: OpenShard) -> None:
        self._shard = shard

    def __getitem__(self, where: slice) -> memoryview:
        return self._shard.view(where.start, where.stop - where.start).data


class LocalShard(OpenShard):
    """A shard on a file system. Positioned reads, which let other threads run while the disk works."""

    def __init__(self, url: str, index: ShardIndex, rows: np.ndarray | None) -> None:
        super().__init__(url, index, rows)
        self._file = open(url, "rb", buffering=0)  # noqa: SIM115 (closed when the last reader lets go of it)
        size = os.fstat(self._file.fileno()).st_size
        if size != index.header.tar_bytes:
            raise ValueError(f"{url} has {size} bytes, but its index is of {index.header.tar_bytes}: open it again")

    def read(self, offset: int, length: int) -> bytes:
        return os.pread(self._file.fileno(), length, offset)

    def view(self, offset: int, length: int) -> np.ndarray:
        return self._mapped[offset : offset + length]

    @cached_property
    def content(self) -> memoryview:
        return memoryview(mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ))

    def touch(self, places: np.ndarray) -> None:
        offsets, lengths = (array[self.rows(places)].ravel() for array in (self.index.offsets, self.index.lengths))
        self._mapped[offsets]
        self._mapped[offsets + lengths // 2]  # the kernel reads what lies around each byte

    @cached_property
    def _mapped(self) -> np.ndarray:
        return np.frombuffer(self.content, np.uint8)


class RemoteShard(OpenShard):
    """A shard behind a URL."""

    def __init__(self, url: str, index: ShardIndex, rows: np.ndarray | None, reader: RemoteReader) -> None:
        super().__init__(url, index, rows)
        self._tar = reader.open(url, index.header.tar_bytes, index.header.sha256)

    def read(self, offset: int, length: int) -> bytes:
        traffic.count(read=length)
        return self._tar.read(offset, length)

    def view(self, offset: int, length: int) -> np.ndarray:
        traffic.count(read=length)
        return self._tar.view(offset, length)

    def announce(self, row: int) -> None:
        for offset, length in zip(self.index.offsets[row].tolist(), self.index.lengths[row].tolist(), strict=True):
            if offset:
                self._tar.announce(offset, length)


def _summarise(urls: Sequence[str], sidecars: Sidecars, progress: Progress | None) -> dict[str, ShardSummary]:
    """Summaries of the shards of one folder, from its manifest or by indexing."""
    known = sidecars.read_summaries(urls[0])
    found: dict[str, ShardSummary] = {}
    made = 0
    for done, (url, size) in enumerate(zip(urls, tar_sizes(urls), strict=True), start=1):
        name = _name(url)
        if name in known and known[name].bytes == size:
            found[url] = known[name]
            continue
        index = sidecars.read(url, size) or sidecars.build(url)
        found[url] = ShardSummary.of(name, index)
        made += 1
        if progress is not None:
            progress(done, len(urls))
    if made:
        everything = known | {summary.name: summary for summary in found.values()}
        sidecars.write_summaries(urls[0], list(everything.values()))
    return found


def tar_sizes(urls: Sequence[str]) -> list[int]:
    """Bytes of local or remote files; many are asked at once, since a parallel file system answers slowly but widely.

    raises  FileNotFoundError naming the one that is not there
    """

    def size(url: str) -> int:
        try:
            if not storage.is_remote(url):
                return os.stat(url).st_size
            return storage.remote_state(url).size
        except FileNotFoundError as error:
            raise FileNotFoundError(f"shard {url} is not there") from error

    with ThreadPoolExecutor(_STAT_THREADS) as pool:
        return list(pool.map(size, urls))


def _missing(group: Sequence[str]) -> str:
    return f"missing_{group[0] if len(group) == 1 else 'image'}"


def _name(url: str) -> str:
    return url.rpartition("/")[2]


def _stem(url: str) -> str:
    return _name(url).removesuffix(".tar")


def _parent(url: str) -> str:
    return url.rpartition("/")[0] or ("/" if url.startswith("/") else ".")


def _identity(parent: str) -> str:
    """One spelling of a folder, so that its sidecars are found from any working directory."""
    return parent if storage.is_remote(parent) else os.path.realpath(parent)
