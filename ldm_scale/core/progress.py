"""A progress bar with an ETA on long work: a live bar on a terminal, a line now and then in a log file."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ldm_scale.core import runtime

_SECONDS_BETWEEN_LINES = 20.0


class Bar:
    """How far some work has come; speaks on rank 0 only."""

    def __init__(self, what: str, total: int, done: int, unit: str) -> None:
        self.what, self.total, self.done, self.unit = what, total, done, unit
        self._first, self._started, self._spoke = done, time.monotonic(), time.monotonic()

    def move(self, done: int, note: str = "") -> None:
        """Say that `done` of `total` is complete, with a short `note`."""
        self.done = done
        self._show(note)

    def advance(self, count: int, note: str = "") -> None:
        """Say that `count` more is complete."""
        self.move(self.done + count, note)

    def _show(self, note: str) -> None:
        """Nothing: ranks other than 0 keep quiet."""


class _Lines(Bar):
    def _show(self, note: str) -> None:
        now = time.monotonic()
        if now - self._spoke < _SECONDS_BETWEEN_LINES and self.done != self.total:  # a total may be an estimate
            return
        self._spoke = now
        rate = (self.done - self._first) / max(now - self._started, 1e-9)
        left = max(self.total - self.done, 0) / rate if rate else 0.0
        text = f"{self.what}: {self.done:,}/{self.total:,} {self.unit}, {rate:,.0f}/s, {left:,.0f} s left  {note}"
        print(text.rstrip(), file=sys.stderr, flush=True)


class _Live(Bar):
    def __init__(self, progress: Progress, what: str, total: int, done: int, unit: str) -> None:
        super().__init__(what, total, done, unit)
        self._progress = progress
        self._task = progress.add_task(what, total=total, completed=done, note="", count="")
        self._show("")

    def _show(self, note: str) -> None:
        count = f"{self.done:,}/{self.total:,} {self.unit}"
        self._progress.update(self._task, completed=self.done, note=note, count=count)


@contextmanager
def bar(what: str, total: int, *, done: int = 0, unit: str = "images") -> Iterator[Bar]:
    """Show the progress of `what` from `done` to `total`, counted in `unit`."""
    console = Console(stderr=True)
    if not runtime.is_main():
        yield Bar(what, total, done, unit)
    elif not console.is_terminal:
        yield _Lines(what, total, done, unit)
    else:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            TextColumn("{task.fields[count]}"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=console, refresh_per_second=4) as progress:
            yield _Live(progress, what, total, done, unit)
