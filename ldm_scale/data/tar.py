"""The tar container, byte by byte: writing reproducible WebDataset shards and walking the headers of anyone's.

POSIX 1003.1 ustar on the way out (readable by `tar`, webdataset and everything else); ustar, PAX, GNU and V7 on the
way in. Python's `tarfile` is 20 to 70 times slower, and webdataset says nothing about most kinds of damage; this walker
names them. Knows nothing of samples beyond how a member's name splits into key and field.
"""

import errno
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import numpy as np

BLOCK = 512
_RECORD = 20 * BLOCK  # archives end on a multiple of this, as GNU tar writes them
_ZEROS = bytes(BLOCK)
_FILES = (b"0", b"\0", b"7")
_MAX_NAME = 100
_MAX_EXTENSION = 1 << 20  # bytes of a PAX or GNU long-name record that is believed
_MAX_TAIL = 1 << 20  # zero bytes that end an archive; more are a file whose end was never written


class Fault(StrEnum):
    """What can be wrong with a tar, or with a sample in it."""

    TRUNCATED = "truncated"
    """The file ends inside a member or inside a header."""
    NO_END = "no_end_blocks"
    """The file ends after a whole member, without the end-of-archive blocks: it was probably cut there."""
    DAMAGED_HEADER = "damaged_header"
    """A header is zeroed or its checksum is wrong."""
    DAMAGED_SIZE = "damaged_size"
    """A member's size leads into the middle of something else."""
    UNSUPPORTED = "unsupported_member"
    """A sparse file or a member of 4 GiB or more."""
    INCOMPLETE = "incomplete_sample"
    """A sample beside a damaged place lacks a member that the others have."""
    ORPHAN = "orphan_member"
    """Members of a sample that has neither image nor latent."""
    DUPLICATE = "duplicate_key"
    """A second member or sample of the same name; the first one counts."""


@dataclass(frozen=True, slots=True)
class Member:
    """One file in the archive; its bytes are `data[offset : offset + length]`."""

    name: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Damage:
    """A place in the archive that cannot be read; `name` is the member concerned, where it is known."""

    fault: Fault
    offset: int
    name: str | None = None


def split_name(name: str) -> tuple[str, str] | None:
    """Member name to (key, field) by WebDataset's rule: the first dot of the base name divides them.

    returns  None for a name without either; the field is lower case (`a/b.seg.PNG` gives `a/b`, `seg.png`)
    """
    folder, slash, base = name.removeprefix("./").rpartition("/")
    stem, _, field = base.partition(".")
    return (folder + slash + stem, field.lower()) if stem and field else None


def header(name: str, length: int, kind: bytes = b"0") -> bytes:
    """One ustar header: mode 0644, owner 0, mtime 0, so that equal content gives equal archives."""
    encoded = name.encode()
    if len(encoded) > _MAX_NAME:
        raise ValueError(f"member name {name!r} has {len(encoded)} bytes; a ustar name holds at most {_MAX_NAME}")
    if length >= 1 << 33:
        raise ValueError(f"member {name!r} has {length} bytes; a ustar member holds less than 8 GiB")
    fields = (
        encoded.ljust(100, b"\0") + b"0000644\0"
        b"0000000\0"
        b"0000000\0"
        + b"%011o\0" % length
        + b"00000000000\0"
        + b"        "
        + kind
        + bytes(100)
        + b"ustar\x0000"
        + bytes(64)
        + b"0000000\0"
        b"0000000\0"
    )
    block = fields.ljust(BLOCK, b"\0")
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


def global_comment(comment: str) -> bytes:
    """A PAX global header record that carries `comment`; ignored by tar, webdataset, wids, datasets and Energon."""
    body = f" comment={comment}\n".encode()
    length = len(body) + 1
    while length != len(str(length)) + len(body):
        length = len(str(length)) + len(body)
    return header("pax_global_header", length, b"g") + _padded(str(length).encode() + body)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % BLOCK)


