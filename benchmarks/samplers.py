"""Samplers against steps on a trained toy run: caption accuracy, `fd_random` and time per image, as a markdown table.

    python benchmarks/samplers.py [RUN] [--steps 5 10 20 50] [--kinds ddim plms dpm_solver ddpm] [--spacing trailing]

RUN is runs/txt2img_laion/toy unless given: what `make demo` trains. Draws one image for each of `--images` held-out
captions with the run's averaged weights and its own guidance; start where the paths of its configuration hold, as for
evaluate.py. The time is that of a batch from captions to pixels, the best of `--passes`, divided by its images. Closes
with DPM-Solver++ at 10 steps beside DDIM at 50.
"""

import argparse
import os
import platform
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ldm_scale.core import runtime
from ldm_scale.core.run_dir import RunDir
from ldm_scale.diffusion.schedule import Spacing
from ldm_scale.jobs import config as jobs_config
from ldm_scale.jobs.loading import TrainingRun
from ldm_scale.jobs.scores import GenerationScores, HeldOutImages
from ldm_scale.latent_diffusion.generate import Generator
from ldm_scale.samplers.base import SamplerConfig
from ldm_scale.samplers.ddim import DDIMConfig
from ldm_scale.samplers.ddpm import DDPMConfig
from ldm_scale.samplers.dpm_solver import DPMSolverConfig
from ldm_scale.samplers.plms import PLMSConfig

KINDS: dict[str, type[SamplerConfig]] = {
    "ddim": DDIMConfig,
    "plms": PLMSConfig,
    "dpm_solver": DPMSolverConfig,
    "ddpm": DDPMConfig,
}


@dataclass(frozen=True, slots=True)
class Row:
    """What one sampler reached with so many steps."""

    kind: str
    spacing: str
    steps: int
    accuracy: float
    distance: float
    seconds: float

    def line(self) -> str:
        scores = f"{self.accuracy:.3f} | {self.distance:.4f} | {1e3 * self.seconds:.1f}"
        return f"| {self.kind} | {self.spacing} | {self.steps} | {scores} |"


def seconds_per_image(generator: Generator, captions: list[str], passes: int) -> float:
    """From captions to pixels, the best pass over one batch."""
    best = float("inf")
    for _ in range(passes):
        began = time.perf_counter()
        generator.images(captions, range(len(captions))).cpu()
        best = min(best, time.perf_counter() - began)
    return best / len(captions)


def table(options: argparse.Namespace) -> list[Row]:
    """Print a line for every sampler and number of steps, as it is found."""
    job = jobs_config.compose("evaluate", [f"run_dir={options.run}"])
    evaluation = replace(job.evaluation, images=options.images, batch=options.batch)
    source = TrainingRun(RunDir(options.run), name=job.checkpoint, which=job.weights)
    trained = source.load(runtime.device())
    held_out = HeldOutImages.open(source.data, options.images)
    scores = GenerationScores(evaluation, job.paths, held_out, runtime.device())
    told = {"guidance": job.sampler.guidance if options.guidance is None else options.guidance}
    if options.spacing is not None:
        told["spacing"] = options.spacing
    print(
        f"{options.run}: {trained.described}; {options.images} held-out captions, batch {options.batch}, guidance "
        f"{told['guidance']}; {platform.machine()}, {runtime.device()}, {torch.get_num_threads()} threads, load "
        f"{os.getloadavg()[0]:.1f}\n\n"
        "| sampler | spacing | steps | caption accuracy | fd_random | ms an image |\n|---|---|---|---|---|---|"
    )
    rows = []
    for kind in options.kinds:
        for steps in options.steps:
            sampler = KINDS[kind](steps=steps, **told)
            generator = Generator(
                model=trained.model,
                first_stage=trained.first_stage,
                latent_scale=trained.latent_scale,
                sampler=sampler,
                size=(source.size, source.size),
                seed=options.seed,
            )
            seconds = seconds_per_image(generator, scores.captions[: options.batch], options.passes)
            found = scores(generator)
            rows.append(
                Row(kind, sampler.spacing.name, steps, found["eval/caption_accuracy"], found["eval/fd_random"], seconds)
            )
            print(rows[-1].line(), flush=True)
    return rows


def main() -> None:
    """Print the table, and what ten steps of DPM-Solver++ reach of fifty of DDIM."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?", default=Path("runs/txt2img_laion/toy"))
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 10, 20, 50])
    parser.add_argument("--kinds", choices=KINDS, nargs="+", default=list(KINDS))
    parser.add_argument(
        "--spacing", type=Spacing, help="leading, trailing or linspace; each sampler's own, unless given"
    )
    parser.add_argument("--guidance", type=float, help="the run's own, unless given")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--passes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0, help="0 for one a CPU")
    options = parser.parse_args()
    torch.set_num_threads(options.threads or len(os.sched_getaffinity(0)))
    found = {(row.kind, row.steps): row.accuracy for row in table(options)}
    fast, slow = found.get(("dpm_solver", 10)), found.get(("ddim", 50))
    if fast is not None and slow:
        print(f"\nDPM-Solver++ with 10 steps: {fast / slow:.3f} of the caption accuracy of DDIM with 50 (aim: 0.95)")


if __name__ == "__main__":
    main()
