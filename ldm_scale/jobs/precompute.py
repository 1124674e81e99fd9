"""Encode image shards into a latent cache, once. `precompute_latents.py` starts this.

One image shard becomes one cache shard, published whole; a shard that is done is never touched again, so the job may be
killed and started again, by any number of processes. The process that finds every shard done writes the manifest.
"""

import json
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm_scale.conditioning.text import TextTransformerConfig
from ldm_scale.conditioning.tokenizer import train_wordpiece
from ldm_scale.core import progress, runtime, storage
from ldm_scale.core.tensors import from_uint8
from ldm_scale.data.cache import (
    Audit,
    CacheManifest,
    CacheShardWriter,
    LatentCache,
    ShardRecord,
    fingerprint,
    finish_cache,
    finished_shard,
)
from ldm_scale.data.index import Rejection
from ldm_scale.data.samples import MalformedMember, Sample, Task
from ldm_scale.data.shards import CorruptSample, ShardSet
from ldm_scale.evaluation.reconstruction import psnr
from ldm_scale.first_stage.base import FirstStage, Moments, MomentsKind
from ldm_scale.images.decode import UndecodableImage, decode
from ldm_scale.images.resize import ImageTransform, RejectedImage
from ldm_scale.jobs import config as jobs_config
from ldm_scale.jobs import loading

log = runtime.logger(__name__)

_DECODE_THREADS = 8
_VOCABULARY_CAPTIONS = 200_000
_KEPT_MEMBERS = ("cls", "boxes.json")


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheIdentity:
    """What decides a cached number, and who says so."""

    first_stage: dict[str, Any]
    """kind, config, sha256 of the weights."""
    transform: dict[str, Any]
    kind: str

    @property
    def fingerprint(self) -> str:
        return fingerprint(
            first_stage_kind=self.first_stage["kind"],
            first_stage_sha256=self.first_stage["sha256"],
            transform=self.transform,
            kind=self.kind,
        )


class AuditFailed(RuntimeError):
    """A shard whose latents do not decode to the images they came from."""


def run(job: jobs_config.PrecomputeJob) -> None:
    """Encode every shard that is not done yet, then write the manifest.

    exits  0 done, 75 preempted
    """
    runtime.configure_logging()
    preemption = runtime.Preemption()
    folder = _folder(job)
    transform = _fixed_transform(job)
    loading.first_stage_weights(job.first_stage)
    images = job.data.open_images()
    first_stage = loading.first_stage(job.first_stage).to(runtime.device())
    encoder = _Encoder(
        job.precompute, images, job.data.task, transform, first_stage, identity(job, first_stage), folder, preemption
    )
    wanted = range(len(images.urls))[: job.precompute.limit_shards or None]
    _encode_all(encoder, wanted)
    records = [encoder.finished(shard) for shard in wanted]
    if all(records):
        _finish(job, encoder, [record for record in records if record is not None])
    else:
        log.info("%d shards are in other hands; whoever ends last writes the manifest", records.count(None))


def identity(job: jobs_config.Experiment, first_stage: FirstStage) -> CacheIdentity:
    """What a cache must have been made with to be this experiment's."""
    config = jobs_config.to_plain(job.first_stage)
    kind = config.pop("schema")
    for key in ("checkpoint", "scale"):
        del config[key]
    return CacheIdentity(
        first_stage={"kind": kind, "config": config, "sha256": first_stage.digest()},
        transform=job.data.transform.build().fingerprint(),
        kind=str(MomentsKind.GAUSSIAN),
    )


def _folder(job: jobs_config.PrecomputeJob) -> Path:
    if job.data.latents is None or storage.is_remote(job.data.latents):
        raise ValueError(f"data.latents={job.data.latents}: name a local directory for the latent cache")
    return Path(job.data.latents)


def _fixed_transform(job: jobs_config.PrecomputeJob) -> ImageTransform:
    transform = job.data.transform.build()
    if transform.random:
        raise ValueError(
            "data.transform is random, but a cache holds one version of an image: set crop=center, flip=false"
        )
    return transform


