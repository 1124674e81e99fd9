"""Train a first stage or a diffusion model: from a job to a run directory. `train.py` starts this."""

import contextlib
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ldm_scale.core import runtime, storage
from ldm_scale.core.run_dir import RunDir
from ldm_scale.core.secrets import without_secrets
from ldm_scale.data.loader import Loader
from ldm_scale.jobs import branch, identity, repro, summary
from ldm_scale.jobs import config as jobs_config
from ldm_scale.jobs.lease import Lease
from ldm_scale.jobs.looks import Looks
from ldm_scale.jobs.schemas.train import TrainJob
from ldm_scale.jobs.stages import Stage, stage_of
from ldm_scale.tracking.goodput import Ledger, idle_before
from ldm_scale.tracking.report import write_report
from ldm_scale.tracking.tracker import JsonLines, Silent, Tracker
from ldm_scale.training import checkpoint, checkpoint_files
from ldm_scale.training.checkpoint import Checkpoints
from ldm_scale.training.control import Control
from ldm_scale.training.ema import EMA
from ldm_scale.training.engine import Engine
from ldm_scale.training.guards import GarbageCollection, Guard, passed_over
from ldm_scale.training.loop import Clock, Due, Outcome, Run, fit
from ldm_scale.training.movement import Movement
from ldm_scale.training.telemetry import Ranks, Startup
from ldm_scale.training.throughput import Meter, peak_flops
from ldm_scale.training.unread import Unread
from ldm_scale.training.watchdog import Watchdog, is_loss

log = runtime.logger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Launch:
    """One launch of a training, before anything of it is built."""

    job: TrainJob
    plain: dict[str, Any]
    """The job as JSON values, without secrets."""
    changed: identity.Changes
    """Since the launch before."""
    run_dir: RunDir
    lease: Lease
    """Of the run directory, which nothing is written to before it is held."""
    tracker: Tracker
    preemption: runtime.Preemption
    startup: Startup
    at_end: contextlib.ExitStack
    """Closes what is open; after an error, which may take long, once the reason has been told."""


def run(job: TrainJob) -> None:
    """Train to the end, or until told to stop; called again, go on from the newest checkpoint.

    exits  75 preempted, 0 stopped, 1 failed; `status.json` in the run directory says the same. Finished, it returns:
           the next training of a sweep may follow in this process
    """
    job.require_trainable()
    startup = Startup()
    runtime.configure_logging()
    preemption = runtime.Preemption()
    run_dir = RunDir(Path(job.run_dir))
    plain = without_secrets(jobs_config.to_plain(job))
    changed = identity.changes(run_dir, plain)
    identity.require_allowed(changed, amend=job.amend)
    if identity.is_finished(run_dir, job.total_images):
        log.info("%s is finished: nothing to train. A new run: name=ANOTHER_NAME", run_dir.path)
        return
    tracker: Tracker = job.tracker.build(run_dir) if runtime.is_main() else Silent()
    with (
        Lease(run_dir, "training") as lease,
        contextlib.ExitStack() as at_end,
        _status_kept(run_dir, lease, tracker, startup),
    ):
        outcome = _train(
            _Launch(
                job=job, plain=plain, changed=changed, run_dir=run_dir, lease=lease, tracker=tracker,
                preemption=preemption, startup=startup, at_end=at_end,
            )
        )  # fmt: skip
    if outcome != "finished":
        runtime.leave(runtime.PREEMPTED_EXIT_CODE if outcome == "preempted" else 0)


