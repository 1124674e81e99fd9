"""Peak memory of a training process on every engine, beside what jobs/footprint.py predicts for it.

    python benchmarks/memory.py [--width 1024] [--layers 10] [--processes 2] [--averages 1]

Each engine and precision trains linear layers in processes of their own on the CPU: weights, gradients, moments,
averages and the frameworks' buffers are all that there is, activations next to nothing and predicted as none. The CPU's
allocator keeps no statistics, so the peak is that of the resident set over a few steps, above what the process held
after it had trained a network of a few thousand parameters on the same engine; freed blocks go back to the system at
once (MALLOC_MMAP_THRESHOLD_). The figure is the mean of the processes.
"""

import argparse
import gc
import json
import os
import platform
import re
import socket
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

from ldm_scale.jobs.footprint import footprint
from ldm_scale.training.ema import EMA
from ldm_scale.training.engine import Engine, EngineConfig, EngineKind, Precision
from ldm_scale.training.optimizer import OptimizerConfig

LIMIT = 0.15
MB = 1e6
KINDS = (EngineKind.ddp, EngineKind.zero1, EngineKind.zero2, EngineKind.zero3)
_WARM = 64  # width of the network that loads whatever an engine loads


def started(config: EngineConfig, width: int, layers: int, averages: int) -> tuple[Engine, EMA]:
    """An engine that trains so many layers, and its averages."""
    torch.manual_seed(0)
    engine = config.build(global_batch=2 * int(os.environ["WORLD_SIZE"]), micro_batch=1)
    module = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
    engine.prepare(module, OptimizerConfig())
    return engine, EMA(engine.masters, [1000 * (number + 1) for number in range(averages)])


def train(engine: Engine, ema: EMA, width: int, steps: int) -> None:
    """Global batches of ones."""
    for number in range(steps):
        for _ in range(engine.accumulation):
            with engine.accumulate():
                engine.backward(engine.model(torch.ones(1, width)).float().square().mean())
                engine.step(1e-4)
        ema.update(engine.global_batch, engine.global_batch * (number + 1))


def peak(kind: EngineKind, precision: Precision, width: int, layers: int, averages: int) -> int:
    """Bytes, in this process."""
    config = EngineConfig(kind=kind, precision=precision, grad_clip=1.0)
    warm, warm_ema = started(config, _WARM, 2, averages)
    train(warm, warm_ema, _WARM, 3)
    warm.close()
    del warm, warm_ema
    gc.collect()
    before = resident("VmRSS")
    engine, ema = started(config, width, layers, averages)
    train(engine, ema, width, 1)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is held now
    train(engine, ema, width, 3)
    return resident("VmHWM") - before


def resident(field: str) -> int:
    """A field of the process's status, bytes."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def measured(kind: EngineKind, precision: Precision, options: argparse.Namespace) -> float:
    """Mean bytes of the processes of a launch."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, __file__, "--child", kind.value, precision.value]
    for name in ("width", "layers", "averages"):
        command += [f"--{name}", str(vars(options)[name])]
    processes = []
    for rank in range(options.processes):
        where = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(options.processes)}
        meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # ninja, for DeepSpeed
        env = {**os.environ, **where, **meet, "PATH": path, "MALLOC_MMAP_THRESHOLD_": "65536"}
        processes.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    found = []
    for process in processes:
        out, err = process.communicate(timeout=300)
        if process.returncode:
            raise RuntimeError(f"{kind.value} {precision.value} ended with {process.returncode}: {err[-2000:]}")
        found.append(json.loads(out.splitlines()[-1]))
    return float(sum(found) / len(found))


def main() -> None:
    """Print the machine, then one line for each engine and precision."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--averages", type=int, default=1)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        kind, precision = EngineKind(options.child[0]), Precision(options.child[1])
        print(json.dumps(peak(kind, precision, options.width, options.layers, options.averages)))
        return
    parameters = options.layers * options.width**2
    print(
        f"{platform.machine()}, cpu, torch {torch.__version__}; {parameters / 1e6:.1f}M parameters, {options.averages} "
        f"averages, {options.processes} processes; MB a process (limit {LIMIT:.0%})"
    )
    for precision in Precision:
        alone = 0.0
        for kind in KINDS:
            told = footprint(
                kind, precision, parameters=parameters, world=options.processes, averages=options.averages
            ).total
            found = measured(kind, precision, options)
            alone = alone or found
            error = told / found - 1
            verdict = "met" if abs(error) <= LIMIT else "MISSED"
            print(
                f"  {precision.value} {kind.value:5s}  measured {found / MB:7.1f} ({found / alone:4.2f} of ddp)   "
                f"predicted {told / MB:7.1f} ({error:+.1%})  {verdict}",
                flush=True,
            )


if __name__ == "__main__":
    main()