class _Encoder:
    """Shards of images to shards of latents."""

    def __init__(
        self,
        config: jobs_config.PrecomputeConfig,
        images: ShardSet,
        task: Task,
        transform: ImageTransform,
        first_stage: FirstStage,
        identity: CacheIdentity,
        folder: Path,
        preemption: runtime.Preemption,
    ) -> None:
        self._fields = task.fields
        self.images, self.identity, self.folder = images, identity, folder
        self._config, self._transform, self._first_stage = config, transform, first_stage
        self._preemption = preemption
        self._device = next(first_stage.parameters()).device

    def target(self, shard: int) -> Path:
        """Where the latents of an image shard go."""
        return self.folder / self.images.names[shard]

    def finished(self, shard: int) -> ShardRecord | None:
        """The record of a shard that needs no more work."""
        return finished_shard(self.target(shard), self.identity.fingerprint, self.images.summaries[shard].sha256)

    def encode(self, shard: int, bar: progress.Bar) -> None:
        """Encode one shard and publish it.

        raises  AuditFailed where its latents do not decode to its images; nothing is published then
        """
        rejected = self.images.shard_rejected(shard)
        audited: list[Tensor] = []
        with CacheShardWriter(
            self.target(shard), fingerprint=self.identity.fingerprint, kind=self.identity.kind
        ) as writer:
            for samples, pixels_BHWC in self._batches(shard, rejected, bar):
                images_BCHW = from_uint8(torch.from_numpy(pixels_BHWC).to(self._device)).permute(0, 3, 1, 2)
                moments = self._encode(images_BCHW)
                if sum(map(len, audited)) < self._config.audit:
                    audited.append(self._audit(images_BCHW, moments))
                for (sample, members), packed in zip(samples, moments.pack().half().cpu().numpy(), strict=True):
                    kept = {field: members[field] for field in _KEPT_MEMBERS if field in members}
                    writer.add(sample.key, packed, sample.caption, members=kept)
            audit = self._verdict(shard, writer, audited)
            summary = self.images.summaries[shard]
            writer.finish(source=summary.name, source_sha256=summary.sha256, rejected=rejected, audit=audit)

    def _batches(
        self, shard: int, rejected: list[Rejection], bar: progress.Bar
    ) -> Iterator[tuple[list[tuple[Sample, dict[str, bytes]]], np.ndarray]]:
        """Decoded images in key order, a batch ahead of the encoder; what cannot be decoded goes to `rejected`."""
        ids = self.images.shard_ids(shard, by_key=True)
        with ThreadPoolExecutor(_DECODE_THREADS) as pool:
            pending = [pool.submit(self._read, int(sample)) for sample in ids[: self._config.batch]]
            for start in range(0, len(ids), self._config.batch):
                if self._preemption.received:
                    log.info("told to stop: %s is left for the next time", self.target(shard).name)
                    sys.exit(runtime.PREEMPTED_EXIT_CODE)
                ahead = ids[start + self._config.batch : start + 2 * self._config.batch]
                current, pending = pending, [pool.submit(self._read, int(sample)) for sample in ahead]
                results = [future.result() for future in current]
                rejected.extend(result for result in results if isinstance(result, Rejection))
                good = [result for result in results if not isinstance(result, Rejection)]
                if good:
                    yield [(sample, members) for sample, members, _ in good], np.stack([pixels for *_, pixels in good])
                bar.advance(len(results), self.target(shard).name)

    def _read(self, sample_id: int) -> tuple[Sample, dict[str, bytes], np.ndarray] | Rejection:
        key = self.images.keys(np.array([sample_id]))[0]
        try:
            members = self.images.read(np.array([sample_id]), (*self._fields, *_KEPT_MEMBERS))[0]
            sample = Sample.parse(key, members)
            assert sample.image is not None, "the shard set requires an image"
            pixels = self._transform(decode(sample.image), original_size=sample.original_size)
        except (UndecodableImage, RejectedImage, MalformedMember) as error:
            return Rejection(error.reason, key, 0)
        except CorruptSample:
            return Rejection("checksum", key, 0)
        return sample, members, pixels

    @torch.no_grad()
    def _encode(self, images_BCHW: Tensor) -> Moments:
        return self._first_stage.encode(images_BCHW)

    @torch.no_grad()
    def _audit(self, images_BCHW: Tensor, moments: Moments) -> Tensor:
        """PSNR of the images decoded from what is stored: float16 means."""
        return psnr(self._first_stage.decode(moments.mean.half().float()), images_BCHW).cpu()

    def _verdict(self, shard: int, writer: CacheShardWriter, audited: list[Tensor]) -> Audit | None:
        if writer.statistics is None:
            return None
        found = torch.cat(audited)
        audit = Audit(
            images=len(found),
            psnr=float(found.mean()),
            latent_mean=writer.statistics.mean,
            latent_std=writer.statistics.std,
        )
        if audit.psnr < self._config.min_psnr:
            raise AuditFailed(
                f"{self.images.urls[shard]}: {audit.images} images decoded from their latents reach {audit.psnr:.1f} "
                f"dB, below precompute.min_psnr={self._config.min_psnr}: wrong first stage, normalisation or images"
            )
        return audit


