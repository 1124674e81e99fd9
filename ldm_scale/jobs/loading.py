"""Trained parts from where they lie: a first stage from its weights, a second stage from a checkpoint of its run."""

from dataclasses import dataclass
from pathlib import Path

import torch

from ldm_scale.core import storage, weights
from ldm_scale.core.run_dir import RunDir
from ldm_scale.data.loader import DataConfig
from ldm_scale.first_stage.base import FirstStage, FirstStageConfig
from ldm_scale.jobs import config as jobs_config
from ldm_scale.latent_diffusion.model import LatentDiffusion, LatentDiffusionConfig
from ldm_scale.training import checkpoint


def first_stage(config: FirstStageConfig) -> FirstStage:
    """The trained, frozen first stage that `config.checkpoint` names: a weights directory, or the run that trained it.

    raises  FileNotFoundError where there is none, ValueError where it is another network than `config` describes
    """
    where = first_stage_weights(config)
    held = weights.load(where)
    network = config.build()
    weights.load_exactly(network, held.tensors, str(where))
    return network.requires_grad_(False).eval()


def first_stage_weights(config: FirstStageConfig) -> Path:
    """The weights directory of a trained first stage; checked without building anything."""
    if config.checkpoint is None:
        raise FileNotFoundError(
            "first_stage.checkpoint is not set: name a weights directory or the run directory of a trained first stage"
        )
    given = Path(config.checkpoint)
    for directory in (given, RunDir(given).weights):
        if (directory / "config.json").exists() and (directory / "weights.safetensors").exists():
            return directory
    raise FileNotFoundError(
        f"first_stage.checkpoint={config.checkpoint}: neither a weights directory nor a finished training run. "
        "Train it (accelerate launch train.py +experiment=autoencoder_...), or fetch published weights"
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedModel:
    """A second stage as it was at one checkpoint, with the first stage it was trained on."""

    model: LatentDiffusion
    first_stage: FirstStage
    latent_scale: float
    size: int
    images_seen: int
    described: str
    """Which weights these are, in words."""
    data: DataConfig
    """Where its experiment finds images."""


def trained_model(run_dir: RunDir, *, name: str, which: str, device: torch.device) -> TrainedModel:
    """A second stage from checkpoint `name` (or `latest`) of a run, with weights `which` (`raw`, `ema`, `ema/H`).

    raises  FileNotFoundError where the run or the checkpoint is absent
    """
    if not run_dir.config.exists():
        raise FileNotFoundError(f"run_dir={run_dir.path} is not a training run: it has no {run_dir.config.name}")
    job = storage.read_json(run_dir.config)
    if job["unet"] is None:
        raise ValueError(f"run_dir={run_dir.path} trained a first stage; images are drawn from a second stage")
    where = checkpoint.find(run_dir.checkpoints, name)
    half_lives = job["ema_half_lives"]
    kind = "weight" if which == "raw" else f"ema/{half_lives[0]}" if which == "ema" else which
    if kind != "weight" and int(kind.removeprefix("ema/")) not in half_lives:
        raise ValueError(f"weights={which!r}; this run averaged with half-lives {half_lives}")
    state, tensors = checkpoint.read_consolidated(where, kind)
    model = LatentDiffusionConfig(
        unet=jobs_config.from_plain("unet", job["unet"]),
        conditioning=jobs_config.from_plain("conditioning", job["conditioning"]) if job["conditioning"] else None,
        diffusion=jobs_config.from_plain("diffusion", job["diffusion"]),
    ).build()
    weights.load_exactly(model, tensors, str(where))
    trained_on = first_stage(jobs_config.from_plain("first_stage", job["first_stage"]))
    if trained_on.digest() != state["first_stage_sha256"]:
        raise ValueError(
            f"{where} was trained on first stage {state['first_stage_sha256'][:12]}, but "
            f"{job['first_stage']['checkpoint']} now holds {trained_on.digest()[:12]}"
        )
    return TrainedModel(
        model=model.requires_grad_(False).eval().to(device),
        first_stage=trained_on.to(device),
        latent_scale=state["latent_scale"],
        size=job["data"]["transform"]["size"],
        images_seen=state["images_seen"],
        described=f"{which} at {state['images_seen']:,} images",
        data=jobs_config.from_plain("data", job["data"]),
    )