def _train(launch: _Launch) -> Outcome:
    job, run_dir, lease = launch.job, launch.run_dir, launch.lease
    checkpoint.require_grace(run_dir.checkpoints)
    parent = None if checkpoint_files.complete_ones(run_dir.checkpoints) else branch.parent_of(job)
    engine = job.engine.build(global_batch=job.global_batch, micro_batch=job.micro_batch, batch_fit=job.batch_fit)
    if not lease.wait(launch.preemption):
        return "preempted"
    if runtime.is_main():
        run_dir.told.unlink(missing_ok=True)  # before any rank can be lost to the watchdog
    watchdog = Watchdog(
        run_dir.path / "stacks",
        minutes=job.guard.watchdog_minutes,
        phase_minutes=job.guard.phase_minutes,
        on_end=lambda reason: _ended(job, run_dir, lease, launch.tracker, reason, launch.startup),
    )
    launch.startup.mark("process_group")
    try:
        try:
            outcome = _watched(launch, engine, watchdog, parent)
        except runtime.Preempted:  # while it looked at held-out images; nothing has begun
            outcome = "preempted"
            if runtime.is_main():
                run_dir.write_status(outcome, images=_images(run_dir))
            launch.tracker.finish(outcome)
        watchdog.close()
        engine.close()
        return outcome
    except Exception as error:
        if cause := watchdog.explained(error):
            error.add_note(cause)
        raise


def _watched(launch: _Launch, engine: Engine, watchdog: Watchdog, parent: branch.Parent | None) -> Outcome:
    job, run_dir, tracker, startup = launch.job, launch.run_dir, launch.tracker, launch.startup
    torch.manual_seed(job.seed)
    unread = Unread()
    stage = stage_of(job, engine.device, unread, launch.preemption.between)
    startup.mark("data_and_model")
    stage.prepare(engine, job.optimizer)
    ema = EMA(engine.masters, job.ema_half_lives)
    startup.mark("engine")
    checkpoints, damaged = _checkpoints(job, run_dir, engine, ema, tracker)
    launch.at_end.callback(checkpoints.close)
    newest = checkpoints.latest()
    state = checkpoints.load(newest) if newest is not None else None
    if state is not None:
        stage.resume(state)
    elif (parent := parent or branch.parent_of(job)) is not None:  # where there are checkpoints, all are damaged
        parent.require_fits(stage.state())
        state = parent.begin(engine, ema, checkpoints)
    startup.mark("checkpoint")
    under_way = _assemble(launch, engine, stage, ema, checkpoints, watchdog, unread, state)
    launch.at_end.callback(under_way.loader.close)
    born = None if parent is None else parent.described()
    _recorded(launch, stage, under_way, "start" if newest is None else "resume", damaged=damaged, parent=born)
    try:
        outcome = fit(under_way)
    except Exception:
        unread.tell_own(tracker, under_way.images_seen)
        raise
    with watchdog.phase("save"):
        checkpoints.drain()
    checkpoints.release()
    with watchdog.phase("end"):
        if outcome == "finished":
            stage.publish(_published(stage, ema, job.ema_half_lives[0]), run_dir)
        return _closed(run_dir, under_way, outcome)


def _recorded(launch: _Launch, stage: Stage, under_way: Run, begin: str, **told: Any) -> None:
    """Write what the launch is made of, and that it begins: `start` or `resume`; `told` goes into the event."""
    run_dir, tracker, startup, images = launch.run_dir, launch.tracker, launch.startup, under_way.images_seen
    idle_s = idle_before(run_dir, startup.launched) if runtime.is_main() else 0.0
    if runtime.is_main():
        storage.write_json(run_dir.config, launch.plain)
        run_dir.write_status("running", images=images)
        repro.record(run_dir, launch.plain, under_way.engine, stage.state(), stage.source, images)
        repro.keep_manifests(run_dir, stage.source, stage.conditions())
    tracker.start(launch.plain, resume_at=images)
    if begin == "start":
        tracker.log(images, stage.baseline())
    startup.mark("assembly")
    tracker.event(
        images, begin, world=under_way.engine.world, changed=launch.changed, launched=startup.launched, idle_s=idle_s,
        **told,
    )  # fmt: skip
    if runtime.is_main():
        under_way.meter.ledger = Ledger.read(run_dir)
    log.info("training %s: %s", run_dir.path, _in_words(under_way.engine, stage, images))


def _published(stage: Stage, ema: EMA, half_life: int) -> dict[str, torch.Tensor] | None:
    """The final weights by name, on rank 0; None elsewhere. Collective."""
    averaged = ema.consolidated(half_life)
    if averaged is None:
        return None
    return averaged | {name: value.cpu() for name, value in stage.module.state_dict().items() if name not in averaged}


