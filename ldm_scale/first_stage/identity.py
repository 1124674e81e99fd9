"""No compression: the latents are the pixels (LDM-1 of Rombach et al. 2022, section 4.1)."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ldm_scale.first_stage.base import FirstStage, FirstStageConfig, Moments, Rebuilt


@dataclass(kw_only=True, slots=True)
class IdentityConfig(FirstStageConfig):
    """A first stage of f = 1 without parameters."""

    image_channels: int = 3
    """Channels of an image, hence of the latent."""

    def __post_init__(self) -> None:
        FirstStageConfig.__post_init__(self)
        if self.image_channels < 1:
            raise ValueError(f"first_stage.image_channels={self.image_channels}; must be at least 1")

    @property
    def has_weights(self) -> bool:
        return False

    @property
    def factor(self) -> int:
        return 1

    @property
    def latent_channels(self) -> int:
        return self.image_channels

    def build(self) -> "Identity":
        return Identity(self)


class Identity(FirstStage):
    """Hands images through, both ways."""

    def __init__(self, config: IdentityConfig) -> None:
        super().__init__()
        self.config = config
        self.factor = config.factor
        self.latent_channels = config.latent_channels

    def encode(self, images_BCHW: Tensor) -> Moments:
        return Moments(images_BCHW, None)

    def decode(self, latents_BCHW: Tensor) -> Tensor:
        return latents_BCHW

    def decoding_parts(self) -> list[Callable[[Tensor], Tensor]]:
        return [self.decode]

    def forward(self, images_BCHW: Tensor, noise_BCHW: Tensor) -> Rebuilt:
        """The latent is certain, so the noise changes nothing."""
        moments = self.encode(images_BCHW)
        return Rebuilt(self.decode(moments.sample(noise_BCHW)), moments, None)
