"""Files, local or remote: naming sets of them, reading, writing so that nothing half-written is ever seen, digests.

A store across a network answers late, wrongly or not at all now and then: every read of one is tried again for about a
minute before it fails, and has exactly the length that was asked for.
"""

import glob
import hashlib
import io
import json
import logging
import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol, TypeVar, runtime_checkable

import fsspec

from ldm_scale.core import traffic

Result = TypeVar("Result")

PIECE = 1 << 23
"""Bytes that one request asks for at most: long enough for full speed, short enough to ask for again."""

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_ATTEMPTS = 8
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 20.0  # between attempts; doubles each time
_ANSWER_S = 60.0  # that one request may take
_WILL_NOT_PASS = (
    FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, LookupError, ValueError, TypeError,
    AttributeError, ImportError, RuntimeError, AssertionError, MemoryError,
)  # fmt: skip
_TRY_AGAIN = (408, 425, 429)  # statuses below 500 that may pass: timeout, too early, too many requests
_VERSION_FIELDS = ("ETag", "etag", "Last-Modified", "LastModified", "mtime", "created")
_jitter = random.SystemRandom()  # hosts that failed together shall not come back together
_log = logging.getLogger(__name__)  # on every rank: trouble with a network is often one host's


def is_remote(url: str) -> bool:
    """True for anything with a scheme other than file://."""
    return "://" in url and not url.startswith("file://")


def expand(source: str, suffix: str = ".tar") -> list[str]:
    """Every file that `source` names, sorted, each once.

    source  a directory, a brace range (`shards/{00000..00041}.tar`), a glob, one file, or a `.txt` file that lists
            one of these a line; local or any fsspec URL; several joined by `::`
    raises  FileNotFoundError naming the part that matches nothing: every number of a brace range and every line of a
            list must match. A remote file named in full is taken on trust. ValueError for `pipe:`, wherever it stands
    """
    return sorted({file for part in source.split("::") for file in _expand_one(part, suffix)})


def _expand_one(part: str, suffix: str) -> list[str]:
    part = part.removeprefix("file://")
    if part.startswith("pipe:"):
        raise ValueError(f"{part!r} would run a shell command; pipe: sources are refused")
    if match := _RANGE.search(part):
        files = [file for one in _members(part, match) for file in _expand_one(one, suffix)]
    elif part.endswith(".txt"):
        with open_read(part) as lines:
            entries = [line.strip() for line in lines.read().decode().splitlines() if line.strip()]
        files = [file for entry in entries for file in _expand_one(entry, suffix)]
    elif is_remote(part):
        files = _expand_remote(part, suffix)
    elif os.path.isdir(part):
        files = glob.glob(os.path.join(glob.escape(part), f"*{suffix}"))
    else:
        files = [part] if os.path.exists(part) else glob.glob(part)
    if not files:
        raise FileNotFoundError(f"{part!r} names no {suffix} file: give a directory, brace range, glob or list")
    return files


def _members(part: str, match: re.Match[str]) -> list[str]:
    """What the first brace range of `part` stands for; numbers as wide as the lower end."""
    low, high = match.groups()
    numbers = [f"{number:0{len(low)}d}" for number in range(int(low), int(high) + 1)]
    return [part[: match.start()] + number + part[match.end() :] for number in numbers]


def _expand_remote(url: str, suffix: str) -> list[str]:
    files, path = fsspec.core.url_to_fs(url)
    if "*" not in path and "?" not in path:
        if path.endswith(suffix):  # not asked about: there may be a hundred thousand, and http answers with the bytes
            return [files.unstrip_protocol(path)]
        path = f"{path.rstrip('/')}/*{suffix}"
    return [files.unstrip_protocol(name) for name in persist(url, lambda: files.glob(path, **_limit(files)))]


def open_read(url: str) -> IO[bytes]:
    """Open a local or remote file for reading bytes."""
    if is_remote(url):
        return io.BufferedReader(_RemoteFile(url), PIECE)
    return open(url.removeprefix("file://"), "rb")


def exists(url: str) -> bool:
    """Whether a local or remote file is there.

    raises  PermissionError for a local one; a store that may not be listed answers so for what it does not have
    """
    try:
        with open_read(url):
            return True
    except (FileNotFoundError, NotADirectoryError):
        return False
    except PermissionError:
        if is_remote(url):
            return False
        raise


@dataclass(frozen=True, slots=True)
class RemoteState:
    """What a store says of a file."""

    size: int
    version: str
    """The etag, or else the time of its last change; empty where the store says neither."""


