"""Precompute end to end against its encoder alone: same network, same batch, same run.

    python benchmarks/precompute.py [--images 96] [--shards 2] [--batch 8] [--precision bfloat16] [--compile]

kl-f8 with random weights. "bare" encodes a batch that lies in memory, again and again, and keeps nothing; it is
measured before and after. "end to end" goes from tars without an index (JPEGs of 384 x 320 pixels) to a cache with its
manifest: read, index, decode, resize, encode, audit, write, hash, sync. Loading the network is in neither.

The audit decodes, which costs more than twice what encoding does: at one image in 48, as here, it takes six times the
share that it takes by default (32 of 10,000). Compare ratios, not rates. On a CUDA device, where there is one.
"""

import argparse
import io
import os
import platform
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ldm_scale.core import progress, runtime
from ldm_scale.data.cache import CacheManifest, finish_cache
from ldm_scale.data.shards import ShardWriter
from ldm_scale.jobs import config, precompute
from ldm_scale.jobs.claims import Claims
from ldm_scale.jobs.encoding import STAGING, CacheIdentity, Pipeline
from ldm_scale.jobs.image_encoder import ImageEncoder
from ldm_scale.jobs.image_tars import ImageTars
from ldm_scale.jobs.schemas.precompute import PrecomputeJob


def write_images(folder: Path, images: int, shards: int) -> None:
    """Smooth noise with grain, which takes a JPEG decoder the time that a photograph does."""
    draw = np.random.default_rng(0)
    for shard in range(shards):
        with ShardWriter(folder / f"{shard:05d}.tar") as writer:
            for i in range(images // shards):
                coarse = Image.fromarray(draw.integers(0, 256, (20, 24, 3), np.uint8))
                smooth = np.asarray(coarse.resize((384, 320), Image.Resampling.BICUBIC))
                pixels = smooth + draw.normal(0, 6, smooth.shape)
                file = io.BytesIO()
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=95)
                writer.add(f"{shard:05d}{i:06d}", {"jpg": file.getvalue(), "txt": b"a caption"})


def bare(encoder: ImageEncoder, size: int, images: int) -> float:
    """Images a second of the encoder alone."""
    pixels_BHWC = encoder.pinned(torch.randint(0, 256, (encoder.batch, size, size, 3), dtype=torch.uint8))
    encoder(pixels_BHWC).cpu()
    began = time.perf_counter()
    for _ in range(images // encoder.batch):
        out = encoder(pixels_BHWC)
    out.cpu()
    return images // encoder.batch * encoder.batch / (time.perf_counter() - began)


def end_to_end(job: PrecomputeJob, encoder: ImageEncoder, made_by: CacheIdentity) -> float:
    """Images a second from tars to manifest."""
    folder = Path(str(job.data.latents))
    began = time.perf_counter()
    tars = ImageTars(str(job.data.images), None, job.data.task.require)
    with Claims(folder / STAGING) as claims, progress.bar("encoding", tars.samples(range(len(tars.names)))) as bar:
        pipeline = Pipeline(
            job.precompute, tars, encoder, made_by, folder, claims, task=job.data.task,
            transform=job.data.transform.build(), threads=job.data.threads, max_bad_share=job.data.max_bad_share,
            preemption=runtime.Preemption(),
        )  # fmt: skip
        pipeline.run(range(len(tars.names)), bar)
        records = [record for tar in range(len(tars.names)) if (record := pipeline.finished(tar)) is not None]
        finish_cache(
            folder, records, first_stage=made_by.first_stage, transform=made_by.transform, kind=str(made_by.kind)
        )
    return CacheManifest.read_from(str(folder)).n / (time.perf_counter() - began)


def main() -> None:
    """Print one line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=96)
    parser.add_argument("--shards", type=int, default=2)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--audit", type=int, default=1, help="images a shard")
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as where:
        write_images(Path(where) / "images", options.images, options.shards)
        job = config.compose(
            "precompute_latents",
            [
                "+experiment=autoencoder_kl_f8", "name=benchmark", f"data.images={where}/images",
                f"data.latents={where}/latents", f"data.transform.size={options.size}",
                "precompute.min_psnr=0", "data.transform.crop=center",
                "data.transform.flip=false",
                f"precompute.batch={options.batch}", f"precompute.audit={options.audit}",
                f"precompute.precision={options.precision}", f"precompute.compile={options.compile}",
                f"data.threads={min(16, os.cpu_count() or 1)}",
            ],
        )  # fmt: skip
        torch.manual_seed(0)
        first_stage = job.first_stage.build().requires_grad_(False).eval()
        made_by = precompute.identity(job, first_stage)
        encoder = ImageEncoder(job.precompute, first_stage, made_by.kind, runtime.device())
        before = bare(encoder, options.size, options.images // 2)
        whole = end_to_end(job, encoder, made_by)
        alone = (before + bare(encoder, options.size, options.images // 2)) / 2
    where_run = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPUs"
    print(f"{where_run}, {platform.machine()}, torch {torch.__version__}, {options.precision}, batch {options.batch}")
    print(f"bare encoder  {alone:8.2f} images/s")
    print(f"end to end    {whole:8.2f} images/s   {whole / alone:.3f} of it")


if __name__ == "__main__":
    main()
