"""What somebody should be told of at once: decided here, from a run's events, and nowhere else.

Every alert is a line of the run's `alerts.jsonl`. W&B is sent it when it is online, and a command of the user's gets it
on its standard input: these two no kind of alert twice within ten minutes.
"""

import json
import logging
import math
import os
import signal
import subprocess
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

QUIET_S = 600.0
"""Seconds in which a second alert of the same kind is written down only."""

_TEXT = 2000  # characters: a pipe takes the whole alert at once
_COMMAND_S = 60.0  # that a command may take
_LAST_S = 10.0  # that the end of a training waits for it
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Alert:
    """One thing to tell."""

    kind: str
    """The event's."""
    level: Literal["info", "warn", "error"]
    text: str


def alert_of(kind: str, fields: Mapping[str, Any]) -> Alert | None:
    """What to tell of an event; None where nobody needs to know.

    A training that ends with an error says why in `failed`: too many bad samples, divergence, no room for too long, a
    hang, a lost rank.
    """
    match {"event": kind, **fields}:
        case {"event": "failed", "reason": reason}:
            alert = Alert(kind, "error", reason)
        case {"event": "save_failed", "reason": reason}:
            alert = Alert(kind, "error", f"training goes on without this checkpoint: {reason}")
        case {"event": "trouble", "action": "skip" | "rollback" as action, "start": start, "why": why}:  # others fail
            alert = Alert(kind, "warn", f"in the global batch after {start:,} images {why}; guard.policy={action}")
        case {"event": "straggler", "rank": rank, "host": host, "own_ms": own_ms, "median_ms": median_ms}:
            work = f"{own_ms:.0f} ms of work in a step, the median rank {median_ms:.0f} ms"
            alert = Alert(kind, "warn", f"rank {rank} on {host} keeps the others waiting: {work}")
        case {"event": "resume", "damaged": [_, *_] as damaged}:
            alert = Alert(kind, "warn", f"damaged checkpoints were passed over: {'; '.join(damaged)}")
        case {"event": "stopped", "reason": reason}:
            alert = Alert(kind, "info", reason)
        case {"event": "preempted"}:
            alert = Alert(kind, "info", "told to stop by a signal, and saved; the launcher starts it again")
        case _:
            return None
    return replace(alert, text=alert.text[:_TEXT])


class AlertCommand:
    """A command line of the user's, run by a shell for alerts. Nothing waits for it, and its failure is a warning."""

    def __init__(self, command: str | None) -> None:
        self._command = command
        self._told: dict[str, float] = {}
        self._running: list[threading.Thread] = []

    def tell(self, alert: Mapping[str, Any]) -> None:
        """Start the command with a line of alerts.jsonl on its standard input; it has a minute."""
        now, kind = time.monotonic(), alert["alert"]
        if self._command is None or now - self._told.get(kind, -math.inf) < QUIET_S:
            return
        self._told[kind] = now
        try:
            process = _started(self._command, json.dumps(alert).encode() + b"\n")
        except OSError as error:
            _LOG.warning("tracker.alert_command: %s", error)
            return
        self._running.append(threading.Thread(target=_watch, args=(process,), daemon=True))
        self._running[-1].start()

    def close(self) -> None:
        """Give what is running a few seconds: some schedulers kill it when the training ends."""
        until = time.monotonic() + _LAST_S
        for thread in self._running:
            thread.join(max(0.0, until - time.monotonic()))


def _started(command: str, said: bytes) -> subprocess.Popen[bytes]:
    """In a session of its own: a signal to the training is none to it."""
    out, into = os.pipe()  # a temporary file would need room, and a full disk is what some alerts are about
    try:
        os.write(into, said)
        return subprocess.Popen(command, shell=True, stdin=out, start_new_session=True)
    finally:
        os.close(into)
        os.close(out)


def _watch(process: subprocess.Popen[bytes]) -> None:
    try:
        code = process.wait(_COMMAND_S)
    except subprocess.TimeoutExpired:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        code = process.wait()
    if code != 0:
        _LOG.warning("tracker.alert_command ended with %d", code)
