"""Ends a training that hangs or has lost a process: on every rank, within a minute of knowing, with the reason.

A thread on every rank, with a key-value store of its own (rank 0 serves it), so that it needs neither the main thread
nor the training's collectives, which are what hangs. Every two seconds each rank gives a sign of life, looks whether
the rank before it gave one, whether its own global batch takes too long, and whether some rank has posted the end. Then
every rank writes the stacks of its threads, and ends.

Seen with torch 2.15: when a rank is killed, gloo fails on the others at once ("Connection closed by peer"), NCCL waits
for its ten minutes, and `accelerate launch` sends SIGTERM, which a training takes for preemption. None of them says who
was lost, nor why: the first to post is believed. A store's client waits for ever where a cable is pulled, or the host
of rank 0 goes dark: nothing closes the connection. So whoever asks the store waits for a limited time.
"""

import faulthandler
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from ldm_scale.core import runtime

BEAT_S = 2.0
"""Seconds between two signs of life."""
SILENT_S = 40.0
"""Seconds without one after which a rank counts as lost; Python that holds its lock for long gives none."""

_SUSPECT_S = 3 * BEAT_S  # the same, once a collective has failed here
_ANSWER_S = 10.0  # that the store may take
_TELL_S = 10.0  # that `on_end` may take
_END = "end"
_NO_STORE = "rank 0 was lost"
_LOSS = re.compile(r"^(rank \d+( on \S+)? was lost|(torch\.|rank \d+ on \S+: )?AcceleratorError): ", re.MULTILINE)

log = runtime.logger(__name__)

Answer = TypeVar("Answer")


def is_loss(reason: str) -> bool:
    """Whether a training ended for want of a process or its GPU (such as an ECC error), and may go on without it."""
    return _LOSS.search(reason) is not None


