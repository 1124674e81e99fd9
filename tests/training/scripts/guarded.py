"""Trains the tiny model in the real loop, with one sample in the stream that is no number.

usage  guarded.py KIND RUN POLICY [kill]      kill: end by SIGKILL on the way back to where the trouble was
"""

import hashlib
import json
import os
import signal
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import tiny
import torch
from torch import Tensor

from ldm_scale.core import runtime
from ldm_scale.core.run_dir import RunDir
from ldm_scale.data.loader import Loader
from ldm_scale.tracking.goodput import Ledger
from ldm_scale.tracking.tracker import JsonLines, Silent
from ldm_scale.training.checkpoint import Checkpoints
from ldm_scale.training.control import Control
from ldm_scale.training.ema import EMA
from ldm_scale.training.guards import GarbageCollection, Guard, GuardConfig, Policy, TrainingDiverged, passed_over
from ldm_scale.training.intake import Intake
from ldm_scale.training.loop import Clock, Due, Run, fit
from ldm_scale.training.masters import Ratio
from ldm_scale.training.movement import Movement
from ldm_scale.training.steps import Metrics
from ldm_scale.training.telemetry import Ranks, Startup
from ldm_scale.training.throughput import Meter
from ldm_scale.training.unread import Unread
from ldm_scale.training.watchdog import Watchdog

TOTAL, SAVE, POISONED = 80, 16, 37


@dataclass(frozen=True)
class Batch:
    positions: Tensor
    keys: list[str]
    x: Tensor
    y: Tensor

    def to(self, device: torch.device) -> Self:
        return replace(self, x=self.x.to(device), y=self.y.to(device))


class Order:
    n = 10_000

    def __call__(self, positions_B: np.ndarray) -> np.ndarray:
        return positions_B


class Source:
    """Position p is sample p; the target of one of them is multiplied by what makes it no number, or large."""

    order = Order()
    bytes_read = 0

    def __init__(self, poisoned: int = POISONED, factor: float = torch.nan) -> None:
        self.poisoned, self.factor = poisoned, factor

    def buffer(self, batch: int, *, pinned: bool) -> Tensor:
        return torch.empty(batch)

    def announce(self, ids: np.ndarray) -> None:
        pass

    def read(self, positions: np.ndarray, *, ids: np.ndarray | None = None, out: Tensor | None = None) -> Batch:
        where = torch.from_numpy(np.array(positions))
        x, y = tiny.samples(where)
        y[where == self.poisoned] *= self.factor
        return Batch(where, [f"sample{position}" for position in where.tolist()], x, y)

    def counts(self, position: int) -> dict[str, float]:
        return {}

    def shares(self) -> dict[str, float]:
        return {}


class Step:
    """One micro batch; `starts` lists the first position of each that was trained on."""

    def __init__(self, engine: Any) -> None:
        self.engine, self.losses, self.starts = engine, list[Tensor](), list[int]()

    def __call__(self, batch: Batch, learning_rate: float, images_seen: int) -> Metrics:
        self.starts.append(int(batch.positions[0]))
        with self.engine.accumulate():
            loss = self.engine.model(batch.x, batch.y).mean()
            self.engine.backward(loss)
            norm = self.engine.step(learning_rate)
        self.losses.append(loss.detach())
        mean = torch.stack(self.losses[-self.engine.accumulation :]).mean()
        return {"train/loss": mean, "train/grad_norm": norm}

    def since_last_line(self) -> dict[str, Ratio]:
        return {}

    def state(self) -> dict[str, Any]:
        return {}

    def resume(self, state: dict[str, Any]) -> None:
        pass


def training(
    engine: Any, path: Path, config: GuardConfig, source: Any, *, late: int | None = None, log_every: int = 8
) -> tuple[Run, Step]:
    run_dir, step = RunDir(path), Step(engine)
    tracker = JsonLines(run_dir) if runtime.is_main() else Silent()
    ema = EMA(engine.masters, [16])
    checkpoints = Checkpoints(run_dir.checkpoints, masters=engine.masters, ema=ema, module=engine.module, keep_last=9)
    newest = checkpoints.latest()
    state = None if newest is None else checkpoints.load(newest)
    images = 0 if state is None else state["images_seen"]
    guard = Guard(config, engine, passed_over(run_dir.read_lines(run_dir.events)), late=late)
    if state is not None:
        guard.resume(state)
    runtime.barrier()  # every rank has read the events
    tracker.start({}, resume_at=images)
    ranks = Ranks(engine, straggler=0.15, straggler_intervals=3)
    meter = Meter(engine, ranks, Ledger(time.time()), flops_per_image=1.0, peak=1.0)
    run = Run(
        engine=engine, step=step, source=source, learning_rate=lambda _: 1e-3, ema=ema, checkpoints=checkpoints,
        loader=Loader(source, global_batch=8, micro_batch=2, rank=engine.rank, world=engine.world),
        tracker=tracker, meter=meter, intake=Intake(shown=0), unread=Unread(),
        movement=Movement(engine.masters, tiny.part_of), startup=Startup(), preemption=runtime.Preemption(),
        control=Control(run_dir), guard=guard, garbage=GarbageCollection(3),
        watchdog=Watchdog(path / "stacks", minutes=1, phase_minutes=1, on_end=lambda reason: None),
        rewind=lambda to: tracker.start({}, resume_at=to), evaluate=list,
        show=lambda _: None, state={}, global_batch=8, total_images=TOTAL, log_clock=Clock(log_every),
        sample_clock=Clock(0), evaluate_clock=Clock(0), save_clock=Clock(SAVE), images_seen=images,
        due=Due(False, False), line_loss=None,
    )  # fmt: skip
    return run, step


def ended(run: Run, step: Step) -> dict[str, Any]:
    """How a training went, on this rank."""
    try:
        how = str(fit(run))
        run.checkpoints.drain()
    except TrainingDiverged as error:
        how = str(error)
    run.loader.close()
    run.watchdog.close()
    tensors = (*run.ema.shadows[16], *run.engine.masters.tensors)
    everything = torch.cat([tensor.detach().flatten() for tensor in tensors])
    digest = hashlib.sha256(everything.numpy().tobytes()).hexdigest()
    return {"how": how, "images_seen": run.images_seen, "starts": step.starts, "digest": digest}


class KilledOnTheWayBack(Step):
    """Dies a few global batches after a rollback, before the trouble is reached again."""

    def __call__(self, batch: Batch, learning_rate: float, images_seen: int) -> Metrics:
        start = int(batch.positions[0])
        if self.starts and max(self.starts) > start + 8 and start >= 24:
            runtime.barrier()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(batch, learning_rate, images_seen)


def main() -> None:
    kind, path, policy, *kill = sys.argv[1:]
    engine = tiny.engine_of(kind)
    config = GuardConfig(policy=Policy(policy), **json.loads(os.environ.get("GUARD", "{}")))
    run, step = training(engine, Path(path), config, Source())
    if engine.rank == 1:
        run.unread("lost", "checksum_txt", 3)
    if kill:
        run.step = step = KilledOnTheWayBack(engine)
    found = ended(run, step)
    Path(path, f"found{engine.rank}.json").write_text(json.dumps(found))
    runtime.leave()


if __name__ == "__main__":
    main()
