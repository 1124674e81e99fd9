"""Networks and noise schedules in the words of diffusers' config.json files, and back. Knows no files and no weights.

A network that one side cannot say is refused by name. Keys that a file leaves out have the defaults of diffusers'
classes; keys that this file does not know must be unset.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ldm_scale.conditioning.text import TextTransformerConfig
from ldm_scale.core import runtime
from ldm_scale.diffusion.objective import ObjectiveConfig, Prediction
from ldm_scale.diffusion.schedule import End, ScheduleConfig, ScheduleKind
from ldm_scale.first_stage.base import FirstStageConfig
from ldm_scale.first_stage.convolutional import ConvolutionalConfig
from ldm_scale.first_stage.kl import AutoencoderKLConfig
from ldm_scale.first_stage.vq import AutoencoderVQConfig
from ldm_scale.latent_diffusion.model import DiffusionConfig
from ldm_scale.nn.unet import NORM_EPS, UNetConfig

Config = dict[str, Any]

log = runtime.logger(__name__)
# Written as the version that made the files: the oldest that this is meant for (pyproject.toml).
VERSION = "0.36.0"

_BOOKKEEPING = ("_class_name", "_diffusers_version", "_name_or_path")
_PREDICTIONS = {Prediction.eps: "epsilon", Prediction.z0: "sample", Prediction.v: "v_prediction"}
_SCHEDULES = {
    ScheduleKind.scaled_linear: "scaled_linear",
    ScheduleKind.linear: "linear",
    ScheduleKind.cosine: "squaredcos_cap_v2",
}
_TEXT_TO_IMAGE_FACTOR = 8  # LDMTextToImagePipeline divides pixels by this, whatever the first stage's factor


@dataclass(frozen=True, kw_only=True, slots=True)
class _Spoken:
    """What we understand of one class of diffusers.

    read     keys that say which network it is, with the defaults that the class gives them
    fixed    keys that every network of ours has at one value, which is the class's default unless we export it
    ignored  keys that change no float32 result
    """

    read: Config
    fixed: Config
    ignored: Sequence[str] = field(default_factory=tuple)


_LEVELS = {"conv": ("DownBlock2D", "UpBlock2D"), "resnet": ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D")}
_ATTENDED, _CROSS_ATTENDED = ("AttnDownBlock2D", "AttnUpBlock2D"), ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D")
_CODEC, _CODEC_ATTENDED = ("DownEncoderBlock2D", "UpDecoderBlock2D"), ("AttnDownEncoderBlock2D", "AttnUpDecoderBlock2D")

_UNET_READ: Config = {
    "layers_per_block": 2,
    "dropout": 0.0,
    "norm_num_groups": 32,
    "attention_head_dim": 8,
    "resnet_time_scale_shift": "default",
}
_UNET_FIXED: Config = {
    "center_input_sample": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "act_fn": "silu",
    "norm_eps": NORM_EPS,
    "time_embedding_type": "positional",
}
_CODEC_READ: Config = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": [_CODEC[0]],
    "up_block_types": [_CODEC[1]],
    "block_out_channels": [64],
    "layers_per_block": 1,
    "norm_num_groups": 32,
    "scaling_factor": 0.18215,
    "mid_block_add_attention": True,
}
SPOKEN = {
    "UNet2DModel": _Spoken(
        read=_UNET_READ
        | {
            "in_channels": 3,
            "out_channels": 3,
            "down_block_types": [_LEVELS["conv"][0], *[_ATTENDED[0]] * 3],
            "up_block_types": [*[_ATTENDED[1]] * 3, _LEVELS["conv"][1]],
            "block_out_channels": [224, 448, 672, 896],
            "downsample_type": "conv",
            "upsample_type": "conv",
            "attn_norm_num_groups": None,
        },
        fixed=_UNET_FIXED | {"mid_block_type": "UNetMidBlock2D", "add_attention": True, "num_class_embeds": None},
        ignored=("sample_size", "num_train_timesteps"),
    ),
    "UNet2DConditionModel": _Spoken(
        read=_UNET_READ
        | {
            "in_channels": 4,
            "out_channels": 4,
            "down_block_types": [*[_CROSS_ATTENDED[0]] * 3, _LEVELS["conv"][0]],
            "up_block_types": [_LEVELS["conv"][1], *[_CROSS_ATTENDED[1]] * 3],
            "block_out_channels": [320, 640, 1280, 1280],
            "cross_attention_dim": 1280,
            "transformer_layers_per_block": 1,
            "class_embed_type": None,
            "projection_class_embeddings_input_dim": None,
        },
        fixed=_UNET_FIXED
        | {
            "mid_block_type": "UNetMidBlock2DCrossAttn",
            "only_cross_attention": False,
            "dual_cross_attention": False,
            "use_linear_projection": False,
            "resnet_skip_time_act": False,
            "resnet_out_scale_factor": 1.0,
            "conv_in_kernel": 3,
            "conv_out_kernel": 3,
            "attention_type": "default",
            "class_embeddings_concat": False,
        },
        ignored=("sample_size", "upcast_attention", "addition_embed_type_num_heads", "mid_block_only_cross_attention"),
    ),
    "AutoencoderKL": _Spoken(
        read=_CODEC_READ | {"latent_channels": 4},
        fixed={"act_fn": "silu", "use_quant_conv": True, "use_post_quant_conv": True},
        ignored=("sample_size", "force_upcast"),
    ),
    "VQModel": _Spoken(
        read=_CODEC_READ | {"latent_channels": 3, "num_vq_embeddings": 256, "vq_embed_dim": None},
        fixed={"act_fn": "silu", "norm_type": "group", "lookup_from_codebook": False},
        ignored=("sample_size", "force_upcast"),
    ),
}


def unet(config: UNetConfig, sample_size: int) -> Config:
    """The config.json of a UNet2DConditionModel, or of a UNet2DModel where there is no context.

    sample_size  side of the latents that pipelines draw unless told otherwise
    raises       ValueError naming what diffusers has no U-Net for
    """
    if config.channel_mult[0] != 1:
        raise ValueError(f"unet.channel_mult={config.channel_mult}: diffusers' U-Nets start at model_channels, so at 1")
    return _conditional(config, sample_size) if config.context_dim else _unconditional(config, sample_size)


def _unconditional(config: UNetConfig, sample_size: int) -> Config:
    if config.vector_dim:
        raise ValueError(f"unet.vector_dim={config.vector_dim} without context: diffusers has no such U-Net")
    resample = "resnet" if config.residual_resampling else "conv"
    return {
        **_unet(config, "UNet2DModel", sample_size, plain=_LEVELS[resample], attended=_ATTENDED),
        "attention_head_dim": _head_width(config),
        # Unset, it takes the norm from the middle's attention where resnet_time_scale_shift is scale_shift.
        "attn_norm_num_groups": config.norm_groups,
        "downsample_type": resample,
        "upsample_type": resample,
    }


def _conditional(config: UNetConfig, sample_size: int) -> Config:
    if config.residual_resampling:
        raise ValueError("unet.residual_resampling=true with a context: diffusers has no such U-Net")
    return {
        **_unet(config, "UNet2DConditionModel", sample_size, plain=_LEVELS["conv"], attended=_CROSS_ATTENDED),
        # The number of heads, a level each: a misnomer that diffusers keeps for old files' sake.
        "attention_head_dim": config.num_heads or [max(1, width // config.head_channels) for width in config.widths],
        "cross_attention_dim": config.context_dim,
        "transformer_layers_per_block": config.transformer_depth,
        "class_embed_type": "projection" if config.vector_dim else None,
        "projection_class_embeddings_input_dim": config.vector_dim or None,
    }


def _unet(
    config: UNetConfig, name: str, sample_size: int, *, plain: tuple[str, str], attended: tuple[str, str]
) -> Config:
    down, up = _block_types(len(config.widths), config.attention_factors, plain, attended)
    return {
        "_class_name": name,
        "_diffusers_version": VERSION,
        **SPOKEN[name].fixed,
        "sample_size": sample_size,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "down_block_types": down,
        "up_block_types": up,
        "block_out_channels": config.widths,
        "layers_per_block": config.num_res_blocks,
        "dropout": config.dropout,
        "norm_num_groups": config.norm_groups,
        "resnet_time_scale_shift": "scale_shift" if config.scale_shift_norm else "default",
    }


def _head_width(config: UNetConfig) -> int | None:
    """UNet2DModel has one width of head for all levels, and None for one head as wide as its level."""
    if config.head_channels:
        return config.head_channels
    if config.num_heads == 1:
        return None
    widths = {width // config.num_heads for width in _attended_widths(config.widths, config.attention_factors)}
    if len(widths) > 1:
        raise ValueError(
            f"unet.num_heads={config.num_heads} makes heads of {len(widths)} widths: {sorted(widths)}; diffusers' "
            "UNet2DModel has one width of head for all levels"
        )
    return widths.pop()


def read_unet(given: Mapping[str, Any], where: str) -> UNetConfig:
    """The U-Net that a config.json describes.

    where   the file, for messages
    raises  ValueError naming what we have no U-Net for
    """
    config = _read(given, ("UNet2DConditionModel", "UNet2DModel"), where)
    widths: list[int] = config["block_out_channels"]
    if config["resnet_time_scale_shift"] not in ("default", "scale_shift"):
        raise _refusal(where, "resnet_time_scale_shift", config["resnet_time_scale_shift"], "default or scale_shift")
    if any(width % widths[0] for width in widths):
        raise _refusal(where, "block_out_channels", widths, "multiples of the first")
    plain = _LEVELS["conv"] if "cross_attention_dim" in config else _LEVELS[_resampling(config, where)]
    attended = _CROSS_ATTENDED if "cross_attention_dim" in config else _ATTENDED
    factors = _attention_factors(config, plain, attended, where)
    reached = _attended_widths(widths, factors)
    specific = (
        _read_conditional(config, factors, reached, where)
        if "cross_attention_dim" in config
        else _read_unconditional(config, where)
    )
    return UNetConfig(
        in_channels=config["in_channels"],
        out_channels=config["out_channels"],
        model_channels=widths[0],
        channel_mult=[width // widths[0] for width in widths],
        num_res_blocks=_one("layers_per_block", config["layers_per_block"], where),
        attention_factors=factors,
        dropout=config["dropout"],
        norm_groups=config["norm_num_groups"],
        scale_shift_norm=config["resnet_time_scale_shift"] == "scale_shift",
        **specific,
    )


def _resampling(config: Config, where: str) -> str:
    down, up = config["downsample_type"], config["upsample_type"]
    if down != up or down not in _LEVELS:
        raise _refusal(where, "downsample_type, upsample_type", (down, up), "conv, or resnet, for both")
    return str(down)


def _read_unconditional(config: Config, where: str) -> Config:
    """What only a U-Net without a context has."""
    groups, width = config["norm_num_groups"], config["attention_head_dim"]
    unset = groups if config["resnet_time_scale_shift"] == "default" else None
    if (config["attn_norm_num_groups"] or unset) != groups:
        raise _refusal(where, "attn_norm_num_groups", config["attn_norm_num_groups"], f"norm_num_groups = {groups}")
    return {
        **({"head_channels": width} if width else {"num_heads": 1}),
        "residual_resampling": config["downsample_type"] == "resnet",
    }


def _read_conditional(config: Config, factors: list[int], reached: list[int], where: str) -> Config:
    """What only a U-Net with a context has."""
    levels = len(config["block_out_channels"])
    if config["class_embed_type"] not in (None, "projection"):
        raise _refusal(where, "class_embed_type", config["class_embed_type"], "projection or null")
    heads, depth = config["attention_head_dim"], config["transformer_layers_per_block"]
    heads_used, depth_used = (
        [value if isinstance(value, int) else value[level] for level in _attended_levels(levels, factors)]
        for value in (heads, depth)
    )
    return {
        **_heads(heads_used, reached, heads, where),
        "transformer_depth": _one("transformer_layers_per_block", depth_used, where),
        "context_dim": _one("cross_attention_dim", config["cross_attention_dim"], where),
        "vector_dim": config["projection_class_embeddings_input_dim"] if config["class_embed_type"] else 0,
    }


def _heads(counts: list[int], widths: list[int], given: Any, where: str) -> Config:
    """One number of heads for all levels, or one width of head."""
    if len(set(counts)) == 1:
        return {"num_heads": counts[0]}
    head_widths = {width / count for width, count in zip(widths, counts, strict=True)}
    if len(head_widths) > 1:
        raise _refusal(where, "attention_head_dim", given, "one number of heads, or one width of head, for all levels")
    return {"head_channels": int(head_widths.pop())}


def first_stage(config: FirstStageConfig, latent_scale: float, sample_size: int) -> Config:
    """The config.json of an AutoencoderKL or a VQModel.

    sample_size  side of the images, pixels; diffusers tiles larger ones if asked to
    raises       ValueError for a first stage that diffusers has no class for
    """
    if isinstance(config, AutoencoderKLConfig):
        if config.embed_dim != config.z_channels:
            raise ValueError(
                f"first_stage.embed_dim={config.embed_dim}, z_channels={config.z_channels}: equal in an AutoencoderKL"
            )
        name, latent = "AutoencoderKL", {"latent_channels": config.embed_dim}
    elif isinstance(config, AutoencoderVQConfig):
        name, latent = "VQModel", {"latent_channels": config.z_channels, "vq_embed_dim": config.embed_dim}
        latent["num_vq_embeddings"] = config.codebook_size
    else:
        raise ValueError(f"diffusers has no first stage like our {type(config).__name__.removesuffix('Config')}")
    down, up = _block_types(len(config.widths), config.attention_factors, _CODEC, _CODEC_ATTENDED)
    return {
        "_class_name": name,
        "_diffusers_version": VERSION,
        **SPOKEN[name].fixed,
        **latent,
        "sample_size": sample_size,
        "in_channels": config.image_channels,
        "out_channels": config.image_channels,
        "down_block_types": down,
        "up_block_types": up,
        "block_out_channels": config.widths,
        "layers_per_block": config.num_res_blocks,
        "norm_num_groups": config.norm_groups,
        "scaling_factor": latent_scale,
        "mid_block_add_attention": config.mid_attention,
    }


def read_first_stage(given: Mapping[str, Any], where: str) -> ConvolutionalConfig:
    """The first stage that a config.json describes; its `scale` is the file's scaling_factor.

    raises  ValueError naming what we have no first stage for
    """
    config = _read(given, ("AutoencoderKL", "VQModel"), where)
    if config["in_channels"] != config["out_channels"]:
        raise _refusal(where, "in_channels, out_channels", (config["in_channels"], config["out_channels"]), "equal")
    widths: list[int] = config["block_out_channels"]
    channels = math.gcd(*widths)
    shape: Config = {
        "scale": config["scaling_factor"],
        "image_channels": config["in_channels"],
        "channels": channels,
        "channel_mult": [width // channels for width in widths],
        "num_res_blocks": config["layers_per_block"],
        "attention_factors": _attention_factors(config, _CODEC, _CODEC_ATTENDED, where),
        "mid_attention": config["mid_block_add_attention"],
        "z_channels": config["latent_channels"],
        "norm_groups": config["norm_num_groups"],
    }
    if "num_vq_embeddings" not in config:
        return AutoencoderKLConfig(**shape, embed_dim=config["latent_channels"])
    width = config["vq_embed_dim"] or config["latent_channels"]
    return AutoencoderVQConfig(**shape, embed_dim=width, codebook_size=config["num_vq_embeddings"])


def text_transformer(config: TextTransformerConfig) -> Config:
    """The config.json of an LDMBertModel."""
    return {
        "architectures": ["LDMBertModel"],
        "model_type": "ldmbert",
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_length,
        "encoder_layers": config.layers,
        "encoder_ffn_dim": 4 * config.width,
        "encoder_attention_heads": config.heads,
        "head_dim": config.head_dim,
        "d_model": config.width,
        "activation_function": "gelu",
        "dropout": 0.0,
        "pad_token_id": 0,
    }


def read_text_transformer(given: Mapping[str, Any], tokenizer: str, where: str) -> TextTransformerConfig:
    """The text transformer that the config.json of an LDMBertModel describes; `tokenizer` is a directory."""
    if given["encoder_ffn_dim"] != 4 * given["d_model"]:
        raise _refusal(where, "encoder_ffn_dim", given["encoder_ffn_dim"], f"4 x d_model = {4 * given['d_model']}")
    if given["activation_function"] != "gelu":
        raise _refusal(where, "activation_function", given["activation_function"], "gelu")
    return TextTransformerConfig(
        width=given["d_model"],
        layers=given["encoder_layers"],
        heads=given["encoder_attention_heads"],
        head_dim=given["head_dim"],
        max_length=given["max_position_embeddings"],
        vocab_size=given["vocab_size"],
        tokenizer=tokenizer,
    )


def scheduler(config: DiffusionConfig) -> Config:
    """The scheduler_config.json of a DDIMScheduler that takes the steps of our DDIM with `spacing=leading`."""
    schedule = config.schedule
    return {
        "_class_name": "DDIMScheduler",
        "_diffusers_version": VERSION,
        "num_train_timesteps": schedule.steps,
        "beta_start": schedule.beta_start,
        "beta_end": schedule.beta_end,
        "beta_schedule": _SCHEDULES[schedule.kind],
        "trained_betas": None,
        "rescale_betas_zero_snr": schedule.zero_terminal_snr,
        "clip_sample": False,
        "set_alpha_to_one": schedule.end is End.clean,
        "steps_offset": 1,
        "timestep_spacing": "leading",
        "prediction_type": _PREDICTIONS[config.objective.prediction],
    }


def read_scheduler(given: Mapping[str, Any], where: str) -> DiffusionConfig:
    """Schedule and prediction of any of diffusers' schedulers; a note in the log where its sampler is not ours.

    raises  ValueError for noise levels that we have no schedule for
    """
    config = {  # diffusers' defaults
        "num_train_timesteps": 1000,
        "beta_start": 0.0001,
        "beta_end": 0.02,
        "beta_schedule": "linear",
        "trained_betas": None,
        "rescale_betas_zero_snr": False,
        "prediction_type": "epsilon",
        "set_alpha_to_one": given["_class_name"] == "DDIMScheduler",
        "clip_sample": given["_class_name"] in ("DDIMScheduler", "DDPMScheduler"),
        "thresholding": False,
        "steps_offset": 0,
        "timestep_spacing": "leading",
        **given,
    }
    kinds = {theirs: ours for ours, theirs in _SCHEDULES.items()}
    predictions = {theirs: ours for ours, theirs in _PREDICTIONS.items()}
    for key, allowed in (("beta_schedule", kinds), ("trained_betas", [None]), ("prediction_type", predictions)):
        if config[key] not in list(allowed):
            raise _refusal(where, key, config[key], ", ".join(map(str, allowed)))
    for key, ours in (("steps_offset", 1), ("clip_sample", False), ("thresholding", False)):
        if config[key] != ours:
            log.warning("%s: %s=%r there; our samplers take %r", where, key, config[key], ours)
    return DiffusionConfig(
        schedule=ScheduleConfig(
            kind=kinds[config["beta_schedule"]],
            zero_terminal_snr=config["rescale_betas_zero_snr"],
            beta_start=config["beta_start"],
            beta_end=config["beta_end"],
            steps=config["num_train_timesteps"],
            end=End.clean if config["set_alpha_to_one"] else End.first_level,
        ),
        objective=ObjectiveConfig(prediction=predictions[config["prediction_type"]]),
    )


def text_to_image_sample_size(size: int, factor: int) -> int:
    """The U-Net's sample_size that makes LDMTextToImagePipeline draw images of side `size` unless told otherwise.

    It asks for sample_size x factor pixels, and draws latents of an eighth of that: the latent's side only where the
    factor is 8.
    """
    return size // factor * _TEXT_TO_IMAGE_FACTOR // factor


def _read(given: Mapping[str, Any], classes: Sequence[str], where: str) -> Config:
    """The keys that matter, defaults filled in."""
    name = given["_class_name"]
    if name not in classes:
        raise _refusal(where, "_class_name", name, " or ".join(classes))
    spoken = SPOKEN[name]
    for key, value in given.items():
        if key in spoken.fixed and value != spoken.fixed[key]:
            raise _refusal(where, key, value, str(spoken.fixed[key]))
        known = key in spoken.read or key in spoken.fixed or key in spoken.ignored or key in _BOOKKEEPING
        if not known and value is not None:
            raise _refusal(where, key, value, "null, as networks of ours have nothing of the kind")
    stated = {key: value for key, value in given.items() if key in spoken.read}
    return {**spoken.read, **stated}


def _block_types(
    levels: int, attention_factors: list[int], plain: tuple[str, str], attended: tuple[str, str]
) -> tuple[list[str], list[str]]:
    """Names of the blocks on the way down, and on the way up, in the order of the way."""
    pairs = [attended if 2**level in attention_factors else plain for level in range(levels)]
    return [down for down, _ in pairs], [up for _, up in reversed(pairs)]


def _attention_factors(config: Config, plain: tuple[str, str], attended: tuple[str, str], where: str) -> list[int]:
    down, up = config["down_block_types"], config["up_block_types"]
    pairs = list(zip(down, reversed(up), strict=True))
    for pair in pairs:
        if pair not in (plain, attended):
            raise _refusal(
                where,
                "down_block_types, up_block_types",
                (down, up),
                f"the same way down and up, of {plain} {attended}",
            )
    return [2**level for level, pair in enumerate(pairs) if pair == attended]


def _attended_levels(levels: int, attention_factors: list[int]) -> list[int]:
    """Levels with attention, then the middle's, which is the last."""
    return [level for level in range(levels) if 2**level in attention_factors] + [levels - 1]


def _attended_widths(widths: list[int], attention_factors: list[int]) -> list[int]:
    return [widths[level] for level in _attended_levels(len(widths), attention_factors)]


def _one(key: str, value: Any, where: str) -> int:
    """The one number that `value` is, or holds at every level."""
    values = set(value) if isinstance(value, list) else {value}
    if len(values) > 1:
        raise _refusal(where, key, value, "one number for all levels")
    return int(values.pop())


def _refusal(where: str, key: str, value: Any, allowed: str) -> ValueError:
    return ValueError(f"{where}: {key}={value!r} describes no network of ours; allowed: {allowed}")
