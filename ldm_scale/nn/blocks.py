"""Convolutional blocks shared by the U-Net and the first stages (Dhariwal & Nichol 2021; Rombach et al. 2022, app. E).

Parameter names are those of diffusers. Knows no schedule, text, file or rank.

Shape letters: B batch, C channels, H W height and width, E embedding width, F width of an embedding's input, S a few
samples of a batch.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

MAX_PERIOD = 10_000  # of the slowest wave of the timestep embedding, in timesteps
_AT_ONCE = 4  # samples normed together on a CPU in bfloat16: few enough to stay in its caches


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


class GroupNorm(nn.GroupNorm):
    """Group norm that hands on the type it was given, in channels_last; statistics are float32 inside.

    Autocast on a GPU makes norms answer in float32, and the GPU's kernel in NCHW: every activation behind them, up to
    the next product, would be twice as large and in the layout that convolutions have to copy.
    """

    def forward(self, x_BCHW: Tensor) -> Tensor:
        if x_BCHW.device.type != "cpu" or x_BCHW.dtype == torch.float32:
            out_BCHW = super().forward(x_BCHW)
        elif torch.compiler.is_compiling():  # which would unroll the loop over samples
            out_BCHW = super().forward(x_BCHW.contiguous())
        else:
            out_BCHW = _GroupNormBySample.apply(x_BCHW, self.weight, self.bias, self.num_groups, self.eps)
        return out_BCHW.to(dtype=x_BCHW.dtype, memory_format=torch.channels_last)


class _GroupNormBySample(torch.autograd.Function):
    """Group norm of a few samples after the other, each in float32: in channels_last the CPU's bfloat16 kernel takes
    many times longer, and of no more samples than that are there float32 copies.
    """

    @staticmethod
    def forward(ctx: Any, x_BCHW: Tensor, weight_C: Tensor, bias_C: Tensor, groups: int, eps: float) -> Tensor:
        shape = x_BCHW.shape[1], x_BCHW.shape[2:].numel(), groups
        affine = weight_C.float(), bias_C.float()
        out_BCHW, statistics = torch.empty_like(x_BCHW), []
        for out_SCHW, x_SCHW in zip(out_BCHW.split(_AT_ONCE), x_BCHW.split(_AT_ONCE), strict=True):
            given = x_SCHW.float(), *affine, len(x_SCHW)
            normed_SCHW, *mean_rstd = torch.ops.aten.native_group_norm(*given, *shape, eps)
            out_SCHW.copy_(normed_SCHW)
            statistics.append(mean_rstd)
        ctx.save_for_backward(x_BCHW, weight_C, *(torch.cat(part) for part in zip(*statistics, strict=True)))
        ctx.shape = shape
        return out_BCHW

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BCHW: Tensor) -> tuple[Tensor | None, ...]:
        x_BCHW, weight_C, mean_BG, rstd_BG = ctx.saved_tensors
        grad_x_BCHW, scale_C = torch.empty_like(x_BCHW), weight_C.float()
        grad_weight_C, grad_bias_C = torch.zeros(2, *weight_C.shape)
        parts = (part.split(_AT_ONCE) for part in (grad_x_BCHW, grad_BCHW, x_BCHW, mean_BG, rstd_BG))
        for grad_x_SCHW, grad_SCHW, x_SCHW, *mean_rstd in zip(*parts, strict=True):
            given = grad_SCHW.float(), x_SCHW.float(), *mean_rstd, scale_C, len(x_SCHW)
            found = torch.ops.aten.native_group_norm_backward(*given, *ctx.shape, [True, True, True])
            grad_x_SCHW.copy_(found[0])
            grad_weight_C += found[1]
            grad_bias_C += found[2]
        return grad_x_BCHW, grad_weight_C.to(weight_C.dtype), grad_bias_C.to(weight_C.dtype), None, None


class LayerNorm(nn.LayerNorm):
    """Layer norm that hands on the type it was given, under autocast too; statistics are float32 inside."""

    def forward(self, x_BLC: Tensor) -> Tensor:
        return super().forward(x_BLC).to(x_BLC.dtype)


class Pointwise(nn.Conv2d):
    """1x1 convolution as a matrix product over pixels: channels_last in and out, gradients laid out as the weights."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return functional.linear(x_BCHW.movedim(1, -1), self.weight.flatten(1), self.bias).movedim(-1, 1)


