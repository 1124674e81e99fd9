"""Run a few steps of a training again from one of its checkpoints, and compare them with what it logged.

    python -m ldm_scale.jobs.replay RUN|CHECKPOINT [--steps K] [--band RELATIVE]
    accelerate launch ... -m ldm_scale.jobs.replay ...      where the run had several processes

For upgrades, suspect nodes, moves and bug reports. Of a run it takes the newest checkpoint that numbers follow. On a
CPU of the same kind, with the same engine, world, micro batch and threads, every loss and gradient norm must be equal
bit for bit; anywhere else they must agree within a relative band, which is printed. Nothing is written into the run.

exits  0 the same, 1 the first difference, 2 cannot compare
"""

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ldm_scale.core import runtime
from ldm_scale.core.run_dir import RunDir
from ldm_scale.data.loader import Loader
from ldm_scale.jobs import config as jobs_config
from ldm_scale.jobs import repro
from ldm_scale.jobs.export import locate
from ldm_scale.jobs.schemas.train import TrainJob
from ldm_scale.jobs.stages import Stage, stage_of
from ldm_scale.training import checkpoint_files
from ldm_scale.training.checkpoint import Checkpoints
from ldm_scale.training.checkpoint_files import CheckpointError
from ldm_scale.training.ema import EMA
from ldm_scale.training.engine import Engine

BANDS = {"fp32": 1e-3, "bf16": 2e-2}
"""Relative differences allowed where bits cannot be asked for: other reduction orders and kernels, over a few steps."""
_COMPARED = ("train/loss", "train/grad_norm")

log = runtime.logger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Compared:
    """One number of one step."""

    images_seen: int
    name: str
    logged: float | None
    """None where it was not finite."""
    found: float

    def differs(self, band: float) -> bool:
        """Whether the two are further apart than `band`, relative; 0 asks for the same bits."""
        if self.logged is None:
            return math.isfinite(self.found)
        return not abs(self.found - self.logged) <= band * abs(self.logged)

    def __str__(self) -> str:
        return f"{self.name} at {self.images_seen:,} images: {self.logged!r} was logged, {self.found!r} found"


def replay(where: Path, run_dir: RunDir, steps: int, band: float | None) -> tuple[list[Compared], float]:
    """Take `steps` steps from a checkpoint, and find the run's own numbers for them. Collective.

    band     relative; None takes 0 where bits can be asked for, else that of the precision
    returns  every number that was logged of these steps with the one found, and the band that holds for them
    raises   ValueError where nothing was logged of these steps, or the run's parts are not the same
    """
    begin = int(checkpoint_files.read_state(where)["images_seen"])
    launch = repro.launch_of(run_dir, begin + 1)
    if launch["engine"]["device"].startswith("cpu"):
        torch.set_num_threads(launch["engine"]["threads"])
    job = jobs_config.job_from_plain("train", launch["config"])
    lines = _logged(run_dir)
    _require_logged(sorted(lines), begin, job.global_batch, steps)
    engine = job.engine.build(global_batch=job.global_batch, micro_batch=job.micro_batch, batch_fit=job.batch_fit)
    torch.manual_seed(job.seed)
    stage = stage_of(job, engine.device, lambda key, reason, position: None)
    stage.prepare(engine, job.optimizer)
    ema = EMA(engine.masters, job.ema_half_lives)
    checkpoints = Checkpoints(
        run_dir.checkpoints, masters=engine.masters, ema=ema, module=engine.module, companions=engine.companion_masters
    )
    state = checkpoints.load(where)
    stage.resume(state)
    found = [
        Compared(images_seen=images, name=name, logged=lines[images][name], found=values[name])
        for images, values in _steps(job, engine, ema, stage, state, steps)
        if images in lines
        for name in _COMPARED
    ]
    if band is None:
        same = repro.described(engine) == launch["engine"] and engine.device.type == "cpu"
        band = 0.0 if same else BANDS[engine.precision.value]
    return found, band


def _steps(
    job: TrainJob, engine: Engine, ema: EMA, stage: Stage, state: dict[str, Any], steps: int
) -> Iterator[tuple[int, dict[str, float]]]:
    """Images seen after each optimizer step, and its numbers over all ranks: the loop, without its looks and saves."""
    step, images = stage.step(engine, ema), int(state["images_seen"])
    step.resume(state)
    loader: Loader[Any] = Loader(
        stage.source,
        global_batch=engine.global_batch,
        micro_batch=engine.micro_batch,
        rank=engine.rank,
        world=engine.world,
        device=engine.device,
    )
    end = images + steps * engine.global_batch
    with loader:
        for batch in loader.batches(images):
            metrics = step(batch, job.optimizer.learning_rate_at(images, job.total_images), images)
            if engine.at_boundary:
                images += engine.global_batch
                yield images, engine.mean_over_ranks({name: metrics[name] for name in _COMPARED})
            if images >= end:
                return


def _logged(run_dir: RunDir) -> dict[int, dict[str, Any]]:
    """The lines that can be compared, by images seen."""
    return {line["images_seen"]: line for line in run_dir.read_lines(run_dir.metrics) if _COMPARED[0] in line}


def _newest_followed(run_dir: RunDir) -> str:
    """The newest checkpoint that was trained on from; a run that ended well closes with one that nothing follows."""
    end = max(_logged(run_dir), default=0)
    complete = checkpoint_files.complete_ones(run_dir.checkpoints)
    return next((path.name for path in complete if checkpoint_files.images_of(path) < end), "latest")


def _require_logged(logged: Sequence[int], begin: int, global_batch: int, steps: int) -> None:
    later = [images for images in logged if images > begin]
    if not later:
        raise ValueError(f"nothing was logged after this checkpoint ({begin:,} images): replay an earlier one")
    needed = -(-(later[0] - begin) // global_batch)
    if needed > steps:
        raise ValueError(f"the first number logged after this checkpoint is {needed} steps away: --steps {needed}")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m ldm_scale.jobs.replay", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("run", type=Path, help="a training run or one of its checkpoints")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps (default: 20)")
    parser.add_argument("--band", type=float, help="relative difference allowed; 0 asks for the same bits")
    arguments = parser.parse_args(argv)
    runtime.configure_logging()
    try:
        run_dir, name = locate(arguments.run)
        where = checkpoint_files.find(run_dir.checkpoints, _newest_followed(run_dir) if name == "latest" else name)
        compared, band = replay(where, run_dir, arguments.steps, arguments.band)
    except (ValueError, OSError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return _say(where, compared, band) if runtime.is_main() else int(any(one.differs(band) for one in compared))


def _say(where: Path, compared: Sequence[Compared], band: float) -> int:
    asked = "the same bit for bit" if band == 0 else f"the same within {band:g}, relative"
    different = [one for one in compared if one.differs(band)]
    if not different:
        print(f"{where}: {len(compared)} numbers, up to {compared[-1].images_seen:,} images, are {asked}")
        return 0
    print(f"{where}: {len(different)} of {len(compared)} numbers are not {asked}; the first:\n  {different[0]}")
    return 1


if __name__ == "__main__":
    runtime.leave(main())
