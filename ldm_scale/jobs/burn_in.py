"""Is this cluster fit for a long training? Every host measured and compared, then the real training killed and resumed.

    launchers/burn_in +experiment=NAME [key=value ...] [--processes N]      on this host; N processes
    srun ... launchers/burn_in +experiment=NAME ...                         one task a GPU, on any number of hosts
    torchrun ... launchers/burn_in +experiment=NAME ...                     and `accelerate launch ...` alike

Takes the overrides of train.py: data.latents=, data.validation=, engine= and so on are those of the training to come.
First every process measures products, memory, collectives, reading and writing. Then the training runs --steps steps
undisturbed, and again with one process killed, resumed on another world, told to stop by SIGTERM, resumed, and
replayed; both must come to the same. The folder --out must lie on a file system of all hosts.

OUT/burn_in.html    pass or fail of every host, with numbers
OUT/exclude.txt     hosts that fail, one a line, with the reason
OUT/rates.json      measured rates: `python -m ldm_scale.jobs.plan ... --rates OUT/rates.json`
OUT/work            logs and runs; checkpoints only where something failed

exits  0 everything passes, 1 something fails, 2 it cannot begin
"""

import argparse
import dataclasses
import os
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ldm_scale.core import runtime, storage
from ldm_scale.jobs import config as jobs_config
from ldm_scale.jobs import plan, preflight
from ldm_scale.jobs.burn_in_crew import Crew, alone, import_for_workers, take_place_in_slurm_step
from ldm_scale.jobs.burn_in_page import is_passed, page
from ldm_scale.jobs.burn_in_rates import Notes, measure
from ldm_scale.jobs.burn_in_training import Rehearsal
from ldm_scale.jobs.burn_in_verdict import Host, exclude, judge, shown
from ldm_scale.jobs.preflight import Check, Needs
from ldm_scale.jobs.schemas.train import TrainJob

log = runtime.logger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="launchers/burn_in", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("overrides", nargs="+", help="as for train.py: +experiment=NAME key=value ...")
    parser.add_argument("--out", type=Path, default=Path("burn_in"), help="folder of all hosts (default: burn_in)")
    parser.add_argument("--processes", type=int, help="without a launcher: on this host (default: one a GPU, or 1)")
    parser.add_argument("--steps", type=int, default=200, help="of each training (default: 200); 0 only measures")
    parser.add_argument("--seconds", type=float, default=5, help="that each measurement lasts (default: 5)")
    parser.add_argument("--minutes", type=float, default=15, help="after which it ends as failed (default: 15)")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.steps and arguments.steps < 16:
        parser.error(
            f"--steps {arguments.steps}: at least 16, for saves between the disturbances, or 0 to measure only"
        )
    arguments.overrides.insert(0, "name=burn_in")
    jobs: list[TrainJob] = []
    jobs_config.or_exit(lambda: jobs.append(jobs_config.compose("train", arguments.overrides)))
    import_for_workers("ldm_scale.jobs.burn_in", *(["deepspeed"] if jobs[0].engine.kind.zero_stage else []))
    take_place_in_slurm_step()
    if "RANK" in os.environ:
        return _agent(arguments)
    return alone(arguments.processes or max(1, torch.cuda.device_count()), _agent_alone, arguments)


def _agent_alone(arguments: argparse.Namespace) -> None:
    runtime.leave(_agent(arguments))


def _agent(arguments: argparse.Namespace) -> int:
    """What every process that a launcher started does; the same exit status on all of them."""
    began = time.time()
    runtime.configure_logging()
    crew, overrides, out = Crew(arguments.minutes), arguments.overrides, arguments.out.absolute()
    job = jobs_config.compose("train", overrides)
    if refusal := crew.agreed(lambda: _unmet(job, crew.world)) or _unshared(crew, out):
        if crew.rank == 0:
            print(f"error: {refusal}", file=sys.stderr)
        return jobs_config.REFUSED_EXIT_CODE
    hosts, notes, checks = _measured(crew, overrides, arguments.seconds, out / "work")
    rates = {"peak": _median(notes, "peak"), "bus": _median(notes, "reduce_over_all")}
    rates["gather"] = _median(notes, "gather_over_all")
    rates |= {"memory": _median(notes, "memory_bytes"), "memory_bandwidth": _median(notes, "memory")}
    if arguments.steps and all(check.state == "ok" for check in checks):
        rehearsal = Rehearsal(crew, overrides, job, steps=arguments.steps, folder=out / "work")
        checks += rehearsal.checks()
        if all(check.state == "ok" for check in checks) and crew.rank == 0:
            rates |= rehearsal.rates(plan.measure(job).training_flops)
            for host in hosts:
                host.reasons += [why for name, why in rehearsal.stragglers().items() if name == host.name]
    passed = crew.agreed(lambda: _concluded(job, hosts, checks, rates, out, began))
    return 0 if passed else 1


def _unmet(job: TrainJob, world: int) -> str:
    """What the training would stumble over; empty for nothing."""
    job = dataclasses.replace(job, global_batch=job.micro_batch * world)
    needs = Needs(world=world, checkpoint_bytes=0, checkpoints=0, gpu_bytes=0, gpu_memory=0)
    return next((f"{check.name}: {check.said}" for check in preflight.checks(job, needs) if check.state != "ok"), "")


