"""The run as Weights & Biases shows it: a view of the run directory, fed by rank 0, that never ends a training.

One W&B run per training, under an id made once and kept in the run directory. Facts it rests on, tried with wandb 0.31:

- Resumed offline, wandb begins a second folder at step 0 and knows nothing of the first. So rows are numbered here, on
  through every process of the training, and `wandb sync` joins the folders without a collision.
- Its best value of a name (`summary="min"`) is that of one process. So the summary's is kept here, over all of them.
- wandb cannot take a row back. So what was sent is remembered by name, in a file that is written before sending; a
  process that repeats work after its checkpoint sends nothing twice.
- An offline run reaches the disk every 15 s. SIGKILL therefore costs this view (not metrics.jsonl) the last seconds.
- With a key and no network `wandb.init` blocks for 100 s, then raises. So the server is asked first, with a time limit.
"""

import json
import logging
import math
import netrc
import os
import secrets
import socket
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

import numpy as np

from ldm_scale.core import storage
from ldm_scale.core.run_dir import RunDir, State
from ldm_scale.core.runtime import PREEMPTED_EXIT_CODE
from ldm_scale.core.secrets import without_secrets
from ldm_scale.tracking.alerts import QUIET_S, Alert, alert_of
from ldm_scale.tracking.artifacts import Artifacts, send_artifacts, staged_in
from ldm_scale.tracking.panels import panel_of
from ldm_scale.tracking.samples_table import newest_samples, samples_table

if TYPE_CHECKING:
    import wandb

_LOG = logging.getLogger(__name__)
_CONNECT_S = 4.0  # a server that has not accepted a connection by then counts as unreachable
_INIT_S = 8.0  # and one that accepted but has not answered by then too; together under 15 s
_AXIS = "train/images_seen"
_BEST = {"min": min, "max": max}
_NOT_TOLD = ("config", "packages")  # of a launch: W&B has them anyway
_TITLE = 63  # characters of an alert's title that W&B takes
_FINISH_S = 120.0  # longest wait for uploads at the end; what is left stays on disk for `wandb sync`
SAMPLES_TABLE = "samples/table"
"""What W&B calls the table of the newest samples."""
EXIT_CODES: dict[State, int] = {
    "finished": 0, "stopped": 0, "running": 0, "preempted": PREEMPTED_EXIT_CODE, "failed": 1,
}  # fmt: skip
"""What W&B is told at the end of a process that feeds it, while the training stands so."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where on W&B a training is shown."""

    project: str
    entity: str | None = None
    group: str | None = None
    tags: Sequence[str] = ()

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Place":
        """That of a run, by its resolved configuration."""
        return cls(**{name: config["tracker"][name] for name in ("project", "entity", "group", "tags")})

    def open(
        self, run_dir: RunDir, mode: Literal["online", "offline"], config: dict[str, Any], *, folder: Path
    ) -> "wandb.Run":
        """The W&B run of a training, begun or gone on with; its files lie in `folder`/wandb.

        Beside the configuration its config has `launch`, what the newest process is made of, as repro.json tells it.

        raises  what wandb raises, where the server does not answer within seconds
        """
        run = self._init(mode, folder, id=run_id(run_dir), name=shown_name(run_dir), resume="allow", config=config)
        run.define_metric(_AXIS, hidden=True)
        run.define_metric("*", step_metric=_AXIS)
        launches = storage.read_json(run_dir.repro)["launches"] if run_dir.repro.exists() else []
        for launch in launches[-1:]:
            told = {key: value for key, value in launch.items() if key not in _NOT_TOLD}
            run.config.update({"launch": told}, allow_val_change=True)
        return run

    def beside(self, run_dir: RunDir, job_type: str, *, folder: Path) -> "wandb.Run":
        """A run of its own, for what is made of a training; as `open`, online where that is possible."""
        import wandb

        mode: Literal["online", "offline"] = "online" if may_go_online(wandb.setup().settings) else "offline"
        return self._init(mode, folder, name=f"{shown_name(run_dir)} {job_type}", job_type=job_type)

    def _init(self, mode: Literal["online", "offline"], folder: Path, **named: Any) -> "wandb.Run":
        import wandb

        settings = wandb.Settings(
            mode=mode,
            init_timeout=_INIT_S,
            finish_timeout=_FINISH_S,
            console="off",
            silent=True,
            save_code=False,
            disable_git=True,
            disable_job_creation=True,
        )
        with _told_no_secrets():
            return wandb.init(
                reinit="create_new",
                dir=folder,
                settings=settings,
                project=self.project,
                entity=self.entity,
                group=self.group,
                tags=list(self.tags),
                **named,
            )


