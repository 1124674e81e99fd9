"""How long training stands still for a checkpoint, as a share of a synchronous save of the same bytes. Limit: 0.25.

    python benchmarks/checkpoint.py [--millions 40] [--saves 5] [--folder FOLDER] [--threads 0]

One process trains a plain network; a checkpoint of it holds weights, two moments and two averages, five float32 values
a parameter. Turn by turn the same state is saved three ways: in the background, while training goes on; waited for; and
by `torch.save` and fsync, which takes no digest. Standing still is `save` itself and the loop's `poll`; the share is of
the faster of the other two, best passes compared, since a busy machine hits some. What steps beside the writing take
longer is printed apart: here writer and steps share the CPU, on a machine with GPUs they do not. The first save of a
process also takes the host memory, and is left out.
"""

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from ldm_scale.training.checkpoint import Checkpoints
from ldm_scale.training.ema import EMA
from ldm_scale.training.engine import Engine, EngineConfig, EngineKind, Precision
from ldm_scale.training.masters import MOMENTS
from ldm_scale.training.optimizer import OptimizerConfig

LIMIT = 0.25
LAYERS, BATCH = 10, 16
Save = Callable[[int], float]


class Squares(nn.Sequential):
    """Layers of equal width; returns the mean square of what comes out."""

    def forward(self, x_BD: torch.Tensor) -> torch.Tensor:
        return nn.Sequential.forward(self, x_BD).square().mean(1)


def engine_of(parameters: int) -> Engine:
    """One process that trains about so many parameters."""
    width = round((parameters / LAYERS) ** 0.5)
    engine = EngineConfig(kind=EngineKind.one_process, precision=Precision.fp32).build(
        global_batch=BATCH, micro_batch=BATCH
    )
    engine.prepare(Squares(*(nn.Linear(width, width) for _ in range(LAYERS))), OptimizerConfig())
    return engine


def timed(work: Callable[[], object]) -> float:
    """Seconds."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


class Training:
    """A training that can be saved in three ways."""

    def __init__(self, parameters: int, folder: Path) -> None:
        self._folder = folder
        self._engine = engine_of(parameters)
        self._ema = EMA(self._engine.masters, [10_000, 1_000_000])
        self._checkpoints = Checkpoints(
            folder / "checkpoints", masters=self._engine.masters, ema=self._ema, module=self._engine.module, keep_last=1
        )
        width = self._engine.module[0].in_features  # type: ignore[index]
        self._x_BD = torch.randn(BATCH, int(width), device=self._engine.device)
        self.steps_beside, self.seconds_beside = 0, 0.0

    @property
    def bytes(self) -> int:
        """Of a checkpoint."""
        return 4 * (3 + len(self._ema.shadows)) * sum(tensor.numel() for tensor in self._engine.masters.tensors)

    def step(self) -> None:
        """One optimizer step and its averages."""
        with self._engine.accumulate():
            self._engine.backward(self._engine.model(self._x_BD).mean())
            self._engine.step(1e-4)
        self._ema.update(BATCH, BATCH)
        if self._engine.device.type == "cuda":
            torch.cuda.synchronize()

    def background(self, number: int) -> float:
        """Save while training goes on; seconds of standing still."""
        path = self._checkpoints.path(number)
        stood = timed(lambda: self._checkpoints.save({"images_seen": number}))
        while not path.exists():
            self.seconds_beside += timed(self.step)
            self.steps_beside += 1
            stood += timed(self._checkpoints.poll)
        return stood + timed(self._checkpoints.drain)

    def waited_for(self, number: int) -> float:
        """Save, and wait for it."""
        saved = timed(lambda: self._checkpoints.save({"images_seen": number}))
        return saved + timed(self._checkpoints.drain)

    def by_torch(self, number: int) -> float:
        """`torch.save` and fsync, over the file before it."""
        masters = self._engine.masters
        lists = [masters.tensors, *(masters.moments(key) for key in MOMENTS), *self._ema.shadows.values()]

        def write() -> None:
            with open(self._folder / "by_torch.pt", "wb") as file:
                torch.save([[tensor.detach() for tensor in tensors] for tensors in lists], file)
                file.flush()
                os.fsync(file.fileno())

        return timed(write)


def main() -> None:
    """Print the machine, then a line for each way, the verdict, and what steps cost beside the writing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=int, default=40)
    parser.add_argument("--saves", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to write; a temporary one is the default")
    parser.add_argument("--threads", type=int, default=0, help="0 for one a CPU")
    options = parser.parse_args()
    torch.set_num_threads(options.threads or len(os.sched_getaffinity(0)))
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        training = Training(options.millions * 1_000_000, Path(folder))
        print(
            f"{platform.machine()}, {os.cpu_count()} CPUs, torch {torch.__version__}; checkpoints of "
            f"{training.bytes / 1e6:,.0f} MB; load {os.getloadavg()[0]:.1f}",
            flush=True,
        )
        training.step()
        plain = statistics.median(timed(training.step) for _ in range(5))
        ways: dict[str, Save] = {
            "in the background": training.background, "waited for": training.waited_for,
            "torch.save, fsync": training.by_torch,
        }  # fmt: skip
        first = training.waited_for(0)
        training.by_torch(0)
        taken: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(options.saves):
            for i, (name, save) in enumerate(ways.items()):
                taken[name].append(save(1 + len(ways) * turn + i))
    best = {name: min(seconds) for name, seconds in taken.items()}
    for name, seconds in taken.items():
        print(f"{name:18s} best {best[name]:6.3f} s   middle {statistics.median(seconds):6.3f}   {max(seconds):6.3f}")
    share = best["in the background"] / min(best["waited for"], best["torch.save, fsync"])
    print(f"training stands still for {share:.3f} of a synchronous save: {'met' if share <= LIMIT else 'MISSED'}")
    beside = training.seconds_beside / training.steps_beside
    print(f"a step takes {plain:.3f} s, beside the writing {beside:.3f} s; the first save of all {first:.3f} s")


if __name__ == "__main__":
    main()
