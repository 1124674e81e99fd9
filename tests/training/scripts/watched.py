"""What a watchdog is for, on purpose.

usage  watched.py OUT sleep|lost|dark|patient|evaluate RANK     that rank sleeps for ever, is killed, answers nobody any
                                                                more, has a long phase (and then less to do than the
                                                                others), or fails with averaged weights under ZeRO

OUT/{rank}.txt says why a process ended, where it ended by itself.
"""

import os
import signal
import sys
import time
from pathlib import Path

import tiny
import torch
import torch.distributed as dist

from ldm_scale.core import runtime
from ldm_scale.training import watchdog as watchdog_module
from ldm_scale.training.ema import EMA
from ldm_scale.training.watchdog import Watchdog

MINUTES = 0.03


def snore() -> None:
    time.sleep(1000)


def step(number: int, what: str, chosen: bool, watchdog: Watchdog) -> None:
    if number == 20 and chosen:
        if what == "sleep":
            snore()
        if what == "lost":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "dark":
            os.kill(os.getpid(), signal.SIGSTOP)
        with watchdog.phase("long"):
            time.sleep(2 * 60 * MINUTES)
    if dist.is_initialized():
        dist.all_reduce(torch.ones(1))
    time.sleep(0.01)


def evaluate(ema: EMA, chosen: bool) -> None:
    with ema.swapped(4):
        if chosen:
            raise OSError("a picture on this host is gone")
        dist.barrier()


def main() -> None:
    out, what, chosen = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    if what == "evaluate":
        ema = EMA(tiny.engine_of("zero1").masters, [4])
    elif runtime.world() > 1:
        dist.init_process_group("gloo")
    if what == "dark":
        watchdog_module.SILENT_S, watchdog_module._ANSWER_S = 4.0, 2.0  # a tenth of what it waits in earnest
    rank = runtime.rank()
    said = out / f"{rank}.txt"
    limit = MINUTES if runtime.world() == 1 or rank == chosen else 10.0  # who waits has no reason of its own to end
    watchdog = Watchdog(out / "stacks", minutes=limit, phase_minutes=10, on_end=(out / "why.txt").write_text)
    try:
        for number in range(40):
            step(number, what, rank == chosen, watchdog)
            watchdog.beat()
        if what == "evaluate":
            evaluate(ema, rank == chosen)
        if what == "patient" and rank != chosen:
            time.sleep(2 * 60 * MINUTES)
        watchdog.close()
        said.write_text("done")
    except Exception as error:
        said.write_text(f"{type(error).__name__}: {error}\n{watchdog.explained(error)}")
        raise
    runtime.leave()


main()