class ShardWriter:
    """Writes one WebDataset shard that appears whole or not at all.

    Plain ustar with mtime 0; written under a temporary name, synced, renamed by `close`. As a context manager it closes
    on success and leaves nothing behind on an exception.

    raises  ValueError for a key or field that tar or WebDataset cannot hold, or a repeated key
            OSError (ENOSPC, EDQUOT, ...) naming the shard when it cannot be written; nothing half-written is left
    """

    def __init__(self, path: str | Path, *, comment: str | None = None) -> None:
        self.path = Path(path)
        self.count = 0
        self._keys: set[str] = set()
        self._temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        self._file: IO[bytes] | None = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self._temporary, "wb", buffering=1 << 20)  # noqa: SIM115 (closed by close or abort)
            if comment is not None:
                self._file.write(global_comment(comment))
        except OSError as error:
            self._fail(error)

    def add(self, key: str, members: Mapping[str, bytes]) -> None:
        """Append one sample: member `{key}.{field}` for each field, in the order given."""
        if self._file is None:
            raise ValueError(f"{self.path} is closed; no sample can be added")
        if key in self._keys:
            raise ValueError(f"{self.path}: key {key!r} is given twice; keys must be unique within a shard")
        if not members:
            raise ValueError(f"{self.path}: sample {key!r} has no members")
        headers = [self._header(key, field, data) for field, data in members.items()]
        try:
            for block, data in zip(headers, members.values(), strict=True):
                self._file.write(block)
                self._file.write(data)
                self._file.write(_ZEROS[: -len(data) % BLOCK])
        except OSError as error:
            self._fail(error)
        self._keys.add(key)
        self.count += 1

    def _header(self, key: str, field: str, data: bytes) -> bytes:
        name = f"{key}.{field}"
        if split_name(name) != (key, field) or key.startswith("/") or ".." in key.split("/"):
            raise ValueError(
                f"{self.path}: {name!r} does not split into key {key!r} and field {field!r}; keys hold no dot and no "
                "leading slash, fields are lower case without a slash"
            )
        return header(name, len(data))

    def close(self) -> None:
        """End the archive, sync it and give it its name. Closing twice does nothing."""
        if self._file is None:
            return
        try:
            end = self._file.tell() + 2 * BLOCK
            self._file.write(bytes(2 * BLOCK + -end % _RECORD))
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self._temporary, self.path)
        except OSError as error:
            self._fail(error)
        self._file = None

    def abort(self) -> None:
        """Leave nothing behind. Does nothing once closed."""
        if self._file is None:
            return
        file, self._file = self._file, None
        self._temporary.unlink(missing_ok=True)
        try:
            file.close()
        except OSError:  # closing flushes, which fails again on a full disk; the file is gone already
            return

    def _fail(self, error: OSError) -> None:
        self.abort()
        remedy = ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            remedy = "; nothing half-written is left and finished shards are whole: free space or quota, then run again"
        raise OSError(error.errno, f"cannot write shard {self.path}: {error.strerror}{remedy}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()


def walk(data: memoryview) -> Iterator[Member | Damage]:
    """Every regular file of a tar, and every place where it is damaged, in file order.

    A `Damage` that carries a name also takes back a member of that name that came before it. Behind damage the walk
    goes on at the next valid ustar header, so that whatever lies whole there is still found.
    """
    return _Walk(data).items()


def comment(data: memoryview) -> str | None:
    """The comment of a PAX global header in the first record, or None where there is none."""
    head = _parse(bytes(data[:BLOCK]), {})
    if head is None or head.kind != b"g":
        return None
    return _extension(b"g", bytes(data[BLOCK : BLOCK + head.length])).get("comment")


@dataclass(frozen=True, slots=True)
class _Header:
    name: str
    length: int
    kind: bytes
    is_sparse: bool

    @property
    def blocks(self) -> int:
        """Bytes that the content occupies, padding included; directories and links have none."""
        return 0 if self.kind in b"123456" else -(-self.length // BLOCK) * BLOCK


class _Walk:
    """The state of one walk: where it is, and what the extension records before the next header say."""

    def __init__(self, data: memoryview) -> None:
        self.data, self.at = data, 0
        self.previous: str | None = None
        self.extended: dict[str, str] = {}

    def items(self) -> Iterator[Member | Damage]:
        while self.at + BLOCK <= len(self.data):
            block = bytes(self.data[self.at : self.at + BLOCK])
            if block == _ZEROS and (zeros := self._zeros_to_the_end()):
                if not 2 * BLOCK <= zeros <= _MAX_TAIL:
                    yield Damage(Fault.NO_END if zeros < 2 * BLOCK else Fault.TRUNCATED, self.at)
                return
            head = _parse(block, self.extended)
            if head is None:
                yield self._bad_header(block)
                found = self._resume(self.at + BLOCK)
            elif self.at + BLOCK + head.length > len(self.data) and head.blocks:
                begin = self.at
                found = self._resume(begin + BLOCK)
                yield Damage(Fault.DAMAGED_SIZE if found else Fault.TRUNCATED, begin, head.name)
            else:
                yield from self._entry(head)
                continue
            if not found:
                return
        yield Damage(Fault.TRUNCATED if self.at < len(self.data) else Fault.NO_END, self.at)

    def _entry(self, head: _Header) -> Iterator[Member | Damage]:
        start = self.at + BLOCK
        if head.kind in (b"x", b"L") and head.length <= _MAX_EXTENSION:
            self.extended |= _extension(head.kind, bytes(self.data[start : start + head.length]))
        elif head.kind not in (b"g", b"K"):
            self.extended = {}
        if head.kind in _FILES and not head.is_sparse and head.length < 1 << 32:
            if not head.name.endswith("/"):
                self.previous = head.name
                yield Member(head.name, start, head.length)
        elif head.kind in _FILES or head.kind in (b"1", b"2", b"S"):
            yield Damage(Fault.UNSUPPORTED, self.at, head.name)
        self.at = start + head.blocks

    def _bad_header(self, block: bytes) -> Damage:
        """A block that is no header at all means that the size of the member before it is wrong."""
        if block == _ZEROS or block[257:262] == b"ustar":
            return Damage(Fault.DAMAGED_HEADER, self.at)
        return Damage(Fault.DAMAGED_SIZE, self.at, self.previous)

    def _zeros_to_the_end(self) -> int:
        """How many bytes are left, if all are zero; else 0."""
        for begin in range(self.at, len(self.data), _MAX_EXTENSION):
            piece = bytes(self.data[begin : begin + _MAX_EXTENSION])
            if piece.count(0) != len(piece):
                return 0
        return len(self.data) - self.at

    def _resume(self, begin: int) -> bool:
        """Move to the next valid ustar header at or after `begin`; False where there is none."""
        self.extended, self.previous = {}, None
        blocks = (len(self.data) - begin) // BLOCK
        if blocks <= 0:
            return False
        rows = np.frombuffer(self.data, np.uint8, blocks * BLOCK, begin).reshape(blocks, BLOCK)
        for row in np.flatnonzero((rows[:, 257:262] == np.frombuffer(b"ustar", np.uint8)).all(axis=1)).tolist():
            if _parse(rows[row].tobytes(), {}) is not None:
                self.at = begin + row * BLOCK
                return True
        return False


def _parse(block: bytes, extended: Mapping[str, str]) -> _Header | None:
    """Read one header, overridden by the extension records before it; None where it is damaged."""
    try:
        if int(block[148:156].strip(b" \0"), 8) not in _checksums(block):
            return None
        length = int(extended["size"]) if "size" in extended else _number(block[124:136])
    except ValueError:
        return None
    name = extended.get("path") or _text(block[:100])
    if "path" not in extended and block[257:263] == b"ustar\0" and block[345]:
        name = f"{_text(block[345:500])}/{name}"
    is_sparse = any(key.startswith("GNU.sparse") for key in extended)
    return _Header(name, length, block[156:157], is_sparse) if length >= 0 else None


def _checksums(block: bytes) -> tuple[int, ...]:
    """The sum of the header's bytes with the checksum itself as spaces; some old writers summed signed bytes."""
    unsigned = sum(block) - sum(block[148:156]) + 256
    if block.isascii():
        return (unsigned,)
    high = sum(byte > 127 for byte in block[:148] + block[156:])
    return (unsigned, unsigned - 256 * high)


def _number(field: bytes) -> int:
    """Octal, or GNU's base 256 for what octal cannot hold."""
    if field[0] & 0x80:
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:])
    return int(field.split(b"\0")[0].strip() or b"0", 8)


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode(errors="backslashreplace")


def _extension(kind: bytes, body: bytes) -> dict[str, str]:
    """PAX records `LENGTH KEY=VALUE`, or GNU's long name as the PAX key `path`; what makes no sense is left out."""
    if kind == b"L":
        return {"path": _text(body)}
    records: dict[str, str] = {}
    while body:
        length, _, rest = body.partition(b" ")
        if not length.isdigit() or not len(length) + 1 < int(length) <= len(body):
            break
        key, _, value = rest[: int(length) - len(length) - 1].removesuffix(b"\n").partition(b"=")
        records[key.decode(errors="backslashreplace")] = value.decode(errors="backslashreplace")
        body = body[int(length) :]
    return records
