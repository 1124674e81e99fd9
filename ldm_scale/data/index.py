"""The sidecar index of one shard: where each sample's members lie, and a checksum of their bytes.

One pass over a tar's headers writes `{shard}.idx`; every later reader goes through it. The file is a magic word, a JSON
header, one fixed-size record a sample, then the keys; a reader maps it into memory. What the tar holds besides whole
samples is listed in the header by reason, so that nothing disappears silently.

Letters: N samples of the shard, F fields that occur in it.
"""

import json
import mmap
import os
import struct
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from ldm_scale.core import storage
from ldm_scale.data.remote import TarCache, fetch
from ldm_scale.data.tar import Damage, Fault, Member, split_name, walk

IMAGE_FIELDS = ("jpg", "jpeg", "png", "webp")
FIELDS = (*IMAGE_FIELDS, "npy", "txt", "json", "cls", "boxes.json", "seg.png", "flip.npy", "text.npy")
"""Members that are indexed; others are counted and left alone."""

_MAGIC = b"LDMIDX1\n"
_ALIGN = 64


@dataclass(frozen=True, slots=True)
class Rejection:
    """One sample that a shard does not deliver, or one damaged place whose sample is unknown."""

    reason: str
    key: str | None
    offset: int
    """Byte offset in the tar."""


@dataclass(frozen=True, slots=True)
class IndexHeader:
    """What is true of the whole shard."""

    n: int
    """Whole samples."""
    tar_bytes: int
    sha256: str
    """Of the tar's bytes."""
    keys_sha256: str
    """Of the keys in index order, one a line."""
    fields: tuple[str, ...]
    combinations: dict[str, int]
    """How many samples have exactly these fields, `jpg+txt: 9990`."""
    rejected: tuple[Rejection, ...]
    ignored: dict[str, int]
    """Members of other fields, by field."""

    @property
    def rejected_counts(self) -> dict[str, int]:
        return dict(Counter(str(entry.reason) for entry in self.rejected))


class ShardIndex:
    """The index of one shard, in memory or mapped from its file.

    offsets  (N, F) uint64 byte offset of each member's content in the tar; 0 where the sample lacks the member
    lengths  (N, F) uint32 bytes
    xxh3     (N, F) uint64 xxh3 of the content

    For one row at a time, plain numbers are quicker: see `unpacker`.
    """

    def __init__(self, header: IndexHeader, records: np.ndarray, keys: memoryview) -> None:
        self.header, self._records, self.key_bytes = header, records, keys
        self.record_bytes, self.record_size = records.view(np.uint8).data, records.dtype.itemsize
        self.column = {name: i for i, name in enumerate(header.fields)}
        self.offsets: np.ndarray = records["offset"]
        self.lengths: np.ndarray = records["length"]
        self.xxh3: np.ndarray = records["xxh3"]

    def unpacker(self, *fields: str) -> struct.Struct:
        """Unpacks from `record_bytes`, at row * record_size, of these fields alone, in the order of the index: their
        offsets, their hashes, their lengths, then begin and length of the key in `key_bytes`.
        """
        return _unpacker(self.header.fields, fields)

    def key(self, row: int) -> str:
        start, length = int(self._records["key_start"][row]), int(self._records["key_length"][row])
        return bytes(self.key_bytes[start : start + length]).decode()

    def keys(self) -> list[str]:
        return [self.key(row) for row in range(self.header.n)]

    def key_array(self) -> pa.LargeStringArray:
        """The keys in index order, without a copy of their text."""
        starts, lengths = self._records["key_start"].astype(np.int64), self._records["key_length"]
        ends = np.append(starts, starts[-1] + lengths[-1] if len(starts) else 0)
        return pa.LargeStringArray.from_buffers(len(starts), pa.py_buffer(ends), pa.py_buffer(self.key_bytes))

    def rows_with(self, fields: Sequence[Sequence[str]]) -> np.ndarray:
        """Rows, ascending, of the samples that have at least one member of every group of fields."""
        has = np.ones(self.header.n, bool)
        for group in fields:
            columns = [self.column[name] for name in group if name in self.column]
            has &= (self.offsets[:, columns] > 0).any(axis=1)
        return np.flatnonzero(has)

    def to_bytes(self) -> bytes:
        """The content of the index file."""
        head = json.dumps(asdict(self.header)).encode()
        head += b" " * (-(len(_MAGIC) + 8 + len(head)) % _ALIGN)
        return _MAGIC + len(head).to_bytes(8, "little") + head + self._records.tobytes() + bytes(self.key_bytes)

    @classmethod
    def from_buffer(cls, buffer: mmap.mmap | bytes, name: str) -> "ShardIndex":
        """Read an index file's content without copying it.

        raises  ValueError where it is no index of this version or is cut short
        """
        view = memoryview(buffer)
        start = len(_MAGIC) + 8
        if bytes(view[: len(_MAGIC)]) != _MAGIC:
            raise ValueError(
                f"{name} is not an index of format {_MAGIC.decode().strip()}; delete it to have it rebuilt"
            )
        end = start + int.from_bytes(view[len(_MAGIC) : start], "little")
        try:
            header = _header_from(json.loads(bytes(view[start:end])))
            records = np.frombuffer(view, _record_type(len(header.fields)), header.n, end)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{name} is damaged or cut short ({error}); delete it to have it rebuilt") from error
        keys = view[end + records.nbytes :]
        if len(keys) != int(records["key_length"].sum()):
            raise ValueError(f"{name} is cut short; delete it to have it rebuilt")
        return cls(header, records, keys)

    @classmethod
    def open(cls, path: str | Path) -> "ShardIndex":
        """Map a local index file into memory, or read a remote one whole."""
        if storage.is_remote(str(path)):
            with storage.open_read(str(path)) as remote:
                return cls.from_buffer(remote.read(), str(path))
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise ValueError(f"{path} is empty; delete it to have it rebuilt")
            return cls.from_buffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), str(path))


