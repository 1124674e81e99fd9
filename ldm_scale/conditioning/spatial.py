"""Conditions aligned with the image, appended to the latent's channels (Rombach et al. 2022, section 4.3.2).

`ConcatConfig` passes on what already has the latent's height and width: a low-resolution image for super-resolution;
the encoded masked image and the mask for inpainting. `LabelMapConfig` brings a semantic map down to it. Knows nothing
of the diffusion process, first stages, files or ranks.

Shape letters: B batch, C channels, H W height and width (of the latent, but those of a label map where said).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ldm_scale.conditioning.base import Conditioner, ConditionerConfig, Conditions

NO_LABEL = -1
"""A pixel of a label map without any label; the empty condition is a map of these."""


@dataclass(kw_only=True, slots=True)
class ConcatConfig(ConditionerConfig):
    """Channels that the U-Net sees as they are."""

    channels: int
    """Channels C; the U-Net's in_channels are the latent's and these."""

    def __post_init__(self) -> None:
        ConditionerConfig.__post_init__(self)
        if self.channels < 1:
            raise ValueError(f"conditioning.channels={self.channels}; must be at least 1")

    def build(self) -> "ConcatConditioner":
        return ConcatConditioner(self)


class ConcatConditioner(Conditioner):
    """Hands channels through. The empty condition is zeros."""

    config: ConcatConfig

    def __init__(self, config: ConcatConfig) -> None:
        super().__init__()
        self.config = config
        self.dropout = config.dropout
        self.concat_channels = config.channels

    def prepare(self, conditions: Sequence[Any]) -> Tensor:
        """Tensors (C, H, W) of the latent's height and width to (B, C, H, W) float32."""
        maps = [torch.as_tensor(condition, dtype=torch.float32, device="cpu") for condition in conditions]
        for map_CHW in maps:
            if map_CHW.ndim != 3 or len(map_CHW) != self.config.channels:
                raise ValueError(
                    f"condition of shape {tuple(map_CHW.shape)}; must be (channels, height, width) with "
                    f"conditioning.channels={self.config.channels}"
                )
        return _stack(maps)

    def null_inputs(self, batch: int) -> Tensor:
        """Zeros, (batch, C, 1, 1)."""
        return torch.zeros(batch, self.config.channels, 1, 1, device="cpu")

    def forward(self, inputs: Tensor) -> Conditions:
        """(B, C, H, W) -> concat, the same."""
        return Conditions(concat=inputs)


@dataclass(kw_only=True, slots=True)
class LabelMapConfig(ConditionerConfig):
    """Shape of the label map's way down; the defaults are those of the paper's landscapes model."""

    classes: int = 182
    """Labels; those of a map are 0 .. classes - 1, and -1 where there is none."""
    channels: int = 3
    """Channels C that a pixel's label is projected to; the U-Net's in_channels are the latent's and these."""
    halvings: int = 2
    """Times that a map's sides are halved: 2^halvings is the first stage's f where maps have the images' size."""

    def __post_init__(self) -> None:
        ConditionerConfig.__post_init__(self)
        for name, value, least in (
            ("classes", self.classes, 1),
            ("channels", self.channels, 1),
            ("halvings", self.halvings, 0),
        ):
            if value < least:
                raise ValueError(f"conditioning.{name}={value}; must be at least {least}")

    def build(self) -> "LabelMapConditioner":
        return LabelMapConditioner(self)


class LabelMapConditioner(Conditioner):
    """One-hot labels, halved bilinearly, projected by a 1x1 convolution. The empty condition has no label anywhere."""

    config: LabelMapConfig

    def __init__(self, config: LabelMapConfig) -> None:
        super().__init__()
        self.config = config
        self.dropout = config.dropout
        self.concat_channels = config.channels
        self.channel_mapper = nn.Conv2d(config.classes, config.channels, kernel_size=1, bias=False)

    def prepare(self, conditions: Sequence[Any]) -> Tensor:
        """Label maps (H, W) of integers, each side a multiple of 2^halvings, to (B, H, W) int64."""
        maps = [torch.as_tensor(condition, device="cpu") for condition in conditions]
        for map_HW in maps:
            self._require_labels(map_HW)
        return _stack(maps).to(torch.int64)

    def _require_labels(self, map_HW: Tensor) -> None:
        if map_HW.ndim != 2 or map_HW.is_floating_point() or not map_HW.numel():
            raise ValueError(
                f"label map of shape {tuple(map_HW.shape)}, {map_HW.dtype}; must be (height, width) integers"
            )
        step = 2**self.config.halvings
        if map_HW.shape[0] % step or map_HW.shape[1] % step:
            raise ValueError(
                f"label map of {map_HW.shape[0]} x {map_HW.shape[1]}; both sides must be multiples of {step}: "
                f"conditioning.halvings={self.config.halvings}"
            )
        lowest, highest = (int(bound) for bound in map_HW.aminmax())
        if lowest < NO_LABEL or highest >= self.config.classes:
            raise ValueError(
                f"label map with labels {lowest} to {highest}; must be 0 to {self.config.classes - 1}, or {NO_LABEL} "
                "for no label"
            )

    def null_inputs(self, batch: int) -> Tensor:
        """No label, (batch, 1, 1)."""
        return torch.full((batch, 1, 1), NO_LABEL, device="cpu")

    def forward(self, inputs: Tensor) -> Conditions:
        """(B, H, W) labels -> concat (B, C, H / 2^halvings, W / 2^halvings); 1 x 1 stays 1 x 1."""
        step = 2**self.config.halvings
        if inputs.shape[1:] == (1, 1):  # the same label everywhere, of any size
            inputs = inputs.expand(-1, step, step)
        # Projecting and halving are linear and act on different axes, so their order is free. Projecting first is a
        # look-up, and spares the one-hot map: 182 channels of the image's resolution against 3.
        columns_KC = functional.pad(self.channel_mapper.weight.flatten(1).T, (0, 0, 0, 1))  # the last: no label
        rows_BHW = torch.where(inputs == NO_LABEL, self.config.classes, inputs)
        concat_BCHW = functional.embedding(rows_BHW, columns_KC).movedim(-1, 1)
        for _ in range(self.config.halvings):
            concat_BCHW = functional.interpolate(concat_BCHW, scale_factor=0.5, mode="bilinear")
        return Conditions(concat=concat_BCHW)


def _stack(maps: Sequence[Tensor]) -> Tensor:
    """One batch of maps that must be of one size."""
    shapes = sorted({tuple(one.shape) for one in maps})
    if len(shapes) > 1:
        raise ValueError(f"maps of one batch differ in size: {', '.join(map(str, shapes))}; crop or resize them to one")
    return torch.stack(list(maps))
