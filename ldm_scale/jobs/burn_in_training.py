"""The real training, undisturbed and beside it killed, resumed on another world, stopped, resumed and replayed.

Both runs must log the same losses and end with the same weights, within a relative band: another world adds gradients
in another order, and bits cannot be asked for.
"""

import math
import signal
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from ldm_scale.core import runtime, storage
from ldm_scale.core.run_dir import RunDir
from ldm_scale.jobs import config as jobs_config
from ldm_scale.jobs import replay, train
from ldm_scale.jobs.burn_in_crew import Crew, Ended, hit, reached
from ldm_scale.jobs.preflight import Check
from ldm_scale.jobs.schemas.train import TrainJob
from ldm_scale.training.batch_fit import divisors
from ldm_scale.training.checkpoint_files import complete_ones, read_consolidated

_SAVES, _LOGS = 8, 40  # of a run
_KILLED_AT, _STOPPED_AT = 0.45, 0.6  # share of the steps: after the third save; and with the fourth one behind
_WARM = 0.25  # share of the steps that no rate is taken from


def train_worker(overrides: Sequence[str]) -> None:
    """What each process of a training does: what train.py does."""
    jobs_config.or_exit(lambda: train.run(jobs_config.compose("train", overrides)))


def replay_worker(where: str, steps: int) -> None:
    """The same of `jobs.replay`."""
    runtime.leave(replay.main([where, "--steps", str(steps)]))


