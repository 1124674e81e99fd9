"""Convolutional blocks shared by the U-Net and the first stages (Dhariwal & Nichol 2021; Rombach et al. 2022, app. E).

Parameter names are those of diffusers. Knows no schedule, text, file or rank.

Shape letters: B batch, C channels, H W height and width, E embedding width, F width of an embedding's input.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

MAX_PERIOD = 10_000  # of the slowest wave of the timestep embedding, in timesteps


def timestep_waves(t_B: Tensor, width: int) -> Tensor:
    """Sinusoidal embedding of timesteps (Vaswani et al. 2017), cosines first; float32 (B, width), `width` even.

    Wave i has frequency 10000^(-i / (width / 2)), as in the reference; facts.md 5.2.
    """
    half = width // 2
    exponents = torch.arange(half, dtype=torch.float32, device=t_B.device) / half
    angles = t_B.float()[:, None] * torch.exp(-math.log(MAX_PERIOD) * exponents)
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


class Embedding(nn.Module):
    """Linear, SiLU, Linear: from waves or from a conditioning vector to the width that residual blocks read."""

    def __init__(self, in_width: int, out_width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_width, out_width)
        self.linear_2 = nn.Linear(out_width, out_width)

    def forward(self, x_BF: Tensor) -> Tensor:
        out: Tensor = self.linear_2(functional.silu(self.linear_1(x_BF)))
        return out


class ResnetBlock(nn.Module):
    """Norm, SiLU, conv; plus the embedding; norm, SiLU, dropout, conv; plus the input.

    embedding_dim  width of the embedding added between the convolutions; 0: none
    zero_init      of the second convolution, so that the block starts as its skip connection
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        groups: int,
        eps: float,
        embedding_dim: int = 0,
        dropout: float = 0.0,
        zero_init: bool = False,
    ) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)
        self.time_emb_proj = nn.Linear(embedding_dim, out_channels) if embedding_dim else None
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1)
        changes_width = in_channels != out_channels
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, kernel_size=1) if changes_width else None
        if zero_init:
            zero_parameters(self.conv2)

    def forward(self, x_BCHW: Tensor, activated_BE: Tensor | None = None) -> Tensor:
        """`activated_BE` is SiLU(embedding), which the U-Net computes once for all its blocks."""
        h_BCHW = self.conv1(functional.silu(self.norm1(x_BCHW)))
        if self.time_emb_proj is not None:
            h_BCHW = h_BCHW + self.time_emb_proj(activated_BE)[:, :, None, None]
        h_BCHW = self.conv2(self.dropout(functional.silu(self.norm2(h_BCHW))))
        if self.conv_shortcut is not None:
            x_BCHW = self.conv_shortcut(x_BCHW)
        return x_BCHW + h_BCHW


class Downsample(nn.Module):
    """3x3 convolution of stride 2, padded by one on every side (the U-Net's)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, stride=2, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        out: Tensor = self.conv(x_BCHW)
        return out


class DownsampleRightBottom(nn.Module):
    """3x3 convolution of stride 2, padded by one on the right and at the bottom only (the first stages')."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, stride=2)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        out: Tensor = self.conv(functional.pad(x_BCHW, (0, 1, 0, 1)))
        return out


class Upsample(nn.Module):
    """Nearest-neighbour doubling, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        out: Tensor = self.conv(functional.interpolate(x_BCHW, scale_factor=2.0, mode="nearest"))
        return out


def zero_parameters(module: nn.Module) -> None:
    """Set every parameter of `module` to zero: the last layer of a branch that starts switched off."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)


def require_group_widths(key: str, groups: int, widths: list[int]) -> None:
    """Refuse group norms whose groups do not divide every width; `key` is the configuration's dotted path."""
    if groups < 1 or any(width % groups for width in widths):
        raise ValueError(f"{key}={groups}; must divide every width: {', '.join(map(str, widths))}")


def require_reached(key: str, factors: list[int], levels: int) -> None:
    """Refuse attention at a downsampling factor that no level has; `key` is the configuration's dotted path."""
    reached = [2**level for level in range(levels)]
    if not set(factors) <= set(reached) or len(set(factors)) != len(factors):
        raise ValueError(f"{key}={factors}; choose, each once, from the factors that the levels have: {reached}")
