"""The real train job on a tiny world, in processes that have everything imported already: they are hit at work."""

import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from data_tools.make_toy_world import Recipe, write_world
from ldm_scale.core import runtime, weights
from ldm_scale.core.run_dir import RunDir
from ldm_scale.jobs import config, evaluate, precompute, train
from ldm_scale.training.checkpoint_files import find, read_consolidated
from ldm_scale.training.guards import Guard

_WAIT_S = 240.0
_LOOK_S = 0.002
_HALF_LIFE = 32


def work(job: str, overrides: Sequence[str], rank: int, world: int, port: int, log: Path) -> None:
    """What each process does: a job as a launcher starts it, with what it says in `log`."""
    said = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(said, 1)
    os.dup2(said, 2)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WANDB_MODE": "offline"}
    # Of two versions of ninja each builds DeepSpeed's operators again: take the one that every other test takes.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    composed = config.compose(job, overrides)
    if job == "train":
        train.Guard = _traced(log.parent / f"keys{port}.{rank}")  # type: ignore[misc]
        config.or_exit(lambda: train.run(composed))
        runtime.leave()
    elif job == "evaluate":
        evaluate.run(composed)
    else:
        precompute.run(composed)


def _traced(file: Path) -> type[Guard]:
    file.touch()

    class Traced(Guard):
        """Writes down the keys of every micro batch that was trained on."""

        def remember(self, keys: Sequence[str]) -> None:
            super().remember(keys)
            with open(file, "a") as lines:
                lines.writelines(f"{key}\n" for key in keys)

    return Traced


class Launch:
    """The processes of one job."""

    def __init__(self, job: str, overrides: Sequence[str], *, world: int, log: Path) -> None:
        self._log, self._world = log, world
        with socket.create_server(("127.0.0.1", 0)) as free:
            self._port = free.getsockname()[1]
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["ldm_scale.jobs.train", "deepspeed", "wandb", "hydra"])
        self._processes: list[BaseProcess] = [
            context.Process(target=work, args=(job, overrides, rank, world, self._port, log)) for rank in range(world)
        ]
        for process in self._processes:
            process.start()

    def reaches(self, condition: Callable[[], bool]) -> bool:
        """Wait until a condition is true; False where a process ended first."""
        until = time.monotonic() + _WAIT_S
        while not condition():
            if not all(process.is_alive() for process in self._processes):
                return False
            assert time.monotonic() < until, self.said()
            time.sleep(_LOOK_S)
        return True

    def send(self, number: signal.Signals, *ranks: int) -> None:
        """Send a signal to these ranks, where they still live."""
        for rank in ranks:
            if (process := self._processes[rank]).is_alive() and process.pid is not None:
                with suppress(ProcessLookupError):  # it ends by itself where the other one is gone
                    os.kill(process.pid, number)

    def ended(self) -> list[int | None]:
        """The exit status of each rank."""
        for process in self._processes:
            process.join(_WAIT_S)
        return [process.exitcode for process in self._processes]

    def finish(self) -> None:
        """Wait for the end, which must be a good one."""
        assert self.ended() == [0] * self._world, self.said()

    def said(self) -> str:
        """What all ranks printed."""
        return self._log.read_text()

    def keys(self) -> list[str]:
        """The samples that all ranks trained on, in the order of the stream."""
        files = [self._log.parent / f"keys{self._port}.{rank}" for rank in range(self._world)]
        return [key for row in zip(*(file.read_text().split() for file in files), strict=True) for key in row]


@dataclass(frozen=True)
class Toy:
    """Shards, a first stage of random weights, its latents; and the tiniest training on them."""

    path: Path

    def overrides(self, *more: str) -> list[str]:
        """What every job on this world is told."""
        return [
            "+experiment=txt2img_laion", "scale=toy", f"data.images={self.path}/toy/train",
            f"data.validation={self.path}/toy/val", f"data.latents={self.path}/latents",
            "first_stage.channels=8", f"first_stage.checkpoint={self.path}/kl",
            "unet.model_channels=16", "unet.norm_groups=8", "unet.head_channels=16", "unet.context_dim=16",
            "conditioning.width=16", "conditioning.layers=1", "conditioning.heads=2", "conditioning.head_dim=8",
            "evaluation.images=8", "evaluation.batch=8", "evaluation.grid=4", "sampler.steps=2", *more,
        ]  # fmt: skip

    def train(self, run: Path, *more: str, engine: str = "ddp", world: int = 2, logs: Path | None = None) -> Launch:
        """Start a training on this machine, or go on with it."""
        logs = logs or run.with_name(f"{run.name}_logs")
        logs.mkdir(exist_ok=True)
        return Launch("train", self.training(run, *more, engine=engine), world=world, log=logs / "log.txt")

    def training(self, run: Path, *more: str, engine: str = "ddp") -> list[str]:
        """What a training is told: steps of 8 images, 12 of them unless told otherwise."""
        return self.overrides(
            f"run_dir={run}", f"engine={engine}", "engine.precision=fp32", "global_batch=8", "micro_batch=2",
            "total_images=96", "every.log=8", "every.save=32", "every.evaluate=0", "every.sample=0",
            f"ema_half_lives=[{_HALF_LIFE}]", "optimizer.warmup_images=16", "tracker.wandb=false", *more,
        )  # fmt: skip


def make_toy(path: Path) -> Toy:
    """Make all that a training starts from, in an empty directory."""
    made = Toy(path)
    write_world(path / "toy", Recipe(train=96, val=8, objects=1, size=32, shard_size=48, seed=0))
    encoding = made.overrides("precompute.min_psnr=0")
    torch.manual_seed(0)
    first_stage = config.compose("precompute_latents", encoding).first_stage
    weights.save(path / "kl", {"first_stage": config.to_plain(first_stage)}, first_stage.build().state_dict())
    Launch("precompute_latents", encoding, world=1, log=path / "log.txt").finish()
    return made


def curve(run: Path, name: str = "train/loss") -> dict[int, float]:
    """Logged values by images seen."""
    run_dir = RunDir(run)
    return {line["images_seen"]: line[name] for line in run_dir.read_lines(run_dir.metrics) if name in line}


def events(run: Path, *kinds: str) -> list[dict[str, Any]]:
    """What happened, of these kinds."""
    run_dir = RunDir(run)
    return [line for line in run_dir.read_lines(run_dir.events) if line["event"] in kinds]


def everything(run: Path) -> dict[str, torch.Tensor]:
    """Weights, moments and averages of the newest checkpoint, by kind and name."""
    newest = find(RunDir(run).checkpoints)
    kinds = ("weight", "exp_avg", "exp_avg_sq", f"ema/{_HALF_LIFE}")
    return {f"{kind}:{name}": t for kind in kinds for name, t in read_consolidated(newest, kind)[1].items()}


def differing(one: Path, other: Path) -> list[str]:
    """What is not the same, bit for bit, at the end of two runs."""
    ours, theirs = everything(one), everything(other)
    assert ours.keys() == theirs.keys()
    return [name for name in ours if not torch.equal(ours[name], theirs[name])]


def saving(run: Path) -> set[Path]:
    """Where a checkpoint is being written, or was when its process was killed."""
    return set(RunDir(run).checkpoints.glob(".images_*.tmp"))
