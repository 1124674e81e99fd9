"""Score a training's checkpoints as they appear, beside it, so that it need not stop for that (`every.evaluate=0`).

`python evaluate.py watch=RUN` starts this. Images, sampler and noise are those that the training itself would have
used, so the scores are the same. They go to `RUN/evaluation/watched.jsonl`, which its tracker and report show.
"""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ldm_scale.core import runtime, storage, weights
from ldm_scale.core.run_dir import RunDir
from ldm_scale.jobs import config as jobs_config
from ldm_scale.jobs.kept import Between
from ldm_scale.jobs.looks import Looks
from ldm_scale.jobs.schemas.train import TrainJob
from ldm_scale.jobs.stages import Stage, stage_of
from ldm_scale.tracking.tracker import Silent, strict_json
from ldm_scale.training import checkpoint_files
from ldm_scale.training.engine import DTYPES
from ldm_scale.training.loop import Evaluation

_BETWEEN_S = 10.0  # between two looks for new checkpoints

log = runtime.logger(__name__)


def run(run_dir: RunDir, between: Between) -> None:
    """Score every checkpoint that is not scored yet, and those to come, until the training is over.

    raises  FileNotFoundError where `run_dir` is no training run
    """
    if not run_dir.config.exists():
        raise FileNotFoundError(f"watch={run_dir.path} is not a training run: it has no {run_dir.config.name}")
    job: TrainJob = jobs_config.job_from_plain("train", storage.read_json(run_dir.config))
    stage = stage_of(job, runtime.device(), lambda key, reason, position: None)
    stage.module.to(runtime.device())
    stage.match(DTYPES[job.engine.kind, job.engine.precision])
    for path in _appearing(run_dir, between):
        _write(run_dir, checkpoint_files.images_of(path), _evaluations(path, run_dir, job, stage, between))


def _appearing(run_dir: RunDir, between: Between) -> Iterator[Path]:
    """Checkpoints that nobody has scored, the oldest first; the same on every rank."""
    while True:
        over = storage.read_json(run_dir.status)["state"] != "running"  # asked before looking: none comes after it
        scored = {line["images_seen"] for line in run_dir.read_events() if line["event"] == "evaluation"}
        complete = checkpoint_files.complete_ones(run_dir.checkpoints)
        found = [path for path in reversed(complete) if checkpoint_files.images_of(path) not in scored]
        over, oldest = runtime.gathered((over, found[0] if found else None))[0]
        if oldest is not None:
            yield oldest
        elif over:
            return
        else:
            between()
            time.sleep(_BETWEEN_S)


def _evaluations(path: Path, run_dir: RunDir, job: TrainJob, stage: Stage, between: Between) -> list[Evaluation]:
    reader = checkpoint_files.Reader(path)
    stage.resume(reader.meta["state"])

    def kind(half_life: int | None) -> str:
        return checkpoint_files.WEIGHT if half_life is None else f"ema/{half_life}"

    @contextmanager
    def put(half_life: int | None) -> Iterator[None]:
        weights.load_exactly(stage.module, reader.whole(kind(half_life)), str(path))
        yield

    looks = Looks(
        stage,
        put,
        half_lives=job.ema_half_lives,
        scored=job.evaluation.weights,
        tracker=Silent(),
        between=between,
        whose=lambda half_life: f"{kind(half_life)} of {reader.meta['digest']}",
        folder=run_dir.unfinished("watch"),
    )
    return looks.evaluate()


def _write(run_dir: RunDir, images_seen: int, evaluations: list[Evaluation]) -> None:
    """All scores of one checkpoint, whole or not at all."""
    for one in evaluations:
        log.info("%s images: %s", f"{images_seen:,}", ", ".join(f"{name} {value:.4g}" for name, value in _shown(one)))
    if not runtime.is_main():
        return
    lines = [
        {
            "time": time.time(),
            "images_seen": images_seen,
            "event": "evaluation",
            "scores": one.scores,
            **one.conditions,
        }
        for one in evaluations
    ]
    run_dir.watched.parent.mkdir(exist_ok=True)
    with open(run_dir.watched, "ab", buffering=0) as file:
        file.write("".join(json.dumps(strict_json(line)) + "\n" for line in lines).encode())


def _shown(one: Evaluation) -> list[tuple[str, float]]:
    """Without the ten ranges of timesteps."""
    return [(name, value) for name, value in one.scores.items() if "_t" not in name]
