"""A model from elsewhere, or on its way there: its parts with what they were trained with, and our directory of it.

What `compvis` and `diffusers` share; knows neither format. A model on disk is two weights directories
(core/weights.py):

    OUT/first_stage         `first_stage.checkpoint=OUT/first_stage` trains on it
    OUT/latent_diffusion    U-Net and conditioner, as training publishes them in RUN/weights; absent for a first stage

with `first_stage` and `latent_diffusion` in their config.json as the jobs write them.
"""

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch

from ldm_scale.conditioning.base import Conditioner
from ldm_scale.conditioning.class_label import ClassLabelConfig
from ldm_scale.conditioning.clip_text import ClipTextConfig
from ldm_scale.conditioning.layout import LayoutConfig
from ldm_scale.conditioning.spatial import ConcatConfig, LabelMapConfig
from ldm_scale.conditioning.text import TextTransformerConfig
from ldm_scale.core import storage, weights
from ldm_scale.core.run_dir import RunDir
from ldm_scale.diffusion.schedule import NoiseSchedule
from ldm_scale.first_stage.base import FirstStage
from ldm_scale.first_stage.identity import IdentityConfig
from ldm_scale.first_stage.kl import AutoencoderKLConfig
from ldm_scale.first_stage.vq import AutoencoderVQConfig
from ldm_scale.latent_diffusion.model import DiffusionConfig, LatentDiffusion, LatentDiffusionConfig
from ldm_scale.nn.unet import UNet, UNetConfig

FIRST_STAGE, LATENT_DIFFUSION = "first_stage", "latent_diffusion"  # directories, and keys of their config.json

