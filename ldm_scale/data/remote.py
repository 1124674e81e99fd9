"""Tars behind a URL: read by blocks that are kept in memory for a while, or fetched whole into a folder on this host.

Blocks suit a set that is larger than the local disk: the order reads runs of samples that lie together, over a window
of time, so that each byte crosses the network about once while the window's blocks fit into memory. A cache of whole
tars suits a set that fits on the disk: later epochs, and other processes of the host, read it there. Knows nothing of
samples or indexes.
"""

import fcntl
import logging
import mmap
import os
import queue
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol
from weakref import WeakSet

import numpy as np

from ldm_scale.core import storage

BLOCK = 1 << 20
"""Bytes that are fetched together: long enough for full speed, short beside the runs of samples that an order reads."""

_WASTE = 4  # times what is read
_STREAMS = 16  # requests at once; one connection to a store is slow, many are not
_FETCHES = 3  # of a tar that arrives with other bytes than it should have
_SIGN_OF_USE_S = 10.0
_MINE = re.compile(r"ldm-[0-9a-f]{40}\.(tar|part)")
_LOCK = "ldm-cache.lock"
_log = logging.getLogger(__name__)


class RemoteTar(Protocol):
    """The bytes of one remote tar."""

    def read(self, offset: int, length: int) -> bytes:
        """Some of them."""
        ...

    def view(self, offset: int, length: int) -> np.ndarray:
        """Some of them, (length,) uint8, read only; without a copy where that can be."""
        ...

    def announce(self, offset: int, length: int) -> None:
        """Say that they will be read soon; returns at once."""
        ...


class RemoteReader:
    """How this process reads remote tars: through `cache`, or by `blocks` where there is none."""

    def __init__(self, *, cache: "TarCache | None" = None, blocks_gb: float = 2.0) -> None:
        self.cache, self._blocks = cache, Blocks(int(blocks_gb * 1e9))

    def open(self, url: str, size: int, sha256: str) -> RemoteTar:
        """A tar of `size` bytes with this digest."""
        if self.cache is not None:
            return CachedTar(self.cache, url, sha256)
        return BlockTar(url, size, self._blocks)


@dataclass(slots=True)
class _Block:
    """One block, on its way or here."""

    data: "Future[bytes]"
    size: int


