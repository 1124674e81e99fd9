"""KL-regularised autoencoder (Rombach et al. 2022, section 3.1 and appendix G; kl-f4 to kl-f32).

State dicts have the names of diffusers' AutoencoderKL. Knows nothing of losses, files or ranks.

Shape letters: B batch, C latent channels, H W height and width.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from ldm_scale.first_stage.base import FirstStage, Moments, Rebuilt
from ldm_scale.first_stage.convolutional import ConvolutionalConfig

LOGVAR_MIN, LOGVAR_MAX = -30.0, 20.0  # of the posterior, natural logarithm; facts.md 5.2


@dataclass(kw_only=True, slots=True)
class AutoencoderKLConfig(ConvolutionalConfig):
    """The defaults are kl-f8."""

    def build(self) -> "AutoencoderKL":
        return AutoencoderKL(self)


class AutoencoderKL(FirstStage):
    """Encoder to a diagonal Gaussian over latents, and decoder."""

    def __init__(self, config: AutoencoderKLConfig) -> None:
        super().__init__()
        self.config = config
        self.factor = config.factor
        self.latent_channels = config.latent_channels
        self.encoder = config.encoder(2 * config.z_channels)
        self.decoder = config.decoder()
        self.quant_conv = nn.Conv2d(2 * config.z_channels, 2 * config.embed_dim, kernel_size=1)
        self.post_quant_conv = nn.Conv2d(config.embed_dim, config.z_channels, kernel_size=1)

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
