"""Submit a job to Slurm: `launchers/slurm/submit` starts this.

    launchers/slurm/submit JOB [key=value ...] [KEY=VALUE ...] [--option=value ...] [--print]

    JOB              train, precompute, sample or evaluate
    key=value        what the job is, as its own command takes it: +experiment=NAME, name=NAME, data.latents=CACHE ...
                     Several values (seed=1,2,3) make a sweep: one array job, a task for each combination
    KEY=VALUE        where it runs:
      NODES              hosts (1)
      GPUS_PER_NODE      GPUs of each, a process for each (8); 0 where there are none
      PROCESSES_PER_NODE processes of each, where they are not one per GPU
      TIME               limit, as sbatch takes it: 24:00:00 (the partition's)
      GRACE              seconds for a last save, before the limit or when another job takes the hosts (120)
    --option=value   goes to sbatch as it is: --partition=gpu --account=lab --cpus-per-task=12 --mem=0
    --print          show the script, say what would be refused, and do nothing

It copies the code (what git does not ignore) and the resolved configuration into the run directory, and the job runs
the copy, the first time and each time that it is requeued. Hosts listed in exclude.txt, or in $LDM_EXCLUDE, are left
out; the list is read again at each requeue. A training is refused that lacks what it reads: keys, data, weights; not
with --dependency=, since the job that it waits for may bring that.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm_scale.core import storage
from ldm_scale.core.run_dir import RunDir
from ldm_scale.core.secrets import without_secrets
from ldm_scale.jobs import config, identity, preflight
from ldm_scale.jobs.schemas.evaluate import EvaluateJob, GivenFirstStage
from ldm_scale.jobs.schemas.precompute import PrecomputeJob
from ldm_scale.jobs.schemas.sample import SampleJob
from ldm_scale.jobs.schemas.train import TrainJob
from ldm_scale.training.batch_fit import fit_batch
from ldm_scale.training.engine import EngineKind

ROOT = Path(__file__).resolve().parents[2]
JOBS = {"train": "train", "precompute": "precompute_latents", "sample": "sample", "evaluate": "evaluate"}
_LARGEST_FILE = 10_000_000  # bytes, of what is copied as code


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """Where a job runs."""

    nodes: int
    gpus_per_node: int
    processes_per_node: int
    time: str | None
    """Limit, as sbatch takes it; None for the partition's."""
    grace: int
    """Seconds between the wish to stop and the end."""
    options: tuple[str, ...]
    """What goes to sbatch as it is."""

    @classmethod
    def read(cls, keys: Mapping[str, str], options: Sequence[str]) -> "Placement":
        """From KEY=VALUE as the user gave them.

        raises  ValueError naming a key that is unknown, or that cannot have its value
        """
        known = ("NODES", "GPUS_PER_NODE", "PROCESSES_PER_NODE", "TIME", "GRACE")
        if unknown := [key for key in keys if key not in known]:
            raise ValueError(f"unknown key {unknown[0]}. Known here: {', '.join(known)}; the job's own are lower case")
        gpus = _count(keys, "GPUS_PER_NODE", 8, least=0)
        return cls(
            nodes=_count(keys, "NODES", 1),
            gpus_per_node=gpus,
            processes_per_node=_count(keys, "PROCESSES_PER_NODE", max(gpus, 1)),
            time=keys.get("TIME"),
            grace=_count(keys, "GRACE", int(os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"])),
            options=tuple(options),
        )

    @property
    def processes(self) -> int:
        """Of the whole job."""
        return self.nodes * self.processes_per_node

    @property
    def excluded(self) -> str:
        """Hosts that the user names; exclude.txt has more."""
        return ",".join(option.partition("=")[2] for option in self.options if option.startswith("--exclude="))


def _count(keys: Mapping[str, str], key: str, default: int, *, least: int = 1) -> int:
    value = keys.get(key, str(default))
    if not value.isdigit() or int(value) < least:
        raise ValueError(f"{key}={value}; a whole number, at least {least}")
    return int(value)


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One run of a job: what a person would type."""

    label: str
    """What sets it apart in a sweep; empty where there is none."""
    overrides: list[str]
    config: Any
    """What they come to: one of `config.JOBS`."""

    @property
    def folder(self) -> Path:
        """The run directory, or where a model lies that belongs to none."""
        match self.config:
            case SampleJob(run_dir=None, model=str(place)):
                return Path(place).absolute()
            case EvaluateJob(run_dir=None, first_stage=GivenFirstStage(checkpoint=str(place))):
                return Path(place).absolute()
            case EvaluateJob(watch=str(place)):
                return Path(place).absolute()
            case EvaluateJob(run_dir=None, write_reference=str(file)):
                return Path(file).absolute().parent
        return Path(self.config.run_dir).absolute()

    @property
    def work(self) -> tuple[list[Path], str]:
        """Where finished pieces of it lie, and a pattern of their files' names: others than before are progress.

        No pattern is that of a job which may find nothing to do.
        """
        kept = r"[0-9]{9}\.safetensors"  # jobs/kept.py
        match self.config:
            case TrainJob():
                return [RunDir(self.folder).checkpoints, self.folder / "evaluation"], rf".*\.json|{kept}"
            case PrecomputeJob(data=data):
                return [Path(str(data.latents)).absolute()], r".*\.done\.json"
            case SampleJob(out=out):
                return [Path(out).absolute() if out else self.folder / "samples"], r".*\.png"
            case EvaluateJob(watch=str()):
                return [self.folder / "evaluation"], ""
            case EvaluateJob(write_reference=str(file)):
                return [Path(f"{file}.unfinished").absolute()], kept
        return [self.folder / "evaluation"], rf".*\.json|{kept}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Submission:
    """All that one command asks for."""

    job: str
    tasks: list[Task]
    home: Path
    """The run directory; of a sweep, the one that holds the tasks' own."""
    placement: Placement
    snapshot: Path
    """In `home`: code, resolved configuration and script."""

    @classmethod
    def read(cls, job: str, overrides: Sequence[str], placement: Placement) -> "Submission":
        """Compose every task, and refuse trainings that cannot start on so many processes, or in their run directory.

        raises  ValueError as the job would
        """
        combinations = config.combinations(overrides)
        first = _task(job, "", combinations[0])
        tasks = [first] if len(combinations) == 1 else _swept(job, combinations, first)
        for task in tasks if job == "train" else []:
            _require_startable(task, placement.processes)
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        snapshot = first.folder / "snapshot" / f"{stamp}_{job}"
        return cls(job=job, tasks=tasks, home=first.folder, placement=placement, snapshot=snapshot)

    def lacking(self) -> list[str]:
        """What trainings would read, and is not there or does not fit."""
        if self.job != "train" or any(option.startswith("--dependency=") for option in self.placement.options):
            return []
        failing = [
            f"{check.name}: {check.said}"
            for task in self.tasks
            for check in preflight.reading(task.config)
            if check.state == "fails"
        ]
        return list(dict.fromkeys(failing))

    def script(self) -> str:
        """What sbatch is given."""
        alone = self.job == "precompute"  # its processes do not need each other
        variables = {
            "CODE": self.snapshot / "code",
            "EXCLUDE": _exclude_file(),
            "EXCLUDED": self.placement.excluded,
            "GRACE": self.placement.grace,
            "WAIT": 0 if alone else self.placement.grace,
        }
        lines = ["#!/usr/bin/env bash", *(f"#SBATCH {option}" for option in self._options()), "", "set -u"]
        lines += [f"{name}={shlex.quote(str(value))}" for name, value in variables.items()]
        lines += [f"PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH", ""]
        lines += ["case ${SLURM_ARRAY_TASK_ID:-0} in"]
        for number, task in enumerate(self.tasks):
            status = str(RunDir(task.folder).status) if self.job == "train" else ""
            work, names = task.work
            lines += [f"    {number})", f"        CONFIG={shlex.quote(str(self._config(task)))}"]
            lines += [f"        STATUS={shlex.quote(status)}"]
            lines += [f"        WORK=({shlex.join(map(str, work))}) PIECE={shlex.quote(names)}"]
            lines += [f'        set -- python "$CODE/{JOBS[self.job]}.py" {shlex.join(task.overrides)}', "        ;;"]
        return "\n".join([*lines, "esac", "", (ROOT / "launchers/slurm/batch.sh").read_text()])

    def _options(self) -> list[str]:
        place, sweep = self.placement, len(self.tasks) > 1
        log = self.home / f"slurm_{'%A_%a' if sweep else '%j'}.log"
        found = [
            f"--job-name={self.job}:{os.path.relpath(self.home)}",
            f"--nodes={place.nodes}",
            f"--ntasks-per-node={place.processes_per_node}",
            f"--output={log}",
            "--open-mode=append",
            "--requeue",
            f"--signal=B:USR1@{place.grace}",
        ]
        if place.gpus_per_node:
            found.append(f"--gpus-per-node={place.gpus_per_node}")
        if place.time:
            found.append(f"--time={place.time}")
        if sweep:
            found.append(f"--array=0-{len(self.tasks) - 1}")
        elif self.job == "train":
            found.append("--dependency=singleton")  # a second job of this run waits for the first
        if hosts := [*filter(None, [place.excluded]), *excluded()]:
            found.append(f"--exclude={','.join(hosts)}")
        others = (option for option in place.options if not option.startswith("--exclude="))
        return [shlex.quote(option) for option in (*found, *others)]

    def _config(self, task: Task) -> Path:
        return self.snapshot / (f"config_{task.label}.json" if task.label else "config.json")

    def send(self) -> str:
        """Make the snapshot and hand the script to Slurm; returns the job's number.

        raises  ValueError where the code cannot be copied, or with what sbatch says; nothing is left behind then
        """
        try:
            return self._sent()
        except ValueError:
            shutil.rmtree(self.snapshot)
            with suppress(OSError):  # directories that hold something
                os.removedirs(self.snapshot.parent)
            raise

    def _sent(self) -> str:
        self.snapshot.mkdir(parents=True)
        copy_code(self.snapshot / "code")
        for task in self.tasks:
            storage.write_json(self._config(task), without_secrets(config.to_plain(task.config)))
        file = self.snapshot / "job.sh"
        file.touch(mode=0o600)  # the command may hold secrets
        file.write_text(self.script())
        try:
            said = subprocess.run(["sbatch", "--parsable", str(file)], capture_output=True, text=True)
        except FileNotFoundError as error:
            raise ValueError("no sbatch here: submit on a host of the cluster, or look with --print") from error
        if said.returncode:
            raise ValueError(said.stderr.strip())
        return said.stdout.strip().partition(";")[0]


def _task(job: str, label: str, overrides: list[str]) -> Task:
    return Task(label=label, overrides=overrides, config=config.compose(JOBS[job], overrides))


def _swept(job: str, combinations: list[list[str]], first: Task) -> list[Task]:
    """A task for each combination; trainings under one group, each in a directory of its own in that of the first."""
    varied = [at for at, texts in enumerate(zip(*combinations, strict=True)) if len(set(texts)) > 1]
    tasks = []
    for overrides in combinations:
        label, own = _label([overrides[at] for at in varied]), []
        if job == "train":
            group = first.config.tracker.group or first.config.name
            own = [f"run_dir={first.folder / label}", f"tracker.group={group}"]
        tasks.append(_task(job, label, [*overrides, *own]))
    if len({task.label for task in tasks}) < len(tasks):
        raise ValueError(f"the same task twice in a sweep: {', '.join(task.label for task in tasks)}")
    return tasks


def _label(overrides: Sequence[str]) -> str:
    """optimizer.learning_rate=1e-4 and seed=2 as learning_rate-1e-4_seed-2: short, and good for a path."""
    pairs = [text.lstrip("+").partition("=") for text in overrides]
    return "_".join(re.sub(r"[^\w.-]+", "-", f"{key.rpartition('.')[2]}-{value}") for key, _, value in pairs)


def _require_startable(task: Task, world: int) -> None:
    """Refuse what the training would refuse, before it has waited in the queue."""
    job = task.config
    job.require_trainable()
    if job.engine.kind is EngineKind.one_process and world > 1:
        raise ValueError(
            f"engine.kind=one_process, but {world} processes are asked for: engine=ddp or engine=zero1, or NODES=1 "
            "PROCESSES_PER_NODE=1"
        )
    fit_batch(global_batch=job.global_batch, micro_batch=job.micro_batch, world=world, fit=job.batch_fit)
    identity.require_allowed(
        identity.changes(RunDir(task.folder), without_secrets(config.to_plain(job))), amend=job.amend
    )


def copy_code(folder: Path) -> None:
    """Copy all of the checkout that git does not ignore, and note which version it is, for `repro.json`.

    raises  ValueError where there is no checkout, or where it holds files that are too large for code
    """
    if not (ROOT / ".git").exists():
        raise ValueError(f"{ROOT} is no git checkout: submit from one; the job runs a copy of what git does not ignore")
    names = _git("ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")
    files = [name for name in names if (ROOT / name).is_file()]  # git lists those that were deleted too
    if large := [name for name in files if (ROOT / name).stat().st_size > _LARGEST_FILE]:
        raise ValueError(f"too large to be copied as code: {', '.join(large[:10])}. Name them in .gitignore")
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)
    changed = _git("status", "--porcelain").splitlines()
    version = {"commit": _git("rev-parse", "HEAD").strip(), "dirty": bool(changed), "changed": changed}
    storage.write_json(folder / "snapshot.json", version)


def _git(*arguments: str) -> str:
    said = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    if said.returncode:
        raise ValueError(f"git {' '.join(arguments)}: {said.stderr.strip()}")
    return said.stdout


def _exclude_file() -> Path:
    return Path(os.environ.get("LDM_EXCLUDE", ROOT / "exclude.txt")).absolute()


def excluded() -> list[str]:
    """Hosts that no job shall have: one a line, after # a remark."""
    if not (file := _exclude_file()).exists():
        return []
    hosts = (line.partition("#")[0].strip() for line in file.read_text().splitlines())
    return [host for host in hosts if host]


def main() -> None:
    """The command line."""
    if not sys.argv[1:] or sys.argv[1] in ("-h", "--help"):
        print(__doc__)
        return
    job, *rest = sys.argv[1:]
    if job not in JOBS:
        raise ValueError(f"{job} is no job: {', '.join(JOBS)}, and then what it is: +experiment=NAME ...")
    options = [text for text in rest if text.startswith("--") and text != "--print"]
    keys = dict(text.split("=", 1) for text in rest if re.match(r"[A-Z_]+=", text))
    overrides = [text for text in rest if not text.startswith("--") and text.split("=")[0] not in keys]
    if bare := [text for text in overrides if "=" not in text and not text.startswith("~")]:
        raise ValueError(f"{bare[0]} is no key=value; options of sbatch are written --option=value")
    submission = Submission.read(job, overrides, Placement.read(keys, options))
    lacking = submission.lacking()
    if "--print" in rest:
        print(submission.script())
        for one in lacking:
            print(f"would be refused: {one}", file=sys.stderr)
        return
    if lacking:
        raise ValueError("; ".join(lacking))
    number = submission.send()
    home, place = os.path.relpath(submission.home), submission.placement
    print(
        f"submitted  {number}: {job} {home}, "
        + (f"{len(submission.tasks)} tasks of " if len(submission.tasks) > 1 else "")
        + f"{place.nodes} host(s) x {place.processes_per_node} process(es)\n"
        f"  copy     {os.path.relpath(submission.snapshot)}\n"
        f"  log      tail -F {home}/slurm_*.log\n"
        f"  status   squeue --jobs={number}; python -m ldm_scale.jobs.status {home}\n"
        f"  end      scancel {number}"  # what is running saves itself, and the same command goes on
    )


if __name__ == "__main__":
    config.or_exit(main)
