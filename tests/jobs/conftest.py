"""A tiny world, first stage and cache, made once by the real commands; and a way to start those commands."""

import contextlib
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from data_tools.make_toy_world import Recipe, write_world
from ldm_scale.data.cache import LatentCache
from ldm_scale.jobs import config, evaluate, precompute, train

ROOT = Path(__file__).parents[2]
TINY_UNET = ["unet.model_channels=16", "unet.norm_groups=8", "unet.head_channels=16", "unet.context_dim=16"]
TINY_TEXT = ["conditioning.width=16", "conditioning.layers=1", "conditioning.heads=2", "conditioning.head_dim=8"]
JOBS = {"train.py": ("train", train.run), "evaluate.py": ("evaluate", evaluate.run)}
QUICK = ["evaluation.images=8", "evaluation.batch=8", "evaluation.grid=4", "sampler.steps=2"]


def start(*command: str, cwd: Path, **changes: str) -> subprocess.Popen[str]:
    """Start a doorway of the project as a user would, in another directory's `runs`; `changes` of its environment."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}"
    environment = {
        **kept, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", "WANDB_ERROR_REPORTING": "false", "PATH": path,
        **changes,
    }  # fmt: skip
    return subprocess.Popen(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@dataclass(frozen=True)
class World:
    """Where the tiny things lie."""

    path: Path

    def job(self, script: str, *overrides: str) -> list[str]:
        return [sys.executable, str(ROOT / script), *overrides]

    def autoencoder(self, *overrides: str, kind: str = "kl") -> list[str]:
        return self.job(
            "train.py", f"+experiment=autoencoder_{kind}_f4", "scale=toy", f"data.images={self.path}/toy/train",
            f"data.validation={self.path}/toy/val", "first_stage.channels=8", "total_images=64",
            "optimizer.warmup_images=0", *QUICK[:3], *overrides,
        )  # fmt: skip

    def unconditional(self, *overrides: str, script: str = "train.py") -> list[str]:
        """A second stage on the latents of `autoencoder(kind="vq")`."""
        return self.job(
            script, "+experiment=uncond_celebahq", "scale=toy", f"data.images={self.path}/toy/train",
            f"data.validation={self.path}/toy/val", f"data.latents={self.path}/latents_vq",
            "first_stage.channels=8", f"first_stage.checkpoint={self.path}/runs/autoencoder_vq_f4/toy",
            *TINY_UNET[:3], *QUICK, *overrides,
        )  # fmt: skip

    def text_to_image(self, *overrides: str, script: str = "train.py") -> list[str]:
        return self.job(
            script, "+experiment=txt2img_laion", "scale=toy", f"data.images={self.path}/toy/train",
            f"data.validation={self.path}/toy/val", f"data.latents={self.path}/latents",
            "first_stage.channels=8", f"first_stage.checkpoint={self.path}/runs/autoencoder_kl_f4/toy",
            *TINY_UNET, *TINY_TEXT, *QUICK, *overrides,
        )  # fmt: skip

    def tiny_training(self, *overrides: str) -> list[str]:
        """A second-stage training of 12 steps."""
        return self.text_to_image(
            "global_batch=8", "micro_batch=8", "total_images=96", "every.log=16", "every.save=32", "every.evaluate=48",
            "every.sample=96", "ema_half_lives=[32]", "optimizer.warmup_images=16", *overrides,
        )  # fmt: skip

    def run(self, command: list[str], expect: int = 0, **changes: str) -> str:
        """Run to the end; returns what was printed."""
        process = start(*command, cwd=self.path, **changes)
        out, _ = process.communicate(timeout=300)
        assert process.returncode == expect, f"exit {process.returncode}\n{out}"
        return out

    def refusal(self, command: list[str]) -> str:
        """What a command that is refused says. Carried out in this process, as to start another one takes seconds."""
        (name, run), overrides = JOBS[Path(command[1]).name], command[2:]
        with (
            contextlib.chdir(self.path), signals_kept(), contextlib.redirect_stderr(io.StringIO()) as said,
            pytest.raises(SystemExit) as ended,
        ):  # fmt: skip
            config.or_exit(lambda: run(config.compose(name, overrides)))
        assert ended.value.code == config.REFUSED_EXIT_CODE
        return said.getvalue()

    def interrupted(self, command: list[str], when: Callable[[], bool], number: signal.Signals) -> int:
        """Start, send a signal once `when()` is true, and return the exit status."""
        process = start(*command, cwd=self.path)
        deadline = time.monotonic() + 120
        while not when():
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
            time.sleep(0.02)
        process.send_signal(number)
        process.communicate(timeout=120)
        return process.returncode


@contextmanager
def signals_kept() -> Iterator[None]:
    """Give a job's signals back to the tests."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    found = World(tmp_path_factory.mktemp("world"))
    write_world(found.path / "toy", Recipe(train=96, val=24, objects=1, size=32, shard_size=48, seed=0))
    found.run(found.autoencoder("data.transform.flip=true"))
    found.run(found.text_to_image("precompute.min_psnr=0", script="precompute_latents.py"))
    return found


@pytest.fixture
def encode(job: Callable[..., Any], tmp_path: Path) -> Iterator[Callable[..., LatentCache]]:
    """Precompute with more overrides of the module's own `job`; returns the cache."""

    def run(*overrides: str) -> LatentCache:
        precompute.run(job(*overrides))
        return LatentCache.open(f"{tmp_path}/latents")

    with signals_kept():
        yield run