class Rehearsal:
    """The checks, one after the other. Every method is collective over the agents, and finds the same on each."""

    def __init__(self, crew: Crew, overrides: Sequence[str], job: TrainJob, *, steps: int, folder: Path) -> None:
        """Prepare.

        overrides  of train.py, as the user gave them; `job` is what they make
        steps      optimizer steps of each of the two runs
        folder     on a file system of all hosts
        """
        self._crew, self._folder, self._steps = crew, folder, steps
        self._batch = job.micro_batch * crew.world
        self._overrides = [*overrides, *self._own(job)]
        self._band = replay.BANDS[job.engine.precision.value]
        self._patience = job.guard.straggler
        self._half_life = job.ema_half_lives[0]
        self._other_world = divisors(crew.world)[-2] if crew.world > 1 else 1
        self.undisturbed, self.disturbed = RunDir(folder / "undisturbed"), RunDir(folder / "disturbed")

    def _own(self, job: TrainJob) -> list[str]:
        images = self._steps * self._batch
        every = {"log": self._batch * max(1, self._steps // _LOGS), "save": self._batch * max(1, self._steps // _SAVES)}
        warm = min(job.optimizer.warmup_images, images // 2)
        return [
            f"total_images={images}", f"global_batch={self._batch}", f"optimizer.warmup_images={warm}",
            f"every.log={every['log']}", f"every.save={every['save']}", "every.evaluate=0", "every.sample=0",
            "keep_last=2", "keep_every=0", "tracker.wandb=false", "init=null",
            # One look at the end is never left out: make it short.
            "evaluation.images=8", "evaluation.grid=4", "evaluation.features=random", "sampler.steps=2",
        ]  # fmt: skip

    def checks(self) -> list[Check]:
        """Everything in turn, up to the first that fails."""
        found: list[Check] = []
        for name, check in (
            ("training", self._trained),
            ("kill -9 of one process", self._killed),
            (f"resumed on {self._other_world}, SIGTERM", self._stopped),
            (f"resumed on {self._crew.world}", self._ended),
            ("same run", self._same),
            ("replay", self._replayed),
        ):
            runtime.logger(__name__).info("%s", name)
            try:
                found.append(Check(name, "ok", check()))
            except _Differs as error:
                found.append(Check(name, "fails", str(error)))
                break
        return found

    def _trained(self) -> str:
        self._run(self.undisturbed, "undisturbed", expect={0})
        return f"{self._steps} steps of {self._batch} images on {self._crew.world} processes"

    def _killed(self) -> str:
        begun = self._batch * self._steps * _KILLED_AT

        def kill(process: BaseProcess) -> None:
            reached(lambda: _images(self.disturbed) >= begun, process, self._crew.until)
            hit(process, signal.SIGKILL)

        ended = self._run(self.disturbed, "killed", harm=kill)
        victim = ended[self._crew.victim]
        if victim.code == 0:
            raise _Differs("the training was over before it could be killed: more --steps")
        self._require([victim], "killed", lambda code: code == -signal.SIGKILL)
        self._require(ended, "killed", lambda code: code is not None)
        return f"rank {victim.rank} at {self._crew.agreed(lambda: _images(self.disturbed)):,} images; the others ended"

    def _stopped(self) -> str:
        begun = self._batch * self._steps * _STOPPED_AT

        def stop(process: BaseProcess) -> None:
            reached(lambda: _images(self.disturbed) >= begun, process, self._crew.until)
            hit(process, signal.SIGTERM)

        expect = {runtime.PREEMPTED_EXIT_CODE}
        self._run(self.disturbed, "another_world", world=self._other_world, harm=stop, expect=expect)
        images = self._crew.agreed(lambda: storage.read_json(self.disturbed.status)["images"])
        resumed = self._crew.agreed(lambda: _resumed(self.disturbed))
        if not resumed:
            raise _Differs("it began anew: no checkpoint was found after the kill")
        return f"went on from {resumed[-1]:,} images; one process was told to stop, all saved at {images:,}"

    def _ended(self) -> str:
        self._run(self.disturbed, "resumed", expect={0})
        return f"from {self._crew.agreed(lambda: _resumed(self.disturbed))[-1]:,} images to the end"

    def _same(self) -> str:
        differences = self._crew.agreed(lambda: differing(self.disturbed, self.undisturbed, self._half_life))
        said = ", ".join(f"{name} within {value:.1e}" for name, value in differences.items())
        if not all(value <= self._band for value in differences.values()):
            raise _Differs(f"{said}; {self._band:g} is allowed")
        return f"as the undisturbed run: {said}, relative ({self._band:g} allowed)"

    def _replayed(self) -> str:
        where = self._crew.agreed(lambda: str(complete_ones(self.disturbed.checkpoints)[1]))
        steps = max(1, self._steps // _SAVES)
        logs = self._folder / "logs" / "replay"
        self._require(self._crew.work(logs, replay_worker, where, steps), "replay", lambda code: code == 0)
        return str(self._crew.agreed(lambda: _last_line(logs / "0.txt"))).removeprefix(f"{where}: ")

    def _run(
        self,
        run_dir: RunDir,
        phase: str,
        *,
        world: int | None = None,
        harm: Callable[[BaseProcess], None] | None = None,
        expect: set[int] | None = None,
    ) -> list[Ended]:
        overrides = [*self._overrides, f"run_dir={run_dir.path}"]
        ended = self._crew.work(self._folder / "logs" / phase, train_worker, overrides, world=world, harm=harm)
        if expect is not None:
            self._require(ended, phase, lambda code: code in expect)
        return ended

    def _require(self, ended: Sequence[Ended], phase: str, holds: Callable[[int | None], bool]) -> None:
        wrong = [one for one in ended if not holds(one.code)]
        if wrong:
            log = self._folder / "logs" / phase / f"{wrong[0].rank}.txt"
            how = "did not end in time" if wrong[0].code is None else f"ended with {wrong[0].code}"
            last = self._crew.agreed(lambda: _last_line(log))
            raise _Differs(f"rank {wrong[0].rank} on {wrong[0].host} {how}; the end of {log}: {last}")

    def stragglers(self) -> dict[str, str]:
        """Hosts that the others waited for in most of the undisturbed run, with what was found."""
        late: dict[int, list[float]] = defaultdict(list)
        lines = self._warm_lines()
        for line in lines:
            waited = (line.get("perf/own_ms_max", 0) - line.get("perf/own_ms_median", 0)) / line["perf/step_ms"]
            if waited > self._patience:
                late[int(line["perf/slowest_rank"])].append(waited)
        return {
            self._crew.hosts[rank]: f"rank {rank} kept the others waiting for {statistics.median(waits):.0%} of a step"
            for rank, waits in late.items()
            if len(waits) > len(lines) / 2
        }

    def rates(self, flops_per_image: float) -> dict[str, float]:
        """Medians of the undisturbed run: images a second, and what products sustain on each process."""
        lines = self._warm_lines()

        def operations(line: dict[str, Any]) -> float:
            at_it = line["perf/split_forward_backward"] / line["perf/images_per_s_per_gpu"]  # seconds an image
            return flops_per_image / float(at_it)

        return {
            "images_per_s": statistics.median(line["perf/images_per_s"] for line in lines),
            "matmul": statistics.median(map(operations, lines)),
        }

    def _warm_lines(self) -> list[dict[str, Any]]:
        """Of the undisturbed run's metrics."""
        lines = self.undisturbed.read_lines(self.undisturbed.metrics)
        warm = _WARM * self._steps * self._batch
        return [line for line in lines if "perf/images_per_s" in line and line["images_seen"] > warm]


def differing(one: RunDir, other: RunDir, half_life: int) -> dict[str, float]:
    """How far two finished runs are apart: largest relative difference of a loss, and the distance between their
    weights, and between their averages, as a share of the length of the other's.
    """
    ours, theirs = _losses(one), _losses(other)
    if ours.keys() != theirs.keys():
        return {"losses (logged at other places)": math.inf}
    found = {"losses": max(abs(ours[at] - theirs[at]) / abs(theirs[at]) for at in theirs)}
    for name, kind in (("weights", "weight"), ("averages", f"ema/{half_life}")):
        mine, wanted = (read_consolidated(complete_ones(run.checkpoints)[0], kind)[1] for run in (one, other))
        apart = sum(float((mine[key].double() - wanted[key].double()).square().sum()) for key in wanted)
        length = sum(float(tensor.double().square().sum()) for tensor in wanted.values())
        found[name] = (apart / length) ** 0.5
    return found


class _Differs(Exception):
    """A check that fails, and why."""


def _images(run_dir: RunDir) -> int:
    lines = run_dir.read_lines(run_dir.metrics)
    return int(lines[-1]["images_seen"]) if lines else 0


def _resumed(run_dir: RunDir) -> list[int]:
    events = run_dir.read_lines(run_dir.events)
    return [event["images_seen"] for event in events if event["event"] == "resume"]


def _losses(run_dir: RunDir) -> dict[int, float]:
    lines = run_dir.read_lines(run_dir.metrics)
    return {line["images_seen"]: line["train/loss"] for line in lines if "train/loss" in line}


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()] if log.exists() else []
    return lines[-1].strip() if lines else "nothing"
