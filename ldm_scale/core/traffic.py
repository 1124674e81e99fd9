"""What this process asked of stores behind a network, counted since it began: for the dashboard."""

import math
import threading
from dataclasses import dataclass, replace


@dataclass(kw_only=True, slots=True)
class Traffic:
    """Bytes and requests, of a process so far or between two moments."""

    read: int = 0
    """Bytes of remote shards that were wanted."""
    fetched: int = 0
    """Bytes that crossed the network, whoever wanted them."""
    retries: int = 0
    """Requests that were made again after an error that may pass."""

    @property
    def hits(self) -> float:
        """Share of the bytes that were read without being fetched for it; NaN where nothing was read."""
        return max(0.0, 1 - self.fetched / self.read) if self.read else math.nan

    def since(self, earlier: "Traffic") -> "Traffic":
        """What came after `earlier`."""
        return Traffic(
            read=self.read - earlier.read,
            fetched=self.fetched - earlier.fetched,
            retries=self.retries - earlier.retries,
        )


_total, _lock = Traffic(), threading.Lock()


def count(*, read: int = 0, fetched: int = 0, retries: int = 0) -> None:
    """Count something that was asked for, by any thread. Called for each sample."""
    with _lock:
        _total.read += read
        _total.fetched += fetched
        _total.retries += retries


def so_far() -> Traffic:
    """Since this process began."""
    with _lock:
        return replace(_total)