def remote_state(url: str) -> RemoteState:
    """Ask for a remote file's length and version.

    raises  FileNotFoundError, PermissionError; OSError where the store does not answer
    """
    files, path = fsspec.core.url_to_fs(url)
    said = persist(url, lambda: files.info(path, **_limit(files)))
    if said["size"] is None:
        raise OSError(f"{url}: the server does not say how long it is")
    return RemoteState(int(said["size"]), next((str(said[field]) for field in _VERSION_FIELDS if field in said), ""))


def read_range(url: str, start: int, end: int) -> bytes:
    """Bytes `start` .. `end` - 1 of a remote file.

    raises  OSError where they do not come, or others do
    """
    files, path = fsspec.core.url_to_fs(url)

    def read() -> bytes:
        data = bytes(files.cat_file(path, start=start, end=end, **_limit(files)))
        if len(data) > end - start:
            raise ValueError(
                f"{url}: asked for {end - start} bytes, got {len(data)}: the server knows no byte ranges; copy the "
                "files to a disk, or serve them by one that does (S3, nginx, Apache)"
            )
        if len(data) < end - start:
            raise OSError(f"{len(data)} of {end - start} bytes came")
        traffic.count(fetched=len(data))
        return data

    return persist(url, read) if end > start else b""


def persist(url: str, read: Callable[[], Result]) -> Result:
    """What `read` returns; called again, after growing and random pauses, while what is wrong with `url` may pass.

    raises  OSError naming URL and attempts; at once what will not pass, such as FileNotFoundError
    """
    began, wait = time.monotonic(), _FIRST_WAIT_S
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            return read()
        except Exception as error:
            if not _may_pass(error):
                if isinstance(error, OSError) or _status(error) is None:
                    raise
                raise OSError(f"{url}: {error}") from error
            said = f"{type(error).__name__} {error}".rstrip()
            if attempt == _ATTEMPTS:
                spent = time.monotonic() - began
                raise OSError(f"{url}: {_ATTEMPTS} attempts in {spent:.0f} s, the last: {said}") from error
            _log.warning("%s: %s; attempt %d of %d follows", url, said, attempt + 1, _ATTEMPTS)
            traffic.count(retries=1)
        time.sleep(wait * _jitter.uniform(0.5, 1))
        wait = min(2 * wait, _LONGEST_WAIT_S)
    raise AssertionError("the last attempt returns or raises")


def _may_pass(error: Exception) -> bool:
    """Whether trying again may help. What the server answered counts more than what a library made of it."""
    cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
    status = _status(error) or _status(cause)
    if status is not None:
        return status >= 500 or status in _TRY_AGAIN
    return not isinstance(cause, _WILL_NOT_PASS)


@runtime_checkable
class _AiohttpError(Protocol):
    status: int


@runtime_checkable
class _BotocoreError(Protocol):
    response: Mapping[str, Any]


def _status(error: Exception) -> int | None:
    """The HTTP status in an error of a library that need not be installed."""
    match error:
        case _AiohttpError(status=int(status)):
            return status
        case _BotocoreError(response={"ResponseMetadata": {"HTTPStatusCode": int(status)}}):
            return status
    return None


def _limit(files: fsspec.AbstractFileSystem) -> dict[str, float]:
    """The argument that ends a request which hangs; file systems without a network do not know it."""
    return {"timeout": _ANSWER_S} if files.async_impl else {}


class _RemoteFile(io.RawIOBase):
    """A remote file, read by byte ranges."""

    def __init__(self, url: str) -> None:
        self.name, self._at, self._size = url, 0, remote_state(url).size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        data = self._next(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def readall(self) -> bytes:
        return b"".join(iter(lambda: self._next(PIECE), b""))

    def _next(self, length: int) -> bytes:
        start = min(self._at, self._size)
        data = read_range(self.name, start, min(start + length, start + PIECE, self._size))
        self._at = start + len(data)
        return data


@contextmanager
def atomic_write(path: str | Path) -> Iterator[IO[bytes]]:
    """Write a local file that appears whole or not at all: temporary name, fsync, rename."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    with atomic_write(path) as file:
        file.write(json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n")


def read_json(path: str | Path) -> Any:
    """Parse a local or remote JSON file."""
    with open_read(str(path)) as file:
        return json.load(file)


def canonical_json(value: Any) -> bytes:
    """One spelling of `value`, for digests: sorted keys, no spaces."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def digest(value: Any) -> str:
    """sha256 of a JSON-able value in its canonical spelling."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def sha256_file(path: str | Path) -> str:
    """sha256 of a local or remote file's bytes."""
    with open_read(str(path)) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
