"""Latents of a cache to look at: decoded again, beside the images that they were made from.

    python -m ldm_scale.jobs.decoded PAGE.png +experiment=NAME data.latents=CACHE [data.images=SHARDS] [--count 16]

The experiment says which first stage decodes; a cache of another one is refused. Without `data.images` the images are
left out. data_tools.stats shows what needs no first stage: numbers, histograms, latents in false colour.

Shape letters: N latents shown, H W height and width of images.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ldm_scale.core import runtime, storage
from ldm_scale.core.tensors import from_uint8, to_uint8
from ldm_scale.data.cache import LatentCache, require_match
from ldm_scale.data.samples import Sample
from ldm_scale.data.shards import CorruptSample, ShardSet
from ldm_scale.evaluation.reconstruction import psnr
from ldm_scale.first_stage.base import Moments
from ldm_scale.images.decode import decode
from ldm_scale.jobs import config as jobs_config
from ldm_scale.jobs import loading
from ldm_scale.jobs.precompute import identity
from ldm_scale.jobs.schemas.precompute import PrecomputeJob
from ldm_scale.tracking.grid import labelled_grid

_COLUMNS = 8


def sheet(job: PrecomputeJob, count: int) -> np.ndarray:
    """The page, (H, W, 3) uint8: some latents of the cache, drawn at random, always the same ones.

    raises  ValueError where the cache was made by another first stage or transform
    """
    if job.data.latents is None:
        raise ValueError("data.latents is not set: name the latent cache to look at")
    if count < 1:
        raise ValueError(f"--count {count}; at least 1")
    cache = LatentCache.open(job.data.latents, job.data.index_dir).view(removed=job.data.removed)
    first_stage = loading.first_stage(job.first_stage).to(runtime.device())
    made_by = identity(job, first_stage)
    require_match(
        cache.manifest, made_by.fingerprint, wanted_first_stage=made_by.first_stage["sha256"], where=cache.folder
    )
    ids_N = np.sort(np.random.default_rng(0).choice(cache.n, min(count, cache.n), replace=False))
    ids_N = np.array([one for one in ids_N if _is_readable(cache, one)], np.int64)
    moments, captions, keys = cache.read(ids_N)
    with torch.no_grad():
        means = Moments.unpack(torch.from_numpy(moments).to(runtime.device()), made_by.kind).mean
        decoded_NHWC = to_uint8(first_stage.decode(means)).permute(0, 2, 3, 1).cpu()
    title = f"{cache.folder}: {len(keys)} of {cache.n:,} latents, decoded"
    if not job.data.images:
        return labelled_grid(decoded_NHWC.numpy(), captions, columns=_COLUMNS, title=title)
    images_NHWC = torch.from_numpy(np.stack(_originals(job, cache, ids_N, keys)))
    decibels = psnr(*(from_uint8(pixels).permute(0, 3, 1, 2) for pixels in (decoded_NHWC, images_NHWC)))
    labels = [(caption, f"{value:.1f} dB") for caption, value in zip(captions, decibels.tolist(), strict=True)]
    pairs = torch.stack((images_NHWC, decoded_NHWC), dim=1).flatten(0, 1).numpy()
    title += ", beside their images"
    return labelled_grid(pairs, [text for pair in labels for text in pair], columns=_COLUMNS, title=title)


def _is_readable(cache: LatentCache, sample_id: int) -> bool:
    try:
        cache.read(np.array([sample_id]))
        return True
    except CorruptSample:  # or taken down
        return False


def _originals(job: PrecomputeJob, cache: LatentCache, ids_N: np.ndarray, keys: Sequence[str]) -> list[np.ndarray]:
    """The images as the first stage saw them.

    raises  ValueError where one is not there
    """
    shards, transform = job.data.open_images()["data"], job.data.transform.build()
    sources = {record.name: record.source["name"] for record in cache.manifest.shards}
    found = []
    for shard, key in zip(np.searchsorted(cache.starts, ids_N, side="right") - 1, keys, strict=True):
        sample = _sample(shards, sources[cache.names[shard]], key, job.data.task.fields)
        assert sample.image is not None, "the shard set requires an image"
        found.append(transform(decode(sample.image), original_size=sample.original_size))
    return found


def _sample(shards: ShardSet, name: str, key: str, fields: Sequence[str]) -> Sample:
    ids = shards.shard_ids(shards.names.index(name)) if name in shards.names else np.arange(0)
    keys = shards.keys(ids)
    if key not in keys:
        raise ValueError(f"data.images has no {name}/{key}, of which the cache holds latents: name its image shards")
    return Sample.parse(key, shards.read(ids[[keys.index(key)]], fields)[0])


def _write(arguments: argparse.Namespace) -> None:
    page = sheet(jobs_config.compose("precompute_latents", arguments.overrides), arguments.count)
    with storage.atomic_write(arguments.page) as file:
        Image.fromarray(page).save(file, "PNG")
    print(f"page: {arguments.page}")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m ldm_scale.jobs.decoded", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("page", type=Path, help="the PNG to write")
    parser.add_argument("overrides", nargs="+", help="as for precompute_latents.py: +experiment=NAME key=value ...")
    parser.add_argument("--count", type=int, default=16, help="latents to show (default: 16)")
    arguments = parser.parse_intermixed_args(argv)
    jobs_config.or_exit(lambda: _write(arguments))
    return 0


if __name__ == "__main__":
    sys.exit(main())
