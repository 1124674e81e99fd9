"""U-Net denoiser (Rombach et al. 2022, sections 3.2 and 3.3, appendix E.2; blocks after Dhariwal & Nichol 2021).

Tensors in, tensors out. Knows nothing of schedules, losses, text, files or ranks. Parameter names are those of
diffusers' UNet2DConditionModel (UNet2DModel where there is no context), so state dicts load strictly both ways.

Shape letters: B batch, C channels, H W latent height and width, L context tokens, D context width, V width of the
conditioning vector, E embedding width (4 x model_channels), F all keys and values.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from ldm_scale.nn.attention import Attention, AttentionBlock, Context, SpatialTransformer, TransformerBlock
from ldm_scale.nn.blocks import (
    Downsample,
    Embedding,
    GroupNorm,
    ResnetBlock,
    Upsample,
    double,
    halve,
    require_group_widths,
    require_reached,
    timestep_waves,
    zero_parameters,
)

NORM_EPS = 1e-5  # of residual blocks, attention blocks and the output norm; facts.md 5.2
BLOCK_KINDS = ("resnet", "attention")  # what activation checkpointing can be asked for


@dataclass(kw_only=True, slots=True)
class UNetConfig:
    """Shape of the denoiser, in the terms of Rombach et al. 2022, tables 12 to 15."""

    in_channels: int
    """Channels of the noisy latent plus those of any spatial conditioning concatenated to it."""
    out_channels: int
    """Channels of the prediction: those of the latent."""
    model_channels: int
    """Width of the highest resolution; every other width is a multiple of it."""
    channel_mult: list[int]
    """Width of each level in model_channels, from the highest resolution down; each level halves the resolution."""
    num_res_blocks: int = 2
    """Residual blocks a level on the way down; the way up has one more."""
    attention_factors: list[int] = field(default_factory=list)
    """Downsampling factors (1, 2, 4 ...) of the levels that have attention; the middle always has it."""
    num_heads: int = 0
    """Attention heads at every width. State this or head_channels."""
    head_channels: int = 0
    """Channels of one attention head; the number of heads follows from the width. State this or num_heads."""
    transformer_depth: int = 1
    """Transformer blocks in each spatial transformer; means nothing where context_dim is 0."""
    context_dim: int = 0
    """Width of the context tokens; 0: no context, and plain self-attention in place of spatial transformers."""
    vector_dim: int = 0
    """Width of the conditioning vector added to the timestep embedding; 0: none."""
    dropout: float = 0.0
    """Probability of zeroing an activation before the last convolution of a residual block."""
    norm_groups: int = 32
    """Groups of every group norm; must divide every width."""
    scale_shift_norm: bool = False
    """The embedding scales and shifts the second norm of a residual block, instead of being added before it."""
    residual_resampling: bool = False
    """Levels are joined by residual blocks that average or repeat pixels inside, instead of by one convolution."""
    activation_checkpointing: list[str] = field(default_factory=list)
    """Kinds of blocks recomputed in the backward pass instead of kept: `resnet` (resamplers too), `attention`."""

    def __post_init__(self) -> None:
        for name, value in (
            ("in_channels", self.in_channels),
            ("out_channels", self.out_channels),
            ("model_channels", self.model_channels),
            ("num_res_blocks", self.num_res_blocks),
            ("transformer_depth", self.transformer_depth),
        ):
            if value < 1:
                raise ValueError(f"unet.{name}={value}; must be at least 1")
        for name, value in (("context_dim", self.context_dim), ("vector_dim", self.vector_dim)):
            if value < 0:
                raise ValueError(f"unet.{name}={value}; must be 0 (none) or a width")
        if self.model_channels % 2:
            raise ValueError(f"unet.model_channels={self.model_channels}; must be even: half cosines, half sines")
        if not self.channel_mult or min(self.channel_mult) < 1:
            raise ValueError(f"unet.channel_mult={self.channel_mult}; give one multiple of at least 1 a level")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"unet.dropout={self.dropout}; must be at least 0 and below 1")
        require_reached("unet.attention_factors", self.attention_factors, len(self.channel_mult))
        require_group_widths("unet.norm_groups", self.norm_groups, self.widths)
        self._check_heads()
        kinds = self.activation_checkpointing
        if not set(kinds) <= set(BLOCK_KINDS) or len(set(kinds)) != len(kinds):
            raise ValueError(
                f"unet.activation_checkpointing={kinds}; choose, each once, from the kinds of blocks: "
                f"{', '.join(BLOCK_KINDS)}"
            )

    def _check_heads(self) -> None:
        if (self.num_heads > 0) == (self.head_channels > 0) or min(self.num_heads, self.head_channels) < 0:
            raise ValueError(
                f"unet.num_heads={self.num_heads} unet.head_channels={self.head_channels}; state exactly one of them"
            )
        key, value = ("num_heads", self.num_heads) if self.num_heads else ("head_channels", self.head_channels)
        attended = [w for level, w in enumerate(self.widths) if 2**level in self.attention_factors] + self.widths[-1:]
        if any(width % value for width in attended):
            raise ValueError(f"unet.{key}={value}; must divide every width that has attention: {attended}")

    @property
    def widths(self) -> list[int]:
        """Channels of each level, from the highest resolution down."""
        return [self.model_channels * multiple for multiple in self.channel_mult]

    @property
    def factor(self) -> int:
        """Downsampling of the lowest level; the latent's sides must be multiples of it."""
        return int(2 ** (len(self.channel_mult) - 1))

    def build(self) -> "UNet":
        """A U-Net with fresh weights, on torch's default device."""
        return UNet(self)


