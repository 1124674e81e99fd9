"""Where a training sends its numbers, pictures and events.

The loop knows one protocol; what stands behind it is files, W&B, several at once, or nothing. Only rank 0 has anything
but `Silent`, so a tracker knows neither rank nor world. Progress is counted in images seen.
"""

import json
import logging
import math
import socket
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ldm_scale.core import storage
from ldm_scale.core.run_dir import RunDir, State
from ldm_scale.core.secrets import without_secrets
from ldm_scale.tracking.alerts import AlertCommand, alert_of
from ldm_scale.tracking.artifacts import Artifacts
from ldm_scale.tracking.grid import CELLS_KEY, Rectangle
from ldm_scale.tracking.weights_and_biases import Place, Wandb

CAPTION_KEY = "caption"  # PNG text chunk that holds a picture's caption

_MOST_WAITING = 1 << 26  # bytes of a file's lines: days of them
_LOG = logging.getLogger(__name__)


Cell = tuple[Rectangle, Mapping[str, Any]]
"""Where on a grid a picture lies, and what is told of it, of plain JSON types: prompt, guidance, weights."""


class Tracker(Protocol):
    """What the training loop may say. `images_seen` never falls between two calls."""

    def start(self, config: dict[str, Any], *, resume_at: int = 0) -> None:
        """Begin, or go on from a checkpoint.

        config     the resolved configuration, of plain JSON types
        resume_at  images seen by the checkpoint this process continues from; 0 begins anew, and forgets what an earlier
                   process had tracked in this run directory
        """

    def log(self, images_seen: int, values: Mapping[str, float]) -> None:
        """Record named numbers; a name is recorded once per `images_seen`."""

    def images(self, images_seen: int, name: str, grid: np.ndarray, caption: str, cells: Sequence[Cell] = ()) -> None:
        """Record one picture, uint8 (H, W, 3), under a name such as `samples/grid`.

        cells  of a grid of samples: where each lies, and what is told of it; W&B makes a table of the newest ones
        """

    def event(self, images_seen: int, kind: str, **fields: Any) -> None:
        """Record something that happened (`resume`, `evaluation`, `alert`), with fields of plain JSON types."""

    def finish(self, state: State) -> None:
        """Close: nothing may be recorded afterwards."""


class Silent:
    """Tracks nothing: for every rank but 0."""

    def start(self, config: dict[str, Any], *, resume_at: int = 0) -> None: ...

    def log(self, images_seen: int, values: Mapping[str, float]) -> None: ...

    def images(
        self, images_seen: int, name: str, grid: np.ndarray, caption: str, cells: Sequence[Cell] = ()
    ) -> None: ...

    def event(self, images_seen: int, kind: str, **fields: Any) -> None: ...

    def finish(self, state: State) -> None: ...


class JsonLines:
    """`metrics.jsonl`, `events.jsonl`, `alerts.jsonl` and `media/` of the run directory: the truth; all else is a view.

    A line has left this process when `log` returns, so a kill costs at most the line being written. What a killed
    process recorded after the checkpoint that is resumed from will be recorded again: `start` takes those metrics and
    pictures away, and the files end up as if nothing had been interrupted. Events and alerts are history and stay, but
    for a torn last line. JSON has no word for a number that is not finite: among metrics it is null, in an event a
    string.

    A disk that is full or fails ends no training here: lines wait until it takes them, pictures are left out.
    """

    def __init__(self, run_dir: RunDir, alert_command: str | None = None) -> None:
        self._run_dir, self._command = run_dir, AlertCommand(alert_command)
        self._metrics, self._events = _Lines(run_dir.metrics), _Lines(run_dir.events)
        self._alerts = _Lines(run_dir.alerts)

    def start(self, config: dict[str, Any], *, resume_at: int = 0) -> None:
        self._run_dir.path.mkdir(parents=True, exist_ok=True)
        kept_up_to = resume_at if resume_at > 0 else -1
        _rewrite_lines(self._run_dir, self._run_dir.metrics, keep_up_to=kept_up_to)
        for history in (self._run_dir.events, self._run_dir.alerts):
            _rewrite_lines(self._run_dir, history, keep_up_to=None)
        for picture in self._run_dir.media.glob("*/*.png"):
            if int(picture.stem) > kept_up_to:
                picture.unlink()

    def log(self, images_seen: int, values: Mapping[str, float]) -> None:
        finite = {name: float(value) if math.isfinite(value) else None for name, value in values.items()}
        self._metrics.append({"images_seen": images_seen, "time": time.time(), **finite})

    def images(self, images_seen: int, name: str, grid: np.ndarray, caption: str, cells: Sequence[Cell] = ()) -> None:
        text = PngInfo()
        text.add_itxt(CAPTION_KEY, caption)
        text.add_itxt(CELLS_KEY, json.dumps([{"place": place, "told": dict(told)} for place, told in cells]))
        path = self._run_dir.picture(name, images_seen)
        try:
            with storage.atomic_write(path) as file:
                Image.fromarray(grid).save(file, format="PNG", pnginfo=text, compress_type=zlib.Z_RLE)  # a third faster
        except OSError as error:
            _LOG.warning("%s is left out: %s", path, error)

    def event(self, images_seen: int, kind: str, **fields: Any) -> None:
        now, fields = {"time": time.time(), "images_seen": images_seen}, without_secrets(fields)
        self._events.append({**now, "event": kind, **fields})
        if alert := alert_of(kind, fields):
            told = {"alert": alert.kind, "level": alert.level, "text": alert.text}
            line = {**now, **told, "run": str(self._run_dir.path), "host": socket.gethostname()}
            self._alerts.append(line)
            self._command.tell(line)

    def finish(self, state: State) -> None:
        self._command.close()


