"""What a person asks of a training under way, by touching files in its run directory.

    touch RUN/control/save      write a checkpoint; the file goes when every byte of it is on disk
    touch RUN/control/sample    draw the grids of samples
    touch RUN/control/stop      save, and end as `stopped`, which no launcher starts again by itself

Rank 0 looks wherever the loop waits for the device anyway, which is at every log line at the latest, and what it finds
travels with the numbers that the guard sums over ranks: nobody is asked besides. A file stays until its wish is
fulfilled. So what was touched while nothing ran, or just before a kill, is not lost: the next launch finds it.
"""

import time
from enum import IntFlag

from ldm_scale.core import runtime
from ldm_scale.core.run_dir import RunDir
from ldm_scale.training.checkpoint_files import complete_ones, images_of

log = runtime.logger(__name__)


class Wish(IntFlag):
    """What is asked for; `RUN/control/` has a file of each one's name."""

    save = 1
    sample = 2
    stop = 4


NOTHING = Wish(0)


class Control:
    """The wishes of one run, as rank 0 sees them; on the other ranks there are none."""

    def __init__(self, run_dir: RunDir) -> None:
        self._run_dir = run_dir
        self._taken_up: dict[Wish, float] = {}
        self._pending: dict[Wish, int] = {}
        if runtime.is_main():
            run_dir.control.mkdir(parents=True, exist_ok=True)

    def wishes(self) -> Wish:
        """What was touched since it was last taken up."""
        self.settle()
        found = NOTHING
        for wish in Wish if runtime.is_main() else ():
            touched = self._touched(wish)
            if touched is not None and touched != self._taken_up.get(wish):
                found |= wish
        return found

    def take_up(self, wishes: Wish) -> dict[str, float | None]:
        """Take note that all ranks know of these; returns when each was touched, in seconds since the epoch."""
        times = {wish: self._touched(wish) for wish in wishes}
        self._taken_up |= {wish: at for wish, at in times.items() if at is not None}
        return {str(wish.name): at for wish, at in times.items()}

    def done(self, wishes: Wish, images_seen: int) -> None:
        """Everything was done about these, but for bytes of the checkpoint of `images_seen` that are under way."""
        for wish in wishes if runtime.is_main() else ():
            if wish is Wish.sample:
                self._remove(wish)
            else:
                self._pending[wish] = images_seen

    def settle(self) -> None:
        """Remove the files of wishes whose checkpoint is complete by now, or a later one."""
        newest = complete_ones(self._run_dir.checkpoints)[:1] if self._pending else []
        for wish in [wish for path in newest for wish, images in self._pending.items() if images <= images_of(path)]:
            del self._pending[wish]
            self._remove(wish)

    def reason(self) -> str:
        """Why the run was stopped, in words."""
        at = self._taken_up.get(Wish.stop, time.time())
        return f"asked by control/stop, touched {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(at))}"

    def _touched(self, wish: Wish) -> float | None:
        try:
            return (self._run_dir.control / str(wish.name)).stat().st_mtime
        except OSError:
            return None

    def _remove(self, wish: Wish) -> None:
        """A file that cannot be removed (another user's directory) is taken up again once it is touched again."""
        try:
            (self._run_dir.control / str(wish.name)).unlink(missing_ok=True)
        except OSError as error:
            log.warning("%s", error)
