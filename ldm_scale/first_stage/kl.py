"""KL-regularised autoencoder (Rombach et al. 2022, section 3.1 and appendix G; kl-f4 to kl-f32).

State dicts have the names of diffusers' AutoencoderKL. Knows nothing of losses, files or ranks.

Shape letters: B batch, C latent channels, H W height and width.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum

import torch
from torch import Tensor, nn

from ldm_scale.first_stage.base import FirstStage, Moments, Rebuilt
from ldm_scale.first_stage.convolutional import ConvolutionalConfig

LOGVAR_MIN, LOGVAR_MAX = -30.0, 20.0  # of the posterior, natural logarithm; facts.md 5.2


class Rescale(Enum):
    """What brings latents to unit variance for a second stage (Rombach et al. 2022, appendix G)."""

    all = "all"
    """One factor for all channels: `first_stage.scale`."""
    channels = "channels"
    """Each channel is divided by its own standard deviation, of which training left a note beside the weights."""


@dataclass(kw_only=True, slots=True)
class AutoencoderKLConfig(ConvolutionalConfig):
    """The defaults are kl-f8."""

    rescale: Rescale = Rescale.all
    """What brings its latents to unit variance, once it is trained."""

    def build(self) -> "AutoencoderKL":
        return AutoencoderKL(self)


class AutoencoderKL(FirstStage):
    """Encoder to a diagonal Gaussian over latents, and decoder."""

    config: AutoencoderKLConfig

    def __init__(self, config: AutoencoderKLConfig) -> None:
        super().__init__()
        self.config = config
        self.factor = config.factor
        self.latent_channels = config.latent_channels
        self.encoder = config.encoder(2 * config.z_channels)
        self.decoder = config.decoder()
        self.quant_conv = nn.Conv2d(2 * config.z_channels, 2 * config.embed_dim, kernel_size=1)
        self.post_quant_conv = nn.Conv2d(config.embed_dim, config.z_channels, kernel_size=1)

    @torch.no_grad()
    def rescale_channels(self, std_C: Tensor) -> None:
        """Divide latent channels by `std_C`, and multiply by it before decoding: the same images by other latents.

        The factors go into the 1x1 convolutions on both sides of the latent, so that nobody has to know of them. What
        the clamp of the log-variance cuts off moves by 2 ln std_C.
        """
        assert self.quant_conv.bias is not None
        mean_bias_C, logvar_bias_C = self.quant_conv.bias.chunk(2)
        mean_bias_C /= std_C
        logvar_bias_C -= 2 * std_C.log()
        self.quant_conv.weight[: len(std_C)] /= std_C[:, None, None, None]
        self.post_quant_conv.weight *= std_C[:, None, None]
        self.config = replace(self.config, rescale=Rescale.all)

    def encode(self, images_BCHW: Tensor) -> Moments:
        self._require_divisible(images_BCHW)
        mean, logvar = self.quant_conv(self.encoder(images_BCHW)).chunk(2, dim=1)
        return Moments(mean, logvar.clamp(LOGVAR_MIN, LOGVAR_MAX))

    def decode(self, latents_BCHW: Tensor) -> Tensor:
        images_BCHW: Tensor = self.decoder(self.post_quant_conv(latents_BCHW))
        return images_BCHW

    def decoding_parts(self) -> list[Callable[[Tensor], Tensor]]:
        first, *others = self.decoder.parts()
        return [lambda latents_BCHW: first(self.post_quant_conv(latents_BCHW)), *others]

    def forward(self, images_BCHW: Tensor, noise_BCHW: Tensor) -> Rebuilt:
        moments = self.encode(images_BCHW)
        return Rebuilt(self.decode(moments.sample(noise_BCHW)), moments, None)
