"""Files, local or remote: naming sets of them, reading, writing so that nothing half-written is ever seen, digests."""

import glob
import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import fsspec

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


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
    if "*" in path or "?" in path:
        names = files.glob(path)
    elif files.isdir(path):
        names = files.glob(f"{path.rstrip('/')}/*{suffix}")
    else:
        names = [path]
    return [files.unstrip_protocol(name) for name in names]


def open_read(url: str) -> IO[bytes]:
    """Open a local or remote file for reading bytes."""
    if is_remote(url):
        return fsspec.open(url, "rb").open()
    return open(url.removeprefix("file://"), "rb")


@contextmanager
def atomic_write(path: str | Path) -> Iterator[IO[bytes]]:
    """Write a local file that appears whole or not at all: temporary name, fsync, rename."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
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
    """sha256 of a local file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
