"""What every first stage is: images to the moments of latents, and latents to images.

Rombach et al. 2022, section 3.1. Latents here are unscaled; scaling them for the U-Net is the diffusion model's work.
Knows nothing of training, files or caches.

Shape letters: B batch, C latent channels, H W height and width.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor, nn

from ldm_scale.core import weights

_PARTS = {"quant_conv": "encoder", "post_quant_conv": "decoder", "quantize": "codebook"}


class MomentsKind(StrEnum):
    """What the numbers of an encoded image mean."""

    GAUSSIAN = "gaussian"
    """Mean and log-variance of a diagonal Gaussian (KL first stages)."""
    POINT = "point"
    """The latent itself, before quantisation (VQ first stages)."""


@dataclass(frozen=True, slots=True)
class Moments:
    """The distribution over latents that an encoder gives for each image.

    mean    (B, C, H, W), unscaled
    logvar  (B, C, H, W), natural logarithm of the variance; None where the latent is certain
    """

    mean: Tensor
    logvar: Tensor | None

    @property
    def kind(self) -> MomentsKind:
        return MomentsKind.POINT if self.logvar is None else MomentsKind.GAUSSIAN

    def sample(self, noise_BCHW: Tensor) -> Tensor:
        """mean + std * noise; the mean itself where the latent is certain. `noise_BCHW` is standard normal."""
        if self.logvar is None:
            return self.mean
        return self.mean + (0.5 * self.logvar).exp() * noise_BCHW

    def pack(self) -> Tensor:
        """One tensor to store: (B, 2C, H, W) mean then log-variance, or (B, C, H, W)."""
        return self.mean if self.logvar is None else torch.cat((self.mean, self.logvar), dim=1)

    @classmethod
    def unpack(cls, packed: Tensor, kind: MomentsKind) -> "Moments":
        """The inverse of `pack`, in float32: caches store float16, in which exp(logvar / 2) would lose its bits."""
        packed = packed.float()
        if kind is MomentsKind.POINT:
            return cls(packed, None)
        if packed.shape[1] % 2:
            raise ValueError(f"{packed.shape[1]} channels are not a mean and a log-variance of equally many")
        mean, logvar = packed.chunk(2, dim=1)
        return cls(mean, logvar)


@dataclass(frozen=True)  # no slots: ZeRO-3 looks through what modules return by vars()
class Codes:
    """What a codebook makes of each latent vector.

    quantised  (B, C, H, W), the nearest entries, before the straight-through step: their gradient moves the codebook
    indices    (B, H, W) int64, which entries these are
    size       entries K of the codebook
    """

    quantised: Tensor
    indices: Tensor
    size: int


@dataclass(frozen=True)
class Rebuilt:
    """An image after its way through the latent, and what the loss of a first stage reads on that way.

    images   (B, C, H, W), around [-1, 1] and not clamped
    moments  what the encoder gave
    codes    what the codebook made of `moments.mean`; None for a first stage without one
    """

    images: Tensor
    moments: Moments
    codes: Codes | None


@dataclass(kw_only=True, slots=True)
class FirstStageConfig(ABC):
    """What every first stage's configuration has."""

    checkpoint: str | None = None
    """Directory of weights, or of a training run, to take the first stage from; None: fresh weights."""
    scale: float | None = None
    """Factor from unscaled latents to those the U-Net sees; None: 1 / their standard deviation, as the weights say, or
    where they do not say, as it is measured."""

    def __post_init__(self) -> None:
        if self.scale is not None and self.scale <= 0:
            raise ValueError(f"first_stage.scale={self.scale}; must be above 0, or null for 1 / standard deviation")

    @property
    def has_weights(self) -> bool:
        """Whether there is anything to take from `checkpoint`."""
        return True

    @property
    @abstractmethod
    def factor(self) -> int:
        """Downsampling f: an image of side s becomes a latent of side s / f."""

    @property
    @abstractmethod
    def latent_channels(self) -> int:
        """Channels C of the latent."""

    @abstractmethod
    def build(self) -> "FirstStage":
        """The first stage with fresh weights, on torch's default device; does not read `checkpoint`."""

    def latent_shape(self, height: int, width: int | None = None) -> tuple[int, int, int]:
        """(C, H / f, W / f) of the latent of an image, sides in pixels; square where only one is given.

        raises  ValueError where f does not divide a side
        """
        sides = height, height if width is None else width
        for side in sides:
            if side < 1 or side % self.factor:
                below = side - side % self.factor
                raise ValueError(
                    f"image size {side} is not a multiple of the first stage's factor {self.factor}; "
                    f"the nearest sizes that fit are {max(below, self.factor)} and {below + self.factor}"
                )
        return self.latent_channels, sides[0] // self.factor, sides[1] // self.factor


class FirstStage(nn.Module, ABC):
    """An autoencoder between images and latents; pixels in [-1, 1], latents unscaled."""

    config: FirstStageConfig
    """What it was built from."""
    factor: int
    """Downsampling f: an image of side s becomes a latent of side s / f."""
    latent_channels: int
    """Channels C of the latent."""

    @abstractmethod
    def encode(self, images_BCHW: Tensor) -> Moments:
        """Moments of the latents, H and W divided by f.

        raises  ValueError where f does not divide the sides of the images
        """

    @abstractmethod
    def decode(self, latents_BCHW: Tensor) -> Tensor:
        """Images of unscaled latents, around [-1, 1] and not clamped."""

    @abstractmethod
    def decoding_parts(self) -> list[Callable[[Tensor], Tensor]]:
        """`decode`, as functions to call one after another; each keeps the sides or multiplies them by a whole factor.

        The first may see all of the latent; the others see no farther than convolutions reach, but for the statistics
        of group norms, so that they can run in tiles.
        """

    @abstractmethod
    def forward(self, images_BCHW: Tensor, noise_BCHW: Tensor) -> Rebuilt:
        """Reconstruction through the latent that `noise_BCHW` draws, with all that training needs.

        Training calls the module, not encode and decode, so that wrappers such as DDP see one forward.
        """

    def part_of(self, parameter: str) -> str:
        """The part that a parameter belongs to, by its name: encoder, decoder, or codebook."""
        name = parameter.partition(".")[0]
        return _PARTS.get(name, name)

    def digest(self) -> str:
        """sha256 of the weights: every tensor of the state dict with its name, dtype and shape, sorted by name."""
        return weights.digest(self.state_dict())

    def _require_divisible(self, images_BCHW: Tensor) -> None:
        height, width = images_BCHW.shape[-2:]
        if height % self.factor or width % self.factor:
            raise ValueError(f"images are {height} x {width}; both sides must be multiples of f = {self.factor}")