class UNet(nn.Module):
    """Predicts, from a noisy latent and its timestep, what the objective asks for. Starts by predicting zero."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        widths, levels = config.widths, len(config.channel_mult)
        embedding_dim = 4 * config.model_channels
        self.time_embedding = Embedding(config.model_channels, embedding_dim)
        self.class_embedding = Embedding(config.vector_dim, embedding_dim) if config.vector_dim else None
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], kernel_size=3, padding=1)

        skips = [widths[0]]
        self.down_blocks = nn.ModuleList()
        for level in range(levels):
            self.down_blocks.append(DownBlock(config, level, skips))
        self.mid_block = MidBlock(config)
        self.up_blocks = nn.ModuleList()
        for level in reversed(range(levels)):
            self.up_blocks.append(UpBlock(config, level, skips))
        assert not skips

        self.conv_norm_out = GroupNorm(config.norm_groups, widths[0], eps=NORM_EPS)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, kernel_size=3, padding=1)
        zero_parameters(self.conv_out)
        self._cross_attentions: list[Attention] = [
            module.attn2 for module in self.modules() if isinstance(module, TransformerBlock)
        ]
        self.to(memory_format=torch.channels_last)  # convolutions would copy NCHW weights and gradients at every pass

    def keys_values(self, context_BLD: Tensor) -> Tensor:
        """What all attentions make of a context, one after another, (B, F): once for the many steps of a sampler."""
        _check_width("context", context_BLD, self.config.context_dim)
        pairs = [attention.keys_values(context_BLD) for attention in self._cross_attentions]
        return torch.cat([part_BLE.flatten(1) for pair in pairs for part_BLE in pair], dim=1)

    def forward(
        self,
        z_BCHW: Tensor,
        t_B: Tensor,
        context_BLD: Tensor | None = None,
        vector_BE: Tensor | None = None,
        *,
        keys_values_BF: Tensor | None = None,
    ) -> Tensor:
        """One prediction a sample.

        z_BCHW          noisy latents, any concatenated conditioning in their last channels; H and W multiples of
                        config.factor
        t_B             timesteps as in the schedule's table, 0 is the least noisy; integers or floats
        context_BLD     tokens to attend to, D = config.context_dim
        vector_BE       one vector a sample, E = config.vector_dim
        keys_values_BF  in place of the context: what `keys_values` made of it
        returns         (B, config.out_channels, H, W)
        raises          ValueError where a condition is missing, unexpected or of another width, or H or W does not fit
        """
        self._check(z_BCHW, vector_BE)
        context = self._context(context_BLD, keys_values_BF)
        activated_BE = functional.silu(self._embedding(t_B, vector_BE, z_BCHW.dtype))
        # Blocks are given and give lists, and change none: zero3's hooks hand on copies of them.
        skips: list[Tensor] = [self.conv_in(z_BCHW.contiguous(memory_format=torch.channels_last))]
        for down in self.down_blocks:
            skips += down(skips[-1], activated_BE, context)
        h_BCHW = self.mid_block(skips[-1], activated_BE, context)
        own = self.config.num_res_blocks + 1  # of each block on the way up
        for up in self.up_blocks:
            h_BCHW = up(h_BCHW, activated_BE, context, skips[-own:])
            del skips[-own:]
        out_BCHW: Tensor = self.conv_out(functional.silu(self.conv_norm_out(h_BCHW)))
        return out_BCHW

    def _embedding(self, t_B: Tensor, vector_BE: Tensor | None, dtype: torch.dtype) -> Tensor:
        waves_BC = timestep_waves(t_B, self.config.model_channels)  # float32: t up to 999 needs its bits
        embedding_BE: Tensor = self.time_embedding(waves_BC.to(dtype))
        if self.class_embedding is not None:
            embedding_BE = embedding_BE + self.class_embedding(vector_BE)
        return embedding_BE

    def _context(self, context_BLD: Tensor | None, keys_values_BF: Tensor | None) -> Context | None:
        """What the blocks are told: the tokens, or each attention's own keys and values."""
        if keys_values_BF is None:
            _check_width("context", context_BLD, self.config.context_dim)
            return context_BLD
        widths = [attention.to_q.out_features for attention in self._cross_attentions for _ in range(2)]
        numbers = keys_values_BF.shape[1]
        if context_BLD is not None or not widths or numbers % sum(widths):
            raise ValueError(
                f"{numbers} keys and values a sample; this U-Net takes {sum(widths)} a token, as its keys_values makes "
                "them, and no context beside them"
            )
        tokens = numbers // sum(widths)
        flat = keys_values_BF.split([tokens * width for width in widths], dim=1)
        parts = [part_BE.unflatten(1, (tokens, -1)) for part_BE in flat]
        return dict(zip(self._cross_attentions, zip(parts[::2], parts[1::2], strict=True), strict=True))

    def _check(self, z_BCHW: Tensor, vector_BE: Tensor | None) -> None:
        if z_BCHW.shape[1] != self.config.in_channels:
            raise ValueError(f"latents have {z_BCHW.shape[1]} channels; unet.in_channels={self.config.in_channels}")
        height, width = z_BCHW.shape[-2:]
        if height % self.config.factor or width % self.config.factor:
            raise ValueError(
                f"latents are {height} x {width}; the U-Net has {len(self.config.channel_mult)} levels, so both sides "
                f"must be multiples of {self.config.factor}"
            )
        _check_width("vector", vector_BE, self.config.vector_dim)


