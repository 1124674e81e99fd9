"""Our captions to pictures against diffusers' LDMTextToImagePipeline: same weights, noise, steps, guidance and run.

    python benchmarks/sampling.py [--batch 16] [--steps 50] [--guidance 2] [--passes 5] [--threads 2] [--compiled]

The toy text-to-image model with random weights, exported by ldm_scale/interop/diffusers.py; captions of 77 tokens, as
their pipeline pads to. Both draw the same pictures with DDIM, which is checked first. Prints seconds of each one's best
batch from captions to pixels, and theirs over ours (above 1, ours is faster); with --compiled, once more with both
U-Nets compiled, which takes minutes. Compare ratios, not seconds.

On a CUDA device, where there is one, else on the CPU.
"""

import argparse
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import diffusers
import torch
from torch import Tensor

from ldm_scale.conditioning.tokenizer import train_wordpiece
from ldm_scale.core import rng, runtime
from ldm_scale.images.scenes import all_scenes
from ldm_scale.interop.bundle import Bundle
from ldm_scale.interop.diffusers import export
from ldm_scale.jobs import config as jobs_config
from ldm_scale.latent_diffusion.generate import Generator
from ldm_scale.samplers.ddim import DDIMConfig

TOKENS = 77  # their pipeline pads to this
SIZE = 32  # pixels of a side: latents of 8 x 8
LATENT_SCALE = 0.5
SEED = 0
TOLERANCE = 1e-3  # of pixels in [-1, 1]
Draw = Callable[[], Tensor]


def toy_bundle(folder: Path, captions: list[str]) -> Bundle:
    """The toy text-to-image model; no weight is zero, so that every branch counts."""
    job = jobs_config.compose(
        "train",
        [
            *("+experiment=txt2img_laion", "scale=toy", f"conditioning.max_length={TOKENS}"),
            f"conditioning.tokenizer={folder / 'tokenizer.json'}",
        ],
    )
    train_wordpiece(captions, job.conditioning.vocab_size, folder / "tokenizer.json")
    torch.manual_seed(SEED)
    first_stage, model = job.first_stage.build().eval(), job.latent_diffusion.build().eval()
    with torch.no_grad():
        for parameter in (*first_stage.parameters(), *model.parameters()):
            parameter += 0.02 * torch.randn_like(parameter)
    return Bundle(
        first_stage=first_stage,
        unet=model.unet,
        conditioner=model.conditioner,
        diffusion=model.config.diffusion,
        latent_scale=LATENT_SCALE,
    )


def both(captions: list[str], sampler: DDIMConfig, compiled: bool) -> dict[str, Draw]:
    """Ours and theirs: (B, 3, SIZE, SIZE) in [-1, 1] of the same captions, from the same noise."""
    device, indices = runtime.device(), range(len(captions))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bundle = toy_bundle(folder, captions)
        export(bundle, folder / "exported", size=SIZE)
        pipeline = diffusers.LDMTextToImagePipeline.from_pretrained(folder / "exported").to(device)
    pipeline.set_progress_bar_config(disable=True)
    model, first_stage = bundle.latent_diffusion().to(device), bundle.first_stage.to(device)
    generator = Generator(
        model=model, first_stage=first_stage, latent_scale=LATENT_SCALE, sampler=sampler, size=(SIZE, SIZE), seed=SEED
    )
    shape = first_stage.config.latent_shape(SIZE)
    side = shape[1] * 8  # they take every first stage for one of f = 8
    start = rng.normal(SEED, "sample/start", torch.arange(len(captions)), shape).to(device)
    if compiled:
        model.unet.compile()
        pipeline.unet.compile()

    def ours() -> Tensor:
        return generator.images(captions, indices)

    def theirs() -> Tensor:
        options = {"num_inference_steps": sampler.steps, "guidance_scale": sampler.guidance, "output_type": "pt"}
        images: Tensor = pipeline(captions, height=side, width=side, latents=start, **options).images
        return images * 2 - 1

    return {"ours": ours, "theirs": theirs}


def require_same_pictures(draws: dict[str, Draw]) -> float:
    """The largest difference of a pixel; also warms both up.

    raises  AssertionError where they are not the same, or show nothing
    """
    ours, theirs = (draw() for draw in draws.values())
    difference = float((ours - theirs).abs().max())
    assert ours.std() > 0.01 and difference < TOLERANCE, (float(ours.std()), difference)
    return difference


def best_seconds(draws: dict[str, Draw], passes: int) -> dict[str, float]:
    """The best batch of each, taking turns so that a busy machine hits both alike."""
    best = dict.fromkeys(draws, float("inf"))
    for _ in range(passes):
        for name, draw in draws.items():
            began = time.perf_counter()
            draw().cpu()
            best[name] = min(best[name], time.perf_counter() - began)
    return best


def main() -> None:
    """Print one line for each mode."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--passes", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compiled", action="store_true", help="also with both U-Nets compiled")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    captions = [scene.caption() for scene in all_scenes(1)][: options.batch]
    sampler = DDIMConfig(steps=options.steps, guidance=options.guidance)
    print(
        f"{platform.machine()}, {runtime.device()}, {options.threads} threads, torch {torch.__version__}, diffusers "
        f"{diffusers.__version__}, batch {len(captions)}, DDIM {options.steps} steps, guidance {options.guidance}; "
        f"load {os.getloadavg()[0]:.1f}"
    )
    for mode in ("eager", "compiled") if options.compiled else ("eager",):
        draws = both(captions, sampler, compiled=mode == "compiled")
        difference = require_same_pictures(draws)
        best = best_seconds(draws, options.passes)
        print(
            f"{mode:9s} ours {best['ours']:7.3f} s   theirs {best['theirs']:7.3f} s   "
            f"{best['theirs'] / best['ours']:5.2f} x   pictures differ by {difference:.0e}",
            flush=True,
        )


if __name__ == "__main__":
    main()