@cache
def _unpacker(fields: tuple[str, ...], wanted: tuple[str, ...]) -> struct.Struct:
    """Skips in a record what is not wanted."""
    layout = "".join(code if field in wanted else f"{struct.calcsize(code)}x" for code in "QQI" for field in fields)
    return struct.Struct(f"<{layout}II")


def index_shard(url: str, index_path: str | Path, cache: TarCache | None = None) -> ShardIndex:
    """Walk the headers of one tar, checksum its samples and write the index, atomically.

    A remote tar is fetched whole first: into `cache`, where it stays, or else into a temporary file.
    """
    with _local_copy(url, cache) as path:
        index = scan(path)
    with storage.atomic_write(index_path) as file:
        file.write(index.to_bytes())
    return index


def scan(path: str | Path) -> ShardIndex:
    """Index one local tar in memory."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size == 0:
            return _build(memoryview(b""))
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped, memoryview(mapped) as view:
            return _build(view)


@contextmanager
def _local_copy(url: str, cache: TarCache | None) -> Iterator[str]:
    if not storage.is_remote(url):
        yield url.removeprefix("file://")
    elif cache is not None:
        with cache.open(url) as copy:
            yield f"/proc/self/fd/{copy.fileno()}"  # its name may go when others need room
    else:
        with tempfile.NamedTemporaryFile(suffix=".tar") as copy:
            fetch(url, storage.remote_state(url).size, copy)
            yield copy.name


def _record_type(fields: int) -> np.dtype:
    return np.dtype(
        [
            ("offset", "<u8", (fields,)),
            ("xxh3", "<u8", (fields,)),
            ("length", "<u4", (fields,)),
            ("key_start", "<u4"),
            ("key_length", "<u4"),
        ]
    )


def _header_from(values: dict[str, Any]) -> IndexHeader:
    rejected = tuple(Rejection(**entry) for entry in values.pop("rejected"))
    return IndexHeader(**(values | {"fields": tuple(values["fields"])}), rejected=rejected)


class _Grouping:
    """Members gathered into samples by key, in order of first appearance, whatever their order in the tar."""

    def __init__(self) -> None:
        self.samples: dict[str, dict[str, Member]] = {}
        self.bad: dict[str, Rejection] = {}
        self.rejected: list[Rejection] = []
        self.copies: dict[str, Counter[str]] = {}
        self.ignored: Counter[str] = Counter()
        self.beside_damage: set[str] = set()
        self._last: str | None = None
        self._after_damage = False

    def add(self, item: Member | Damage) -> None:
        if isinstance(item, Damage):
            return self._add_damage(item)
        split = split_name(item.name)
        if split is None or split[1] not in FIELDS:
            self.ignored[split[1] if split else item.name] += 1
            return None
        key, field = split
        if self._after_damage:
            self.beside_damage.add(key)
        self._last, self._after_damage = key, False
        if field in self.samples.setdefault(key, {}):
            self.copies.setdefault(key, Counter())[field] += 1
        else:
            self.samples[key][field] = item
        return None

    def _add_damage(self, damage: Damage) -> None:
        split = split_name(damage.name) if damage.name else None
        if split is None:
            self.rejected.append(Rejection(damage.fault, None, damage.offset))
        else:
            self.bad.setdefault(split[0], Rejection(damage.fault, split[0], damage.offset))
        if self._last is not None:
            self.beside_damage.add(self._last)
        self._after_damage = True

    def finish(self) -> None:
        """Take out what is not a whole sample, each with its reason."""
        usual = self._usual_kinds()
        for key, entry in self.bad.items():
            self.samples.pop(key, None)
            self.rejected.append(entry)
        for key, members in list(self.samples.items()):
            kinds = {_kind(field) for field in members}
            if key in self.beside_damage and not usual <= kinds:
                self._reject(key, Fault.INCOMPLETE)
            elif not kinds & {"image", "npy"}:
                self._reject(key, Fault.ORPHAN)
        for key, copies in self.copies.items():
            offset = next(iter(self.samples[key].values())).offset if key in self.samples else 0
            self.rejected.extend([Rejection(Fault.DUPLICATE, key, offset)] * max(copies.values()))
        self.rejected.sort(key=lambda entry: entry.offset)

    def _reject(self, key: str, fault: Fault) -> None:
        members = self.samples.pop(key)
        self.rejected.append(Rejection(fault, key, next(iter(members.values())).offset))

    def _usual_kinds(self) -> set[str]:
        """Kinds of member that more than half of the samples away from damage have."""
        trusted = [members for key, members in self.samples.items() if key not in self.beside_damage]
        counts = Counter(kind for members in trusted for kind in {_kind(field) for field in members})
        return {kind for kind, count in counts.items() if 2 * count > len(trusted)}


def _kind(field: str) -> str:
    return "image" if field in IMAGE_FIELDS else field


def _build(data: memoryview) -> ShardIndex:
    grouping = _Grouping()
    for item in walk(data):
        grouping.add(item)
    grouping.finish()
    samples = grouping.samples
    present = {field for members in samples.values() for field in members}
    fields = tuple(field for field in FIELDS if field in present)
    column = {field: i for i, field in enumerate(fields)}
    records = np.zeros(len(samples), _record_type(len(fields)))
    names = [key.encode() for key in samples]
    records["key_length"] = [len(name) for name in names]
    records["key_start"][1:] = np.cumsum(records["key_length"][:-1])
    for row, members in enumerate(samples.values()):
        for field, member in members.items():
            place = row, column[field]
            records["offset"][place], records["length"][place] = member.offset, member.length
            content = data[member.offset : member.offset + member.length]
            records["xxh3"][place] = xxhash.xxh3_64_intdigest(content)
    header = IndexHeader(
        n=len(samples),
        tar_bytes=len(data),
        sha256=sha256(data).hexdigest(),
        keys_sha256=sha256(b"\n".join(names)).hexdigest(),
        fields=fields,
        combinations=dict(Counter("+".join(f for f in fields if f in members) for members in samples.values())),
        rejected=tuple(grouping.rejected),
        ignored=dict(grouping.ignored),
    )
    return ShardIndex(header, records, memoryview(b"".join(names)))