def _checkpoints(
    job: TrainJob, run_dir: RunDir, engine: Engine, ema: EMA, tracker: Tracker
) -> tuple[Checkpoints, list[str]]:
    """The run's checkpoints, and a list that names those found damaged."""
    damaged: list[str] = []

    def on_failed(path: Path, reason: str) -> None:
        tracker.event(checkpoint_files.images_of(path), "save_failed", reason=reason)

    checkpoints = Checkpoints(
        run_dir.checkpoints,
        masters=engine.masters,
        ema=ema,
        module=engine.module,
        companions=engine.companion_masters,
        keep_last=job.keep_last,
        keep_every_images=job.keep_every,
        max_unsaved_minutes=job.max_unsaved_minutes,
        on_damaged=lambda path, reason: damaged.append(f"{path.name}: {reason}"),
        on_failed=on_failed,
    )
    return checkpoints, damaged


def _assemble(
    launch: _Launch,
    engine: Engine,
    stage: Stage,
    ema: EMA,
    checkpoints: Checkpoints,
    watchdog: Watchdog,
    unread: Unread,
    state: dict[str, Any] | None,
) -> Run:
    """The parts of a training and how far it has come, for the loop."""
    job, run_dir, tracker, startup = launch.job, launch.run_dir, launch.tracker, launch.startup
    loader: Loader[Any] = Loader(
        stage.source,
        global_batch=engine.global_batch,
        micro_batch=engine.micro_batch,
        rank=engine.rank,
        world=engine.world,
        device=engine.device,
    )
    meter = Meter(
        engine,
        Ranks(engine, straggler=job.guard.straggler, straggler_intervals=job.guard.straggler_intervals),
        Ledger(startup.launched),
        flops_per_image=stage.flops_per_image(),
        peak=peak_flops(engine.device, engine.compute_dtype),
    )
    left_out = runtime.gathered(passed_over(run_dir.read_lines(run_dir.events)))[0]  # files may reach hosts late
    guard = Guard(job.guard, engine, left_out)
    step = stage.step(engine, ema)
    if state is not None:
        guard.resume(state)
        step.resume(state)
    looks = Looks(
        stage,
        ema.put,
        half_lives=job.ema_half_lives,
        scored=job.evaluation.weights,
        tracker=tracker,
        between=launch.preemption.between,
        whose=ema.checksum,
        folder=run_dir.unfinished("training"),
    )
    return Run(
        engine=engine,
        step=step,
        source=stage.source,
        loader=loader,
        learning_rate=lambda images: job.optimizer.learning_rate_at(images, job.total_images),
        ema=ema,
        checkpoints=checkpoints,
        tracker=tracker,
        meter=meter,
        intake=stage.intake,
        unread=unread,
        movement=Movement(engine.masters, stage.module.part_of),
        startup=startup,
        preemption=launch.preemption,
        control=Control(run_dir),
        guard=guard,
        watchdog=watchdog,
        garbage=GarbageCollection(job.guard.collect_every),
        rewind=lambda images: _rewind(run_dir, meter, images),
        evaluate=looks.evaluate,
        show=looks.show,
        state=stage.state(),
        global_batch=engine.global_batch,
        total_images=job.total_images,
        log_clock=Clock(job.every.log),
        sample_clock=Clock(job.every.sample),
        evaluate_clock=Clock(job.every.evaluate),
        save_clock=Clock(job.every.save),
        images_seen=0 if state is None else int(state["images_seen"]),
        due=Due(job.every.evaluate > 0, job.every.sample > 0) if state is None else _still_due(run_dir, state),
        line_loss=None if state is None else state.get("line_loss"),
    )