class Several:
    """Tells several trackers the same, in their order."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = list(trackers)

    def start(self, config: dict[str, Any], *, resume_at: int = 0) -> None:
        for tracker in self._trackers:
            tracker.start(config, resume_at=resume_at)

    def log(self, images_seen: int, values: Mapping[str, float]) -> None:
        for tracker in self._trackers:
            tracker.log(images_seen, values)

    def images(self, images_seen: int, name: str, grid: np.ndarray, caption: str, cells: Sequence[Cell] = ()) -> None:
        for tracker in self._trackers:
            tracker.images(images_seen, name, grid, caption, cells)

    def event(self, images_seen: int, kind: str, **fields: Any) -> None:
        for tracker in self._trackers:
            tracker.event(images_seen, kind, **fields)

    def finish(self, state: State) -> None:
        for tracker in self._trackers:
            tracker.finish(state)


class WandbMode(Enum):
    """Whether W&B may use the network."""

    auto = "auto"
    """Online where a key is configured and the server answers, else offline."""
    offline = "offline"
    """Files only."""


@dataclass(kw_only=True, slots=True)
class TrackerConfig:
    """Where numbers and pictures go besides the run directory, which always has them."""

    wandb: bool = True
    """Also feed W&B. Without an account it writes files that `wandb leet` shows and `wandb sync` uploads later."""
    mode: WandbMode = WandbMode.auto
    """Whether W&B may use the network."""
    project: str = "ldm_scale"
    """W&B project."""
    entity: str | None = None
    """W&B team or user; None takes the account's default."""
    group: str | None = None
    """W&B group, to see runs of one study together."""
    tags: list[str] = field(default_factory=list)
    """W&B tags."""
    artifacts: Artifacts = Artifacts.none
    """What W&B is given when training is finished, besides numbers and pictures."""
    alert_command: str | None = None
    """Shell command that is run for alerts, each as one JSON object on its standard input: a mail, a chat message."""
    gpu_hour_price: float | None = None
    """Of one GPU for an hour, in any money, to tell what the run costs; None: in GPU hours only."""

    def __post_init__(self) -> None:
        if self.gpu_hour_price is not None and not self.gpu_hour_price > 0:
            raise ValueError(f"tracker.gpu_hour_price={self.gpu_hour_price}; must be above 0, or null for no price")
        if not self.project or any(c in self.project for c in "/\\#?%:"):
            raise ValueError(f"tracker.project={self.project!r}; give a name without any of / \\ # ? % :")

    def files(self, run_dir: RunDir) -> JsonLines:
        """The part of it that no network is needed for."""
        return JsonLines(run_dir, self.alert_command)

    def build(self, run_dir: RunDir) -> Tracker:
        """The tracker of rank 0."""
        files = self.files(run_dir)
        if not self.wandb:
            return files
        return Several([files, self.view(run_dir)])

    def view(self, run_dir: RunDir) -> Wandb:
        """W&B's part of it."""
        place = Place(project=self.project, entity=self.entity, group=self.group, tags=self.tags)
        return Wandb(run_dir, place, offline=self.mode is WandbMode.offline, artifacts=self.artifacts)


class _Lines:
    """A file that grows by lines; those that its disk does not take wait, and follow when it does."""

    def __init__(self, path: Path) -> None:
        self._path, self._waiting, self._fails = path, b"", False

    def append(self, line: dict[str, Any]) -> None:
        if len(self._waiting) < _MOST_WAITING:
            self._waiting += _json_line(line)
        try:
            with open(self._path, "ab", buffering=0) as file:
                while self._waiting:  # a line may fit in part
                    self._waiting = self._waiting[file.write(self._waiting) :]
            self._fails = False
        except OSError as error:
            if not self._fails:
                _LOG.warning("%s: %s; lines wait until it can be written", self._path, error.strerror)
            self._fails = True


def _json_line(line: dict[str, Any]) -> bytes:
    return json.dumps(strict_json(line), ensure_ascii=False).encode() + b"\n"


def strict_json(value: Any) -> Any:
    """`value` with the numbers that JSON has no word for spelled out: "nan", "inf", "-inf"."""
    if isinstance(value, dict):
        return {name: strict_json(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict_json(part) for part in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _rewrite_lines(run_dir: RunDir, path: Path, *, keep_up_to: int | None) -> None:
    """Leave only complete lines, and of those the ones up to `keep_up_to` images; whole or not at all."""
    if not path.exists():
        return
    lines = run_dir.read_lines(path)
    kept = [line for line in lines if keep_up_to is None or line["images_seen"] <= keep_up_to]
    torn = path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
    if torn or len(kept) < len(lines):
        with storage.atomic_write(path) as file:
            file.writelines(_json_line(line) for line in kept)
