"""The run directory: one training, everything it wrote, and the one place that knows the names."""

import json
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ldm_scale.core import storage

State = Literal["running", "preempted", "stopped", "finished", "failed"]
"""Of these, `preempted` asks launchers to start the run again, and `failed` where its cause is `lost`; `stopped` is a
person's wish."""
Cause = Literal["", "error", "lost"]
"""Of a failure: an error of the training's own, or a process or GPU that was lost; empty where nothing failed."""


@dataclass(frozen=True, slots=True)
class RunDir:
    """Paths inside `runs/{experiment}/{name}`.

    `metrics.jsonl`, `events.jsonl` and `media/` are the truth of what happened; W&B and report.html are views of them.
    """

    path: Path

    @property
    def config(self) -> Path:
        """The resolved configuration, with the kind of every part."""
        return self.path / "config.json"

    @property
    def status(self) -> Path:
        """`{state, reason, cause, images, host, time}`: what launchers read."""
        return self.path / "status.json"

    @property
    def metrics(self) -> Path:
        """One JSON object a line: `{images_seen, time, name: value, ...}`."""
        return self.path / "metrics.jsonl"

    @property
    def events(self) -> Path:
        """One JSON object a line: `{time, images_seen, event, ...}`."""
        return self.path / "events.jsonl"

    @property
    def evaluation(self) -> Path:
        """What `evaluate.py` found: a JSON file each time, and perhaps a picture of the same name."""
        return self.path / "evaluation"

    @property
    def watched(self) -> Path:
        """Evaluations made beside the training, as lines of `events` (jobs/watch.py)."""
        return self.evaluation / "watched.jsonl"

    def unfinished(self, who: str) -> Path:
        """While `who` (`training`, `watch`) evaluates: what it need not do again if it is broken off (jobs/kept.py)."""
        return self.evaluation / f"{who}.unfinished"

    @property
    def alerts(self) -> Path:
        """One JSON object a line: `{time, images_seen, alert, level, text, run, host}`."""
        return self.path / "alerts.jsonl"

    @property
    def media(self) -> Path:
        """Pictures, `{name with / as __}/{images_seen:012d}.png`."""
        return self.path / "media"

    def picture(self, name: str, images_seen: int) -> Path:
        """The one that was recorded under `name` at `images_seen`."""
        return self.media / name.replace("/", "__") / f"{images_seen:012d}.png"

    @property
    def told(self) -> Path:
        """There once another rank has told of the end of rank 0: of many, one does."""
        return self.path / ".told"

    @property
    def claims(self) -> Path:
        """Which process trains here, and which one watches (jobs/lease.py)."""
        return self.path / "claims"

    @property
    def control(self) -> Path:
        """Where a person touches `save`, `sample` or `stop`."""
        return self.path / "control"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def weights(self) -> Path:
        """Inference weights written when training ends: a directory that other jobs load."""
        return self.path / "weights"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def repro(self) -> Path:
        """`{launches: [...]}`: what each process of the run was made of."""
        return self.path / "repro.json"

    @property
    def plan(self) -> Path:
        """What `make plan` foretold of this run, where it was told to keep it (`--keep`)."""
        return self.path / "plan.json"

    @property
    def manifests(self) -> Path:
        """Copies of the manifests of latent caches, and `evaluation.json`: what scores depend on."""
        return self.path / "manifests"

    @property
    def wandb(self) -> Path:
        return self.path / "wandb"

    def write_status(self, state: State, *, images: int, reason: str = "", cause: Cause = "") -> None:
        """Say how the run stands. Called by rank 0."""
        here = {"host": socket.gethostname(), "time": time.time()}
        storage.write_json(self.status, {"state": state, "reason": reason, "cause": cause, "images": images, **here})

    def read_lines(self, file: Path) -> list[dict[str, Any]]:
        """Every whole line of `metrics`, `events` or `alerts`; what a kill cut short, or ran together, is left out."""
        if not file.exists():
            return []
        values = []
        with open(file, "rb") as lines:
            for line in lines:
                with suppress(ValueError):
                    values.append(json.loads(line))
        return values

    def read_watched(self) -> list[dict[str, Any]]:
        """Evaluations made beside the training, but for those of weights that it has gone back from since."""
        back = [line for line in self.read_lines(self.events) if line["event"] in ("start", "resume", "rollback")]
        return [
            line
            for line in self.read_lines(self.watched)
            if not any(one["time"] > line["time"] and one["images_seen"] < line["images_seen"] for one in back)
        ]

    def read_events(self) -> list[dict[str, Any]]:
        """What happened, in the training and beside it, in the order of time."""
        return sorted(self.read_lines(self.events) + self.read_watched(), key=lambda line: line["time"])

    def read_metrics(self) -> list[dict[str, Any]]:
        """Every number, of the training and of evaluations beside it, by images seen."""
        beside = [
            {"images_seen": line["images_seen"], "time": line["time"], **line["scores"]} for line in self.read_watched()
        ]
        return sorted(self.read_lines(self.metrics) + beside, key=lambda line: line["images_seen"])
