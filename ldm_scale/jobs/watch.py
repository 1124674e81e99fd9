"""Score a training's checkpoints as they appear, beside it, so that it need not stop for that (`every.evaluate=0`).

`python evaluate.py watch=RUN [every=IMAGES]` starts this. Images, sampler and noise are those that the training itself
would have used, so the scores are the same. They go to `RUN/evaluation/watched.jsonl`, which its tracker and report
show; the report is written anew, and what a training that is over did not live to send, W&B is sent here.

The newest checkpoint comes first, older ones that are still there when nothing newer is. One that is being scored is
held: no policy deletes it, and a watch that was killed goes on with it.
"""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ldm_scale.core import runtime, storage, weights
from ldm_scale.core.run_dir import RunDir
from ldm_scale.jobs import config as jobs_config
from ldm_scale.jobs.lease import Lease
from ldm_scale.jobs.looks import Looks
from ldm_scale.jobs.schemas.train import TrainJob
from ldm_scale.jobs.stages import Stage, stage_of
from ldm_scale.jobs.status import duration
from ldm_scale.tracking.report import write_report
from ldm_scale.tracking.tracker import Silent, strict_json
from ldm_scale.training import checkpoint_files
from ldm_scale.training.checkpoint_files import COMPLETE, HELD, CheckpointError
from ldm_scale.training.engine import DTYPES
from ldm_scale.training.loop import Evaluation

SILENT_S = 3600.0
"""Seconds without a sign of life after which a training is not waited for, whatever it said last."""
_BETWEEN_S = 10.0  # between two looks for new checkpoints
_OVER = ("finished", "stopped", "failed")

log = runtime.logger(__name__)


@dataclass(frozen=True, slots=True)
class _Found:
    """A checkpoint to be scored."""

    path: Path
    digest: str
    state: dict[str, Any]


def run(run_dir: RunDir, every: int, preemption: runtime.Preemption) -> None:
    """Score every checkpoint that is not scored yet, and those to come, until the training is over.

    every   of checkpoints within so many images one is scored; 0: each
    raises  FileNotFoundError where `run_dir` is no training run, ValueError where another watch is at it, Preempted
    """
    if not run_dir.config.exists():
        raise FileNotFoundError(f"watch={run_dir.path} is not a training run: it has no {run_dir.config.name}")
    with Lease(run_dir, "watch") as lease:
        if not lease.wait(preemption):
            raise runtime.Preempted
        _watch(run_dir, every, preemption)


def _watch(run_dir: RunDir, every: int, preemption: runtime.Preemption) -> None:
    plain = storage.read_json(run_dir.config)
    job: TrainJob = jobs_config.job_from_plain("train", plain)
    stage = stage_of(job, runtime.device(), lambda key, reason, position: None, preemption.between)
    stage.module.to(runtime.device())
    stage.match(DTYPES[job.engine.kind, job.engine.precision])
    for found in _appearing(run_dir, every, preemption):
        if runtime.is_main():
            with suppress(FileNotFoundError):  # deleted just now, as reading it will tell
                (found.path / HELD).touch()
        try:
            _write(run_dir, found, _evaluations(found, run_dir, job, stage, preemption))
        except CheckpointError as error:
            log.warning("%s cannot be scored: %s", found.path, error)
        if runtime.is_main():
            (found.path / HELD).unlink(missing_ok=True)
    with Lease(run_dir, "training") as training:  # W&B is fed by one process at a time
        state = storage.read_json(run_dir.status)["state"]
        if training.has_run and job.tracker.wandb and state in _OVER:
            job.tracker.view(run_dir).catch_up(plain, state)


def _appearing(run_dir: RunDir, every: int, preemption: runtime.Preemption) -> Iterator[_Found]:
    """Checkpoints to be scored, each once; the same on every rank."""
    tried = set[str]()
    while True:
        over, found = runtime.gathered(_look(run_dir, every, tried) if runtime.is_main() else ("", None))[0]
        if found is not None:
            tried.add(found.digest)
            yield found
        elif over:
            log.info("%s: %s. Nothing is left to score", run_dir.path, over)
            return
        else:
            preemption.between()
            time.sleep(_BETWEEN_S)