def _still_due(run_dir: RunDir, state: dict[str, Any]) -> Due:
    """What was due when a checkpoint was written, but for what the run directory has of it already. Collective."""
    images, due = state["images_seen"], Due(**state["due"])
    if runtime.is_main():
        lines = [line for line in run_dir.read_lines(run_dir.metrics) if line["images_seen"] == images]
        evaluated = any(name.startswith(("val/", "eval/")) for line in lines for name in line)
        shown = any(run_dir.media.glob(f"samples__*/{images:012d}.png"))
        due = Due(evaluate=due.evaluate and not evaluated, show=due.show and not shown)
    return runtime.gathered(due)[0]


def _closed(run_dir: RunDir, under_way: Run, outcome: Outcome) -> Outcome:
    """Write how the run stands, close the tracker, show what there is."""
    reason = under_way.control.reason() if outcome == "stopped" else ""
    under_way.tracker.event(under_way.images_seen, outcome, **({"reason": reason} if reason else {}))
    if runtime.is_main():
        run_dir.write_status(outcome, images=under_way.images_seen, reason=reason)
    under_way.control.settle()
    under_way.tracker.finish(outcome)
    if runtime.is_main() and outcome != "preempted":  # that one's time is the save's
        _show(run_dir)
    return outcome


def _show(run_dir: RunDir) -> None:
    """Write the report, say where things are: views, for which no training fails that has ended well."""
    try:
        write_report(run_dir)
        summary.closing(run_dir)
    except Exception as error:
        log.warning("not shown (%s: %s): %s has everything else", type(error).__name__, error, run_dir.path)


@contextlib.contextmanager
def _status_kept(run_dir: RunDir, lease: Lease, tracker: Tracker, startup: Startup) -> Iterator[None]:
    """Tell that it failed, and the reason, where training ends by an error.

    exits  1 after the first step, with a traceback: whatever it is, an error there is no refusal
    """
    try:
        yield
    except Exception as error:
        if lease.has_run:
            reason = "".join(traceback.format_exception_only(error)).strip()
            write_failed(run_dir, tracker, reason, startup)
            tracker.finish("failed")
        if startup.is_over:
            sys.excepthook(type(error), error, error.__traceback__)
            sys.exit(1)
        raise


def _ended(job: TrainJob, run_dir: RunDir, lease: Lease, tracker: Tracker, reason: str, startup: Startup) -> None:
    """For the watchdog: tell that training failed, on rank 0, or where that is lost on whichever comes first."""
    if runtime.is_main():
        write_failed(run_dir, tracker, reason, startup)
        lease.close()
        return
    with contextlib.suppress(FileExistsError), open(run_dir.told, "x"):
        write_failed(run_dir, job.tracker.files(run_dir), reason, startup)


def write_failed(run_dir: RunDir, tracker: Tracker, reason: str, startup: Startup | None) -> None:
    """Say in status, events and alerts that a training failed, and why.

    startup  of this process; None where it is no training, which costs no GPU hours
    """
    images, reason = _images(run_dir), without_secrets(reason)
    run_dir.write_status("failed", images=images, reason=reason, cause="lost" if is_loss(reason) else "error")
    lived = {} if startup is None else {"launched": startup.launched, "world": runtime.world()}
    tracker.event(images, "failed", reason=reason, **lived)


def _rewind(run_dir: RunDir, meter: Meter, images: int) -> None:
    """Take back numbers and pictures of what came after so many images; W&B keeps them, and is sent none twice."""
    if runtime.is_main():
        JsonLines(run_dir).start({}, resume_at=images)
        meter.ledger = Ledger.read(run_dir)


def _images(run_dir: RunDir) -> int:
    lines = run_dir.read_lines(run_dir.metrics)
    return int(lines[-1]["images_seen"]) if lines else 0


def _in_words(engine: Engine, stage: Stage, images_seen: int) -> str:
    parameters = sum(parameter.numel() for parameter in stage.module.parameters())
    start = f"from image {images_seen:,}"
    return (
        f"{parameters:,} parameters, {engine.kind.value} {engine.precision.value} on {engine.world} process(es), "
        f"batch {engine.global_batch} = {engine.micro_batch} x {engine.world} x {engine.accumulation}, {start}"
    )
