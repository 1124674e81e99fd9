"""The processes of a burn-in: an agent for each process that a launcher would start, and what works under it.

An agent keeps away from the accelerator and talks to the others through gloo and a store, so it outlives what it
starts: a worker may be killed, hang, or take its GPU down. Workers are forked from a server that has imported
everything, so that a training begins at once where imports from a network disk take a minute.
"""

import multiprocessing
import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from ldm_scale.core import runtime

LOST_S = 120.0
"""Seconds in which every worker must have ended by itself once one of them was killed."""
_LOOK_S = 0.02
_SERVER = multiprocessing.get_context("forkserver")


@dataclass(frozen=True, slots=True)
class Ended:
    """How a worker ended."""

    rank: int
    host: str
    code: int | None
    """Its exit status, negative for a signal; None for one that had to be ended."""


class Crew:
    """This agent among all agents. Every method is collective, where nothing else is said."""

    def __init__(self, minutes: float) -> None:
        """Meet the others, as the environment says.

        minutes  that all work together may take
        """
        self.until = time.monotonic() + 60 * minutes
        self._store, self.rank, self.world = next(rendezvous("env://"))
        waits = timedelta(minutes=2 * minutes + 5)
        dist.init_process_group("gloo", store=self._store, rank=self.rank, world_size=self.world, timeout=waits)
        self.hosts: list[str] = runtime.gathered(host_name())
        """Of every rank."""
        self.victim = self.hosts.count(self.hosts[0]) - 1
        """The last rank on the host of rank 0, which writes what it looks at."""

    def work(
        self,
        logs: Path,
        function: Callable[..., None],
        *arguments: Any,
        world: int | None = None,
        harm: Callable[[BaseProcess], None] | None = None,
    ) -> list[Ended]:
        """Start a worker under each of the first `world` agents, as ranks of one world, and wait for their end.

        logs     where each writes what it says, `RANK.txt`
        harm     what the agent of the victim does to its worker once it runs; it returns soon when that ends
        returns  one each, by rank
        """
        world = self.world if world is None else world
        logs.mkdir(parents=True, exist_ok=True)
        port = runtime.gathered(_free_port())[0]
        killed = f"killed {logs.name}"
        code: int | None = 0
        if self.rank < world:
            environment = {"RANK": str(self.rank), "WORLD_SIZE": str(world), "MASTER_PORT": str(port)}
            environment |= {"LOCAL_RANK": str(self._local_rank), "MASTER_ADDR": os.environ["MASTER_ADDR"]}
            what = (function, arguments, environment, logs / f"{self.rank}.txt")
            process = _SERVER.Process(target=_begin, args=what)
            process.start()
            if harm is not None and self.rank == min(self.victim, world - 1):
                harm(process)
                self._store.set(killed, "yes")
            code = self._end_of(process, killed)
        ends = runtime.gathered(Ended(self.rank, self.hosts[self.rank], code))
        return ends[:world]

    def _end_of(self, process: BaseProcess, killed: str) -> int | None:
        until = self.until
        while process.is_alive() and time.monotonic() < until:
            process.join(0.5)
            if until == self.until and self._store.check([killed]):
                until = min(until, time.monotonic() + LOST_S)
        if not process.is_alive():
            return process.exitcode
        process.kill()
        process.join()
        return None

    def agreed(self, found: Callable[[], Any]) -> Any:
        """What rank 0 finds, on every rank."""
        return runtime.gathered(found() if self.rank == 0 else None)[0]

    @property
    def _local_rank(self) -> int:
        return self.hosts[: self.rank].count(self.hosts[self.rank])


def host_name() -> str:
    """This host, as Slurm's `--exclude` calls it where Slurm has started this process."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def take_place_in_slurm_step() -> None:
    """Say in torch's words which process of how many this is, where `srun` started it."""
    step = os.environ
    if "RANK" in step or int(step.get("SLURM_STEP_NUM_TASKS", "1")) == 1:
        return
    names = ["scontrol", "show", "hostnames", step["SLURM_STEP_NODELIST"]]
    first = subprocess.run(names, capture_output=True, check=True, text=True).stdout.split()[0]
    port = 20000 + (int(step["SLURM_JOB_ID"]) * 16 + int(step["SLURM_STEP_ID"])) % 12000
    step.setdefault("MASTER_ADDR", first)
    step.setdefault("MASTER_PORT", str(port))
    step |= {"RANK": step["SLURM_PROCID"], "WORLD_SIZE": step["SLURM_STEP_NUM_TASKS"]}


def import_for_workers(*modules: str) -> None:
    """Have the server of workers import these; before it is first asked for one. Not collective."""
    _SERVER.set_forkserver_preload(list(modules))


def alone(processes: int, agent: Callable[..., None], *arguments: Any) -> int:
    """All agents on this host, where no launcher has started any; the highest of their exit statuses."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    place = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    agents = [
        multiprocessing.get_context("fork").Process(target=_begin, args=(agent, arguments, place | {"RANK": str(rank)}))
        for rank in range(processes)
    ]
    for process in agents:
        process.start()
    for process in agents:
        process.join()
    return max(abs(process.exitcode or 0) for process in agents)


def _begin(
    function: Callable[..., None], arguments: tuple[Any, ...], environment: dict[str, str], log: Path | None = None
) -> None:
    """What each process does first: it ends when its parent does."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if log is not None:
        said = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(said, 1)
        os.dup2(said, 2)
    for name in [name for name in os.environ if name.startswith("TORCHELASTIC_")]:
        del os.environ[name]  # the agent of torchrun keeps a store for its own workers, not for these
    os.environ |= environment
    function(*arguments)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def reached(condition: Callable[[], bool], process: BaseProcess, until: float) -> bool:
    """Wait for a condition; False where the process ended first, or time (monotonic) is over. Not collective."""
    while not condition():
        if not process.is_alive() or time.monotonic() > until:
            return False
        time.sleep(_LOOK_S)
    return True


def hit(process: BaseProcess, number: int) -> None:
    """Send a signal to a process that may have ended. Not collective."""
    assert process.pid is not None
    with suppress(ProcessLookupError):
        os.kill(process.pid, number)


def _free_port() -> int:
    with socket.create_server(("", 0)) as free:
        port: int = free.getsockname()[1]
        return port
