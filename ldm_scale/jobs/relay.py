"""Follow a run directory into one W&B run, from a machine with internet: where the training runs there need be none.

    python -m ldm_scale.jobs.relay RUN [--once] [--every SECONDS]

Follows until the training is finished; `--once` sends what is there and ends. It reads `metrics.jsonl`, `events.jsonl`,
`media/`, `alerts.jsonl` and `evaluation/watched.jsonl`, and asks nothing of the training. Either may be killed and go
on meanwhile.

A row of W&B is everything of one `images_seen`, and that is its number. So W&B itself says how far it got: a relay that
was killed asks for the last row and goes on behind it, nothing twice and nothing left out. A row is sent when a later
one has begun, or the training runs no more: until then it may still get a score or a picture. W&B takes no row back; so
after a rollback, or a resume from before the last row, new ones come where training is beyond it. A training that was
stopped in the middle of an evaluation makes up for it when it goes on: those scores are a row behind their own, of the
same images seen. Events are counted: `events/resume` is 2 in the first row after the second resume.

Scores made beside the training (`evaluate.py watch=RUN`) come when rows of later images are sent already. Each line of
theirs is a row of its own: its images seen on the axis, and the next free number, of which a global batch leaves many.
W&B holds how many they are (`relay/beside`), and a killed relay asks for that too.
"""

import argparse
import fcntl
import json
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ldm_scale.core import storage
from ldm_scale.core.run_dir import RunDir, State
from ldm_scale.tracking.alerts import QUIET_S, Alert
from ldm_scale.tracking.artifacts import Artifacts, send_artifacts, staged_in
from ldm_scale.tracking.samples_table import newest_samples, samples_table
from ldm_scale.tracking.tracker import CAPTION_KEY
from ldm_scale.tracking.weights_and_biases import (
    EXIT_CODES,
    SAMPLES_TABLE,
    Place,
    Rows,
    may_go_online,
    send_alert,
    shown_picture,
)

_BESIDE = "relay/beside"
EVERY_S = 15.0
"""Seconds between two looks at the run directory."""


@dataclass(frozen=True, slots=True)
class Row:
    """Everything of one `images_seen`."""

    images_seen: int
    values: dict[str, float]
    pictures: dict[str, Path]


def rows_behind(run_dir: RunDir, last: int, *, whole: bool) -> Iterator[Row]:
    """The rows of a run behind the one of `last` images that will not change, in their order.

    whole  nothing is added any more: the newest one too
    """
    values: dict[int, dict[str, float]] = {}
    times: dict[int, float] = {}
    for line in run_dir.read_lines(run_dir.metrics):
        images_seen, times[images_seen] = line.pop("images_seen"), line.pop("time")
        values.setdefault(images_seen, {}).update({name: value for name, value in line.items() if value is not None})
    newest = max(values, default=-1)
    pictures: dict[int, dict[str, Path]] = {}  # those of a row are there before numbers of the next one
    for path in run_dir.media.glob("*/*.png"):
        name = shown_picture(path.parent.name.replace("__", "/"))
        pictures.setdefault(int(path.stem), {})[name] = path
    events = deque(run_dir.read_lines(run_dir.events))
    happened: Counter[str] = Counter()
    for images_seen in sorted(values.keys() | pictures.keys()):
        is_last = images_seen >= newest
        while events and (is_last or events[0]["time"] <= times.get(images_seen, 0.0)):
            happened[f"events/{events.popleft()['event']}"] += 1
        if images_seen > last and (whole or not is_last):
            yield Row(images_seen, {**values.get(images_seen, {}), **happened}, pictures.get(images_seen, {}))


