"""Draw captions with a trained model. `sample.py` starts this.

Image i has its own noise stream, (seed, i): the same picture in any batch.
"""

import json
from pathlib import Path

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ldm_scale.core import progress, runtime, storage
from ldm_scale.core.run_dir import RunDir
from ldm_scale.core.tensors import to_uint8
from ldm_scale.jobs import config as jobs_config
from ldm_scale.jobs import loading
from ldm_scale.latent_diffusion.generate import Generator
from ldm_scale.tracking.grid import labelled_grid


def run(job: jobs_config.SampleJob) -> None:
    """Write one PNG for each image, named by its number, and a labelled grid of all."""
    runtime.configure_logging()
    prompts = _prompts(job)
    trained = loading.trained_model(
        RunDir(Path(job.run_dir)), name=job.checkpoint, which=job.weights, device=runtime.device()
    )
    captions = [prompt for prompt in prompts for _ in range(job.images_per_prompt)]
    generator = Generator(
        model=trained.model,
        first_stage=trained.first_stage,
        latent_scale=trained.latent_scale,
        sampler=job.sampler,
        size=trained.size,
        seed=job.seed,
    )
    out = Path(job.out)
    pictures: list[torch.Tensor] = []
    with progress.bar("sampling", len(captions)) as bar:
        for images_BCHW in generator.batches(captions, job.batch):
            for image_HWC in to_uint8(images_BCHW).permute(0, 2, 3, 1).cpu():
                _write(out / f"{len(pictures):05d}.png", image_HWC, job, captions[len(pictures)], trained.described)
                pictures.append(image_HWC)
            bar.move(len(pictures))
    grid = labelled_grid(
        torch.stack(pictures).numpy(), captions, columns=_columns(len(captions), job), title=f"{trained.described}"
    )
    with storage.atomic_write(out / "grid.png") as file:
        Image.fromarray(grid).save(file, format="PNG")
    print(f"\nsamples  {out} ({len(pictures)} PNG files)\n  grid   {out / 'grid.png'}\n")


def _prompts(job: jobs_config.SampleJob) -> list[str]:
    if job.prompts_file is None:
        return job.prompts
    lines = Path(job.prompts_file).read_text().splitlines()
    if not (prompts := [line.strip() for line in lines if line.strip()]):
        raise ValueError(f"prompts_file={job.prompts_file} holds no caption")
    return prompts


def _columns(count: int, job: jobs_config.SampleJob) -> int:
    """A row for each prompt where there are several pictures of it, else near a square."""
    return job.images_per_prompt if job.images_per_prompt > 1 else max(1, round(count**0.5))


def _write(path: Path, image_HWC: torch.Tensor, job: jobs_config.SampleJob, caption: str, described: str) -> None:
    """A PNG that says how it was made."""
    text = PngInfo()
    text.add_itxt("caption", caption)
    text.add_itxt(
        "made_by",
        json.dumps(
            {
                "run": job.run_dir,
                "weights": described,
                "seed": job.seed,
                "index": int(path.stem),
                "sampler": jobs_config.to_plain(job.sampler),
            }
        ),
    )
    with storage.atomic_write(path) as file:
        Image.fromarray(image_HWC.numpy()).save(file, format="PNG", pnginfo=text)
