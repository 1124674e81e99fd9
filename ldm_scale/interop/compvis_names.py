"""Where each of our tensors lies in an original latent-diffusion checkpoint (facts.md 6.1 and 6.2).

Ours are named as in diffusers. Knows the shapes that names depend on (levels, blocks, heads), and no file.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from functools import partial

from torch import Tensor, nn

from ldm_scale.conditioning.base import Conditioner
from ldm_scale.conditioning.class_label import ClassLabelConfig
from ldm_scale.conditioning.clip_text import ClipTextConfig
from ldm_scale.conditioning.layout import LayoutConfig
from ldm_scale.conditioning.spatial import LabelMapConfig
from ldm_scale.conditioning.text import TextTransformerConfig
from ldm_scale.first_stage.base import FirstStage
from ldm_scale.first_stage.convolutional import ConvolutionalConfig
from ldm_scale.nn.unet import UNet, UNetConfig


class HeadOrder(Enum):
    """How the joint q, k, v projection of a plain attention block orders its output channels."""

    heads_first = "heads_first"
    """[head, qkv, channel]; the reference's default, which all published checkpoints have."""
    qkv_first = "qkv_first"
    """[qkv, head, channel]; the reference's `use_new_attention_order`."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where one of our tensors comes from."""

    name: str
    """Of the tensor in the checkpoint."""
    take: Callable[[Tensor], Tensor]
    """Ours out of theirs. Where theirs has another shape than expected, so has the result, which loading then tells."""


@dataclass(frozen=True, slots=True)
class _Place:
    """What one of our modules is called there."""

    module: str
    children: Mapping[str, str] = field(default_factory=dict)
    """Modules inside it that have another name there."""


_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_QKV = {"to_q": 0, "to_k": 1, "to_v": 2}
_ATTENTION = {"group_norm": "norm", **dict.fromkeys(_QKV, "qkv"), "to_out.0": "proj_out"}
_FIRST_STAGE_RESNET = {"conv_shortcut": "nin_shortcut"}
_FIRST_STAGE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_TEXT_ATTENTION = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}


def unet(network: UNet, order: HeadOrder) -> dict[str, Source]:
    """Sources of a U-Net's tensors, below `model.diffusion_model.`."""
    places, found = _unet_places(network.config), {}
    for ours, tensor in network.state_dict().items():
        theirs = _renamed(ours, places)
        take = _matrix if tensor.ndim == 2 else _as_it_is
        if theirs.split(".")[-2] == "qkv":
            heads = network.config.num_heads or len(tensor) // network.config.head_channels
            take = partial(_rows_of, part=_QKV[ours.split(".")[-2]], heads=heads, order=order)
        found[ours] = Source(theirs, take)
    return found


def first_stage(network: FirstStage) -> dict[str, Source]:
    """Sources of a first stage's tensors, below `first_stage_model.`, or at the root of its own checkpoint."""
    if not isinstance(network.config, ConvolutionalConfig):
        return {}
    return _sources(network, _first_stage_places(network.config))


def conditioner(network: Conditioner) -> dict[str, Source]:
    """Sources of a conditioner's tensors, below `cond_stage_model.`."""
    match network.config:
        case TextTransformerConfig() | LayoutConfig():
            return _sources(network, _text_places(network.config.layers))
        case ClipTextConfig():
            # transformers 4 has `text_model.` in front of the names, transformers 5 has not.
            names = network.state_dict()
            bare = {name: name.removeprefix("transformer.").removeprefix("text_model.") for name in names}
            return {name: Source(f"transformer.text_model.{bare[name]}", _as_it_is) for name in names}
        case ClassLabelConfig() | LabelMapConfig():
            return _sources(network, {})
        case _:
            return {}


def _sources(network: nn.Module, places: Mapping[str, _Place]) -> dict[str, Source]:
    return {
        ours: Source(_renamed(ours, places), _matrix if tensor.ndim == 2 else _as_it_is)
        for ours, tensor in network.state_dict().items()
    }


def _renamed(ours: str, places: Mapping[str, _Place]) -> str:
    """Their name of one of our tensors; the same where no place says otherwise."""
    parts = ours.split(".")
    for length in range(len(parts) - 1, 0, -1):
        place = places.get(".".join(parts[:length]))
        if place is not None:
            inside, leaf = ".".join(parts[length:-1]), parts[-1]
            return ".".join(filter(None, (place.module, place.children.get(inside, inside), leaf)))
    return ours


def _unet_places(config: UNetConfig) -> dict[str, _Place]:
    attention: Mapping[str, str] = {} if config.context_dim else _ATTENTION  # a spatial transformer's names are ours
    places = {
        "time_embedding.linear_1": _Place("time_embed.0"),
        "time_embedding.linear_2": _Place("time_embed.2"),
        "conv_in": _Place("input_blocks.0.0"),
        "mid_block.resnets.0": _Place("middle_block.0", _RESNET),
        "mid_block.attentions.0": _Place("middle_block.1", attention),
        "mid_block.resnets.1": _Place("middle_block.2", _RESNET),
        "conv_norm_out": _Place("out.0"),
        "conv_out": _Place("out.2"),
    }
    return places | _down_places(config, attention) | _up_places(config, attention)


