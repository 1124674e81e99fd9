"""Encode image shards into a latent cache, once. `precompute_latents.py` starts this.

One image shard becomes one cache shard, published whole; a shard that is done is never touched again, so the job may be
killed and started again, by any number of processes on any hosts, at any time. The process that finds every shard done
writes the manifest.
"""

import json
import shutil
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch

from ldm_scale.conditioning.clip_text import ClipTextConditioner, ClipTextConfig
from ldm_scale.conditioning.text import TextTransformerConfig
from ldm_scale.conditioning.tokenizer import train_wordpiece
from ldm_scale.core import progress, runtime, storage
from ldm_scale.data.cache import (
    NPY_HEADER_BYTES,
    CacheManifest,
    LatentCache,
    ShardRecord,
    done_record,
    finish_cache,
)
from ldm_scale.data.shards import SIDECARS
from ldm_scale.data.tar import BLOCK
from ldm_scale.first_stage.base import FirstStage, FirstStageConfig, MomentsKind
from ldm_scale.images.resize import ImageTransform
from ldm_scale.jobs import config as jobs_config
from ldm_scale.jobs import loading
from ldm_scale.jobs.claims import Claims
from ldm_scale.jobs.encoding import STAGING, CacheIdentity, Pipeline
from ldm_scale.jobs.image_encoder import ImageEncoder
from ldm_scale.jobs.image_tars import ImageTars, sweep
from ldm_scale.jobs.schemas.experiment import Experiment
from ldm_scale.jobs.schemas.precompute import PrecomputeConfig, PrecomputeJob

log = runtime.logger(__name__)

_VOCABULARY_CAPTIONS = 200_000
_CAPTION_BYTES = 256  # header and index of a caption, its row of metadata, beside the blocks that it fills
_TRIED_SHARE = 64  # the speed is tried on at most one so-many-th of the images
_POLL_S = 1.0
_UNSAID = {"data.transform.resize": None, "precompute.text_embeddings": None}  # by caches older than the choice


def run(job: PrecomputeJob) -> None:
    """Encode every shard that is not done yet, then write the manifest.

    exits  0 done, 75 preempted
    """
    runtime.configure_logging()
    preemption = runtime.Preemption()
    folder = _folder(job)
    transform = _fixed_transform(job)
    loading.first_stage_weights(job.first_stage)
    tars = _image_tars(job)
    estimate = Estimate.of(job, tars, folder)
    estimate.require_space()
    first_stage = loading.first_stage(job.first_stage)
    text_encoder = loading.text_encoder(job.conditioning) if job.precompute.text_embeddings else None
    made_by = identity(job, first_stage, text_encoder)
    _begin(folder, made_by, job.precompute, tars)
    encoder = ImageEncoder(job.precompute, first_stage, made_by.kind, runtime.device())
    with Claims(folder / STAGING) as claims:
        pipeline = Pipeline(
            job.precompute,
            tars,
            encoder,
            made_by,
            folder,
            claims,
            task=job.data.task,
            transform=transform,
            threads=job.data.threads,
            max_bad_share=job.data.max_bad_share,
            preemption=preemption,
            text_encoder=None if text_encoder is None else text_encoder.to(runtime.device()),
        )
        if estimate.images:
            estimate.say(_speed(encoder, job.precompute, transform.config.size, estimate.images))
        records = _encode_all(pipeline, _wanted(pipeline, job.precompute.limit_shards), estimate.images, preemption)
        _finish_once(job, pipeline, records, claims, preemption)
        claims.sweep()


def identity(
    job: Experiment, first_stage: FirstStage, text_encoder: ClipTextConditioner | None = None
) -> CacheIdentity:
    """What a cache must have been made with to be this experiment's."""
    config = jobs_config.to_plain(job.first_stage)
    name = config.pop("schema")
    for key in ("checkpoint", "scale"):
        del config[key]
    kind, _ = moments_of(job.first_stage, job.data.transform.size)
    return CacheIdentity(
        first_stage={"kind": name, "config": config, "sha256": first_stage.digest()},
        transform=job.data.transform.build().fingerprint(),
        kind=kind,
        text=None if text_encoder is None else _text_identity(text_encoder),
    )