class Watchdog:
    """Watches one training in this process, and its peers. Collective to make, and to close."""

    def __init__(self, stacks: Path, *, minutes: float, phase_minutes: float, on_end: Callable[[str], None]) -> None:
        """Begin to watch, in a phase that ends at the first `beat`.

        stacks         directory for `rank{r}.txt`
        minutes        longest time of one global batch; 0 for any time
        phase_minutes  the same for a phase, and for the start
        on_end         told the reason before the process ends: on rank 0, and where rank 0 is lost on every rank
        """
        self._stacks, self._on_end = stacks, on_end
        self._limits = {"": 60 * minutes, "phase": 60 * phase_minutes}
        self._rank, self._world = runtime.rank(), runtime.world()
        self._doing = ("start", time.monotonic())
        self._before = (self._rank - 1) % self._world
        self._last_sign, self._signed, self._answered = b"", time.monotonic(), time.monotonic()
        self._failing = False
        self._closing = threading.Event()
        self._reason = ""
        self._store = _store() if self._world > 1 else None
        self._give_sign()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def beat(self) -> None:
        """A global batch is done."""
        self._doing = ("", time.monotonic())

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Something that may take much longer than a global batch happens inside."""
        (before, _), self._doing = self._doing, (name, time.monotonic())
        try:
            yield
        finally:
            self._doing = (before, time.monotonic())

    def explained(self, error: Exception) -> str:
        """What made another rank end, and this error follow from; empty where it all began here. Tells the others."""
        if self._store is None:
            return ""
        self._failing = True
        if type(error) is RuntimeError or isinstance(error, dist.DistError):  # so a collective fails without a peer
            self._thread.join(2 * _SUSPECT_S)  # it ends when it has a reason
        own = f"{type(error).__name__}: {error}"
        reason = self._reason or self._posted(f"rank {self._rank} on {socket.gethostname()}: {own}")
        if self._rank == 0:
            time.sleep(2 * BEAT_S)  # the others read it from here
        return "" if reason.endswith(own) else reason

    def close(self) -> None:
        """Stop watching, when every rank has done its work."""
        with self.phase("end"):  # some may have more of it
            runtime.barrier()
        self._closing.set()
        self._thread.join()
        runtime.barrier()  # the store is there until nobody asks it

    def _watch(self) -> None:
        while not self._closing.wait(BEAT_S if self._store is not None else min(BEAT_S, self._limit() / 4 or BEAT_S)):
            if reason := self._trouble():
                self._reason = reason
                if not self._failing:  # else the main thread ends the process, and waits for the reason in `explained`
                    self._end(reason)
                return

    def _trouble(self) -> str:
        """Why to end; empty where all is well."""
        overdue = self._overdue()
        if self._store is None:
            return overdue
        try:
            ended, lost = _within(_ANSWER_S, self._talk)
            self._answered = time.monotonic()
        except (RuntimeError, TimeoutError):  # torch's DistError and its kin
            silent = time.monotonic() - self._answered > self._silent_s() and not self._closing.is_set()
            return overdue or (f"{_NO_STORE}: it does not answer rank {self._rank}" if silent else "")
        return ended or (self._posted(overdue or lost) if overdue or lost else "")

    def _talk(self) -> tuple[str, str]:
        """A sign of life for a reason that some rank has posted, and for whether the rank before this one is silent."""
        assert self._store is not None
        self._give_sign()
        if self._store.check([_END]):
            return self._store.get(_END).decode(), ""
        return "", self._lost()

    def _overdue(self) -> str:
        phase, since = self._doing
        seconds, limit = time.monotonic() - since, self._limit()
        if not limit or seconds < limit:
            return ""
        what = f"the phase {phase!r}" if phase else "a global batch"
        key = "guard.phase_minutes" if phase else "guard.watchdog_minutes"
        return (
            f"rank {self._rank} on {socket.gethostname()} hangs: {what} takes longer than {key}={limit / 60:g}. Stacks "
            f"of every rank: {self._stacks}"
        )

    def _limit(self) -> float:
        return self._limits["phase" if self._doing[0] else ""]

    def _silent_s(self) -> float:
        return _SUSPECT_S if self._failing else SILENT_S

    def _give_sign(self) -> None:
        if self._store is not None:
            self._store.set(f"sign/{self._rank}", f"{time.time()} {socket.gethostname()}")

    def _lost(self) -> str:
        """Whether the rank before this one is silent."""
        assert self._store is not None
        sign = self._store.get(f"sign/{self._before}")
        if sign != self._last_sign:
            self._last_sign, self._signed = sign, time.monotonic()
        seconds = time.monotonic() - self._signed
        if seconds < self._silent_s():
            return ""
        host = sign.decode().split()[-1]
        return f"rank {self._before} on {host} was lost: no sign of life for {seconds:.0f} s"

    def _posted(self, reason: str) -> str:
        """Post a reason, unless there is one already; returns the one that stands."""
        store = self._store
        assert store is not None
        try:
            return _within(_ANSWER_S, lambda: store.compare_set(_END, "", reason).decode())
        except (RuntimeError, TimeoutError):
            return reason

    def _end(self, reason: str) -> None:
        log.error("%s", reason)
        with suppress(OSError):
            self._stacks.mkdir(parents=True, exist_ok=True)
            with open(self._stacks / f"rank{self._rank}.txt", "w") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {socket.gethostname()}: {reason}\n\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        if self._rank == 0 or reason.startswith(_NO_STORE):
            telling = threading.Thread(target=self._on_end, args=(reason,), daemon=True)  # a disk may be what hangs
            telling.start()
            telling.join(_TELL_S)
        if self._world > 1:
            time.sleep(2 * BEAT_S)  # the others read the reason first, and write what they are at
        os._exit(1)


def _within(seconds: float, ask: Callable[[], Answer]) -> Answer:
    """What `ask` returns; TimeoutError where that takes longer, and its thread ends with the process, if not before."""
    answer: Future[Answer] = Future()

    def run() -> None:
        try:
            answer.set_result(ask())
        except Exception as error:
            answer.set_exception(error)

    threading.Thread(target=run, name="watchdog asks", daemon=True).start()
    return answer.result(seconds)


def _store() -> TCPStore:
    """One for the watchdogs alone, served by rank 0."""
    where: list[str | int] = [os.environ["MASTER_ADDR"], 0]
    timeout = timedelta(seconds=_ANSWER_S)
    served = None
    if runtime.is_main():
        served = TCPStore(str(where[0]), 0, is_master=True, wait_for_workers=False, timeout=timeout)
        where[1] = served.port
    dist.broadcast_object_list(where, src=0)
    return served or TCPStore(str(where[0]), int(where[1]), is_master=False, timeout=timeout)
