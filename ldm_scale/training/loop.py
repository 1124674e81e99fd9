"""The training loop: one order, for first and second stages, for one process and for many.

Progress is counted in images seen; intervals, learning rate, EMA and random streams are functions of it.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice
from statistics import fmean
from typing import Any, Literal

import torch

from ldm_scale.core import progress, runtime
from ldm_scale.data.loader import Loader
from ldm_scale.data.sources import SampleSource
from ldm_scale.tracking.tracker import Tracker
from ldm_scale.training.checkpoint import Checkpoints
from ldm_scale.training.control import NOTHING, Control, Wish
from ldm_scale.training.ema import EMA
from ldm_scale.training.engine import Engine
from ldm_scale.training.guards import GarbageCollection, Guard, Policy, TrainingDiverged, Trouble
from ldm_scale.training.intake import Intake
from ldm_scale.training.movement import Movement
from ldm_scale.training.steps import Metrics, Step
from ldm_scale.training.telemetry import Startup
from ldm_scale.training.throughput import Meter
from ldm_scale.training.unread import Unread
from ldm_scale.training.watchdog import Watchdog

Outcome = Literal["finished", "preempted", "stopped"]


@dataclass(frozen=True, slots=True)
class Clock:
    """Fires when training crosses a multiple of `every_images`, or comes to its end; 0 never fires."""

    every_images: int

    def fires(self, before: int, after: int, *, end: bool = False) -> bool:
        return self.every_images > 0 and (end or before // self.every_images != after // self.every_images)


@dataclass(frozen=True, slots=True)
class Due:
    """What is due at the images seen so far; a checkpoint remembers it, a resume makes up for what nobody recorded."""

    evaluate: bool
    show: bool


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Scores by name, and what they depend on."""

    scores: dict[str, float]
    conditions: dict[str, Any]


@dataclass(kw_only=True, slots=True)
class Run:
    """One training under way: its parts, and how far it has come."""

    engine: Engine
    step: Step[Any]
    source: SampleSource[Any]
    loader: Loader
    learning_rate: Callable[[int], float]
    ema: EMA
    checkpoints: Checkpoints
    tracker: Tracker
    meter: Meter
    intake: Intake
    unread: Unread
    movement: Movement
    startup: Startup
    preemption: runtime.Preemption
    control: Control
    guard: Guard
    watchdog: Watchdog
    garbage: GarbageCollection
    rewind: Callable[[int], None]
    """Takes back what the run directory says of training after so many images."""
    evaluate: Callable[[], list[Evaluation]]
    show: Callable[[int], None]
    """Draws pictures of the model, after so many images."""
    state: dict[str, Any]
    """What a checkpoint carries besides weights and `images_seen`."""
    global_batch: int
    total_images: int
    log_clock: Clock
    sample_clock: Clock
    evaluate_clock: Clock
    save_clock: Clock
    images_seen: int
    due: Due
    line_loss: float | None
    """Of a diffusion model: the loss of the last log line, every range of timesteps alike, as `val/loss` is."""


def fit(run: Run) -> Outcome:
    """Train until `total_images` have been seen, or a signal or a person asks to stop; the last weights are saved."""
    run.meter.restart()
    stop, stopped = not _looked(run), False
    run.startup.mark("first_look")
    with progress.bar("training", run.total_images, done=run.images_seen) as bar, run.garbage.scheduled():
        micro_batches = run.loader.batches(run.images_seen)
        while not stop and run.images_seen < run.total_images:
            rate = run.learning_rate(run.images_seen)
            before, after = run.images_seen, run.images_seen + run.global_batch
            last = after >= run.total_images
            logs = run.log_clock.fires(before, after) or last
            saves = run.save_clock.fires(before, after) or last
            due = _due(run, before, after, end=last)
            waits = logs or saves or due.evaluate or due.show
            run.movement.watch(logs)
            run.intake.watch(waits)  # a person can ask for pictures then, too
            metrics = _global_batch(run, micro_batches, rate)
            run.images_seen = after
            run.ema.update(run.global_batch, run.images_seen)
            run.meter.mark("ema")
            if metrics is not None:
                run.meter.step(run.global_batch)
            run.garbage.step()
            run.watchdog.beat()
            if not run.startup.is_over:
                _started(run)
            run.due = due
            asked = run.control.wishes() if waits else NOTHING
            told = run.preemption.received
            heard = run.guard.hear(before, metrics, told_to_stop=told, asked=asked, at_once=waits)
            if heard.troubles and _rolled_back(run, heard.troubles):
                micro_batches = run.loader.batches(run.images_seen)
                continue
            if logs and metrics is not None:
                bar.move(min(run.images_seen, run.total_images), _log(run, metrics, rate))
            if heard.asked:
                _take_up(run, heard.asked)
            stopped = Wish.stop in heard.asked and not last
            saves = saves or Wish.save in heard.asked or run.due.evaluate or (logs and run.checkpoints.poll())
            if saves:
                _save(run)  # before looking, which takes long: a kill in between costs no training
            stop = heard.stop or stopped or not _looked(run)
            if stop and not saves:
                _save(run)
            run.control.done(heard.asked, run.images_seen)
    return "stopped" if stopped else "preempted" if stop else "finished"


def _due(run: Run, before: int, after: int, *, end: bool) -> Due:
    return Due(
        evaluate=run.evaluate_clock.fires(before, after, end=end), show=run.sample_clock.fires(before, after, end=end)
    )


def _global_batch(run: Run, micro_batches: Iterator[Any], rate: float) -> Metrics | None:
    """Forward, backward and the optimizer's step; None for a global batch that is passed over, which is read only."""
    metrics, passed_over = None, run.guard.passes_over(run.images_seen)
    run.meter.mark("other")
    for batch in islice(micro_batches, run.engine.accumulation):
        run.meter.mark("data")
        if not passed_over:
            metrics = run.step(batch, rate, run.images_seen)
            run.guard.remember(batch.keys)
    return metrics


