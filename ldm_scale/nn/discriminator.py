"""PatchGAN discriminator of the first stages (Isola et al. 2017, appendix 6.1.2; Rombach et al. 2022, appendix G).

Tensors in, tensors out. Knows nothing of losses, optimizers, files or ranks. Parameter names and initial weights are
the reference's (`main.0.weight ...`).

Shape letters: B batch, C channels, H W height and width, h w patches down and across.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ldm_scale.nn.blocks import GroupNorm

NORM_CHANNELS = 16  # of each group where group norm is chosen
_WIDEST = 8  # multiple of the base width
_SLOPE = 0.2  # of the leaky rectifiers
_STD = 0.02  # of initial weights


def batch_norm(width: int) -> nn.Module:
    """Statistics of the batch, always: a discriminator is only ever asked while it trains."""
    norm = nn.BatchNorm2d(width, track_running_stats=False)
    nn.init.normal_(norm.weight, 1.0, _STD)
    return norm


def group_norm(width: int) -> nn.Module:
    """Statistics of each image by itself, so the same on any number of processes and in any micro batch."""
    return GroupNorm(width // NORM_CHANNELS, width)


class PatchDiscriminator(nn.Module):
    """A logit for each patch of an image: high where it looks like an original.

    in_channels  of an image
    channels     base width; doubled by every layer, up to 8 times it
    layers       that halve the resolution: 2 or 3 in the paper, where a patch has a side of 34 or 70 pixels
    norm         of a width: `batch_norm` or `group_norm`
    """

    def __init__(self, in_channels: int, *, channels: int, layers: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        widths = [channels * min(2**layer, _WIDEST) for layer in range(layers + 1)]
        parts: list[nn.Module] = [_conv(in_channels, widths[0], stride=2), nn.LeakyReLU(_SLOPE)]
        for layer in range(1, layers + 1):
            normed = norm(widths[layer])
            # Batch norm takes away whatever a bias would add.
            bias = not isinstance(normed, nn.BatchNorm2d)
            stride = 2 if layer < layers else 1
            parts += [_conv(widths[layer - 1], widths[layer], stride=stride, bias=bias), normed, nn.LeakyReLU(_SLOPE)]
        self.main = nn.Sequential(*parts, _conv(widths[-1], 1, stride=1))
        self.to(memory_format=torch.channels_last)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """(B, in_channels, H, W) in [-1, 1] -> (B, 1, h, w) float32 logits; 3 layers: 30 x 30 of 256 x 256 pixels."""
        logits_B1hw: Tensor = self.main(images_BCHW.contiguous(memory_format=torch.channels_last))
        return logits_B1hw.float()


def smallest_side(layers: int) -> int:
    """Pixels of the smallest image that has a logit."""
    return 3 * 2**layers


def _conv(in_channels: int, out_channels: int, *, stride: int, bias: bool = True) -> nn.Conv2d:
    conv = nn.Conv2d(in_channels, out_channels, kernel_size=4, stride=stride, padding=1, bias=bias)
    nn.init.normal_(conv.weight, 0.0, _STD)
    return conv