# The names that jobs/config.py registers these parts by, one floor up.
_SCHEMAS: dict[str, type] = {
    "autoencoder_kl": AutoencoderKLConfig,
    "autoencoder_vq": AutoencoderVQConfig,
    "identity": IdentityConfig,
    "unet": UNetConfig,
    "diffusion": DiffusionConfig,
    "text_transformer": TextTransformerConfig,
    "class_label": ClassLabelConfig,
    "layout": LayoutConfig,
    "concat": ConcatConfig,
    "label_map": LabelMapConfig,
    "clip_text": ClipTextConfig,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Bundle:
    """The parts of a model with their weights; a first stage alone has no U-Net."""

    first_stage: FirstStage
    unet: UNet | None
    conditioner: Conditioner | None
    """None for an unconditional model."""
    diffusion: DiffusionConfig | None
    """Schedule and objective; None where there is no U-Net."""
    latent_scale: float
    """What unscaled latents are multiplied by before the U-Net sees them."""

    def __post_init__(self) -> None:
        assert (self.unet is None) == (self.diffusion is None), "a U-Net and what it was trained with go together"
        assert self.unet is not None or self.conditioner is None, "a conditioner without a U-Net"

    @property
    def schedule(self) -> NoiseSchedule | None:
        """The noise levels of the U-Net; None where there is none."""
        return None if self.diffusion is None else self.diffusion.schedule.build()

    def latent_diffusion(self) -> LatentDiffusion:
        """U-Net and conditioner as one model, which shares their weights.

        raises  ValueError for a first stage alone
        """
        if self.unet is None or self.diffusion is None:
            raise ValueError("this is a first stage alone: it has no U-Net")
        conditioning = None if self.conditioner is None else self.conditioner.config
        config = LatentDiffusionConfig(unet=self.unet.config, conditioning=conditioning, diffusion=self.diffusion)
        with torch.device("meta"):  # it builds a U-Net of its own, which is thrown away
            model = LatentDiffusion(config, self.conditioner)
        model.unet = self.unet
        return model


def save(bundle: Bundle, out: Path) -> list[Path]:
    """Write the weights directories of a model, and say which."""
    weights.save(out / FIRST_STAGE, {FIRST_STAGE: to_plain(bundle.first_stage.config)}, bundle.first_stage.state_dict())
    if bundle.unet is None:
        return [out / FIRST_STAGE]
    model = bundle.latent_diffusion()
    config = {LATENT_DIFFUSION: to_plain(model.config), "latent_scale": bundle.latent_scale}
    weights.save(out / LATENT_DIFFUSION, config, model.state_dict())
    return [out / FIRST_STAGE, out / LATENT_DIFFUSION]


def load(directory: Path, first_stage: Path | None = None) -> Bundle:
    """A model from a directory that `save` wrote, from a training run, or from one weights directory.

    first_stage  where the first stage lies, if not where `directory` says
    raises       FileNotFoundError where a part is absent, ValueError where its weights are of another architecture
    """
    if (directory / FIRST_STAGE).is_dir():
        second = directory / LATENT_DIFFUSION
        return _load_parts(second if second.is_dir() else None, first_stage or directory / FIRST_STAGE)
    run = RunDir(directory)
    where = run.weights if run.weights.is_dir() else directory
    if not (where / "config.json").exists():
        raise FileNotFoundError(
            f"{directory} is none of these: a directory with {FIRST_STAGE}/ in it, a training run with weights/, a "
            "weights directory"
        )
    if LATENT_DIFFUSION not in storage.read_json(where / "config.json"):
        return _load_parts(None, where)
    if first_stage is None and where != directory:
        first_stage = Path(storage.read_json(run.config)["first_stage"]["checkpoint"])
    if first_stage is None:
        raise FileNotFoundError(f"{where} holds a U-Net without its first stage; name that one too (--first-stage)")
    return _load_parts(where, first_stage)


def first_stage_at(given: Path) -> Path | None:
    """The weights of a first stage: `given` itself, or in it where a run or a model directory has them; or None."""
    for directory in (given, RunDir(given).weights, given / FIRST_STAGE):
        if (directory / "config.json").exists() and (directory / "weights.safetensors").exists():
            return directory
    return None


def _load_parts(latent_diffusion: Path | None, first_stage: Path) -> Bundle:
    first_stage = first_stage_at(first_stage) or first_stage
    held = weights.load(first_stage)
    autoencoder = from_plain(held.config[FIRST_STAGE]).build()
    weights.load_exactly(autoencoder, held.tensors, str(first_stage))
    if latent_diffusion is None:
        scale = autoencoder.config.scale
        return Bundle(
            first_stage=autoencoder,
            unet=None,
            conditioner=None,
            diffusion=None,
            latent_scale=1.0 if scale is None else scale,
        )
    held = weights.load(latent_diffusion)
    plain = held.config[LATENT_DIFFUSION]
    model = LatentDiffusionConfig(
        unet=from_plain(plain["unet"]),
        conditioning=None if plain["conditioning"] is None else from_plain(plain["conditioning"]),
        diffusion=from_plain(plain["diffusion"]),
    ).build()
    weights.load_exactly(model, held.tensors, str(latent_diffusion))
    return Bundle(
        first_stage=autoencoder,
        unet=model.unet,
        conditioner=model.conditioner,
        diffusion=model.config.diffusion,
        latent_scale=held.config["latent_scale"],
    )


def to_plain(config: Any) -> Any:
    """A config dataclass as JSON values, parts by their `schema`: what jobs/config.py writes and reads."""
    if dataclasses.is_dataclass(config):
        values = {field.name: to_plain(getattr(config, field.name)) for field in dataclasses.fields(config)}
        schemas = [name for name, known in _SCHEMAS.items() if known is type(config)]
        return {"schema": schemas[0], **values} if schemas else values
    if isinstance(config, Enum):
        return config.name
    return [to_plain(value) for value in config] if isinstance(config, list) else config


def from_plain(plain: Mapping[str, Any]) -> Any:
    """The config dataclass of a part that `to_plain`, or a job, wrote.

    raises  ValueError for a schema or a key that is unknown here
    """
    values = dict(plain)
    schema = values.pop("schema")
    if schema not in _SCHEMAS:
        raise ValueError(f"a part of kind {schema!r} is unknown here; known: {', '.join(_SCHEMAS)}")
    return _build(_SCHEMAS[schema], values, schema)


def _build(kind: type, values: Mapping[str, Any], path: str) -> Any:
    types = typing.get_type_hints(kind)
    known = {field.name for field in dataclasses.fields(kind)}
    if unknown := sorted(values.keys() - known):
        raise ValueError(f"{path} has no {', '.join(unknown)}; these weights are of another version")
    return kind(**{name: _value(types[name], value, f"{path}.{name}") for name, value in values.items()})


def _value(kind: Any, value: Any, path: str) -> Any:
    if not isinstance(kind, type):
        return value  # `str | None` and the like
    if dataclasses.is_dataclass(kind):
        return _build(kind, value, path)
    return kind[value] if issubclass(kind, Enum) else value