class Blocks:
    """Blocks of any number of tars in memory, the least recently used out; fetched by threads, each block once."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.fetched, self.read = 0, 0
        """Bytes so far: what crossed the network, and what readers asked for."""
        self._warned = False
        self._kept: OrderedDict[tuple[str, int], _Block] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()
        self._asked: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []

    def get(self, url: str, number: int, size: int) -> "Future[bytes]":
        """Block `number` of a tar of `size` bytes; fetched where it is not here or on its way."""
        name, start = (url, number), number * BLOCK
        with self._lock:
            if name in self._kept:
                self._kept.move_to_end(name)
                return self._kept[name].data
            block = _Block(Future(), min(BLOCK, size - start))
            self._kept[name] = block
            self._bytes += block.size
            self.fetched += block.size
            self._make_room()
            self._warn_of_waste()
            self._start_threads()
        self._asked.put(lambda: self._fetch(name, block, start))
        return block.data

    def _fetch(self, name: tuple[str, int], block: _Block, start: int) -> None:
        try:
            block.data.set_result(storage.read_range(name[0], start, start + block.size))
        except BaseException as error:
            self._forget(name, block)  # so that whoever asks next tries again
            block.data.set_exception(error)

    def _forget(self, name: tuple[str, int], block: _Block) -> None:
        with self._lock:
            if self._kept.get(name) is block:
                del self._kept[name]
                self._bytes -= block.size

    def _make_room(self) -> None:
        """Those that are still on their way stay: they would be asked for again."""
        for name in list(self._kept):
            if self._bytes <= self.max_bytes:
                return
            if self._kept[name].data.done():
                self._bytes -= self._kept.pop(name).size

    def _warn_of_waste(self) -> None:
        if self._warned or self.fetched < _WASTE * self.read + 2 * self.max_bytes:
            return
        self._warned = True
        _log.warning(
            "%.1f GB of remote shards were fetched to read %.1f GB: blocks leave memory too early. Set "
            "data.order=window, allow more than data.blocks_gb=%g, or give data.cache_dir on a disk that holds the set",
            self.fetched / 1e9, self.read / 1e9, self.max_bytes / 1e9,
        )  # fmt: skip

    def _start_threads(self) -> None:
        """Daemons, since an ending process must not wait for blocks that were only announced."""
        while len(self._threads) < _STREAMS:
            self._threads.append(threading.Thread(target=self._work, name="blocks", daemon=True))
            self._threads[-1].start()

    def _work(self) -> None:
        while True:
            self._asked.get()()


class BlockTar:
    """A tar read by blocks."""

    def __init__(self, url: str, size: int, blocks: Blocks) -> None:
        self._url, self._size, self._blocks = url, size, blocks

    def read(self, offset: int, length: int) -> bytes:
        return self.view(offset, length).tobytes()

    def view(self, offset: int, length: int) -> np.ndarray:
        self._blocks.read += length  # unlocked: a few lost counts do not matter
        coming = self._coming(offset, length)
        data = [np.frombuffer(block.result(), np.uint8) for block in coming]
        joined = data[0] if len(data) == 1 else np.concatenate([np.empty(0, np.uint8), *data])
        start = offset % BLOCK
        return joined[start : start + length]

    def announce(self, offset: int, length: int) -> None:
        self._coming(offset, length)

    def _coming(self, offset: int, length: int) -> "list[Future[bytes]]":
        numbers = range(offset // BLOCK, -(-(offset + length) // BLOCK))
        return [self._blocks.get(self._url, number, self._size) for number in numbers]


class TarCache:
    """Whole tars in a folder that all processes of this host share, at most `max_gb` together.

    A copy is named by the digest of its tar's URL, version and size, and appears when it is whole and verified. Where
    room is needed the least recently used ones go; a file that is not named like a copy is never touched.
    """

    def __init__(self, folder: str | Path, max_gb: float) -> None:
        self.folder, self.max_bytes = Path(folder), int(max_gb * 1e9)
        self._open: WeakSet[CachedTar] = WeakSet()
        self._lock = threading.Lock()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / _LOCK).touch()
        except OSError as error:
            raise ValueError(
                f"data.cache_dir={folder} cannot be written ({error.strerror}): give a folder on a local disk"
            ) from error

    def open(self, url: str, sha256: str | None = None) -> IO[bytes]:
        """The local copy of a tar, fetched where it is not there.

        sha256  what the bytes must have where they are fetched; None where nobody knows
        raises  OSError naming the URL where it cannot be fetched, or the folder where its disk is full
                ValueError where other bytes come, or data.cache_gb is too small for it
        """
        state = storage.remote_state(url)
        if state.size > self.max_bytes:
            raise ValueError(
                f"{url} has {state.size / 1e9:.3f} GB, data.cache_gb={self.max_bytes / 1e9:g}: allow more than the "
                "largest shard, or leave data.cache_dir out to read by blocks"
            )
        copy = self.folder / f"ldm-{storage.digest([url, state.version, state.size])[:40]}.tar"
        while True:
            try:
                file = open(copy, "rb", buffering=0)  # noqa: SIM115 (the caller's)
                _mark_used(file)
                return file
            except FileNotFoundError:
                self._fetch(url, state.size, sha256, copy)

    def register(self, tar: "CachedTar") -> None:
        """Have `tar` let go of its copy once that is deleted, since a deleted file keeps its room while it is open."""
        with self._lock:
            self._open.add(tar)

    def _fetch(self, url: str, size: int, sha256: str | None, copy: Path) -> None:
        """Fetch one tar, unless another process is doing it, or has just done it; then look again."""
        part = copy.with_suffix(".part")
        with _claimed(part) as file:
            if file is None or copy.exists():
                return
            self._reserve(file, size)
            fetch(url, size, file, sha256)
            os.fsync(file.fileno())
            os.replace(part, copy)

    def _reserve(self, part: IO[bytes], size: int) -> None:
        """Make room for `size` bytes, and take it.

        Other processes see it taken: a file that is being fetched has its full length from the beginning.
        """
        while True:
            with open(self.folder / _LOCK, "rb") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if self._evict(self.max_bytes - size):
                    try:
                        if size:
                            os.posix_fallocate(part.fileno(), 0, size)
                        return
                    except OSError as error:
                        raise OSError(
                            f"no room for {size / 1e9:.3f} GB in data.cache_dir={self.folder} ({error.strerror}): "
                            f"data.cache_gb={self.max_bytes / 1e9:g} promises more than the disk has"
                        ) from error
            time.sleep(0.2)  # until others have fetched what the rest of the room is promised to

    def _evict(self, allowed: int) -> bool:
        """Delete copies, the least recently used first, until those left have `allowed` bytes; whether that is so."""
        files = {entry.name: entry.stat() for entry in os.scandir(self.folder) if _MINE.fullmatch(entry.name)}
        total = sum(stat.st_size for stat in files.values())
        for name in sorted(files, key=lambda name: files[name].st_mtime_ns):
            if total <= allowed:
                break
            if _remove(self.folder / name):
                total -= files[name].st_size
        with self._lock:
            for tar in self._open:
                tar.let_go_if_deleted()
        return total <= allowed


@contextmanager
def _claimed(part: Path) -> Iterator[IO[bytes] | None]:
    """The file that a tar is fetched into, locked; None where another process had it meanwhile. Gone in the end.

    The lock ends with its process, so that a killed one leaves nothing that others wait for.
    """
    with os.fdopen(os.open(part, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if not _is_at(file, part):
            yield None
            return
        os.ftruncate(file.fileno(), 0)
        try:
            yield file
        finally:
            if _is_at(file, part):
                part.unlink()


def _is_at(file: IO[bytes], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def _mark_used(file: IO[bytes]) -> None:
    now = time.time_ns()  # left to itself, a file system counts in ticks of milliseconds
    os.utime(file.fileno(), ns=(now, now))


def _remove(path: Path) -> bool:
    """Delete a copy, or a file that nobody fetches into any more; whether it is gone."""
    try:
        with open(path, "rb") as file:
            if path.suffix == ".part":
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
    except BlockingIOError:
        return False
    except FileNotFoundError:
        pass
    return True


def fetch(url: str, size: int, file: IO[bytes], sha256: str | None = None) -> None:
    """Write a remote tar of `size` bytes to a local file, by several streams.

    raises  OSError where it cannot be read; ValueError where its bytes have another digest, time and again
    """

    def piece(start: int) -> None:
        os.pwrite(file.fileno(), storage.read_range(url, start, min(start + storage.PIECE, size)), start)

    for _ in range(_FETCHES):
        with ThreadPoolExecutor(_STREAMS, thread_name_prefix="fetch") as pool:
            try:
                list(pool.map(piece, range(0, size, storage.PIECE)))
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
        if sha256 is None or (found := storage.sha256_file(f"/proc/self/fd/{file.fileno()}")) == sha256:
            return
    raise ValueError(
        f"{url} has sha256 {found}, its index says {sha256}: the tar was replaced or damaged; run data_tools.verify on "
        "it, or delete its index and run data_tools.index"
    )


@dataclass(frozen=True, slots=True)
class _Copy:
    """An open local copy."""

    file: IO[bytes]
    mapped: np.ndarray
    """Its bytes, (size,) uint8."""

    @classmethod
    def of(cls, file: IO[bytes]) -> "_Copy":
        if os.fstat(file.fileno()).st_size == 0:
            return cls(file, np.empty(0, np.uint8))
        return cls(file, np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8))

    def is_deleted(self) -> bool:
        return os.fstat(self.file.fileno()).st_nlink == 0


class CachedTar:
    """A tar read from its local copy, which is fetched again where it was deleted to make room."""

    def __init__(self, cache: TarCache, url: str, sha256: str) -> None:
        self._cache, self._url, self._sha256 = cache, url, sha256
        self._copy: _Copy | None = None
        self._sign_due = 0.0
        cache.register(self)

    def read(self, offset: int, length: int) -> bytes:
        return os.pread(self._current().file.fileno(), length, offset)

    def view(self, offset: int, length: int) -> np.ndarray:
        return self._current().mapped[offset : offset + length]

    def announce(self, offset: int, length: int) -> None:
        """Nothing: a whole tar for some samples that may not come for long would push out what is read now."""

    def let_go_if_deleted(self) -> None:
        copy = self._copy
        if copy is not None and copy.is_deleted():
            self._copy = None

    def _current(self) -> _Copy:
        copy, now = self._copy, time.monotonic()
        if copy is not None and now >= self._sign_due:
            self._sign_due = now + _SIGN_OF_USE_S
            if copy.is_deleted():
                copy = None
            else:
                _mark_used(copy.file)
        if copy is None:
            self._copy = copy = _Copy.of(self._cache.open(self._url, self._sha256))
        return copy
