"""The original latent-diffusion YAML files, in our configurations (facts.md 1.1 to 1.3 and 5.2).

Reads plain YAML; nothing in a file is imported or called. A key is translated, known not to change the network, or
refused: a checkpoint must not be loaded into something that only looks like its network.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ldm_scale.conditioning.base import ConditionerConfig
from ldm_scale.conditioning.class_label import ClassLabelConfig
from ldm_scale.conditioning.clip_text import ClipTextConfig
from ldm_scale.conditioning.layout import LayoutConfig
from ldm_scale.conditioning.spatial import ConcatConfig, LabelMapConfig
from ldm_scale.conditioning.text import TextTransformerConfig
from ldm_scale.core import runtime, storage
from ldm_scale.diffusion.objective import Loss, ObjectiveConfig, Prediction
from ldm_scale.diffusion.schedule import ScheduleConfig
from ldm_scale.first_stage.base import FirstStageConfig
from ldm_scale.first_stage.identity import IdentityConfig
from ldm_scale.first_stage.kl import AutoencoderKLConfig
from ldm_scale.first_stage.vq import AutoencoderVQConfig
from ldm_scale.interop.compvis_names import HeadOrder
from ldm_scale.latent_diffusion.model import DiffusionConfig
from ldm_scale.nn.unet import BLOCK_KINDS, UNetConfig

log = runtime.logger(__name__)

VIT_L = "openai/clip-vit-large-patch14"
FIRST_STAGE_ITSELF = "__is_first_stage__"
_IMAGENET_AND_NULL = 1001  # classes of the published cin256-v2: ImageNet's, and last the one for no class
_CROP_TOKENS = 2
_PREDICTIONS = {"eps": Prediction.eps, "x0": Prediction.z0, "v": Prediction.v}


@dataclass(frozen=True, kw_only=True, slots=True)
class Described:
    """What a YAML file says."""

    first_stage: FirstStageConfig
    unet: UNetConfig | None = None
    """None where the file describes a first stage alone."""
    conditioning: ConditionerConfig | None = None
    diffusion: DiffusionConfig | None = None
    latent_scale: float = 1.0
    """Means nothing where `scale_by_std` is true."""
    scale_by_std: bool = False
    """The scale was measured when training began, and lies in the checkpoint."""
    head_order: HeadOrder = HeadOrder.heads_first
    conditioner_is_first_stage: bool = False
    """The checkpoint then holds the first stage twice."""


class Section:
    """The keys of one `params`; each is taken, known to be harmless, or refused by `done`."""

    def __init__(self, values: Mapping[str, Any], path: str) -> None:
        if not isinstance(values, Mapping):
            raise ValueError(f"{path}={values!r}; must be keys with values")
        self._left = dict(values)
        self.path = path

    def take(self, key: str, default: Any = ...) -> Any:
        """The value of `key`.

        raises  ValueError where it is absent and has no default
        """
        if key not in self._left and default is ...:
            raise ValueError(f"{self.path}.{key} is missing, and the reference has no default for it")
        return self._left.pop(key, default)

    def integer(self, key: str, default: Any = ...) -> int:
        """An integer."""
        value = self.take(key, default)
        if not _is_integer(value):
            raise ValueError(f"{self.path}.{key}={value!r}; must be an integer")
        return int(value)

    def integers(self, key: str, default: Any = ...) -> list[int]:
        """A list of integers."""
        values = self.take(key, default)
        if not isinstance(values, list | tuple) or not all(map(_is_integer, values)):
            raise ValueError(f"{self.path}.{key}={values!r}; must be a list of integers")
        return list(values)

    def number(self, key: str, default: float) -> float:
        """A number; YAML reads 1e-4, which has no point, as a string."""
        value = self.take(key, default)
        try:
            return float(value)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self.path}.{key}={value!r}; must be a number") from error

    def flag(self, key: str) -> bool:
        """True or false; false where it is absent."""
        value = self.take(key, False)
        if not isinstance(value, bool):
            raise ValueError(f"{self.path}.{key}={value!r}; must be true or false")
        return value

    def choice(self, key: str, default: str, known: Mapping[str, Any]) -> Any:
        """What `known` says of the name that `key` gives."""
        name = self.take(key, default)
        if not isinstance(name, str) or name not in known:
            raise ValueError(f"{self.path}.{key}={name!r}; known: {_listed((*known,))}")
        return known[name]

    def require(self, key: str, *allowed: Any) -> None:
        """Take a key that must be absent or have a value that leaves the network as ours is."""
        value = self.take(key, allowed[0])
        if value not in allowed:
            raise ValueError(f"{self.path}.{key}={value!r} is a network that is not here; allowed: {_listed(allowed)}")

    def section(self, key: str) -> tuple[str, "Section"]:
        """The target and the params of the part that `key` describes."""
        return _part(self.take(key), f"{self.path}.{key}")

    def done(self, *harmless: str) -> None:
        """Refuse what is left, but for keys that change no network."""
        if unknown := sorted(self._left.keys() - set(harmless)):
            raise ValueError(
                f"{', '.join(f'{self.path}.{key}={self._left[key]!r}' for key in unknown)}: unknown here, and may "
                "change the network; remove the key if it does not"
            )


def read(path: Path) -> Described:
    """What an original YAML file describes: a diffusion model or a first stage.

    raises  FileNotFoundError where there is none, ValueError naming the key for anything that is not here
    """
    with open(path, encoding="utf-8") as file:
        try:
            held = yaml.safe_load(file)
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(held, Mapping) or "model" not in held:
        raise ValueError(f"{path} has no key `model`: not a configuration of the original latent-diffusion")
    target, section = _part(held["model"], "model")
    if target in _FIRST_STAGES:
        return Described(first_stage=_FIRST_STAGES[target](section))
    if target not in _DIFFUSION_MODELS:
        raise ValueError(f"model.target={target!r}; known: {_listed((*_DIFFUSION_MODELS, *_FIRST_STAGES))}")
    return _latent_diffusion(section)


def _part(value: Any, path: str) -> tuple[str, Section]:
    """The target and the params of one part; a bare string is a target without any."""
    if isinstance(value, str):
        return value, Section({}, path)
    if not isinstance(value, Mapping) or not isinstance(value.get("target"), str):
        raise ValueError(f"{path}={value!r}; must name a target")
    return value["target"], Section(value.get("params") or {}, f"{path}.params")


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _listed(values: tuple[Any, ...]) -> str:
    return ", ".join(map(str, values))


# The model ------------------------------------------------------------------------------------------------------------


def _latent_diffusion(section: Section) -> Described:
    unet, head_order = _unet(section)
    target, autoencoder = section.section("first_stage_config")
    if target not in _FIRST_STAGES:
        raise ValueError(f"model.params.first_stage_config.target={target!r}; known: {_listed((*_FIRST_STAGES,))}")
    conditioner, conditioning = _conditioning(section, unet)
    described = Described(
        first_stage=_FIRST_STAGES[target](autoencoder),
        unet=unet,
        conditioning=conditioning,
        diffusion=_diffusion(section),
        latent_scale=section.number("scale_factor", 1.0),
        scale_by_std=section.flag("scale_by_std"),
        head_order=head_order,
        conditioner_is_first_stage=conditioner == FIRST_STAGE_ITSELF,
    )
    section.require("split_input_params", None)
    section.require("use_positional_encodings", False)
    section.done(*_HARMLESS_TO_DIFFUSION)
    return described


def _diffusion(section: Section) -> DiffusionConfig:
    section.require("beta_schedule", "linear")  # linear in the square root, as ours; facts.md 5.2
    section.require("given_betas", None)
    schedule = ScheduleConfig(
        beta_start=section.number("linear_start", 1e-4),
        beta_end=section.number("linear_end", 2e-2),
        steps=section.integer("timesteps", 1000),
    )
    objective = ObjectiveConfig(
        prediction=section.choice("parameterization", "eps", _PREDICTIONS),
        loss=section.choice("loss_type", "l2", Loss.__members__),
    )
    return DiffusionConfig(schedule=schedule, objective=objective)


_DIFFUSION_MODELS = ("ldm.models.diffusion.ddpm.LatentDiffusion", "ldm.models.diffusion.ddpm.Layout2ImgDiffusion")
_HARMLESS_TO_DIFFUSION = (
    # what is logged, monitored and cropped
    "log_every_t", "monitor", "image_size", "channels", "first_stage_key", "cond_stage_key", "clip_denoised",
    # how it is trained
    "num_timesteps_cond", "cond_stage_trainable", "scheduler_config", "use_ema", "v_posterior", "original_elbo_weight",
    "l_simple_weight", "learn_logvar", "logvar_init", "cosine_s", "unfreeze_diffusion_model",
    # where it starts; the checkpoint is named to us
    "ckpt_path", "ignore_keys", "load_only_unet", "cond_stage_forward",
)  # fmt: skip


# The U-Net ------------------------------------------------------------------------------------------------------------


def _unet(model: Section) -> tuple[UNetConfig, HeadOrder]:
    target, section = model.section("unet_config")
    if target != "ldm.modules.diffusionmodules.openaimodel.UNetModel":
        raise ValueError(f"model.params.unet_config.target={target!r}; known: the reference's openaimodel.UNetModel")
    channel_mult = section.integers("channel_mult", (1, 2, 4, 8))
    head_channels = section.integer("num_head_channels", -1)  # -1: not stated; it wins where both are
    num_heads = section.integer("num_heads", -1)
    config = UNetConfig(
        in_channels=section.integer("in_channels"),
        out_channels=section.integer("out_channels"),
        model_channels=section.integer("model_channels"),
        channel_mult=channel_mult,
        num_res_blocks=section.integer("num_res_blocks"),
        attention_factors=_reached(section.integers("attention_resolutions"), len(channel_mult), section.path),
        num_heads=max(num_heads, 0) if head_channels == -1 else 0,
        head_channels=max(head_channels, 0),
        **_transformer(section),
        dropout=section.number("dropout", 0.0),
        scale_shift_norm=section.flag("use_scale_shift_norm"),
        residual_resampling=section.flag("resblock_updown"),
        activation_checkpointing=list(BLOCK_KINDS) if section.flag("use_checkpoint") else [],
    )
    order = HeadOrder.qkv_first if section.flag("use_new_attention_order") else HeadOrder.heads_first
    section.require("num_heads_upsample", -1, num_heads)
    section.require("conv_resample", True)
    section.require("dims", 2)
    section.require("num_classes", None)
    section.require("n_embed", None)
    # `legacy` chooses between two ways to the same number of heads, and `use_fp16` casts nothing (facts.md 5.1, W16).
    section.done("image_size", "legacy", "use_fp16")
    return config, order


def _transformer(section: Section) -> dict[str, int]:
    """Fields of the spatial transformers; without them attention is plain, whatever else is said of them."""
    depth, context_dim = section.integer("transformer_depth", 1), section.take("context_dim", None)
    if not section.flag("use_spatial_transformer"):
        return {}
    if not _is_integer(context_dim) or context_dim < 1:
        raise ValueError(f"{section.path}.context_dim={context_dim!r}; a spatial transformer needs one width")
    return {"transformer_depth": depth, "context_dim": context_dim}


def _reached(attention_resolutions: list[int], levels: int, path: str) -> list[int]:
    """Downsampling factors that have attention; those that no level has, the reference passes over."""
    levels_have = [2**level for level in range(levels)]
    if never := sorted(set(attention_resolutions) - set(levels_have)):
        log.info("%s.attention_resolutions: %s is never reached, as in the reference", path, _listed((*never,)))
    return [factor for factor in levels_have if factor in attention_resolutions]


# First stages ---------------------------------------------------------------------------------------------------------


def _autoencoder_kl(section: Section) -> AutoencoderKLConfig:
    return AutoencoderKLConfig(**_convolutional(section, double_z=True))


def _autoencoder_vq(section: Section) -> AutoencoderVQConfig:
    codebook_size = section.integer("n_embed")
    section.require("remap", None)
    return AutoencoderVQConfig(codebook_size=codebook_size, **_convolutional(section, double_z=False))


def _convolutional(section: Section, *, double_z: bool) -> dict[str, Any]:
    """Fields that both autoencoders have."""
    shape = Section(section.take("ddconfig"), f"{section.path}.ddconfig")
    has_attention = shape.choice("attn_type", "vanilla", {"vanilla": True, "none": False})
    channel_mult, resolution = shape.integers("ch_mult", (1, 2, 4, 8)), shape.integer("resolution")
    attended = shape.integers("attn_resolutions")  # sides of the feature maps, for images of `resolution`
    reached = [2**level for level in range(len(channel_mult)) if resolution // 2**level in attended]
    fields = {
        "image_channels": shape.integer("in_channels"),
        "channels": shape.integer("ch"),
        "channel_mult": channel_mult,
        "num_res_blocks": shape.integer("num_res_blocks"),
        "attention_factors": reached if has_attention else [],
        "mid_attention": has_attention,
        "z_channels": shape.integer("z_channels"),
        "embed_dim": section.integer("embed_dim"),
    }
    if shape.take("double_z", True) is not double_z:
        raise ValueError(f"{shape.path}.double_z must be {double_z}: KL has a mean and a log-variance, VQ one latent")
    shape.require("out_ch", fields["image_channels"])
    shape.require("dropout", 0, None)
    shape.require("resamp_with_conv", True)
    shape.require("use_linear_attn", False)
    shape.require("give_pre_end", False)
    shape.require("tanh_out", False)
    shape.done()
    section.require("colorize_nlabels", None)
    section.done(*_HARMLESS_TO_FIRST_STAGES)
    return fields


def _identity(section: Section) -> IdentityConfig:
    section.done("vq_interface", *_HARMLESS_TO_FIRST_STAGES)
    return IdentityConfig()


_FIRST_STAGES: dict[str, Callable[[Section], FirstStageConfig]] = {
    "ldm.models.autoencoder.AutoencoderKL": _autoencoder_kl,
    "ldm.models.autoencoder.VQModel": _autoencoder_vq,
    "ldm.models.autoencoder.VQModelInterface": _autoencoder_vq,
    "ldm.models.autoencoder.IdentityFirstStage": _identity,
}
_HARMLESS_TO_FIRST_STAGES = (
    "lossconfig", "monitor", "ckpt_path", "ignore_keys", "image_key", "base_learning_rate",
    # of VQ: how it was trained, and how code maps are laid out
    "batch_resize_range", "scheduler_config", "lr_g_factor", "sane_index_shape", "use_ema",
)  # fmt: skip


# Conditioners ---------------------------------------------------------------------------------------------------------


def _conditioning(model: Section, unet: UNetConfig) -> tuple[str, ConditionerConfig | None]:
    """Target and configuration of the conditioner; None for an unconditional model."""
    target, section = model.section("cond_stage_config")
    way = model.take("conditioning_key", None) or ("concat" if model.take("concat_mode", True) else "crossattn")
    model.take("concat_mode", None)
    if target == "__is_unconditional__":
        return target, None
    if target not in _CONDITIONERS:
        raise ValueError(f"{model.path}.cond_stage_config.target={target!r}; known: {_listed((*_CONDITIONERS,))}")
    wanted = _CONDITIONERS[target]
    if way not in wanted:
        raise ValueError(f"{model.path}.conditioning_key={way!r} with {target}; known: {_listed((*wanted,))}")
    config = wanted[way](section, unet)
    section.done()
    return target, config


def _given_channels(section: Section, unet: UNetConfig) -> ConcatConfig:
    return ConcatConfig(channels=unet.in_channels - unet.out_channels)


def _given_context(section: Section, unet: UNetConfig) -> None:
    log.info("the context of this model, %d wide, comes from outside: it has no conditioner", unet.context_dim)


def _label_map(section: Section, unet: UNetConfig) -> LabelMapConfig:
    section.require("method", "bilinear")
    section.require("multiplier", 0.5)
    section.require("bias", False)
    return LabelMapConfig(
        classes=section.integer("in_channels", 3),
        channels=section.integer("out_channels"),
        halvings=section.integer("n_stages", 1),
    )


def _class_label(section: Section, unet: UNetConfig) -> ClassLabelConfig:
    rows, width = section.integer("n_classes", 1000), section.integer("embed_dim")
    section.take("key", None)
    if rows == _IMAGENET_AND_NULL:
        return ClassLabelConfig(classes=rows - 1, null_class=True, width=width)
    return ClassLabelConfig(classes=rows, null_class=False, width=width, dropout=0.0)


def _transformer_of_tokens(section: Section, unet: UNetConfig) -> TextTransformerConfig | LayoutConfig:
    """The reference has one class for captions and for layouts."""
    width, layers = section.integer("n_embed"), section.integer("n_layer")
    vocab_size, length = section.integer("vocab_size", 30522), section.integer("max_seq_len", 77)
    section.require("embedding_dropout", 0)
    section.take("device", None)
    if section.take("use_tokenizer", True):
        return TextTransformerConfig(width=width, layers=layers, vocab_size=vocab_size, max_length=length)
    objects, crop = divmod(length, 3)
    if crop not in (0, _CROP_TOKENS):
        raise ValueError(
            f"{section.path}.max_seq_len={length} is no layout: 3 tokens an object, {_CROP_TOKENS} or 0 for the crop"
        )
    return LayoutConfig(width=width, layers=layers, vocab_size=vocab_size, max_objects=objects, crop=crop > 0)


def _clip_text(section: Section, unet: UNetConfig) -> ClipTextConfig:
    section.take("device", None)
    model, max_length = str(section.take("version", VIT_L)), section.integer("max_length", 77)
    shape = {} if model == VIT_L else _clip_shape(Path(model), section.path)
    return ClipTextConfig(model=model, max_length=max_length, **shape)


def _clip_shape(directory: Path, path: str) -> dict[str, int]:
    """Fields of another text encoder than ViT-L/14, from its own directory."""
    if not (directory / "config.json").exists():
        raise ValueError(f"{path}.version={str(directory)!r}; known: {VIT_L}, or a directory as transformers saves it")
    held = storage.read_json(directory / "config.json")
    held = held.get("text_config", held)
    return {
        "width": held["hidden_size"],
        "layers": held["num_hidden_layers"],
        "heads": held["num_attention_heads"],
        "vocab_size": held["vocab_size"],
    }


_ENCODERS = "ldm.modules.encoders.modules"
_CONDITIONERS: dict[str, dict[str, Callable[[Section, UNetConfig], ConditionerConfig | None]]] = {
    # by target, then by conditioning_key
    FIRST_STAGE_ITSELF: {"concat": _given_channels},
    "torch.nn.Identity": {"concat": _given_channels, "crossattn": _given_context},
    f"{_ENCODERS}.SpatialRescaler": {"concat": _label_map},
    f"{_ENCODERS}.ClassEmbedder": {"crossattn": _class_label},
    f"{_ENCODERS}.BERTEmbedder": {"crossattn": _transformer_of_tokens},
    f"{_ENCODERS}.FrozenCLIPEmbedder": {"crossattn": _clip_text},
}
