"""Convolutional encoder and decoder of the first stages (Rombach et al. 2022, section 3.1 and appendix G).

Tensors in, tensors out. Knows nothing of posteriors, codebooks, losses, files or ranks. Parameter names are those of
diffusers' AutoencoderKL (`encoder.down_blocks.0.resnets.0.norm1 ...`).

Shape letters: B batch, C channels, H W height and width. The factor between image and latent is f = 2^(levels - 1).
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from ldm_scale.nn.attention import AttentionBlock
from ldm_scale.nn.blocks import DownsampleRightBottom, GroupNorm, ResnetBlock, Upsample

NORM_EPS = 1e-6  # of every group norm here; facts.md 5.2


class Encoder(nn.Module):
    """Images to feature maps f times smaller.

    widths             channels of each level, from the image's resolution down
    num_res_blocks     residual blocks a level
    attention_factors  downsampling factors of the levels that have attention
    mid_attention      False: the middle has two residual blocks and no attention (vq-f4-noattn)
    groups             of every group norm; must divide every width
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        widths: list[int],
        num_res_blocks: int,
        attention_factors: list[int],
        groups: int,
        mid_attention: bool = True,
    ) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, widths[0], kernel_size=3, padding=1)
        self.down_blocks = nn.ModuleList()
        for level, (before, width) in enumerate(zip([widths[0], *widths], widths, strict=False)):
            block = Level(before, width, num_res_blocks, attention=2**level in attention_factors, groups=groups)
            if level < len(widths) - 1:
                block.downsamplers.append(DownsampleRightBottom(width))
            self.down_blocks.append(block)
        self.mid_block = MidBlock(widths[-1], attention=mid_attention, groups=groups)
        self.conv_norm_out = GroupNorm(groups, widths[-1], eps=NORM_EPS)
        self.conv_out = nn.Conv2d(widths[-1], out_channels, kernel_size=3, padding=1)
        self.to(memory_format=torch.channels_last)  # convolutions would copy NCHW weights and gradients at every pass

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> (B, out_channels, H / f, W / f)."""
        h_BCHW = self.conv_in(x_BCHW.contiguous(memory_format=torch.channels_last))
        for block in self.down_blocks:
            h_BCHW = block(h_BCHW)
        out_BCHW: Tensor = self.conv_out(functional.silu(self.conv_norm_out(self.mid_block(h_BCHW))))
        return out_BCHW


class Decoder(nn.Module):
    """Feature maps to images f times larger; no squashing at the end.

    The arguments are the encoder's. A level has one residual block more than it has there.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        widths: list[int],
        num_res_blocks: int,
        attention_factors: list[int],
        groups: int,
        mid_attention: bool = True,
    ) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, widths[-1], kernel_size=3, padding=1)
        self.mid_block = MidBlock(widths[-1], attention=mid_attention, groups=groups)
        self.up_blocks = nn.ModuleList()
        for level in reversed(range(len(widths))):
            below = widths[min(level + 1, len(widths) - 1)]
            attention = 2**level in attention_factors
            block = Level(below, widths[level], num_res_blocks + 1, attention=attention, groups=groups)
            if level:
                block.upsamplers.append(Upsample(widths[level]))
            self.up_blocks.append(block)
        self.conv_norm_out = GroupNorm(groups, widths[0], eps=NORM_EPS)
        self.conv_out = nn.Conv2d(widths[0], out_channels, kernel_size=3, padding=1)
        self.to(memory_format=torch.channels_last)

    def forward(self, z_BCHW: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> (B, out_channels, f H, f W)."""
        h_BCHW = self._middle(z_BCHW)
        for block in self.up_blocks:
            h_BCHW = block(h_BCHW)
        return self._image(h_BCHW)

    def parts(self) -> list[Callable[[Tensor], Tensor]]:
        """`forward`, as functions to call one after another: all that attends, then one for each further level.

        The further ones see no farther than their convolutions reach, but for the statistics of group norms. Each
        begins with its upsampling, so that what lies between two of them is small.
        """
        blocks = [block for block in self.up_blocks if isinstance(block, Level)]
        last = max((index for index, block in enumerate(blocks) if block.attentions), default=0)
        parts: list[list[Callable[[Tensor], Tensor]]] = [[self._middle]]
        for index, block in enumerate(blocks):
            parts[-1].append(block.features)
            if block.upsamplers and index >= last:
                parts.append([])
            parts[-1].extend(block.upsamplers)
        parts[-1].append(self._image)
        return [partial(_chain, functions) for functions in parts]

    def _middle(self, z_BCHW: Tensor) -> Tensor:
        h_BCHW: Tensor = self.mid_block(self.conv_in(z_BCHW.contiguous(memory_format=torch.channels_last)))
        return h_BCHW

    def _image(self, h_BCHW: Tensor) -> Tensor:
        out_BCHW: Tensor = self.conv_out(functional.silu(self.conv_norm_out(h_BCHW)))
        return out_BCHW


def _chain(functions: Sequence[Callable[[Tensor], Tensor]], x: Tensor) -> Tensor:
    for function in functions:
        x = function(x)
    return x


class Level(nn.Module):
    """The residual and attention blocks of one resolution, then the resampler that its owner appends, if any."""

    def __init__(self, in_channels: int, width: int, num_res_blocks: int, *, attention: bool, groups: int) -> None:
        super().__init__()
        self.resnets, self.attentions = nn.ModuleList(), nn.ModuleList()
        for index in range(num_res_blocks):
            self.resnets.append(ResnetBlock(width if index else in_channels, width, groups=groups, eps=NORM_EPS))
            if attention:
                self.attentions.append(_attention(width, groups))
        self.downsamplers, self.upsamplers = nn.ModuleList(), nn.ModuleList()

    def forward(self, h_BCHW: Tensor) -> Tensor:
        h_BCHW = self.features(h_BCHW)
        for resample in (*self.downsamplers, *self.upsamplers):
            h_BCHW = resample(h_BCHW)
        return h_BCHW

    def features(self, h_BCHW: Tensor) -> Tensor:
        """What the residual and attention blocks give, before any resampling."""
        for index, resnet in enumerate(self.resnets):
            h_BCHW = resnet(h_BCHW)
            if self.attentions:
                h_BCHW = self.attentions[index](h_BCHW)
        return h_BCHW


class MidBlock(nn.Module):
    """Residual block, attention if any, residual block at the lowest resolution."""

    def __init__(self, width: int, *, attention: bool, groups: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(width, width, groups=groups, eps=NORM_EPS) for _ in range(2))
        self.attentions = nn.ModuleList([_attention(width, groups)] if attention else [])

    def forward(self, h_BCHW: Tensor) -> Tensor:
        h_BCHW = self.resnets[0](h_BCHW)
        for attention in self.attentions:
            h_BCHW = attention(h_BCHW)
        out_BCHW: Tensor = self.resnets[1](h_BCHW)
        return out_BCHW


def _attention(width: int, groups: int) -> AttentionBlock:
    return AttentionBlock(width, heads=1, groups=groups, eps=NORM_EPS, zero_init=False)