class Rows:
    """What W&B is told of names: each one's axis and, of scores, the best value so far beside the last."""

    def __init__(self) -> None:
        self._defined = set[str]()
        self._best: dict[str, float] = {}

    def note(self, values: Mapping[str, Any]) -> None:
        """Take in what is going to be sent, or was by an earlier process."""
        for name, value in values.items():
            best = panel_of(name).best
            if best is not None and isinstance(value, (int, float)) and math.isfinite(value):
                self._best[name] = _BEST[best](value, self._best.get(name, value))

    def send(self, run: "wandb.Run", images_seen: int, values: Mapping[str, Any], *, number: int) -> None:
        """Log a row of numbers and pictures."""
        for name in values.keys() - self._defined:
            best = panel_of(name).best
            run.define_metric(name, step_metric=_AXIS, summary=best and f"{best},last")
        self._defined |= values.keys()
        run.log({**values, _AXIS: images_seen}, step=number, commit=True)
        scores = values.keys() & self._best.keys()
        if scores:
            run.summary.update({name: {panel_of(name).best: self._best[name], "last": values[name]} for name in scores})


class Wandb:
    """Feeds one W&B run. A failure of W&B is a warning, after which this training goes on without it."""

    def __init__(
        self, run_dir: RunDir, place: Place, *, offline: bool = False, artifacts: Artifacts = Artifacts.none
    ) -> None:
        self._run_dir, self._place, self._offline, self._artifacts = run_dir, place, offline, artifacts
        self._run: wandb.Run | None = None
        self._rows, self._sent = Rows(), _Sent(run_dir.wandb / "sent.json")
        self._watched_bytes, self._images_seen = 0, 0

    def start(self, config: dict[str, Any], *, resume_at: int = 0) -> None:
        """Open the run, and send what metrics.jsonl has up to `resume_at` and W&B was never sent."""
        self._try(lambda: self._open(config))
        for line in self._run_dir.read_lines(self._run_dir.metrics) if resume_at > 0 else []:
            if line["images_seen"] <= resume_at:
                values = {name: value for name, value in line.items() if name not in ("images_seen", "time")}
                self.log(line["images_seen"], {name: value for name, value in values.items() if value is not None})

    def log(self, images_seen: int, values: Mapping[str, float]) -> None:
        self._send(images_seen, dict(values))
        self._send_watched()

    def images(self, images_seen: int, name: str, grid: np.ndarray, caption: str, cells: Sequence[Any] = ()) -> None:
        """Show a picture; of `cells` there is a table in the end, made from the run directory."""
        import wandb

        path = self._run_dir.picture(name, images_seen)  # as the run directory has it, where its disk had room
        picture = str(path) if path.exists() else grid
        shown = shown_picture(name)
        if self._run is not None:
            self._try(lambda: self._send(images_seen, {shown: wandb.Image(picture, caption=caption, file_type="png")}))

    def event(self, images_seen: int, kind: str, **fields: Any) -> None:
        """Mark the moment; events.jsonl has the fields. An alert is sent too, where the run is online."""
        run, alert = self._run, alert_of(kind, without_secrets(fields))
        if run is not None and alert is not None:
            self._try(lambda: send_alert(run, self._run_dir, alert))
        self._send(images_seen, {f"events/{kind}": 1})

    def catch_up(self, config: dict[str, Any], state: State) -> None:
        """Of a training that is over, and fed W&B: send scores that were made beside it too late for it to send."""
        if self._sent.rows and len(self._run_dir.read_lines(self._run_dir.watched)) > self._sent.beside:
            lines = self._run_dir.read_lines(self._run_dir.metrics)
            self.start(config, resume_at=max((line["images_seen"] for line in lines), default=0))
            self.finish(state)

    def finish(self, state: State) -> None:
        self._send_watched()
        if state == "finished":
            self._try(self._send_what_remains)

        def close() -> None:
            if self._run is not None:
                if state == "preempted":
                    self._run.mark_preempting()
                self._run.finish(exit_code=EXIT_CODES[state])

        self._try(close)
        self._run = None

    def _send_what_remains(self) -> None:
        """The newest samples as a table, and artifacts."""
        if self._run is None:
            return
        if grids := newest_samples(self._run_dir):
            with staged_in(self._run_dir.wandb):
                self._send(int(grids[0].stem), {SAMPLES_TABLE: samples_table(grids)})
        send_artifacts(self._run, self._run_dir, self._artifacts, self._images_seen)

    def _open(self, config: dict[str, Any]) -> None:
        import wandb

        settings = wandb.setup().settings
        if settings.mode == "disabled":  # WANDB_MODE
            return
        self._run_dir.wandb.mkdir(parents=True, exist_ok=True)
        online = not self._offline and may_go_online(settings)
        try:
            self._run = self._begin("online" if online else "offline", config)
        except Exception as error:
            if not online:
                raise
            _LOG.warning("W&B did not answer (%s); this run is recorded offline", error)
            wandb.teardown()  # its service still holds the run id
            self._run = self._begin("offline", config)
        _LOG.info("W&B: %s", f"offline in {self._run_dir.wandb}" if self._run.offline else self._run.url)

    def _begin(self, mode: Literal["online", "offline"], config: dict[str, Any]) -> "wandb.Run":
        return self._place.open(self._run_dir, mode, config, folder=self._run_dir.path)

    def _send(self, images_seen: int, values: dict[str, Any]) -> None:
        if self._run is None:
            return
        self._images_seen = max(self._images_seen, images_seen)
        self._rows.note(values)
        fresh = {name: value for name, value in values.items() if self._sent.is_new(name, images_seen)}
        if not fresh:
            return
        run = self._run
        self._try(lambda: self._rows.send(run, images_seen, fresh, number=self._sent.note(fresh, images_seen)))

    def _send_watched(self) -> None:
        """Scores that were made beside the training since the last look, each at the images it is of."""
        watched = self._run_dir.watched
        size = watched.stat().st_size if watched.exists() else 0
        if size > self._watched_bytes:
            self._watched_bytes = size
            for number, line in enumerate(self._run_dir.read_lines(watched)):
                self._rows.note(line["scores"])
                if number >= self._sent.beside:
                    self._send_beside(line["images_seen"], line["scores"])

    def _send_beside(self, images_seen: int, scores: dict[str, float]) -> None:
        """A row of its own, in any order of images: W&B may have later ones already."""
        if (run := self._run) is not None:
            number = self._sent.note({}, images_seen, beside=1)
            self._try(lambda: self._rows.send(run, images_seen, scores, number=number))

    def _try(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:
            self._run = None
            _LOG.warning("W&B stopped (%s: %s); the run goes on in %s", type(error).__name__, error, self._run_dir.path)


class _Sent:
    """What W&B was sent: for each name the most images seen, and how many rows in all. Survives the process."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.rows, self._high_water = 0, dict[str, int]()
        self.beside = 0
        """Of these rows, those of scores made beside the training."""
        if path.exists():
            held = storage.read_json(path)
            self.rows, self._high_water, self.beside = held["rows"], held["images_seen"], held.get("beside", 0)

    def is_new(self, name: str, images_seen: int) -> bool:
        return images_seen > self._high_water.get(name, -1)

    def note(self, names: Mapping[str, Any], images_seen: int, *, beside: int = 0) -> int:
        """Remember a row before it is sent; returns its number. Where its disk fails, the next one is noted with it."""
        row, self.rows, self.beside = self.rows, self.rows + 1, self.beside + beside
        self._high_water.update(dict.fromkeys(names, images_seen))
        temporary = self._path.with_suffix(".tmp")
        held = {"rows": self.rows, "images_seen": self._high_water, "beside": self.beside}
        try:
            temporary.write_text(json.dumps(held))
            os.replace(temporary, self._path)
        except OSError as error:
            _LOG.warning("%s: %s", self._path, error.strerror)
        return row


def shown_picture(name: str) -> str:
    """What W&B calls a picture: names without a folder go under `samples/`."""
    return name if "/" in name else f"samples/{name}"


def send_alert(run: "wandb.Run", run_dir: RunDir, alert: Alert) -> None:
    """Where the run is online: an alert that is uploaded days later is none."""
    if not run.offline:
        title = f"{alert.kind}: {shown_name(run_dir)}"[:_TITLE]
        run.alert(title, alert.text, alert.level.upper(), wait_duration=QUIET_S)


def shown_name(run_dir: RunDir) -> str:
    """What W&B calls this training: EXPERIMENT/NAME."""
    return "/".join(run_dir.path.absolute().parts[-2:])


def run_id(run_dir: RunDir) -> str:
    """The W&B id of this training: made on the first call, the same ever after."""
    path = run_dir.path / "wandb_id"
    if not path.exists():
        with storage.atomic_write(path) as file:
            file.write(secrets.token_hex(4).encode() + b"\n")
    return path.read_text().strip()


def may_go_online(settings: "wandb.Settings") -> bool:
    """Whether the user's settings allow it, a key is configured and the server accepts connections."""
    if settings.mode != "online" or not _has_key(settings):
        return False
    if _reachable(settings.base_url, _CONNECT_S):
        return True
    _LOG.warning("W&B at %s is unreachable; this run is recorded offline", settings.base_url)
    return False


def closing_hint(run_dir: RunDir) -> str:
    """Commands that show what W&B wrote into the run directory, and that upload it; empty when it wrote nothing."""
    offline = sorted(run_dir.wandb.glob("offline-run-*"))
    if not offline:
        return ""
    return (
        f"look at it in the terminal:  wandb leet {run_dir.wandb}\n"
        f"print its last values:       wandb leet inspect --summary {offline[-1]}\n"
        f"upload it, with an account:  wandb sync {' '.join(map(str, offline))}"
    )


@contextmanager
def _told_no_secrets() -> Iterator[None]:
    """W&B takes the command line down as it finds it."""
    given, sys.argv = sys.argv, without_secrets(sys.argv)
    try:
        yield
    finally:
        sys.argv = given


def _has_key(settings: "wandb.Settings") -> bool:
    """A key in the environment, a settings file, or ~/.netrc, as wandb itself would find it."""
    if settings.api_key or settings.identity_token_file:
        return True
    hosts = {urlsplit(settings.base_url).netloc, "api.wandb.ai"}
    places = [os.environ.get("NETRC"), "~/.netrc", "~/_netrc"]
    files = [Path(place).expanduser() for place in places if place]
    try:
        held = next((netrc.netrc(file) for file in files if file.exists()), None)
    except (netrc.NetrcParseError, OSError):
        return False
    return held is not None and any(held.authenticators(host) for host in hosts)


def _reachable(url: str, limit_s: float) -> bool:
    """Whether the host of `url`, or the proxy on the way to it, accepts a connection within `limit_s` seconds."""
    target = urlsplit(urllib.request.getproxies().get(urlsplit(url).scheme, url))
    port = target.port or (80 if target.scheme == "http" else 443)
    connected = threading.Event()

    def connect() -> None:
        try:
            with socket.create_connection((target.hostname, port), timeout=limit_s):
                connected.set()
        except OSError:
            return

    thread = threading.Thread(target=connect, daemon=True)  # name resolution has no time limit of its own
    thread.start()
    thread.join(limit_s)
    return connected.is_set()
