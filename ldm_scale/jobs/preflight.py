"""What would stop a training, found before it starts: each check opens what the job would open, and trains nothing."""

import importlib.util
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from ldm_scale.conditioning.text import TextTransformerConfig
from ldm_scale.conditioning.tokenizer import load_tokenizer
from ldm_scale.core import runtime
from ldm_scale.data.cache import require_match, require_text
from ldm_scale.data.config import Origin
from ldm_scale.evaluation.alignment import ClipScore
from ldm_scale.first_stage.base import FirstStageConfig
from ldm_scale.first_stage.loss import perceptual_network
from ldm_scale.jobs import loading
from ldm_scale.jobs.precompute import identity
from ldm_scale.jobs.schemas.train import TrainJob
from ldm_scale.jobs.scores import features_of
from ldm_scale.tracking.tracker import WandbMode
from ldm_scale.tracking.weights_and_biases import may_go_online
from ldm_scale.training.batch_fit import fit_batch

State = Literal["ok", "to do", "fails"]
_LOOKED_AT = 64  # shards of each data set of which a sample is read
_REMEDY = "precompute_latents.py with the same overrides"


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that the job needs."""

    name: str
    state: State
    said: str


class ToDo(Exception):
    """Not there yet, but can be made."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Needs:
    """What the plan has worked out."""

    world: int
    checkpoint_bytes: int
    """Of one checkpoint."""
    checkpoints: int
    """Kept at the end, and the one being written."""
    gpu_bytes: int
    """At the worst moment."""
    gpu_memory: int


def checks(job: TrainJob, needs: Needs) -> list[Check]:
    """Every check, in the order in which the job would stumble."""
    return [_checked(name, work) for name, work in _all(job, needs)]


def reading(job: TrainJob) -> list[Check]:
    """Those of them about what the job reads: any host that sees the files can tell, with a GPU or without."""
    return [_checked(name, work) for name, work in _reading(job)]


def _checked(name: str, work: Callable[[], str]) -> Check:
    try:
        return Check(name, "ok", work())
    except ToDo as todo:
        return Check(name, "to do", str(todo))
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        return Check(name, "fails", str(error))


def _all(job: TrainJob, needs: Needs) -> Iterator[tuple[str, Callable[[], str]]]:
    yield "batch", lambda: _batch(job, needs.world)
    yield "engine", lambda: _engine(job, needs.world)
    yield "memory", lambda: _memory(job, needs)
    yield from _reading(job)
    yield "disk", lambda: _disk(job, needs)
    yield "W&B", lambda: _wandb(job)


def _reading(job: TrainJob) -> Iterator[tuple[str, Callable[[], str]]]:
    if not job.trains_first_stage:
        yield "first stage", lambda: _first_stage(job.first_stage)
    yield "conditions", lambda: _conditions(job)
    yield "data", lambda: _data(job)
    yield "held-out images", lambda: _held_out(job)
    yield "scores", lambda: _scores(job)


def _first_stage(config: FirstStageConfig) -> str:
    where = loading.first_stage_weights(config)
    return "has no weights" if where is None else f"weights in {where}"


def _batch(job: TrainJob, world: int) -> str:
    fitted = fit_batch(global_batch=job.global_batch, micro_batch=job.micro_batch, world=world, fit=job.batch_fit)
    return f"{fitted.global_batch} = {fitted.micro_batch} x {world} GPUs x {fitted.accumulation}"


def _engine(job: TrainJob, world: int) -> str:
    kind = job.engine.kind
    if kind.value == "one_process" and world > 1:
        raise ValueError(f"engine.kind=one_process on {world} GPUs: choose ddp or zero1, or --gpus 1")
    if kind.zero_stage and importlib.util.find_spec("deepspeed") is None:
        raise ImportError(f"engine.kind={kind.value} needs deepspeed: pip install deepspeed, or engine.kind=ddp")
    return f"{kind.value} {job.engine.precision.value}; this machine has {runtime.device()}"


def _memory(job: TrainJob, needs: Needs) -> str:
    said = f"{_gb(needs.gpu_bytes)} of {_gb(needs.gpu_memory)} on each GPU"
    if needs.gpu_bytes > needs.gpu_memory:
        raise ValueError(
            f"{said}: engine.kind={job.engine.kind.value} with micro_batch={job.micro_batch} does not fit; a smaller "
            "micro_batch, unet.activation_checkpointing=[resnet,attention], or an engine of the table that fits"
        )
    return said