class Relay:
    """One W&B run that is fed from a run directory. Its own files lie in `RUN/relay`."""

    def __init__(self, run_dir: RunDir) -> None:
        """Begin, or go on behind the last row that W&B has.

        raises  ValueError where there is no key, or no answer; what wandb raises
        """
        import wandb

        config, settings = storage.read_json(run_dir.config), wandb.setup().settings
        offline = settings.mode == "offline"
        if not offline and not may_go_online(settings):
            raise ValueError(
                f"no key for W&B at {settings.base_url}, or no answer from there: wandb login, or set "
                "WANDB_MODE=offline for files that wandb sync uploads"
            )
        self._run_dir, self._folder = run_dir, run_dir.path / "relay"
        self._cut = self._folder / "cut.json"  # images seen and names of the last row of a run that trained no more
        before = _summary(self._folder / "wandb") if offline else {}
        self._run = Place.of(config).open(run_dir, "offline" if offline else "online", config, folder=self._folder)
        self._run.define_metric(_BESIDE, hidden=True)
        self._last = max(before.get("_step", -1), self._run.starting_step - 1)
        self._beside = int(before.get(_BESIDE, self._run.summary.get(_BESIDE, 0)))
        self._global_batch: int = config["global_batch"]
        lines = [line for line in run_dir.read_lines(run_dir.metrics) if line["images_seen"] <= self._last]
        self.images = max((line["images_seen"] for line in lines), default=-1)
        """Images seen in the last row of the training that W&B has."""
        told = {"artifacts": "none", **config["tracker"]}  # runs begun before there was this key
        self._artifacts = Artifacts(told["artifacts"])
        self._closed = SAMPLES_TABLE in before or SAMPLES_TABLE in self._run.summary.keys()  # noqa: SIM118
        self._rows = Rows()
        for values in (*lines, *(line["scores"] for line in self._scores()[: self._beside])):
            self._rows.note(values)

    def forward(self, *, whole: bool) -> int:
        """Send what is there (see `rows_behind`); returns how many rows."""
        sent = self._forward_late(whole=whole)
        for row in rows_behind(self._run_dir, self._last, whole=whole):
            shown = _shown(row)
            if whole:
                storage.write_json(self._cut, [row.images_seen, [*shown]])
            self._send(row.images_seen, shown, number=row.images_seen)
            self.images, sent = row.images_seen, sent + 1
        if self.images >= 0:
            sent += self._forward_scores(whole=whole)
        self._forward_alerts()
        return sent

    def close(self, state: State) -> None:
        """Send what a finished training leaves, wait until everything is sent, and say how the training stands."""
        if state == "finished" and not self._closed:
            if grids := newest_samples(self._run_dir):
                with staged_in(self._folder / "wandb"):
                    self._send(int(grids[0].stem), {SAMPLES_TABLE: samples_table(grids)}, number=self._last + 1)
            send_artifacts(self._run, self._run_dir, self._artifacts, self.images)
        self._run.finish(exit_code=EXIT_CODES[state])

    def _send(self, images_seen: int, values: Mapping[str, Any], *, number: int) -> None:
        self._rows.note(values)
        self._rows.send(self._run, images_seen, values, number=number)
        self._last = number

    def _forward_late(self, *, whole: bool) -> int:
        """Send what came, after all, to the last row of a training that had stopped; returns how many rows."""
        if not self._cut.exists():
            return 0
        images_seen, names = storage.read_json(self._cut)
        row = next(rows_behind(self._run_dir, images_seen - 1, whole=whole), None)
        if row is None:
            return 0  # still the newest
        shown = _shown(row) if row.images_seen == images_seen else {}
        late = {name: shown[name] for name in shown.keys() - set(names) if not name.startswith("events/")}
        if whole:
            storage.write_json(self._cut, [images_seen, [*names, *late]])
        else:
            self._cut.unlink()
        if late:
            self._send(images_seen, late, number=self._last + 1)
        return int(bool(late))

    def _forward_scores(self, *, whole: bool) -> int:
        """Send scores made beside the training, as many as numbers are free before its next row; returns how many."""
        lines = self._scores()[self._beside :]
        free = self.images + self._global_batch // 2 - self._last  # a batch made to fit the hardware may be smaller
        sent = lines if whole else lines[: max(0, free)]
        for line in sent:
            self._beside += 1
            self._send(line["images_seen"], {**line["scores"], _BESIDE: self._beside}, number=self._last + 1)
        return len(sent)

    def _scores(self) -> list[dict[str, Any]]:
        return self._run_dir.read_lines(self._run_dir.watched)

    def _forward_alerts(self) -> None:
        """Send those that no relay has sent yet, and that are not old news."""
        mark = self._folder / "alerts_sent"
        before = int(mark.read_text()) if mark.exists() else 0
        alerts = self._run_dir.read_lines(self._run_dir.alerts)
        for number, line in enumerate(alerts[before:], before + 1):
            with storage.atomic_write(mark) as file:
                file.write(str(number).encode())
            if time.time() - line["time"] < QUIET_S:
                send_alert(self._run, self._run_dir, Alert(line["alert"], line["level"], line["text"]))


def _shown(row: Row) -> dict[str, Any]:
    """What W&B is sent of a row: numbers and pictures by name."""
    import wandb

    shown: dict[str, Any] = {**row.values}
    for name, path in row.pictures.items():
        with suppress(FileNotFoundError), Image.open(path) as picture:  # training has just gone back
            shown[name] = wandb.Image(picture, caption=str(picture.info.get(CAPTION_KEY, "")), file_type="png")
    return shown


def _summary(folder: Path) -> dict[str, Any]:
    """What wandb's offline files say of the last values; empty where there are none."""
    found: dict[str, Any] = {}
    for part in sorted(folder.glob("offline-run-*")):
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--summary", "--json", str(part)]
        said = subprocess.run(command, capture_output=True, text=True)
        if said.returncode == 0:
            found |= json.loads(said.stdout)["summary"]
    return found


def follow(run_dir: RunDir, *, once: bool, every_s: float, stop: threading.Event) -> None:
    """Relay a run until it is finished, or what is there if `once`, or until told to `stop`.

    raises  FileNotFoundError where there is no such run; ValueError as `Relay` does, where the training is
            online itself, or where another relay is at it
    """
    if not run_dir.status.exists():
        raise FileNotFoundError(f"{run_dir.path} is no run (a directory with status.json)")
    newest = run_dir.wandb / "latest-run"
    if newest.resolve().name.startswith("run-"):  # those without network are offline-run-*
        raise ValueError(f"{run_dir.path} feeds W&B by itself, {newest} says: there is nothing to relay")
    with _alone(run_dir):
        relay = Relay(run_dir)
        while True:
            state: State = storage.read_json(run_dir.status)["state"]  # before what it speaks of
            over = state == "finished" or (once and state != "running")
            sent = relay.forward(whole=over)
            if sent or over:
                print(f"{run_dir.path}: {state}, {sent} rows sent, up to {relay.images:,} images", flush=True)
            if over or once or stop.wait(every_s):
                break
        relay.close(state)


@contextmanager
def _alone(run_dir: RunDir) -> Iterator[None]:
    """Keep a second relay away; the lock goes with the process."""
    folder = run_dir.path / "relay"
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"another relay follows {run_dir.path}") from error
        yield


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m ldm_scale.jobs.relay", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("--once", action="store_true", help="send what is there, and end")
    parser.add_argument("--every", type=float, default=EVERY_S, help=f"seconds between looks (default: {EVERY_S:g})")
    arguments = parser.parse_args(argv)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    try:
        follow(RunDir(arguments.run), once=arguments.once, every_s=arguments.every, stop=stop)
    except (FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
