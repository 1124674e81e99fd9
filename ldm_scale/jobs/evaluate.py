"""Score a trained model on the held-out images of its experiment. `evaluate.py` starts this."""

from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ldm_scale.core import runtime, storage
from ldm_scale.core.run_dir import RunDir
from ldm_scale.jobs import config as jobs_config
from ldm_scale.jobs import loading
from ldm_scale.jobs.scores import GenerationScores, HeldOutImages
from ldm_scale.latent_diffusion.generate import Generator


def run(job: jobs_config.EvaluateJob) -> None:
    """Print the scores, and write them with everything they depend on to `evaluation/` in the run directory."""
    runtime.configure_logging()
    runtime.join()
    run_dir = RunDir(Path(job.run_dir))
    source = loading.TrainingRun(run_dir, name=job.checkpoint, which=job.weights)
    trained = source.load(runtime.device())
    data = replace(source.data, validation=job.validation or source.data.validation)
    held_out = HeldOutImages.open(data, job.evaluation.images)
    transform = jobs_config.to_plain(data.transform)
    scores = GenerationScores(job.evaluation, job.paths, held_out, transform, runtime.device())
    generator = Generator(
        model=trained.model,
        first_stage=trained.first_stage,
        latent_scale=trained.latent_scale,
        sampler=job.sampler,
        size=(source.size, source.size),
        seed=job.seed,
    )
    found = scores(generator)
    if not runtime.is_main():
        runtime.leave()
    images_seen = source.checkpoint.name.removeprefix("images_")
    out = run_dir.path / "evaluation" / f"{images_seen}_{job.weights.replace('/', '_')}.json"
    conditions = {"weights": trained.described, **scores.conditions(generator)}
    storage.write_json(out, {"scores": found, "real": scores.real(), "conditions": conditions})
    table = Table(title=f"{job.run_dir}: {trained.described}", title_justify="left")
    table.add_column("score")
    table.add_column("value", justify="right")
    for name, value in found.items():
        table.add_row(name, f"{value:.4f}")
    Console().print(table)
    print(f"scores and what they depend on: {out}")
    runtime.leave()
