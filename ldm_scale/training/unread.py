"""Samples that could not be read, or were removed: noted by the threads that read, written down by the loop.

A tracker is no matter for several threads, and only rank 0 has one. So every rank keeps what it met until the next log
line, where the main threads put it together.
"""

import threading
from collections import Counter
from typing import Any

from ldm_scale.core import runtime
from ldm_scale.tracking.tracker import Tracker

_NAMED = 8
"""Samples that every rank names between two log lines; the others are counted."""
_NAMED_IN_ALL = 64
"""Of those, how many one event does."""


class Unread:
    """Of this rank. Called by any thread with (key, reason, stream position), as a source's `on_bad`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._named: list[dict[str, Any]] = []
        self._new: Counter[str] = Counter()
        self._all: Counter[str] = Counter()

    def __call__(self, key: str, reason: str, position: int) -> None:
        with self._lock:
            self._new[reason] += 1
            if len(self._named) < _NAMED:
                self._named.append({"key": key, "reason": reason, "position": position, "rank": runtime.rank()})

    def __len__(self) -> int:
        """Samples that are not written down yet."""
        return self._new.total()

    def tell(self, tracker: Tracker, images_seen: int) -> None:
        """Write down what all ranks met. Collective."""
        self._write(tracker, images_seen, runtime.gathered(self._taken()))

    def tell_own(self, tracker: Tracker, images_seen: int) -> None:
        """Write down what this rank met: where a training fails, others may not come."""
        if len(self):
            self._write(tracker, images_seen, [self._taken()])

    def counts(self) -> dict[str, float]:
        """Samples of all ranks since the launch, by reason."""
        return {f"data/unread_{reason}": float(count) for reason, count in self._all.items()}

    def _taken(self) -> tuple[Counter[str], list[dict[str, Any]]]:
        with self._lock:
            taken = self._new, self._named
            self._new, self._named = Counter(), []
        return taken

    def _write(
        self, tracker: Tracker, images_seen: int, found: list[tuple[Counter[str], list[dict[str, Any]]]]
    ) -> None:
        reasons = sum((new for new, _ in found), Counter())
        samples = sorted((one for _, named in found for one in named), key=lambda one: one["position"])
        self._all += reasons
        tracker.event(images_seen, "unread", reasons=dict(reasons), samples=samples[:_NAMED_IN_ALL])