def _unshared(crew: Crew, out: Path) -> str:
    """Make room for the work, and say which hosts do not see it; empty for none. Collective."""

    def make_room() -> None:
        shutil.rmtree(out / "work", ignore_errors=True)
        (out / "work" / "rates").mkdir(parents=True)

    crew.agreed(make_room)
    blind = {host for host, sees in runtime.gathered((crew.hosts[crew.rank], (out / "work").is_dir())) if not sees}
    return f"--out {out} is not one folder for all hosts: {', '.join(sorted(blind))} cannot see it" if blind else ""


def _measured(
    crew: Crew, overrides: Sequence[str], seconds: float, work: Path
) -> tuple[list[Host], list[dict[str, Any]], list[Check]]:
    """Every host with its rates, what each rank noted, and whether all came to the end."""
    log.info("measuring %d processes on %d hosts", crew.world, len(set(crew.hosts)))
    folder = work / "rates"
    ended = crew.work(work / "logs" / "rates", measure, overrides, crew.hosts, seconds, folder)
    notes = runtime.gathered(Notes(folder, crew.rank).read())
    wrong = [one for one in ended if one.code != 0]
    check = Check("rates", "ok", f"measured by {crew.world} processes")
    if wrong:
        places = ", ".join(f"rank {one.rank} on {one.host} at {notes[one.rank].get('at')}" for one in wrong[:8])
        check = Check(
            "rates", "fails", f"{len(wrong)} processes did not come to the end: {places}; see {work / 'logs'}"
        )
    return judge(crew.hosts, notes), notes, [check]


def _median(notes: Sequence[dict[str, Any]], name: str) -> float | None:
    """Over all processes that measured it; None where none did."""
    found = [note[name] for note in notes if name in note]
    return statistics.median(found) if found else None


def _concluded(
    job: TrainJob,
    hosts: list[Host],
    checks: list[Check],
    rates: dict[str, float | None],
    out: Path,
    began: float,
) -> bool:
    """Write and print everything. On rank 0."""
    passed, engine = is_passed(hosts, checks), job.engine
    training = f"{job.experiment}, {engine.kind.value} {engine.precision.value}, micro batch {job.micro_batch}"
    facts = {
        "began": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(began)),
        "took": f"{(time.time() - began) / 60:.1f} min",
        "hosts": str(len(hosts)),
        "processes": str(sum(host.processes for host in hosts)),
        "device": hosts[0].device,
        **_in_words(rates),
    }
    measured = f"{facts['began']}, {facts['hosts']} hosts, {facts['processes']} processes, training {training}"
    machine = {name: rates.get(name) for name in ("peak", "matmul", "bus", "memory", "memory_bandwidth")}
    storage.write_json(
        out / "rates.json",
        {
            "measured": measured,
            "machine": {"name": hosts[0].device} | {name: rate for name, rate in machine.items() if rate is not None},
            "hosts": {host.name: host.rates for host in hosts},
        },
    )
    (out / "exclude.txt").write_text(exclude(hosts))
    following = _following(job, hosts, passed, out)
    (out / "burn_in.html").write_text(page(training, facts, hosts, checks, following), "utf-8")
    if passed:
        for run in (out / "work").glob("*disturbed"):
            shutil.rmtree(run / "checkpoints")
    _say(hosts, checks, passed, out, following)
    return passed


def _in_words(rates: dict[str, float | None]) -> dict[str, str]:
    """The rates of all hosts together."""
    words = {
        "bus": ("all-reduce over all", "B/s"),
        "gather": ("all-gather over all", "B/s"),
        "images_per_s": ("speed", "images/s"),
        "matmul": ("products in training", "FLOP/s a process"),
    }
    known = {name: rate for name in words if (rate := rates.get(name)) is not None}
    return {words[name][0]: shown(rate, words[name][1]) for name, rate in known.items()}


def _following(job: TrainJob, hosts: Sequence[Host], passed: bool, out: Path) -> list[str]:
    """What to type next."""
    planned = f"python -m ldm_scale.jobs.plan +experiment={job.experiment} ... --rates {out / 'rates.json'}"
    if any(host.reasons for host in hosts):
        return [
            f"launchers/slurm/submit ... with LDM_EXCLUDE={out / 'exclude.txt'}, or burn in the other hosts",
            planned,
        ]
    return [planned] if passed else [f"less {out / 'work' / 'logs'}/*/*.txt"]


def _say(hosts: Sequence[Host], checks: Sequence[Check], passed: bool, out: Path, following: Sequence[str]) -> None:
    """The closing summary."""
    failed = [host for host in hosts if host.reasons]
    print(f"\nburn-in {'passed' if passed else 'FAILED'}: {len(hosts) - len(failed)} of {len(hosts)} hosts pass")
    for host in failed:
        print(f"  {host.name}: {'; '.join(host.reasons)}")
    for check in checks:
        print(f"  {check.state:5s}  {check.name}: {check.said}")
    for what, name in (
        ("page", "burn_in.html"),
        ("exclude", "exclude.txt"),
        ("rates", "rates.json"),
        ("logs", "work/logs"),
    ):
        print(f"  {what:7s}  {out / name}")
    print("next:\n  " + "\n  ".join(following), flush=True)


if __name__ == "__main__":
    runtime.leave(main())