def _take_up(run: Run, asked: Wish) -> None:
    """Begin to do what a person asks for."""
    run.due = replace(run.due, show=run.due.show or Wish.sample in asked)
    run.tracker.event(run.images_seen, "control", asked=run.control.take_up(asked))


def _started(run: Run) -> None:
    """Tell how long it took to come to the first step."""
    run.startup.finish()
    run.tracker.event(run.images_seen, "startup", **run.startup.seconds)


def _rolled_back(run: Run, troubles: list[Trouble]) -> bool:
    """Write down what is wrong, and do what the policy says; True where training is back at a checkpoint.

    raises  TrainingDiverged where the policy is to stop, there were too many in a row, or there is no checkpoint
    """
    for trouble in troubles:
        action = run.guard.config.policy
        run.tracker.event(run.images_seen, "trouble", action=action.value, **asdict(trouble))
        run.guard.require_patience(trouble)
        if action is Policy.rollback:
            _roll_back(run, trouble)
            return True  # what came after it comes again
    return False


def _roll_back(run: Run, trouble: Trouble) -> None:
    wanted = max(trouble.start - run.guard.config.rollback_images, 0)
    with run.watchdog.phase("rollback"):
        abandoned = run.checkpoints.abandon_newer(run.checkpoints.path(wanted))
        newest = run.checkpoints.latest()
        if newest is None:
            raise TrainingDiverged(
                f"{trouble}. guard.policy=rollback finds no checkpoint of {wanted:,} images or fewer: write them more "
                "often (every.save), or rename one of *.abandoned"
            )
        state = run.checkpoints.load(newest)
    # After the renaming: a kill in between meets the same trouble again, and not what came after it.
    begin, end = run.guard.pass_over(trouble)
    run.images_seen, run.due, run.line_loss = state["images_seen"], Due(**state["due"]), state.get("line_loss")
    run.guard.resume(state)
    run.step.resume(state)
    run.rewind(run.images_seen)
    run.meter.restart()
    names = [path.name for path in abandoned]
    run.tracker.event(run.images_seen, "rollback", passed_over=[begin, end], abandoned=names)


def _log(run: Run, metrics: Metrics, rate: float) -> str:
    """Send this step's numbers to the tracker: the only wait for the device. Returns a note for the progress bar."""
    shares = {name: torch.tensor(share) for name, share in run.source.shares().items()}
    squares = run.movement.numbers(metrics["train/grad_norm"])
    squares |= {f"train/ema_distance_{half_life}": ratio for half_life, ratio in run.ema.distances().items()}
    means, spread = run.intake.since_last_line()
    squares |= spread
    unread = {"unread": torch.tensor(float(len(run.unread)))}
    ratios = {**squares, **means, **run.step.since_last_line()}
    values = run.engine.mean_over_ranks({**metrics, **shares, **unread}, ratios)
    if values.pop("unread"):
        run.unread.tell(run.tracker, run.images_seen)
    by_timestep = [value for name, value in values.items() if name.startswith("train/loss_t")]
    run.line_loss = fmean(by_timestep) if by_timestep else None
    values |= {name: math.sqrt(values[name]) for name in squares if name in values}
    values |= run.intake.expected() | run.guard.clipped() | run.source.counts(run.images_seen) | run.unread.counts()
    speed = run.meter.read(run.source.bytes_read)
    if runtime.is_main():
        speed |= run.checkpoints.numbers(run.images_seen)
    if run.meter.straggler is not None:
        run.tracker.event(run.images_seen, "straggler", **asdict(run.meter.straggler))
    values |= {"train/lr": rate, "train/global_batch": float(run.global_batch)}
    run.tracker.log(run.images_seen, {**values, "train/images_seen": float(run.images_seen), **speed})
    return f"loss {values['train/loss']:.4f}, {speed['perf/images_per_s']:,.0f} images/s"


def _looked(run: Run) -> bool:
    """Score and draw, where that is due; left out of the training's rates.

    returns  False where a signal came in between: what was not recorded is still due
    """
    if not (run.due.evaluate or run.due.show):
        return True
    try:
        with run.watchdog.phase("evaluation"), run.meter.pause("evaluation"):
            if run.due.evaluate:
                found = run.evaluate()
                for one in found:
                    run.tracker.event(run.images_seen, "evaluation", scores=one.scores, **one.conditions)
                # Of all weights in one line, and last: whenever a kill comes, it is there with all that belongs to it.
                scores = {name: value for one in found for name, value in one.scores.items()}
                run.tracker.log(run.images_seen, scores | _gap(run, scores))
                run.due = replace(run.due, evaluate=False)
            if run.due.show:
                run.show(run.images_seen)
    except runtime.Preempted:
        return False
    run.due = replace(run.due, show=False)
    return True


def _gap(run: Run, scores: dict[str, float]) -> dict[str, float]:
    """By how much the held-out loss of the weights that train is above their training loss, once both are known."""
    held_out = scores.get("val/loss_raw")
    return {} if held_out is None or run.line_loss is None else {"val/gap": held_out - run.line_loss}


def _save(run: Run) -> None:
    with run.watchdog.phase("save"), run.meter.pause("checkpoint"):
        own = {
            "images_seen": run.images_seen,
            "due": asdict(run.due),
            "line_loss": run.line_loss,
            "guard": run.guard.state(),
            "step": run.step.state(),
        }
        run.checkpoints.save({**own, **run.state}, stop_s=run.guard.steps_to_stop * run.meter.step_s)
    run.guard.saved()