def _conditions(job: TrainJob) -> str:
    job.require_trainable()
    told = job.conditioning
    if (encoder := loading.text_encoder(told)) is not None:
        return f"text encoder {encoder.config.model}, frozen: its output is cached"
    if not isinstance(told, TextTransformerConfig):
        return "none" if told is None else type(told).__name__.removesuffix("Config")
    with_latents = job.data.latents is not None and told.tokenizer.startswith(job.data.latents)
    if with_latents and not Path(told.tokenizer).exists():
        raise ToDo(f"conditioning.tokenizer={told.tokenizer} is made with the latents: {_REMEDY}")
    size = load_tokenizer(told.tokenizer, told.max_length).vocab_size
    if size != told.vocab_size:
        raise ValueError(
            f"conditioning.vocab_size={told.vocab_size}, but conditioning.tokenizer={told.tokenizer} has {size} tokens"
        )
    return f"tokenizer {told.tokenizer}, {size:,} tokens"


def _data(job: TrainJob) -> str:
    if job.trains_first_stage or job.data.source is Origin.images:
        return _images(job)
    if job.data.latents is None and job.data.images:
        raise ToDo(f"data.latents is not set. Images are there: {_images(job)}; next: {_REMEDY}")
    try:
        caches = job.data.open_latents()
    except FileNotFoundError as error:
        if not job.data.images:
            raise
        raise ToDo(f"{error}. Images are there: {_images(job)}; next: {_REMEDY}") from error
    wanted = identity(job, loading.first_stage(job.first_stage), loading.text_encoder(job.conditioning))
    for cache in caches.values():
        require_match(
            cache.manifest, wanted.fingerprint, wanted_first_stage=wanted.first_stage["sha256"], where=cache.folder
        )
        if wanted.text is not None:
            require_text(cache, wanted.text)
        cache.read(_some(cache.n))
    return f"{sum(cache.n for cache in caches.values()):,} latents, made by this first stage and transform"


def _images(job: TrainJob) -> str:
    sets = job.data.open_images()
    for shards in sets.values():
        places = shards.starts[:-1][shards.counts > 0]
        shards.read(places[_some(len(places))], job.data.task.fields)
    return f"{sum(shards.n for shards in sets.values()):,} images in {sum(len(s.urls) for s in sets.values()):,} shards"


def _held_out(job: TrainJob) -> str:
    shards = job.data.open_validation()
    shards.read(_some(shards.n), job.data.task.fields)
    return f"{shards.n:,} images"


def _scores(job: TrainJob) -> str:
    features_of(job.evaluation, job.paths)
    if job.evaluation.clip is not None:
        ClipScore(job.evaluation.clip)
    if job.trains_first_stage:
        perceptual_network(job.autoencoder_loss, job.paths.weights)
    return f"features: {job.evaluation.features.value}"


def _disk(job: TrainJob, needs: Needs) -> str:
    run_dir = Path(job.run_dir).absolute()
    free = shutil.disk_usage(next(path for path in (run_dir, *run_dir.parents) if path.exists())).free
    wanted = needs.checkpoint_bytes * needs.checkpoints
    said = f"{needs.checkpoints} checkpoints of {_gb(needs.checkpoint_bytes)}, {_gb(wanted)} of {_gb(free)} free"
    if wanted > free:
        raise ValueError(f"run_dir={job.run_dir}: {said}: another disk, keep_last=1, or keep_every=0")
    return said


def _wandb(job: TrainJob) -> str:
    if not job.tracker.wandb:
        return "not asked for"
    if job.tracker.mode is WandbMode.offline:
        return "offline, as asked for"
    import wandb

    return "online" if may_go_online(wandb.setup().settings) else "offline: no key, or no way to the server"


def _some(n: int) -> np.ndarray:
    """Numbers spread over 0 .. n - 1, both ends among them."""
    return np.unique(np.linspace(0, n - 1, min(n, _LOOKED_AT)).astype(np.int64))


def _gb(count: int) -> str:
    return f"{count / 1e9:,.1f} GB"
