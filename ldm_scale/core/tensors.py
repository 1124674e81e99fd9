"""Small tensor conventions shared by every floor: the sample axis, and the range of pixels."""

import torch
from torch import Tensor


def over_samples(values_B: Tensor, like: Tensor) -> Tensor:
    """Shape one value per sample, (B,), so that it broadcasts over `like`, (B, ...)."""
    return values_B.reshape(-1, *[1] * (like.ndim - 1))


def from_uint8(pixels: Tensor) -> Tensor:
    """uint8 pixels in 0..255 to float32 in [-1, 1]: x / 127.5 - 1, as the reference does."""
    return pixels.to(torch.float32) / 127.5 - 1


def to_uint8(pixels: Tensor) -> Tensor:
    """Pixels in [-1, 1] (values outside are clamped) to uint8 in 0..255, rounded to nearest."""
    return ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