def _text_identity(encoder: ClipTextConditioner) -> dict[str, Any]:
    config = jobs_config.to_plain(encoder.config)
    name = config.pop("schema")
    for key in ("model", "dropout"):
        del config[key]
    return {
        "kind": name,
        "config": config,
        "sha256": encoder.digest(),
        "vocabulary": encoder.load_tokenizer().digest(),
        "shape": list(text_shape(encoder.config)),
    }


def text_shape(config: ClipTextConfig) -> tuple[int, int]:
    """(L, D) of what a frozen text encoder makes of a caption."""
    return config.max_length, config.width


def member_bytes(shape: Sequence[int]) -> int:
    """What a float16 array takes in a tar."""
    content = NPY_HEADER_BYTES + 2 * int(np.prod(shape))
    return BLOCK + -(-content // BLOCK) * BLOCK


def moments_of(config: FirstStageConfig, size: int) -> tuple[MomentsKind, tuple[int, ...]]:
    """Kind and shape (M, h, w) of what a first stage makes of a square image; builds no weights.

    raises  ValueError where f does not divide the side
    """
    config.latent_shape(size)
    with torch.device("meta"), torch.no_grad():
        moments = config.build().encode(torch.empty(1, 3, size, size))
    return moments.kind, tuple(moments.pack().shape[1:])


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """What is left to do, before anything is done."""

    shards: int
    images: int
    """By the sizes of the tars, where some have no index yet."""
    bytes: int
    """Of the latents, and of the embeddings of captions."""
    free: int
    """Bytes where the cache goes."""
    folder: Path

    @classmethod
    def of(cls, job: PrecomputeJob, tars: ImageTars, folder: Path) -> "Estimate":
        """Judge by the shards that have no latents yet."""
        _, shape = moments_of(job.first_stage, job.data.transform.size)
        wanted = range(len(tars.names))[: job.precompute.limit_shards or None]
        left = [tar for tar in wanted if not done_record(folder / tars.names[tar]).exists()]
        images = tars.samples(left)
        latent, text = member_bytes(shape) * (1 + job.precompute.flip), 0
        if job.precompute.text_embeddings and isinstance(job.conditioning, ClipTextConfig):
            text = member_bytes(text_shape(job.conditioning))
        return cls(
            shards=len(left),
            images=images,
            bytes=images * (latent + text + 2 * BLOCK + _CAPTION_BYTES),
            free=shutil.disk_usage(
                next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
            ).free,
            folder=folder,
        )

    def require_space(self) -> None:
        """Refuse what cannot fit.

        raises  ValueError naming both numbers, and how many shards would fit
        """
        if self.bytes > self.free:
            fit = self.shards * self.free // self.bytes
            raise ValueError(
                f"data.latents={self.folder}: the latents of {self.shards:,} shards need about "
                f"{_gigabytes(self.bytes)}, but its disk has {_gigabytes(self.free)} left: free space, name another "
                f"disk, or set precompute.limit_shards to {fit:,} more than are done"
            )

    def say(self, images_per_s: float) -> None:
        """Shards, images, bytes and time, in one line of the log."""
        log.info(
            "to encode: %s images in %s shards, %s of %s free; %.1f h at the %.0f images/s of this process, "
            "less with others beside it",
            f"{self.images:,}", f"{self.shards:,}", _gigabytes(self.bytes), _gigabytes(self.free),
            self.images / images_per_s / 3600, images_per_s,
        )  # fmt: skip


def _folder(job: PrecomputeJob) -> Path:
    if job.data.latents is None or storage.is_remote(job.data.latents):
        raise ValueError(f"data.latents={job.data.latents}: name a local directory for the latent cache")
    return Path(job.data.latents)


def _fixed_transform(job: PrecomputeJob) -> ImageTransform:
    transform = job.data.transform.build()
    if transform.random:
        raise ValueError(
            "data.transform is random, but a cache holds one version of an image: set crop=center, flip=false "
            "(precompute.flip=true stores the mirror image too)"
        )
    return transform


def _image_tars(job: PrecomputeJob) -> ImageTars:
    if not job.data.images:
        raise ValueError("data.images is not set: give a directory, brace range, glob or list of image shards")
    return ImageTars(
        job.data.images,
        job.data.index_dir,
        job.data.task.require,
        selection=job.data.selection,
        removed=job.data.removed,
    )


def _begin(folder: Path, made_by: CacheIdentity, config: PrecomputeConfig, tars: ImageTars) -> None:
    """Note what makes this cache, before its first shard; refuse a folder that holds another one.

    raises  ValueError naming what differs
    """
    note, manifest = folder / SIDECARS / "precompute.json", folder / "manifest.json"
    ours = _settings(made_by.first_stage, made_by.transform, made_by.kind, made_by.text) | {
        "precompute.precision": config.precision.value,
        "precompute.flip": config.flip,
        "data.selection": [selection.digest[:12] for selection in tars.selections],
    }
    theirs: dict[str, Any] = {}
    if note.exists():
        theirs = _UNSAID | storage.read_json(note)
    elif manifest.exists():
        found = CacheManifest.read_from(str(folder))
        theirs = _settings(found.first_stage, found.transform, found.kind, found.text)
    differing = [f"{key}={value} (now {ours[key]})" for key, value in theirs.items() if value != ours[key]]
    if differing and not config.overwrite:
        raise ValueError(
            f"data.latents={folder} holds latents made with {', '.join(differing)}: go back to that, name another "
            "folder, or set precompute.overwrite=true to encode everything again"
        )
    if differing:
        manifest.unlink(missing_ok=True)
        for record in (folder / SIDECARS).glob("*.done.json"):
            record.unlink()
    if theirs != ours:
        storage.write_json(note, ours)


def _settings(
    first_stage: dict[str, Any], transform: dict[str, Any], kind: str, text: dict[str, Any] | None
) -> dict[str, Any]:
    return {
        **_UNSAID,
        "first_stage": f"{first_stage['kind']} {first_stage['sha256'][:12]}",
        **{f"data.transform.{key}": value for key, value in transform.items()},
        "moments": str(kind),
        "precompute.text_embeddings": text and f"{text['kind']} {storage.digest(text)[:12]}",
    }


def _wanted(pipeline: Pipeline, limit: int) -> list[int]:
    """The first so many tars, and whatever else is done already: a cache only grows."""
    everything = range(len(pipeline.tars.names))
    if not limit:
        return list(everything)
    return [tar for tar in everything if tar < limit or pipeline.finished(tar) is not None]


def _speed(encoder: ImageEncoder, config: PrecomputeConfig, size: int, images: int) -> float:
    """Images that this process encodes in a second, tried on a batch of zeros after one to warm up."""
    batch = config.batch if config.compile else min(config.batch, max(1, images // _TRIED_SHARE))
    pixels_BHWC = torch.zeros(batch, size, size, 3, dtype=torch.uint8)
    encoder(pixels_BHWC).cpu()
    began = time.perf_counter()
    encoder(pixels_BHWC).cpu()
    return batch / (time.perf_counter() - began) / (1 + config.flip)


def _encode_all(
    pipeline: Pipeline, wanted: Sequence[int], images: int, preemption: runtime.Preemption
) -> list[ShardRecord]:
    """The records of all wanted shards, whoever encoded them."""
    records = {tar: pipeline.finished(tar) for tar in wanted}
    if done := len(wanted) - list(records.values()).count(None):
        log.info("%d of %d shards are done already", done, len(wanted))
    with progress.bar("encoding", images // runtime.world()) as bar:
        while left := [tar for tar, record in records.items() if record is None]:
            pipeline.run(left, bar)
            if preemption.received:
                _leave(
                    f"{len(left)} shards were left when this process began; what is not done waits for the next time"
                )
            records |= {tar: pipeline.finished(tar) for tar in left}
    return [record for record in records.values() if record is not None]


def _finish_once(
    job: PrecomputeJob,
    pipeline: Pipeline,
    records: list[ShardRecord],
    claims: Claims,
    preemption: runtime.Preemption,
) -> None:
    """One process writes what there is one of; the others see it done."""
    while not claims.take("manifest"):
        if preemption.received:
            _leave("another process writes the manifest")
        time.sleep(_POLL_S)
    before = _manifest(pipeline.folder)
    if before is not None and before.shards == sorted(records, key=lambda record: record.name):
        log.info("%s is complete", pipeline.folder)
    else:
        _finish(job, pipeline, records, before)
    claims.release("manifest")


def _manifest(folder: Path) -> CacheManifest | None:
    try:
        return CacheManifest.read_from(str(folder))
    except (FileNotFoundError, ValueError):
        return None


def _finish(job: PrecomputeJob, pipeline: Pipeline, records: list[ShardRecord], before: CacheManifest | None) -> None:
    """Write list of rejected samples, manifest and (where the text encoder wants one) the vocabulary."""
    made_by, folder, config = pipeline.identity, pipeline.folder, job.precompute
    lines = [
        json.dumps({"shard": record.name, "reason": reason, "key": key}) + "\n"
        for record in sorted(records, key=lambda record: record.name)
        for reason, key in record.rejected_keys
    ]
    for path in (folder / "rejected.jsonl", folder / "manifest.json", folder / SIDECARS / "precompute.json"):
        sweep(path)
    with storage.atomic_write(folder / "rejected.jsonl") as file:
        file.write("".join(lines).encode())
    errors = [record.statistics["float32_error"] for record in records if record.written]
    how = {"precision": config.precision.value, "float32_error": max(errors, default=0.0)}
    manifest = finish_cache(
        folder,
        records,
        first_stage=made_by.first_stage | how,
        transform=made_by.transform,
        kind=str(made_by.kind),
        text=made_by.text,
    )
    grown = before is not None and all(record in records for record in before.shards)
    _train_vocabulary(job, folder, keep=grown)
    pipeline.tars.summarise()
    _say(job, folder, manifest, records)


def _train_vocabulary(job: PrecomputeJob, folder: Path, *, keep: bool) -> None:
    """A text encoder whose tokenizer lies in the cache gets one trained on the cache's captions.

    keep  leave one that is there: models may have been trained with it, on the smaller cache that this one was
    """
    config = job.conditioning
    if not isinstance(config, TextTransformerConfig) or Path(config.tokenizer).parent != folder:
        return
    if keep and Path(config.tokenizer).exists():
        return
    cache = LatentCache.open(str(folder), job.data.index_dir)
    members = cache.members(np.arange(min(cache.n, _VOCABULARY_CAPTIONS)), ("txt",))
    train_wordpiece([member["txt"].decode() for member in members], config.vocab_size, config.tokenizer)


def _leave(why: str) -> NoReturn:
    log.info("told to stop: %s", why)
    sys.exit(runtime.PREEMPTED_EXIT_CODE)


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:,.1f} GB"


def _say(job: PrecomputeJob, folder: Path, manifest: CacheManifest, records: list[ShardRecord]) -> None:
    reasons = Counter(manifest.rejected)
    audits = [record.audit.psnr for record in records if record.audit is not None]
    error = manifest.first_stage["float32_error"]
    print(
        f"\nlatent cache  {folder}\n"
        f"  samples     {manifest.n:,} written, {sum(reasons.values()):,} rejected, of {manifest.read:,} read"
        + (f" ({', '.join(f'{reason} {count:,}' for reason, count in reasons.most_common())})" if reasons else "")
        + f"\n  moments     {' x '.join(map(str, manifest.shape))} {manifest.dtype}, "
        f"latent mean {manifest.latent_mean:.3f}, std {manifest.latent_std:.3f} (scale {1 / manifest.latent_std:.4f})\n"
        f"  encoder     {job.precompute.precision.value}"
        + (f", off float32 by {error:.2%} of the latents' size" if error else "")
        + (f"\n  captions    {' x '.join(map(str, manifest.text['shape']))} float16 each" if manifest.text else "")
        + f"\n  audit       {min(audits):.1f} to {max(audits):.1f} dB over {len(audits)} shards\n"
        f"  next        accelerate launch train.py +experiment={job.experiment} data.latents={folder}\n"
    )
