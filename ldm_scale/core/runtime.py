"""Where this process runs: rank, world, device; logging that knows its rank; a wish to stop that all ranks agree on."""

import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from types import FrameType, TracebackType
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

from ldm_scale.core.secrets import without_secrets

Gathered = TypeVar("Gathered")

PATIENCE = timedelta(weeks=4)
"""How long processes wait for one another: a watchdog ends what hangs, and knows why."""
PREEMPTED_EXIT_CODE = 75  # EX_TEMPFAIL: try again later; launchers requeue on status.json, schedulers may read this


def rank() -> int:
    """This process's number in the world, 0 when there is only one."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))


def world() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """True on rank 0, which alone writes what there is one of."""
    return rank() == 0


def join() -> None:
    """Let processes that were launched together speak with each other, however long that may be between two words."""
    if world() > 1:
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=PATIENCE)


def barrier() -> None:
    """Wait for every rank; nothing to wait for in a world of one."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()


def grace_s() -> float:
    """Seconds between the launcher's signal to stop and its SIGKILL; infinite where no launcher tells.

    An elastic agent (torchrun, `accelerate launch`) gives 30 unless it is told otherwise, as launchers/env.sh does.
    """
    untold = "30" if "TORCHELASTIC_RUN_ID" in os.environ else "inf"
    return float(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", untold))


def leave(code: int = 0) -> NoReturn:
    """End this process with an exit status; where it has a process group, all ranks together and at once.

    Threads of gloo may outlive the group and still hold Python objects. An interpreter that shuts down in good order
    under them aborts now and then ("terminate called without an active exception", torch 2.15), after all work is done.
    """
    if dist.is_initialized():
        barrier()
        dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def any_rank(flag: bool) -> bool:
    """True on every rank when it is true on one."""
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return flag
    vote = torch.tensor(int(flag), device=device())
    dist.all_reduce(vote, op=dist.ReduceOp.MAX)
    return bool(vote.item())


def gathered(value: Gathered) -> list[Gathered]:
    """What every rank has, by rank. Collective; for small things, since they are pickled."""
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def together(make: Callable[[], Gathered]) -> Gathered:
    """What `make` returns here. What it refuses on one rank (ValueError), all refuse: none waits for it. Collective."""
    refused: list[str] = []
    try:
        made = make()
    except ValueError as error:
        refused.append(str(error))
    if any_rank(bool(refused)):
        raise ValueError(next(said for rank in gathered(refused) for said in rank))
    return made


def device() -> torch.device:
    """The accelerator of this process, or the CPU where there is none.

    raises  RuntimeError where a GPU is present but CUDA cannot use it: never silently the CPU
    """
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    require_usable_gpu(gpu_present=os.path.exists("/dev/nvidiactl"), driver=_driver_version())
    return torch.device("cpu")


def require_usable_gpu(*, gpu_present: bool, driver: str) -> None:
    """Refuse a machine whose GPU this torch cannot drive, unless CUDA_VISIBLE_DEVICES is set empty on purpose."""
    if gpu_present and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
        raise RuntimeError(
            f"a GPU is present but CUDA is unusable: driver {driver}, torch {torch.__version__} built for CUDA "
            f"{torch.version.cuda}. Install a torch wheel for this driver, or set CUDA_VISIBLE_DEVICES= to use the CPU"
        )


def _driver_version() -> str:
    try:
        with open("/proc/driver/nvidia/version") as file:
            return file.readline().split("Module")[-1].split()[0]
    except (OSError, IndexError):
        return "unknown"


def logger(name: str) -> logging.Logger:
    """A logger that speaks on rank 0 only, and names the rank when it is not alone."""
    log = logging.getLogger(name)
    log.addFilter(lambda record: is_main() or record.levelno >= logging.ERROR)
    return log


def configure_logging() -> None:
    """Plain lines on stderr, with time and rank; in them, and in what an uncaught error says, no secrets."""
    prefix = f"[rank {rank()}] " if world() > 1 else ""
    lines = logging.StreamHandler(sys.stderr)
    lines.setFormatter(_Discreet(f"%(asctime)s {prefix}%(message)s", "%H:%M:%S"))
    logging.basicConfig(level=logging.INFO, handlers=[lines], force=True)
    sys.excepthook = _say_error


class _Discreet(logging.Formatter):
    """Keeps secrets: messages name URLs."""

    def format(self, record: logging.LogRecord) -> str:
        return str(without_secrets(super().format(record)))


def _say_error(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    sys.stderr.write(without_secrets("".join(traceback.format_exception(kind, error, trace))))


class Preempted(Exception):
    """Some rank was told to stop; raised on all ranks, at the same place."""


class Preemption:
    """Remembers SIGTERM or SIGUSR1 until it is asked; `agreed` and `between` are collective calls."""

    def __init__(self) -> None:
        self.received = False
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = True

    def agreed(self) -> bool:
        """True on all ranks once one of them was told to stop."""
        return any_rank(self.received)

    def between(self) -> None:
        """Ask between two batches of something long.

        raises  Preempted on all ranks once one of them was told to stop
        """
        if self.agreed():
            raise Preempted
