"""How runs stand, one line each, from what they left on disk: nothing is asked of the processes.

    python -m ldm_scale.jobs.status RUNS ... [--json] [--stale SECONDS]      e.g. runs

A run's last sign of life is the newest time in its status, metrics and events. One that says `running` and gave no sign
for long is `stale`: killed, hung, or in one long evaluation. GPU hours count from each launch to the last sign of it,
with starting up and what a crash lost. They are told as spent / at completion / planned (`plan --keep`), and in money
too where tracker.gpu_hour_price is set.
"""

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ldm_scale.core import storage
from ldm_scale.core.run_dir import RunDir
from ldm_scale.tracking.cost import Cost, Forecast
from ldm_scale.tracking.goodput import STALE_S, Launch, state_of


@dataclass(frozen=True, kw_only=True, slots=True)
class RunStatus:
    """One run, as far as its files say."""

    run: str
    state: str
    """running, stale, preempted, stopped, finished or failed."""
    reason: str
    images: int
    total_images: int | None
    """None where it ended before it could say."""
    eta_s: float | None
    """Seconds left at the last logged rate; None where nothing trains or no rate is known."""
    images_per_s: float | None
    loss: float | None
    goodput: float | None
    """Share of the time since the first launch that went into steps that were kept, as of the last log line."""
    checkpoint_age_s: float | None
    """Seconds since the newest complete checkpoint was written; None where there is none."""
    heartbeat_age_s: float
    """Seconds since the last sign of life."""
    alerts: int
    """Since the last launch."""
    last_alert: str
    """What the newest of them is about; empty where there is none."""
    gpus: int
    """Processes of the last launch."""
    cost: Cost
    """In GPU hours, and what one of them costs."""
    restarts: int
    host: str

    @classmethod
    def read(cls, run_dir: RunDir, *, now: float, stale_s: float = STALE_S) -> "RunStatus":
        """The state of one run.

        now  seconds since the epoch
        """
        status = storage.read_json(run_dir.status)
        config = storage.read_json(run_dir.config) if run_dir.config.exists() else {}
        metrics, events = run_dir.read_lines(run_dir.metrics), run_dir.read_lines(run_dir.events)
        signs = sorted({status["time"], *(line["time"] for line in (*metrics, *events))})
        age = now - signs[-1]
        state = state_of(status, silent_s=age, stale_s=stale_s)
        images = max([status["images"], *(line["images_seen"] for line in metrics[-1:])])
        rate, total = _last(metrics, "perf/images_per_s"), config.get("total_images")
        launches = Launch.all_of(metrics, events)
        launched = launches[-1].began if launches else 0.0
        alerts = [alert["alert"] for alert in run_dir.read_lines(run_dir.alerts) if alert["time"] >= launched]
        saved = [file.stat().st_mtime for file in run_dir.checkpoints.glob("images_*[0-9]/complete.json")]
        plan = storage.read_json(run_dir.plan) if run_dir.plan.exists() else {}
        world = launches[-1].world if launches else 0
        return cls(
            run=str(run_dir.path),
            state=state,
            reason=status["reason"],
            images=images,
            total_images=total,
            eta_s=(total - images) / rate if state == "running" and rate and total else None,
            images_per_s=rate,
            loss=_last(metrics, "train/loss"),
            goodput=_last(metrics, "perf/goodput"),
            checkpoint_age_s=now - max(saved) if saved else None,
            heartbeat_age_s=age,
            alerts=len(alerts),
            last_alert=alerts[-1] if alerts else "",
            gpus=world,
            cost=Cost.of(config, launches, images=images, total=total, forecast=Forecast.of(plan, world)),
            restarts=max(0, len(launches) - 1),
            host=status["host"],
        )


def find_runs(given: Sequence[Path]) -> list[RunDir]:
    """Runs among `given` paths and anywhere in them, sorted.

    raises  FileNotFoundError naming a path that is not there, or all of them where none holds a run
    """
    found = {run for path in given for run in _runs(path)}
    if empty := [path for path in given if not (found and path.exists())]:
        raise FileNotFoundError(f"no run (a directory with status.json) at or below {', '.join(map(str, empty))}")
    return [RunDir(path) for path in sorted(found)]


def _runs(path: Path) -> Iterator[Path]:
    for folder, below, files in os.walk(path):
        if "status.json" in files:
            yield Path(folder)
            below[:] = [name for name in below if Path(folder, name, "status.json").exists()]  # of a sweep by its name
        elif "snapshot" in below:  # of a sweep: code
            below.remove("snapshot")


def _last(lines: Sequence[dict[str, Any]], name: str) -> float | None:
    """The last logged value; None where there is none, or it was not finite."""
    value: float | None = next((line[name] for line in reversed(lines) if name in line), None)
    return value


def show(runs: Sequence[RunStatus]) -> Table:
    """One line a run."""
    table = Table(box=box.SIMPLE)
    words = ("run", "state", "alerts", "host")
    priced = ["cost"] if any(run.cost.price is not None for run in runs) else []
    numbers = ("images", "%", "ETA", "images/s", "loss", "goodput", "saved", "last sign", "GPU h", *priced)
    for column in (*words[:2], *numbers, *words[2:]):
        table.add_column(column, justify="left" if column in words else "right", overflow="fold")
    for run in runs:
        table.add_row(
            run.run,
            Text(_in_words(run), style="bold red" if run.state in ("stale", "failed") else ""),
            f"{run.images:,}",
            "-" if run.total_images is None else f"{100 * run.images / run.total_images:.1f}",
            "-" if run.eta_s is None else duration(run.eta_s),
            "-" if run.images_per_s is None else f"{run.images_per_s:,.1f}",
            "-" if run.loss is None else f"{run.loss:.4f}",
            "-" if run.goodput is None else f"{run.goodput:.1%}",
            "-" if run.checkpoint_age_s is None else duration(run.checkpoint_age_s),
            duration(run.heartbeat_age_s),
            _spent(run.cost, 1.0),
            *("-" if run.cost.price is None else _spent(run.cost, run.cost.price) for _ in priced),
            Text(f"{run.alerts}: {run.last_alert}" if run.alerts else "", style="bold red"),
            f"{run.host} x{run.gpus}" + (f", {run.restarts} restarts" if run.restarts else ""),
        )
    return table


def _spent(cost: Cost, factor: float) -> str:
    """Spent / at completion / planned, times `factor`."""
    hours = [cost.spent, cost.at_completion, cost.planned]
    while hours[-1] is None:
        hours.pop()
    return " / ".join("-" if one is None else f"{factor * one:,.1f}" for one in hours)


def _in_words(run: RunStatus) -> str:
    return f"{run.state}: {run.reason}" if run.reason else run.state


def duration(seconds: float) -> str:
    """Seconds in words: 42 s, 17 min, 3.4 h, 12.0 d."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} d"


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m ldm_scale.jobs.status", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("runs", type=Path, nargs="+", help="run directories, or folders of them")
    parser.add_argument("--json", action="store_true", help="a JSON array instead of a table")
    parser.add_argument("--stale", type=float, default=STALE_S, help=f"seconds (default: {STALE_S:g})")
    arguments = parser.parse_args(argv)
    try:
        now = time.time()
        runs = [RunStatus.read(run, now=now, stale_s=arguments.stale) for run in find_runs(arguments.runs)]
    except FileNotFoundError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if arguments.json:
        print(json.dumps([dataclasses.asdict(run) for run in runs], indent=2))
    else:
        console = Console()
        Console(width=console.width if console.is_terminal else 200).print(show(runs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
