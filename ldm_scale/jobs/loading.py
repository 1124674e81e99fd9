"""Trained parts from where they lie: a first stage from its weights, a second stage from its run or model directory."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm_scale.conditioning.base import ConditionerConfig
from ldm_scale.conditioning.clip_text import CachedTextConditioner, ClipTextConditioner, ClipTextConfig
from ldm_scale.core import storage, weights
from ldm_scale.core.run_dir import RunDir
from ldm_scale.data.config import DataConfig
from ldm_scale.first_stage.base import FirstStage, FirstStageConfig
from ldm_scale.first_stage.kl import AutoencoderKL, AutoencoderKLConfig, Rescale
from ldm_scale.interop import bundle
from ldm_scale.jobs import config as jobs_config
from ldm_scale.latent_diffusion.model import LatentDiffusion, LatentDiffusionConfig
from ldm_scale.training import checkpoint_files
from ldm_scale.training.ema import half_life_of
from ldm_scale.training.engine import DTYPES, Dtypes, EngineKind, Precision

LATENTS = "latents"
"""Key of a first stage's config.json: what its latents look like, and on how many images."""


def first_stage(config: FirstStageConfig) -> FirstStage:
    """The trained, frozen first stage that `config.checkpoint` names: a weights directory, or the run that trained it.

    raises  FileNotFoundError where there is none; ValueError where it is another network than `config` describes, or
            first_stage.rescale=channels asks for statistics that are not there
    """
    where = first_stage_weights(config)
    network = config.build()
    if where is not None:
        held = weights.load(where)
        weights.load_exactly(network, held.tensors, str(where))
        if isinstance(network, AutoencoderKL) and network.config.rescale is Rescale.channels:
            network.rescale_channels(torch.tensor(_latents(held.config, where)["channel_std"]))
    return network.requires_grad_(False).eval()


def _latents(config: dict[str, Any], where: Path) -> dict[str, Any]:
    if LATENTS not in config:
        raise ValueError(
            f"first_stage.rescale=channels, but {where} does not say what its latents look like, as weights do that "
            "train.py publishes: first_stage.rescale=all"
        )
    found: dict[str, Any] = config[LATENTS]
    return found


def stated_scale(config: FirstStageConfig) -> float | None:
    """The latent scale that goes with the trained weights of a first stage; None where they do not say.

    Published weights state it in their configuration, those that were trained here measured their latents.
    """
    if isinstance(config, AutoencoderKLConfig) and config.rescale is Rescale.channels:
        return 1.0
    where = first_stage_weights(config)
    if where is None:
        return None
    held = storage.read_json(where / "config.json")
    stated: float | None = held[bundle.FIRST_STAGE]["scale"]
    return 1 / float(held[LATENTS]["std"]) if stated is None and LATENTS in held else stated


def described_first_stage(checkpoint: str) -> FirstStage:
    """As `first_stage`, of the network that the weights directory itself describes."""
    plain = storage.read_json(_weights_directory(checkpoint) / "config.json")[bundle.FIRST_STAGE]
    return first_stage(replace(jobs_config.from_plain("first_stage", plain), checkpoint=checkpoint))


def first_stage_weights(config: FirstStageConfig) -> Path | None:
    """The weights directory of a trained first stage, None for one that has no weights; checked without building.

    raises  FileNotFoundError where there is none
    """
    return _weights_directory(config.checkpoint) if config.has_weights else None


def _weights_directory(checkpoint: str | None) -> Path:
    if checkpoint is None:
        raise FileNotFoundError(
            "first_stage.checkpoint is not set: name a weights directory or the run directory of a trained first stage"
        )
    if (directory := bundle.first_stage_at(Path(checkpoint))) is not None:
        return directory
    raise FileNotFoundError(
        f"first_stage.checkpoint={checkpoint}: neither weights nor a finished training run. The published kl_f8 and "
        "vq_f4: `make fetch-weights` on a machine with internet; others from their authors' files: `python -m "
        f"ldm_scale.interop.compvis CONFIG CKPT {checkpoint}`; or train one: +experiment=autoencoder_..."
    )