def _look(run_dir: RunDir, every: int, tried: set[str]) -> tuple[str, _Found | None]:
    """Why nothing more will come, empty while it may, and what to score: what was begun, or the newest."""
    over = _over(run_dir)  # asked before looking: none comes after it
    own = [line for line in run_dir.read_lines(run_dir.events) if line["event"] == "evaluation"]
    beside = run_dir.read_watched()
    known = tried | {line.get("checkpoint", "") for line in beside}  # lines of old say nothing of it
    stretches = {line["images_seen"] // max(every, 1) for line in (*own, *(beside if every else []))}
    for path in sorted(checkpoint_files.complete_ones(run_dir.checkpoints), key=lambda path: not _is_held(path)):
        with suppress(FileNotFoundError):  # deleted, or gone back from, just now
            digest = _digest(path, (path / COMPLETE).stat().st_mtime_ns)
            due = _is_held(path) or checkpoint_files.images_of(path) // max(every, 1) not in stretches
            if due and digest not in known:
                return over, _Found(path, digest, checkpoint_files.read_state(path))
    return over, None


def _is_held(path: Path) -> bool:
    return (path / HELD).exists()


@cache
def _digest(path: Path, written: int) -> str:
    """Of a checkpoint; `written` tells one from another that takes its place."""
    return str(storage.read_json(path / COMPLETE)["digest"])


def _over(run_dir: RunDir) -> str:
    """Why no checkpoint will come any more; empty while one may."""
    status = storage.read_json(run_dir.status)
    state = status["state"]
    if state in _OVER and status.get("cause") != "lost":  # launchers start that again; a status of old has no cause
        return f"the training is {state}"
    signs = [file.stat().st_mtime for file in (run_dir.status, run_dir.metrics, run_dir.events) if file.exists()]
    silent_s = time.time() - max(signs)
    if silent_s < SILENT_S:
        return ""
    return f"the training is {state}, and gave no sign of life for {duration(silent_s)}; the same command goes on"


def _evaluations(
    found: _Found, run_dir: RunDir, job: TrainJob, stage: Stage, preemption: runtime.Preemption
) -> list[Evaluation]:
    stage.resume(found.state)

    def kind(half_life: int | None) -> str:
        return checkpoint_files.WEIGHT if half_life is None else f"ema/{half_life}"

    def load(half_life: int | None) -> None:
        reader = checkpoint_files.Reader(found.path)
        if reader.meta["digest"] != found.digest:
            raise FileNotFoundError("another one has taken its place")
        weights.load_exactly(stage.module, reader.whole(kind(half_life)), str(found.path))

    @contextmanager
    def put(half_life: int | None) -> Iterator[None]:
        checkpoint_files.agreed(lambda: load(half_life))
        yield

    looks = Looks(
        stage,
        put,
        half_lives=job.ema_half_lives,
        scored=job.evaluation.weights,
        tracker=Silent(),
        between=preemption.between,
        whose=lambda half_life: f"{kind(half_life)} of {found.digest}",
        folder=run_dir.unfinished("watch"),
    )
    return looks.evaluate()


def _write(run_dir: RunDir, found: _Found, evaluations: list[Evaluation]) -> None:
    """All scores of one checkpoint, whole or not at all; none where training went back behind it meanwhile."""
    if not runtime.is_main():
        return
    if not (found.path / COMPLETE).exists() or storage.read_json(found.path / COMPLETE)["digest"] != found.digest:
        log.warning("%s was gone back from while it was scored: its scores are left out", found.path)
        return
    images_seen = checkpoint_files.images_of(found.path)
    for one in evaluations:
        log.info("%s images: %s", f"{images_seen:,}", ", ".join(f"{name} {value:.4g}" for name, value in _shown(one)))
    lines = [
        {
            "time": time.time(),
            "images_seen": images_seen,
            "event": "evaluation",
            "checkpoint": found.digest,
            "scores": one.scores,
            **one.conditions,
        }
        for one in evaluations
    ]
    run_dir.watched.parent.mkdir(exist_ok=True)
    with open(run_dir.watched, "ab", buffering=0) as file:
        file.write("".join(json.dumps(strict_json(line)) + "\n" for line in lines).encode())
    write_report(run_dir)


def _shown(one: Evaluation) -> list[tuple[str, float]]:
    """Without the ten ranges of timesteps."""
    return [(name, value) for name, value in one.scores.items() if "_t" not in name]
