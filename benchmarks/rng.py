"""What random numbers drawn for each position cost in a training step (core/rng.py), and beside torch's own.

    python benchmarks/rng.py [--channels 128] [--batch 4] [--steps 5] [--threads 0]

One draw of 4 x 32 x 32 normal numbers an image against `torch.randn` of as many. Then two text-to-image trainings,
float32, in one process: the toy, and the paper's network narrowed to `--channels` (320 there) with two text layers of
32, more than 100 million parameters. Each step draws noise, a posterior sample, timesteps and caption dropout; their
share is measured inside the step, median of the steps. On a CUDA device, where there is one, else on the CPU.
"""

import argparse
import os
import platform
import statistics
import string
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ldm_scale.conditioning.tokenizer import train_wordpiece
from ldm_scale.core import rng, runtime
from ldm_scale.data.sources import LatentBatch
from ldm_scale.first_stage.base import MomentsKind
from ldm_scale.jobs import config as jobs_config
from ldm_scale.jobs.model_table import conditioner_inputs, parameters
from ldm_scale.jobs.schemas.train import TrainJob
from ldm_scale.training.intake import Intake
from ldm_scale.training.steps import CachedMoments, DiffusionStep

LIMIT = 0.01
VOCABULARY = 128
DRAWS = ("normal", "uniform", "integers")
_LATENTS = 32  # images of the draw beside torch.randn


class Clock:
    """Seconds spent in the draws of `core/rng.py` while it is patched in."""

    def __init__(self) -> None:
        self.seconds = 0.0
        for name in DRAWS:
            setattr(rng, name, self._timed(getattr(rng, name)))

    def _timed(self, draw: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            began = now()
            out = draw(*args)
            self.seconds += now() - began
            return out

        return timed


def now() -> float:
    """Seconds, when the device has done what it was told."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def training_step(overrides: list[str], batch: int) -> tuple[int, Callable[[], object]]:
    """Trained parameters, and one optimizer step of one micro batch; every call at new positions."""
    plain = ["engine=one_process", "engine.precision=fp32"]
    job: TrainJob = jobs_config.compose("train", ["+experiment=txt2img_laion", *plain, *overrides])
    engine = job.engine.build(global_batch=batch, micro_batch=batch)
    module = job.latent_diffusion.build_trained()
    engine.prepare(module, job.optimizer)
    step = DiffusionStep(
        engine,
        conditioner=module.conditioner,
        moments=CachedMoments(MomentsKind.GAUSSIAN),
        latent_scale=1.0,
        diffusion=job.latent_diffusion.diffusion,
        seed=0,
        intake=Intake(shown=0),
    )
    channels, *sides = job.first_stage.latent_shape(job.data.transform.size)
    inputs = conditioner_inputs(job)
    assert inputs is not None
    images_seen = 0

    def one() -> None:
        nonlocal images_seen
        read = LatentBatch(
            positions=torch.arange(images_seen, images_seen + batch),
            keys=[""] * batch,
            captions=[""] * batch,
            moments=torch.zeros(batch, 2 * channels, *sides, dtype=torch.float16),
            inputs=inputs.expand(batch, *inputs.shape[1:]),
        )
        step(read, 1e-4, images_seen)
        images_seen += batch

    return parameters(module), one


def print_share(name: str, overrides: list[str], batch: int, steps: int, clock: Clock) -> None:
    """One line: what a step takes, what its random numbers take, and their share."""
    count, step = training_step(overrides, batch)
    step()  # warms up
    whole, drawn = [], []
    for _ in range(steps):
        clock.seconds, began = 0.0, now()
        step()
        whole.append(now() - began)
        drawn.append(clock.seconds)
    share = statistics.median(part / total for part, total in zip(drawn, whole, strict=True))
    verdict = "met" if share <= LIMIT else "MISSED"
    step_ms, drawn_ms = (1e3 * statistics.median(seconds) for seconds in (whole, drawn))
    print(
        f"  {name:9s} {count / 1e6:6.1f}M parameters, batch {batch:2d}: step {step_ms:9.2f} ms, random numbers "
        f"{drawn_ms:6.3f} ms, {share:.3%}  {verdict}",
        flush=True,
    )


def print_draw() -> None:
    """One line: a draw of normal numbers, ours and torch's."""
    device = runtime.device()
    positions, shape = torch.arange(_LATENTS, device=device), (4, 32, 32)
    ours = best_us(lambda: rng.normal(0, "benchmark", positions, shape))
    theirs = best_us(lambda: torch.randn(_LATENTS, *shape, device=device))
    print(f"  4 x 32 x 32 normal numbers an image: {ours:.1f} us, torch.randn {theirs:.1f} us ({ours / theirs:.1f} x)")


def best_us(draw: Callable[[], object]) -> float:
    """Microseconds an image of the best of many passes."""
    seconds = []
    for _ in range(50):
        began = now()
        draw()
        seconds.append(now() - began)
    return 1e6 * min(seconds) / _LATENTS


def main() -> None:
    """Print the machine, then both shares, then the draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--channels", type=int, default=128)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0, help="0 for one a CPU")
    options = parser.parse_args()
    threads = options.threads or len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    print(
        f"{platform.machine()}, {runtime.device()}, {threads} threads, torch {torch.__version__}; load "
        f"{os.getloadavg()[0]:.1f}; random numbers of a step (limit {LIMIT:.0%} at a realistic size)"
    )
    print_draw()
    clock = Clock()
    with tempfile.TemporaryDirectory() as directory:
        tokenizer = Path(directory, "tokenizer.json")
        train_wordpiece([string.ascii_lowercase], VOCABULARY, tokenizer)
        words = [f"conditioning.tokenizer={tokenizer}", f"conditioning.vocab_size={VOCABULARY}"]
        print_share("toy", [*words, "scale=toy"], 32, 10 * options.steps, clock)
        narrowed = ["name=benchmark", f"unet.model_channels={options.channels}", "conditioning.layers=2"]
        print_share("narrowed", [*words, *narrowed], options.batch, options.steps, clock)


if __name__ == "__main__":
    main()
