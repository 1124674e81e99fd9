"""Score a trained model: of a second stage what it generates, of a first stage what it gives back.

`evaluate.py` starts this.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from ldm_scale.core import runtime, storage
from ldm_scale.core.run_dir import RunDir
from ldm_scale.data.config import DataConfig
from ldm_scale.data.samples import Task
from ldm_scale.first_stage.base import FirstStage
from ldm_scale.images.resize import ImageTransformConfig
from ldm_scale.jobs import guidance_sweep, loading, reference_set, watch
from ldm_scale.jobs.kept import Between, Kept, kept_beside
from ldm_scale.jobs.schemas.evaluate import EvaluateJob
from ldm_scale.jobs.scores import (
    GenerationScores,
    HeldOutImages,
    Reconstructions,
    ReconstructionScores,
    reconstruction_grid,
)
from ldm_scale.latent_diffusion.generate import Generator

_COLUMNS = 8  # pairs in a row of the picture

log = runtime.logger(__name__)


def run(job: EvaluateJob) -> None:
    """Print the scores, and write them with everything they depend on to `evaluation/` beside what was scored."""
    runtime.configure_logging()
    runtime.join()
    preemption = runtime.Preemption()
    try:
        _evaluate(job, preemption)
    except runtime.Preempted:
        log.info("stopped; the same command goes on")
        runtime.leave(runtime.PREEMPTED_EXIT_CODE)
    runtime.leave()


def _evaluate(job: EvaluateJob, preemption: runtime.Preemption) -> None:
    between = preemption.between
    if job.watch is not None:
        watch.run(RunDir(Path(job.watch)), job.every, preemption)
        return
    if job.write_reference is not None:
        reference_set.write(job, Path(job.write_reference), between)
        return
    trained = None
    if job.run_dir is not None:
        trained = loading.RunWeights(RunDir(Path(job.run_dir)), name=job.checkpoint, which=job.weights)
    if trained is None or trained.trained_first_stage:
        _score_first_stage(job, _given(job) if trained is None else _trained(job, trained), between)
    else:
        _score_second_stage(job, between)


def _score_second_stage(job: EvaluateJob, between: Between) -> None:
    assert job.run_dir is not None, "asked only of a run"
    if job.data.size is not None:
        raise ValueError(f"data.size={job.data.size}: a second stage is scored at the size that it was trained at")
    source = loading.TrainingRun(RunDir(Path(job.run_dir)), name=job.checkpoint, which=job.weights)
    trained = source.load_as_trained(runtime.device())
    data = replace(source.data, validation=job.data.images or source.data.validation)
    held_out = HeldOutImages.open(data, job.evaluation.images)
    scores = GenerationScores(job.evaluation, job.paths, held_out, runtime.device(), between)
    generator = Generator(
        model=trained.model,
        first_stage=trained.first_stage,
        latent_scale=trained.latent_scale,
        sampler=job.sampler,
        size=(source.size, source.size),
        seed=job.seed,
    )
    title = f"{job.run_dir}: {trained.described}"

    def identity(generator: Generator) -> dict[str, Any]:
        return {"weights": source.digest, **scores.identity(generator)}

    name = f"{_name(job, source.checkpoint)}{'_guidance' if job.guidances else ''}"
    out = _out(Path(job.run_dir), name, {**identity(generator), "guidances": job.guidances})
    with kept_beside(out) as folder:

        def score(generator: Generator, name: str) -> dict[str, float]:
            return scores(generator, between, Kept(folder / name, identity(generator)))

        if job.guidances:
            guidance_sweep.run(scores, score, generator, job.guidances, out, title)
        else:
            conditions = {"weights": trained.described, **scores.conditions(generator)}
            _write(out, score(generator, "scores"), {"real": scores.real(), "conditions": conditions}, title)


@dataclass(frozen=True, slots=True)
class _Scored:
    """A first stage, and what is said of it."""

    network: FirstStage
    dtype: torch.dtype
    """Of its weights while it is scored."""
    described: str
    """Which weights these are, in words."""
    data: DataConfig
    """The images, as `validation`, and how they are brought to size."""
    where: Path
    """The directory of the run or the weights."""
    name: str
    """Of these weights there."""


def _trained(job: EvaluateJob, trained: loading.RunWeights) -> _Scored:
    data, size = trained.data, job.data.size
    transform = data.transform if size is None else replace(data.transform, size=size, resize=None)
    data = replace(data, validation=job.data.images or data.validation, transform=transform)
    described = f"{job.run_dir}: {trained.described}"
    name = _name(job, trained.checkpoint)
    return _Scored(trained.first_stage(), trained.dtypes.parameter, described, data, Path(str(job.run_dir)), name)


def _given(job: EvaluateJob) -> _Scored:
    checkpoint, size = job.first_stage.checkpoint, job.data.size
    assert checkpoint is not None and size is not None, "EvaluateJob checks it"
    transform = ImageTransformConfig(size=size)
    data = DataConfig(validation=job.data.images, transform=transform, task=Task.unconditional)
    network = loading.described_first_stage(checkpoint)
    return _Scored(network, torch.float32, checkpoint, data, Path(checkpoint), "weights")


def _score_first_stage(job: EvaluateJob, scored: _Scored, between: Between) -> None:
    if job.guidances:
        raise ValueError(f"guidances={job.guidances}: {scored.described} is a first stage, which nothing guides")
    network = scored.network.to(runtime.device())
    held_out = HeldOutImages.open(scored.data, job.evaluation.images)
    scores = ReconstructionScores(job.evaluation, job.paths, held_out, runtime.device())
    weights = {"first_stage_sha256": network.digest()}
    conditions = {"weights": scored.described, **weights, **scores.conditions(), "images": scored.data.validation}
    network.to(scored.dtype)
    identity = {**weights, **scores.identity(network)}
    out = _out(scored.where, scored.name, identity)
    with kept_beside(out) as folder:
        found = scores(network, between, Kept(folder, identity))
        _write(out, found.scores, {"conditions": conditions}, scored.described)
    if runtime.is_main():
        _show(out, network, held_out, found)


def _show(out: Path, network: FirstStage, held_out: HeldOutImages, found: Reconstructions) -> None:
    """`out`.png: reconstructions below their originals, first the worst, then those in the middle."""
    ranked = found.psnr_N.argsort().tolist()
    middle = max(0, len(ranked) // 2 - _COLUMNS // 2)
    shown = [*ranked[:_COLUMNS], *ranked[middle : middle + _COLUMNS]]
    labels = [f"{found.psnr_N[i]:.1f} dB" for i in shown]
    title = "the worst of all images, and below them those in the middle, by PSNR"
    picture_HWC = reconstruction_grid(network, held_out.read(shown).images, labels, columns=_COLUMNS, title=title)
    file = out.with_suffix(".png")
    with storage.atomic_write(file) as stream:
        Image.fromarray(picture_HWC).save(stream, format="PNG")
    print(f"worst and typical reconstructions: {file}")


def _write(out: Path, found: Mapping[str, float], beside: Mapping[str, Any], title: str) -> None:
    """On rank 0: `out`.json, and the scores as a table on the screen."""
    if not runtime.is_main():
        return
    file = out.with_suffix(".json")
    storage.write_json(file, {"scores": dict(found), **beside})
    table = Table(title=title, title_justify="left")
    table.add_column("score")
    table.add_column("value", justify="right")
    for name, value in found.items():
        table.add_row(name, f"{value:.4f}")
    Console().print(table)
    print(f"scores and what they depend on: {file}")


def _name(job: EvaluateJob, checkpoint: Path) -> str:
    """What weights of a checkpoint are called in the names of files."""
    return f"{checkpoint.name.removeprefix('images_')}_{job.weights.replace('/', '_')}"


def _out(where: Path, name: str, identity: Mapping[str, Any]) -> Path:
    """Where scores go, without the end of the name; those of other settings, perhaps made meanwhile, go elsewhere."""
    return where / "evaluation" / f"{name}_{storage.digest(identity)[:8]}"