def text_encoder(config: ConditionerConfig | None) -> ClipTextConditioner | None:
    """The pretrained text encoder of a conditioner that is frozen, with its tokenizer; None for any other.

    raises  FileNotFoundError where `conditioning.model` is not there, ValueError where it is another network
    """
    if not isinstance(config, ClipTextConfig):
        return None
    encoder = config.build()
    encoder.load_tokenizer()
    encoder.load_pretrained()
    return encoder


def require_trained_on(
    checkpoint: str, state: Mapping[str, Any], trained: FirstStage, encoder: ClipTextConditioner | None
) -> None:
    """Refuse networks that are not those of a second stage's checkpoint; `encoder` is a frozen text encoder.

    raises  ValueError naming both sides
    """
    held = [("first stage", "first_stage.checkpoint", trained.config.checkpoint, trained.digest())]
    if encoder is not None:
        held.append(("text encoder", "conditioning.model", encoder.config.model, encoder.digest()))
    for what, key, where, found in held:
        sha256 = state[f"{what.replace(' ', '_')}_sha256"]
        if found != sha256:
            raise ValueError(
                f"{checkpoint} was trained on {what} {sha256[:12]}, but {key}={where} now holds {found[:12]}: name the "
                "one it was trained on"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedModel:
    """A second stage with its weights, and the first stage it was trained on; on one device, frozen."""

    model: LatentDiffusion
    first_stage: FirstStage
    latent_scale: float
    described: str
    """Which weights these are, in words."""


class ModelSource(ABC):
    """Where a trained second stage lies. What it is, is known before any weights are read."""

    config: LatentDiffusionConfig
    """U-Net, conditioning, diffusion."""
    first_stage: FirstStageConfig
    """The autoencoder it was trained on."""
    size: int | None
    """Side of the images it was trained on, pixels; None where its files do not say."""

    @abstractmethod
    def load(self, device: torch.device) -> TrainedModel:
        """Read the weights.

        raises  FileNotFoundError where they are absent, ValueError where they are another model's
        """


class RunWeights:
    """One set of weights of one checkpoint of a training run, of a first or second stage."""

    def __init__(self, run_dir: RunDir, *, name: str, which: str) -> None:
        """Find checkpoint `name` (or `latest`) of a run, with weights `which` (`raw`, `ema`, `ema/H`).

        raises  FileNotFoundError where the run or the checkpoint is absent; ValueError for weights it does not have
        """
        if not run_dir.config.exists():
            raise FileNotFoundError(f"run_dir={run_dir.path} is not a training run: it has no {run_dir.config.name}")
        self.job: dict[str, Any] = storage.read_json(run_dir.config)
        """The configuration of the run, as JSON values."""
        half_lives = self.job["ema_half_lives"]
        self._which = which
        half_life = half_life_of(which, half_lives)
        self._kind = "weight" if half_life is None else f"ema/{half_life}"
        self.checkpoint = checkpoint_files.find(run_dir.checkpoints, name)

    @property
    def trained_first_stage(self) -> bool:
        """True where the run trained an autoencoder."""
        return self.job["unet"] is None

    @property
    def dtypes(self) -> Dtypes:
        """The number types of the training: in these it scored its weights."""
        engine = self.job["engine"]
        return DTYPES[EngineKind[engine["kind"]], Precision[engine["precision"]]]

    @property
    def digest(self) -> str:
        """Tells these weights apart from all others, without reading them."""
        return f"{self._kind} of {storage.read_json(self.checkpoint / checkpoint_files.COMPLETE)['digest']}"

    @property
    def data(self) -> DataConfig:
        """What the run was trained on."""
        found: DataConfig = jobs_config.from_plain("data", self.job["data"])
        return found

    @property
    def described(self) -> str:
        """Which weights these are, in words."""
        return f"{self._which} at {checkpoint_files.images_of(self.checkpoint):,} images"

    def read(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The state of the checkpoint, and whole tensors by name."""
        return checkpoint_files.read_consolidated(self.checkpoint, self._kind)

    def first_stage(self) -> FirstStage:
        """The autoencoder that the run trained, frozen, on the CPU."""
        assert self.trained_first_stage, "asked only of a first stage's run"
        network: FirstStage = jobs_config.from_plain("first_stage", self.job["first_stage"]).build()
        weights.load_exactly(network, self.read()[1], str(self.checkpoint))
        return network.requires_grad_(False).eval()


class TrainingRun(ModelSource):
    """A checkpoint of a training run of a second stage."""

    size: int

    def __init__(self, run_dir: RunDir, *, name: str, which: str) -> None:
        """Find it; see `RunWeights`.

        raises  as `RunWeights`; ValueError where the run trained a first stage
        """
        self._weights = RunWeights(run_dir, name=name, which=which)
        if self._weights.trained_first_stage:
            raise ValueError(f"run_dir={run_dir.path} trained a first stage; images are drawn from a second stage")
        job = self._weights.job
        self.config = LatentDiffusionConfig(
            unet=jobs_config.from_plain("unet", job["unet"]),
            conditioning=jobs_config.from_plain("conditioning", job["conditioning"]) if job["conditioning"] else None,
            diffusion=jobs_config.from_plain("diffusion", job["diffusion"]),
        )
        self.first_stage = jobs_config.from_plain("first_stage", job["first_stage"])
        self.data = self._weights.data
        self.size = self.data.transform.size
        self.checkpoint, self.digest = self._weights.checkpoint, self._weights.digest

    def load(self, device: torch.device) -> TrainedModel:
        loaded, encoder = self._load(device)
        if encoder is not None:
            loaded.model.conditioner = encoder.to(device)
        return loaded

    def load_as_trained(self, device: torch.device) -> TrainedModel:
        """The same to score: in the number types of its training, and where that read cached text, with text as cached.

        Scores that it logged come out again, exactly.
        """
        loaded, encoder = self._load(device)
        dtypes = self._weights.dtypes
        loaded.model.use_dtypes(parameter=dtypes.parameter, compute=dtypes.compute)
        if encoder is not None and isinstance(loaded.model.conditioner, CachedTextConditioner):
            loaded.model.conditioner.use(encoder.to(device))
        return loaded

    def _load(self, device: torch.device) -> tuple[TrainedModel, ClipTextConditioner | None]:
        """The model as a checkpoint holds it, and the text encoder that training left out of it, if any."""
        state, tensors = self._weights.read()
        model = self.config.build_trained()
        weights.load_exactly(model, tensors, str(self.checkpoint))
        encoder, trained_on = text_encoder(self.config.conditioning), first_stage(self.first_stage)
        require_trained_on(str(self.checkpoint), state, trained_on, encoder)
        loaded = TrainedModel(
            model=model.requires_grad_(False).eval().to(device),
            first_stage=trained_on.to(device),
            latent_scale=state["latent_scale"],
            described=self._weights.described,
        )
        return loaded, encoder


class ModelDirectory(ModelSource):
    """What `ldm_scale.interop` wrote: a model that was imported, or brought from a run."""

    size = None

    def __init__(self, directory: Path) -> None:
        """Read the configuration of a model.

        raises  FileNotFoundError where `directory` is none
        """
        self._directory = directory
        parts = {name: directory / name / "config.json" for name in (bundle.FIRST_STAGE, bundle.LATENT_DIFFUSION)}
        if lacking := [name for name, file in parts.items() if not file.exists()]:
            raise FileNotFoundError(
                f"model={directory} has no {' and no '.join(lacking)}: give what `python -m ldm_scale.interop.compvis` "
                "or `... .diffusers import` wrote; of a training run, run_dir=RUN"
            )
        plain = {name: storage.read_json(file)[name] for name, file in parts.items()}
        self.first_stage = bundle.from_plain(plain[bundle.FIRST_STAGE])
        second = plain[bundle.LATENT_DIFFUSION]
        self.config = LatentDiffusionConfig(
            unet=bundle.from_plain(second["unet"]),
            conditioning=None if second["conditioning"] is None else bundle.from_plain(second["conditioning"]),
            diffusion=bundle.from_plain(second["diffusion"]),
        )

    def load(self, device: torch.device) -> TrainedModel:
        held = bundle.load(self._directory)
        return TrainedModel(
            model=held.latent_diffusion().requires_grad_(False).eval().to(device),
            first_stage=held.first_stage.requires_grad_(False).eval().to(device),
            latent_scale=held.latent_scale,
            described=self._directory.name,
        )
