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
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import fsspec
import numpy as np
import xxhash

from ldm_scale.core import storage
from ldm_scale.data.index import FIELDS, IMAGE_FIELDS, Rejection, ShardIndex, index_shard
from ldm_scale.data.tar import ShardWriter

__all__ = ["CorruptSample", "ShardSet", "ShardSummary", "ShardWriter", "Sidecars", "open_shard_limit"]

SIDECARS = ".ldm"
MANIFEST_FORMAT = 1
_DESCRIPTORS_LEFT_TO_OTHERS = 256
_STAT_THREADS = 16

Progress = Callable[[int, int], None]


class CorruptSample(ValueError):
    """A sample whose bytes are not the ones that were indexed."""

    def __init__(self, key: str, reason: str, where: str) -> None:
        super().__init__(f"sample {key!r} of {where}: {reason}")
        self.key, self.reason = key, reason


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
        for folder in self.folders(url):
            try:
                index = ShardIndex.open(f"{folder}/{_stem(url)}.idx")
            except (OSError, ValueError):
                continue
            if index.header.tar_bytes == size:
                return index
        return None

    def build(self, url: str) -> ShardIndex:
        """Index one shard.

        raises  ValueError naming data.index_dir where the index cannot be written
        """
        folder = self.writable(url)
        return index_shard(url, Path(folder) / f"{_stem(url)}.idx")

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


def order_id(shards: Sequence[ShardSummary], groups: Sequence[Sequence[str]] = ()) -> str:
    """Digest of what numbers the samples: shard names, counts and keys, and which samples are left out."""
    return storage.digest(
        {
            "shards": [[shard.name, shard.count_with(groups), shard.keys_sha256] for shard in shards],
            "require": [list(group) for group in groups],
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
        self, urls: Sequence[str], summaries: Sequence[ShardSummary], sidecars: Sidecars, require: Sequence[str] = ()
    ) -> None:
        self.urls, self.summaries, self.sidecars = list(urls), list(summaries), sidecars
        self.require = tuple(IMAGE_FIELDS if field == "image" else (field,) for field in require)
        for (field,) in (group for group in self.require if len(group) == 1):
            if field not in FIELDS:
                raise ValueError(f"require={field!r}; choose image or one of {', '.join(FIELDS)}")
        self.names = [summary.name for summary in summaries]
        self.counts = np.array([summary.count_with(self.require) for summary in summaries], np.int64)
        self.starts = np.concatenate([[0], np.cumsum(self.counts)])
        self.n = int(self.starts[-1])
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
        progress: Progress | None = None,
    ) -> "ShardSet":
        """Open every shard that `source` names, making the indexes that are missing or no longer fit their tar.

        source    directory, brace range, glob, list file or one tar; local or remote; several joined by `::`
        progress  called with (shards ready, shards) after each one that had to be indexed
        raises    FileNotFoundError naming a part of `source` that is not there
                  ValueError naming data.index_dir where an index is missing and cannot be written,
                  or saying that no sample is left
        """
        urls = storage.expand(source)
        sidecars = Sidecars(index_dir.rstrip("/") if index_dir else None)
        summaries: dict[str, ShardSummary] = {}
        for parent in sorted({_parent(url) for url in urls}):
            group = [url for url in urls if _parent(url) == parent]
            summaries |= _summarise(group, sidecars, progress)
        shards = cls(urls, [summaries[url] for url in urls], sidecars, require)
        if shards.n == 0:
            raise ValueError(f"{source!r}: no sample in {len(urls)} shards; left out: {shards.rejected or 'nothing'}")
        return shards

    @cached_property
    def order_id(self) -> str:
        """Digest of shard names, counts and keys: equal exactly where sample numbers mean the same samples."""
        return order_id(self.summaries, self.require)

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
        opened = self.opened(shard)
        index, rejected = opened.index, list(opened.index.header.rejected)
        kept = np.arange(index.header.n)
        for i, group in enumerate(self.require):
            left = index.rows_with(self.require[: i + 1])
            for row in np.setdiff1d(kept, left, assume_unique=True).tolist():
                rejected.append(Rejection(_missing(group), index.key(row), int(index.offsets[row].max())))
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

        raises  CorruptSample where the bytes are not the indexed ones
        """
        return [shard.members(row, fields) for shard, row in self._places(sample_ids)]

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

    def _open_shard(self, shard: int) -> "OpenShard":
        url, summary = self.urls[shard], self.summaries[shard]
        index = self.sidecars.read(url, summary.bytes) or self.sidecars.build(url)
        if (index.header.n, index.header.keys_sha256) != (summary.n, summary.keys_sha256):
            raise ValueError(
                f"{url} holds {index.header.n} samples and {index.header.tar_bytes} bytes, but the manifest says "
                f"{summary.n} and {summary.bytes}: it was replaced; open the set again"
            )
        everything = summary.count_with(self.require) == summary.n
        rows = None if everything else index.rows_with(self.require)
        return RemoteShard(url, index, rows) if storage.is_remote(url) else LocalShard(url, index, rows)


class OpenShard:
    """One shard with its index. `rows` are the index rows of the samples that count, or None for all."""

    def __init__(self, url: str, index: ShardIndex, rows: np.ndarray | None) -> None:
        self.url, self.index, self._rows = url, index, rows

    def row(self, place: int) -> int:
        """Index row of the shard's sample at `place`."""
        return place if self._rows is None else int(self._rows[place])

    def members(self, row: int, fields: Sequence[str]) -> dict[str, bytes]:
        """The verified bytes of a sample's members."""
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
        return np.frombuffer(self.read(offset, length), np.uint8)


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
    def _mapped(self) -> np.ndarray:
        return np.frombuffer(mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)


class RemoteShard(OpenShard):
    """A shard behind a URL, read by byte ranges."""

    def __init__(self, url: str, index: ShardIndex, rows: np.ndarray | None) -> None:
        super().__init__(url, index, rows)
        self._files, self._path = fsspec.core.url_to_fs(url)

    def read(self, offset: int, length: int) -> bytes:
        return bytes(self._files.cat_file(self._path, start=offset, end=offset + length))


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
            files, path = fsspec.core.url_to_fs(url)
            return int(files.size(path))
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