def _encode_all(encoder: _Encoder, wanted: range) -> None:
    """Encode this process's share of the shards that are not done."""
    done = {shard for shard in wanted if encoder.finished(shard) is not None}
    mine = [shard for shard in wanted if shard % runtime.world() == runtime.rank() and shard not in done]
    counts = encoder.images.counts
    total = int(counts[mine].sum()) if mine else 0
    if done:
        log.info("%d of %d shards are done already", len(done), len(wanted))
    with progress.bar("encoding", total) as bar:
        for shard in mine:
            encoder.encode(shard, bar)


def _finish(job: jobs_config.PrecomputeJob, encoder: _Encoder, records: list[ShardRecord]) -> None:
    """Write manifest, list of rejected samples and (where the text encoder wants one) the vocabulary."""
    identity = encoder.identity
    manifest = finish_cache(
        encoder.folder, records, first_stage=identity.first_stage, transform=identity.transform, kind=identity.kind
    )
    lines = [
        json.dumps({"shard": record.name, "reason": reason, "key": key}) + "\n"
        for record in records
        for reason, key in record.rejected_keys
    ]
    with storage.atomic_write(encoder.folder / "rejected.jsonl") as file:
        file.write("".join(lines).encode())
    _train_vocabulary(job, encoder.folder)
    if runtime.is_main():
        _say(job, encoder.folder, manifest, records)


def _train_vocabulary(job: jobs_config.PrecomputeJob, folder: Path) -> None:
    """A text encoder whose tokenizer lies in the cache gets one trained on the cache's captions."""
    config = job.conditioning
    if not isinstance(config, TextTransformerConfig) or Path(config.tokenizer).parent != folder:
        return
    cache = LatentCache.open(str(folder), job.data.index_dir)
    members = cache.members(np.arange(min(cache.n, _VOCABULARY_CAPTIONS)), ("txt",))
    train_wordpiece([member["txt"].decode() for member in members], config.vocab_size, config.tokenizer)


def _say(job: jobs_config.PrecomputeJob, folder: Path, manifest: CacheManifest, records: list[ShardRecord]) -> None:
    reasons = Counter(manifest.rejected)
    audits = [record.audit.psnr for record in records if record.audit is not None]
    print(
        f"\nlatent cache  {folder}\n"
        f"  samples     {manifest.n:,} written, {sum(reasons.values()):,} rejected, of {manifest.read:,} read"
        + (f" ({', '.join(f'{reason} {count:,}' for reason, count in reasons.most_common())})" if reasons else "")
        + f"\n  moments     {' x '.join(map(str, manifest.shape))} {manifest.dtype}, "
        f"latent mean {manifest.latent_mean:.3f}, std {manifest.latent_std:.3f} (scale {1 / manifest.latent_std:.4f})\n"
        f"  audit       {min(audits):.1f} to {max(audits):.1f} dB over {len(audits)} shards\n"
        f"  next        accelerate launch train.py +experiment={job.experiment} data.latents={folder}\n"
    )