def _check_width(name: str, condition: Tensor | None, expected: int) -> None:
    given = 0 if condition is None else condition.shape[-1]
    if given != expected:
        raise ValueError(f"{name} has width {given} (0 is none); unet.{name}_dim={expected}")


class DownBlock(nn.Module):
    """One level on the way down; its outputs go to the skip connections."""

    def __init__(self, config: UNetConfig, level: int, skips: list[int]) -> None:
        """`skips` is the stack of skip widths so far; the last is this block's input, its own outputs are pushed."""
        super().__init__()
        width, has_attention = config.widths[level], 2**level in config.attention_factors
        self.resnets, self.attentions = nn.ModuleList(), nn.ModuleList()
        for _ in range(config.num_res_blocks):
            self.resnets.append(_resnet(config, skips[-1], width))
            if has_attention:
                self.attentions.append(_attention(config, width))
            skips.append(width)
        self.downsamplers = nn.ModuleList()
        if level < len(config.channel_mult) - 1:
            residual = config.residual_resampling
            self.downsamplers.append(_resnet(config, width, width, halve) if residual else Downsample(width))
            skips.append(width)
        self.recomputed = config.activation_checkpointing

    def forward(self, h_BCHW: Tensor, activated_BE: Tensor, context: Context | None) -> list[Tensor]:
        """What every residual block and the downsampler give."""
        outputs = []
        for index, resnet in enumerate(self.resnets):
            h_BCHW = _run(resnet, "resnet" in self.recomputed, h_BCHW, activated_BE)
            if self.attentions:
                h_BCHW = _run(self.attentions[index], "attention" in self.recomputed, h_BCHW, context)
            outputs.append(h_BCHW)
        for downsample in self.downsamplers:
            outputs.append(_run(downsample, "resnet" in self.recomputed, h_BCHW, activated_BE))
        return outputs


