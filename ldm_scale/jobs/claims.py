"""Who works on what, among processes of any number and on any hosts that share a folder and nothing else.

A claim is a file that only one process can create. Its owner touches it now and then; one that is no longer touched, or
whose process on this host is gone, may be taken over. Two owners at once are possible (a host that slept, a network
that hung): what is done under a claim must be harmless when it is done twice.
"""

import json
import os
import secrets
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ldm_scale.core import storage

STALE_S = 300.0
"""Seconds without a sign of life after which a claim is free; network file systems show a new time a minute late."""
_BEATS = 10  # signs of life in that time
_ATTEMPTS = 10  # to create a file in a folder that others remove when they leave


class Claims:
    """What this process has claimed in `folder`. As a context manager it gives everything back at the end."""

    def __init__(self, folder: str | Path, *, stale_s: float = STALE_S) -> None:
        self.folder = Path(folder)
        self.owner = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        self._stale_s = stale_s
        self._held: set[str] = set()
        self._seen: dict[str, tuple[int, float]] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="claims", daemon=True)
        self._thread.start()

    def take(self, name: str) -> bool:
        """Claim `name`; False where another process has it."""
        if not self._create(name):
            if not self._is_stale(name):
                return False
            self._path(name).unlink(missing_ok=True)
            if not self._create(name):
                return False
        self._held.add(name)
        return True

    def holds(self, name: str) -> bool:
        """Whether `name` is still this process's, and was not taken over while it seemed dead."""
        return name in self._held and self.said(name).get("owner") == self.owner

    def said(self, name: str) -> dict[str, Any]:
        """What the claim of `name` says of its owner; nothing where it is gone, or its owner died while writing it."""
        try:
            said: dict[str, Any] = json.loads(self._path(name).read_bytes())
            return said
        except (OSError, ValueError):
            return {}

    def lives(self, name: str) -> bool | None:
        """Whether the owner of `name` is a living process; None where it is none of this host's, so only beats tell."""
        said = self.said(name)
        return _is_alive(said["pid"], said["began"]) if here().items() <= said.items() else None

    def release(self, name: str) -> None:
        """Give `name` back."""
        if self.holds(name):
            self._path(name).unlink(missing_ok=True)
        self._held.discard(name)

    def sweep(self) -> None:
        """Remove what processes left behind that are gone."""
        for path in self.folder.glob("*.claim"):
            if self.take(path.stem):
                self.release(path.stem)

    def close(self) -> None:
        """Give everything back."""
        self._stop.set()
        self._thread.join()
        for name in list(self._held):
            self.release(name)
        with suppress(OSError):  # others still work here
            self.folder.rmdir()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.claim"

    def _create(self, name: str) -> bool:
        """Create the claim where there is none; with its content, so that nobody sees it empty for long."""
        descriptor = self._new_file(name)
        if descriptor is None:
            return False
        pid = os.getpid()
        said = {"owner": self.owner, **here(), "pid": pid, "began": _began(pid), "time": time.time()}
        with os.fdopen(descriptor, "wb") as file:
            file.write(storage.canonical_json(said))
        return True

    def _new_file(self, name: str) -> int | None:
        """A descriptor of the claim's file, created; None where there is one."""
        for left in reversed(range(_ATTEMPTS)):
            try:
                return os.open(self._path(name), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
            except FileExistsError:
                return None
            except FileNotFoundError:  # nobody is here yet, or the last to leave removed the folder just now
                if not left:
                    raise
                with suppress(FileExistsError, FileNotFoundError):
                    self.folder.mkdir(parents=True)
        raise AssertionError("the last attempt returns or raises")

    def _is_stale(self, name: str) -> bool:
        """Judged by this process's own clock from when it first saw the last sign of life: clocks of hosts differ."""
        if self.lives(name) is False:
            return True
        try:
            beat = self._path(name).stat().st_mtime_ns
        except FileNotFoundError:
            return True
        last, since = self._seen.get(name, (None, 0.0))
        if last != beat:
            since = time.monotonic()
            self._seen[name] = beat, since
        return time.monotonic() - since > self._stale_s

    def _beat(self) -> None:
        while not self._stop.wait(self._stale_s / _BEATS):
            for name in list(self._held):
                with suppress(OSError):  # taken over just now, or the file system is away
                    if self.holds(name):
                        os.utime(self._path(name))


def here() -> dict[str, str]:
    """Where a process number means one process: a host, and of it this boot and this container."""
    kernel = ""
    with suppress(OSError):  # another system than Linux
        kernel = f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    return {"host": socket.gethostname(), "kernel": kernel}


def _is_alive(pid: int, began: str) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return _began(pid) == began


def _began(pid: int) -> str:
    """When a process began, in ticks of its kernel; empty where it ended, or the system does not tell."""
    with suppress(OSError):
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if state == "Z" else rest[18]  # a zombie has ended; proc(5): the 22nd field
    return ""