class ResnetBlock(nn.Module):
    """Norm, SiLU, conv; plus the embedding; norm, SiLU, dropout, conv; plus the input.

    embedding_dim  width of the embedding read between the convolutions; 0: none
    scale_shift    the embedding scales and shifts the second norm (Dhariwal & Nichol 2021), instead of being added
    resample       `halve` or `double`: of the input and of what its norm and SiLU give; None: same resolution
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
        scale_shift: bool = False,
        resample: Callable[[Tensor], Tensor] | None = None,
        dropout: float = 0.0,
        zero_init: bool = False,
    ) -> None:
        super().__init__()
        self.scale_shift, self.resample = scale_shift, resample
        self.norm1 = GroupNorm(groups, in_channels, eps=eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)
        projected = 2 * out_channels if scale_shift else out_channels
        self.time_emb_proj = nn.Linear(embedding_dim, projected) if embedding_dim else None
        self.norm2 = GroupNorm(groups, out_channels, eps=eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1)
        changes_width = in_channels != out_channels
        self.conv_shortcut = Pointwise(in_channels, out_channels) if changes_width else None
        if zero_init:
            zero_parameters(self.conv2)

    def forward(self, x_BCHW: Tensor, activated_BE: Tensor | None = None) -> Tensor:
        """`activated_BE` is SiLU(embedding), which the U-Net computes once for all its blocks."""
        h_BCHW = functional.silu(self.norm1(x_BCHW))
        if self.resample is not None:
            h_BCHW, x_BCHW = self.resample(h_BCHW), self.resample(x_BCHW)
        h_BCHW = self._norm2(self.conv1(h_BCHW), activated_BE)
        h_BCHW = self.conv2(self.dropout(functional.silu(h_BCHW)))
        if self.conv_shortcut is not None:
            x_BCHW = self.conv_shortcut(x_BCHW)
        return x_BCHW + h_BCHW

    def _norm2(self, h_BCHW: Tensor, activated_BE: Tensor | None) -> Tensor:
        """The second norm, with the embedding added before it, or scaling and shifting what it gives."""
        if self.time_emb_proj is None:
            out_BCHW: Tensor = self.norm2(h_BCHW)
            return out_BCHW
        embedded_BC11 = self.time_emb_proj(activated_BE)[:, :, None, None]
        if not self.scale_shift:
            return self.norm2(h_BCHW + embedded_BC11)
        scale_BC11, shift_BC11 = embedded_BC11.chunk(2, dim=1)
        return self.norm2(h_BCHW) * (1 + scale_BC11) + shift_BC11


def halve(x_BCHW: Tensor) -> Tensor:
    """Half the height and width: the mean of every 2 x 2 pixels."""
    return functional.avg_pool2d(x_BCHW, kernel_size=2)


def double(x_BCHW: Tensor) -> Tensor:
    """Twice the height and width: the nearest pixel."""
    return functional.interpolate(x_BCHW, scale_factor=2.0, mode="nearest")


class Downsample(nn.Module):
    """3x3 convolution of stride 2, padded by one on every side (the U-Net's)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, stride=2, padding=1)

    def forward(self, x_BCHW: Tensor, activated_BE: Tensor | None = None) -> Tensor:
        """`activated_BE` is not read: a U-Net calls its resamplers alike, and a residual one reads it."""
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

    def forward(self, x_BCHW: Tensor, activated_BE: Tensor | None = None) -> Tensor:
        """`activated_BE` is not read: a U-Net calls its resamplers alike, and a residual one reads it."""
        out: Tensor = self.conv(double(x_BCHW))
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
