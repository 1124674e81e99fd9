"""One training at a time in a run directory, and one watch: a second one would take back what the first one writes.

The first to come has a claim there (jobs/claims.py: a file that it touches now and then, since locks are not to be
relied on where hosts share a file system) until its end. One that a dead process of this host left is taken over at
once; one of a host that died, or was lost, as soon as no sign of life came for a while: whoever comes next waits for
that, and is refused where signs go on.
"""

import time
from contextlib import suppress
from types import TracebackType
from typing import Self

from ldm_scale.core import runtime
from ldm_scale.core.run_dir import RunDir
from ldm_scale.jobs.claims import Claims
from ldm_scale.jobs.status import duration

STALE_S = 120.0
"""Seconds without a sign of life; one comes in each tenth of them, and is seen a minute later at most."""
_PATIENCE = 1.5  # times that: then whoever has the claim lives
_LOOK_S = 1.0

log = runtime.logger(__name__)


class Lease:
    """What rank 0 has of a run directory, as long as the block lasts."""

    def __init__(self, run_dir: RunDir, what: str, *, stale_s: float = STALE_S) -> None:
        """Take it where it is free, and there is such a directory.

        what  is to be alone there: `training`, `watch`
        """
        self._run_dir, self._what, self._patience_s = run_dir, what, _PATIENCE * stale_s
        self._claims = Claims(run_dir.claims, stale_s=stale_s) if runtime.is_main() else None
        self._held = self._claims is not None and run_dir.path.exists() and self._claims.take(what)
        self._told = False

    @property
    def has_run(self) -> bool:
        """Whether there is a run in the directory, and it is this process that may say how it stands."""
        return self._held and any(path != self._run_dir.claims for path in self._run_dir.path.iterdir())

    def wait(self, preemption: runtime.Preemption) -> bool:
        """Wait until the directory is this process's; False where a signal came first. Collective.

        raises  ValueError on every rank where another process has it, and lives
        """
        until = time.monotonic() + self._patience_s
        while True:
            held, refusal = runtime.gathered(self._looked(until))[0]
            if refusal:
                raise ValueError(refusal)
            if held or preemption.agreed():
                return bool(held)
            time.sleep(_LOOK_S)

    def close(self) -> None:
        """Give it back, and leave no empty directory behind."""
        if self._claims is not None:
            self._claims.close()
            with suppress(OSError):  # a run is in it, or never was one
                self._run_dir.path.rmdir()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _looked(self, until: float) -> tuple[bool, str]:
        """Whether it is held now, and if it will not be, why."""
        if self._claims is None:
            return False, ""  # rank 0's word counts
        self._held = self._held or self._claims.take(self._what)
        said = self._claims.said(self._what)
        if self._held or not said:
            return self._held, ""
        owner = f"process {said['pid']} on {said['host']}, for {duration(time.time() - said['time'])}"
        if self._claims.lives(self._what) or time.monotonic() > until:
            return False, (
                f"{self._run_dir.path} has a {self._what} already: {owner}. One at a time: end that one first, or wait "
                "for its end"
            )
        if not self._told:
            log.warning("%s had a %s: %s. Waiting to see whether it lives", self._run_dir.path, self._what, owner)
            self._told = True
        return False, ""
