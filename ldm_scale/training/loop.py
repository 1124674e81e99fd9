"""The training loop: one order, for first and second stages, for one process and for many.

Progress is counted in images seen; intervals, learning rate, EMA and random streams are functions of it.
"""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any, Literal

from ldm_scale.core import progress, runtime
from ldm_scale.data.loader import Loader
from ldm_scale.tracking.tracker import Tracker
from ldm_scale.training.checkpoint import Checkpoints
from ldm_scale.training.ema import EMA
from ldm_scale.training.engine import Engine
from ldm_scale.training.guards import require_finite
from ldm_scale.training.steps import Metrics, Step
from ldm_scale.training.throughput import Meter

Outcome = Literal["finished", "preempted"]


@dataclass(frozen=True, slots=True)
class Clock:
    """Fires when training crosses a multiple of `every_images`; 0 never fires."""

    every_images: int

    def fires(self, before: int, after: int) -> bool:
        return self.every_images > 0 and before // self.every_images != after // self.every_images


@dataclass(frozen=True, slots=True)
class Looks:
    """What is due at the images seen so far and not done yet; a checkpoint remembers it, a resume makes up for it."""

    evaluate: bool
    show: bool


@dataclass(kw_only=True, slots=True)
class Run:
    """One training under way: its parts, and how far it has come."""

    engine: Engine
    step: Step[Any]
    loader: Loader
    learning_rate: Callable[[int], float]
    ema: EMA
    checkpoints: Checkpoints
    tracker: Tracker
    meter: Meter
    preemption: runtime.Preemption
    averaged: Callable[[], AbstractContextManager[None]]
    """Puts the averaged weights into the model while it lasts."""
    evaluate: Callable[[], dict[str, float]]
    conditions: dict[str, Any]
    """What scores depend on besides the weights."""
    show: Callable[[int], None]
    state: dict[str, Any]
    """What a checkpoint carries besides weights and `images_seen`."""
    global_batch: int
    total_images: int
    log_clock: Clock
    sample_clock: Clock
    evaluate_clock: Clock
    save_clock: Clock
    images_seen: int
    due: Looks


def fit(run: Run) -> Outcome:
    """Train until `total_images` have been seen or a signal asks to stop; the last weights are saved either way."""
    _look(run)
    with progress.bar("training", run.total_images, done=run.images_seen) as bar:
        for batch in run.loader.batches(run.images_seen):
            rate = run.learning_rate(run.images_seen)
            metrics = run.step(batch, rate)
            if not run.engine.at_boundary:
                continue
            before, run.images_seen = run.images_seen, run.images_seen + run.global_batch
            run.ema.update(run.global_batch, run.images_seen)
            run.meter.step(run.global_batch)
            last, stop = run.images_seen >= run.total_images, run.preemption.agreed()
            if run.log_clock.fires(before, run.images_seen) or last:
                bar.move(min(run.images_seen, run.total_images), _log(run, metrics, rate))
            run.due = Looks(
                evaluate=run.evaluate_clock.fires(before, run.images_seen) or last,
                show=run.sample_clock.fires(before, run.images_seen) or last,
            )
            if not stop:
                _look(run)
            if run.save_clock.fires(before, run.images_seen) or last or stop:
                _save(run)
            if last or stop:
                return "finished" if last else "preempted"
    raise AssertionError("the stream of batches has no end")


def _log(run: Run, metrics: Metrics, rate: float) -> str:
    """Send this step's numbers to the tracker: the only wait for the device. Returns a note for the progress bar."""
    values = run.engine.mean_over_ranks(metrics)
    require_finite(values, run.images_seen)
    speed = run.meter.read(run.loader.wait_s)
    run.tracker.log(run.images_seen, {**values, "train/lr": rate, "train/images_seen": float(run.images_seen), **speed})
    return f"loss {values['train/loss']:.4f}, {speed['perf/images_per_s']:,.0f} images/s"


def _look(run: Run) -> None:
    """Score and draw with the averaged weights, where that is due; left out of the training's rates."""
    if not (run.due.evaluate or run.due.show):
        return
    started = time.perf_counter()
    with run.averaged():
        if run.due.evaluate:
            scores = run.evaluate()
            run.tracker.log(run.images_seen, scores)
            run.tracker.event(run.images_seen, "evaluation", scores=scores, **run.conditions)
        if run.due.show:
            run.show(run.images_seen)
    run.due = Looks(evaluate=False, show=False)
    run.meter.pause(time.perf_counter() - started)


def _save(run: Run) -> None:
    started = time.perf_counter()
    run.checkpoints.save({"images_seen": run.images_seen, "due": asdict(run.due), **run.state})
    run.meter.pause(time.perf_counter() - started)