class MidBlock(nn.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        width = config.widths[-1]
        self.resnets = nn.ModuleList(_resnet(config, width, width) for _ in range(2))
        self.attentions = nn.ModuleList([_attention(config, width)])
        self.recomputed = config.activation_checkpointing

    def forward(self, h_BCHW: Tensor, activated_BE: Tensor, context: Context | None) -> Tensor:
        h_BCHW = _run(self.resnets[0], "resnet" in self.recomputed, h_BCHW, activated_BE)
        h_BCHW = _run(self.attentions[0], "attention" in self.recomputed, h_BCHW, context)
        return _run(self.resnets[1], "resnet" in self.recomputed, h_BCHW, activated_BE)


class UpBlock(nn.Module):
    """One level on the way up; each residual block also reads one skip connection."""

    def __init__(self, config: UNetConfig, level: int, skips: list[int]) -> None:
        """`skips` is the stack of skip widths that are left; this block's are popped."""
        super().__init__()
        width, has_attention = config.widths[level], 2**level in config.attention_factors
        below = config.widths[min(level + 1, len(config.channel_mult) - 1)]
        self.resnets, self.attentions = nn.ModuleList(), nn.ModuleList()
        for index in range(config.num_res_blocks + 1):
            self.resnets.append(_resnet(config, (width if index else below) + skips.pop(), width))
            if has_attention:
                self.attentions.append(_attention(config, width))
        self.upsamplers = nn.ModuleList()
        if level:
            residual = config.residual_resampling
            self.upsamplers.append(_resnet(config, width, width, double) if residual else Upsample(width))
        self.recomputed = config.activation_checkpointing

    def forward(self, h_BCHW: Tensor, activated_BE: Tensor, context: Context | None, skips: list[Tensor]) -> Tensor:
        """`skips` has a feature map for every residual block, the last one for the first."""
        for index, resnet in enumerate(self.resnets):
            h_BCHW = torch.cat((h_BCHW, skips[-1 - index]), dim=1)
            h_BCHW = _run(resnet, "resnet" in self.recomputed, h_BCHW, activated_BE)
            if self.attentions:
                h_BCHW = _run(self.attentions[index], "attention" in self.recomputed, h_BCHW, context)
        for upsample in self.upsamplers:
            h_BCHW = _run(upsample, "resnet" in self.recomputed, h_BCHW, activated_BE)
        return h_BCHW


def _run(block: nn.Module, recompute: bool, h_BCHW: Tensor, condition: Context | None) -> Tensor:
    """The block's output. Where `recompute`, the backward pass runs the block again (same dropout, same autocast) and
    only its inputs are kept until then.
    """
    if recompute and torch.is_grad_enabled():
        recomputed_BCHW: Tensor = checkpoint(block, h_BCHW, condition, use_reentrant=False)
        return recomputed_BCHW
    out_BCHW: Tensor = block(h_BCHW, condition)
    return out_BCHW


def _resnet(
    config: UNetConfig, in_channels: int, out_channels: int, resample: Callable[[Tensor], Tensor] | None = None
) -> ResnetBlock:
    return ResnetBlock(
        in_channels,
        out_channels,
        groups=config.norm_groups,
        eps=NORM_EPS,
        embedding_dim=4 * config.model_channels,
        scale_shift=config.scale_shift_norm,
        resample=resample,
        dropout=config.dropout,
        zero_init=True,
    )


def _attention(config: UNetConfig, width: int) -> nn.Module:
    heads = config.num_heads or width // config.head_channels
    if config.context_dim == 0:
        return AttentionBlock(width, heads=heads, groups=config.norm_groups, eps=NORM_EPS, zero_init=True)
    return SpatialTransformer(
        width,
        depth=config.transformer_depth,
        context_dim=config.context_dim,
        heads=heads,
        groups=config.norm_groups,
    )