def _down_places(config: UNetConfig, attention: Mapping[str, str]) -> dict[str, _Place]:
    """Every residual block, its attention with it, and every downsampler is one of `input_blocks`."""
    places, block = {}, 1
    for level in range(len(config.channel_mult)):
        for index in range(config.num_res_blocks):
            places[f"down_blocks.{level}.resnets.{index}"] = _Place(f"input_blocks.{block}.0", _RESNET)
            places[f"down_blocks.{level}.attentions.{index}"] = _Place(f"input_blocks.{block}.1", attention)
            block += 1
        resampler = _RESNET if config.residual_resampling else {"conv": "op"}
        places[f"down_blocks.{level}.downsamplers.0"] = _Place(f"input_blocks.{block}.0", resampler)
        block += 1
    return places


def _up_places(config: UNetConfig, attention: Mapping[str, str]) -> dict[str, _Place]:
    """Every residual block is one of `output_blocks`, with its attention and the upsampler behind it."""
    places, levels, block = {}, len(config.channel_mult), 0
    for up, level in enumerate(reversed(range(levels))):
        for index in range(config.num_res_blocks + 1):
            places[f"up_blocks.{up}.resnets.{index}"] = _Place(f"output_blocks.{block}.0", _RESNET)
            places[f"up_blocks.{up}.attentions.{index}"] = _Place(f"output_blocks.{block}.1", attention)
            block += 1
        behind = 2 if 2**level in config.attention_factors else 1
        resampler = _RESNET if config.residual_resampling else {}
        places[f"up_blocks.{up}.upsamplers.0"] = _Place(f"output_blocks.{block - 1}.{behind}", resampler)
    return places


def _first_stage_places(config: ConvolutionalConfig) -> dict[str, _Place]:
    levels = len(config.channel_mult)
    places = {}
    for level in range(levels):
        # Their `up` counts from the highest resolution, our up_blocks from the lowest, where decoding begins.
        for ours, theirs in (
            (f"encoder.down_blocks.{level}", f"encoder.down.{level}"),
            (f"decoder.up_blocks.{levels - 1 - level}", f"decoder.up.{level}"),
        ):
            for index in range(config.num_res_blocks + 1):
                places[f"{ours}.resnets.{index}"] = _Place(f"{theirs}.block.{index}", _FIRST_STAGE_RESNET)
                places[f"{ours}.attentions.{index}"] = _Place(f"{theirs}.attn.{index}", _FIRST_STAGE_ATTENTION)
            places[f"{ours}.downsamplers.0"] = _Place(f"{theirs}.downsample")
            places[f"{ours}.upsamplers.0"] = _Place(f"{theirs}.upsample")
    for side in ("encoder", "decoder"):
        places[f"{side}.mid_block.resnets.0"] = _Place(f"{side}.mid.block_1", _FIRST_STAGE_RESNET)
        places[f"{side}.mid_block.attentions.0"] = _Place(f"{side}.mid.attn_1", _FIRST_STAGE_ATTENTION)
        places[f"{side}.mid_block.resnets.1"] = _Place(f"{side}.mid.block_2", _FIRST_STAGE_RESNET)
        places[f"{side}.conv_norm_out"] = _Place(f"{side}.norm_out")
    return places


def _text_places(layers: int) -> dict[str, _Place]:
    """Attention and feed-forward take turns in their list of layers, each a pair of norm and block."""
    places = {
        "transformer.model.embed_tokens": _Place("transformer.token_emb"),
        "transformer.model.embed_positions": _Place("transformer.pos_emb.emb"),
        "transformer.model.layer_norm": _Place("transformer.norm"),
    }
    for layer in range(layers):
        ours = f"transformer.model.layers.{layer}"
        attention, feed_forward = (f"transformer.attn_layers.layers.{2 * layer + i}" for i in range(2))
        places[f"{ours}.self_attn_layer_norm"] = _Place(f"{attention}.0")
        places[f"{ours}.self_attn"] = _Place(f"{attention}.1", _TEXT_ATTENTION)
        places[f"{ours}.final_layer_norm"] = _Place(f"{feed_forward}.0")
        places[f"{ours}.fc1"] = _Place(f"{feed_forward}.1.net.0.0")
        places[f"{ours}.fc2"] = _Place(f"{feed_forward}.1.net.2")
    return places


def _as_it_is(theirs: Tensor) -> Tensor:
    return theirs


def _matrix(theirs: Tensor) -> Tensor:
    """The linear layer that a convolution of one pixel is: (E, C, 1) or (E, C, 1, 1) -> (E, C)."""
    while theirs.ndim > 2 and theirs.shape[-1] == 1:
        theirs = theirs.squeeze(-1)
    return theirs


def _rows_of(theirs: Tensor, *, part: int, heads: int, order: HeadOrder) -> Tensor:
    """q (part 0), k (1) or v (2) out of a joint projection, (3 C, C, 1) -> (C, C), or its bias, (3 C,) -> (C,)."""
    theirs = _matrix(theirs)
    if theirs.ndim == 0 or len(theirs) % (3 * heads):
        return theirs
    if order is HeadOrder.qkv_first:
        return theirs.chunk(3)[part]
    return theirs.unflatten(0, (heads, 3, -1))[:, part].flatten(0, 1)
