"""KL-regularised autoencoder (Rombach et al. 2022, section 3.1 and appendix G; kl-f4 to kl-f32).

State dicts have the names of diffusers' AutoencoderKL. Knows nothing of losses, files or ranks.

Shape letters: B batch, C latent channels, H W height and width.
"""

from dataclasses import dataclass, field

from torch import Tensor, nn

from ldm_scale.first_stage.base import FirstStage, FirstStageConfig, Moments
from ldm_scale.nn.autoencoder import Decoder, Encoder
from ldm_scale.nn.blocks import require_group_widths, require_reached

LOGVAR_MIN, LOGVAR_MAX = -30.0, 20.0  # of the posterior, natural logarithm; facts.md 5.2


@dataclass(kw_only=True, slots=True)
class AutoencoderKLConfig(FirstStageConfig):
    """Shape of the autoencoder, in the terms of Rombach et al. 2022, table 8. The defaults are kl-f8."""

    image_channels: int = 3
    """Channels of an image."""
    channels: int = 128
    """Width of the highest resolution; every other width is a multiple of it."""
    channel_mult: list[int] = field(default_factory=lambda: [1, 2, 4, 4])
    """Width of each level in channels, from the image's resolution down; f = 2^(levels - 1)."""
    num_res_blocks: int = 2
    """Residual blocks a level of the encoder; the decoder has one more."""
    attention_factors: list[int] = field(default_factory=list)
    """Downsampling factors (1, 2, 4 ...) of the levels that have attention; the middle always has it."""
    z_channels: int = 4
    """Channels between encoder and decoder, before the moments are projected."""
    embed_dim: int = 4
    """Latent channels C."""
    norm_groups: int = 32
    """Groups of every group norm; must divide every width."""

    def __post_init__(self) -> None:
        FirstStageConfig.__post_init__(self)
        for name, value in (
            ("image_channels", self.image_channels),
            ("channels", self.channels),
            ("num_res_blocks", self.num_res_blocks),
            ("z_channels", self.z_channels),
            ("embed_dim", self.embed_dim),
        ):
            if value < 1:
                raise ValueError(f"first_stage.{name}={value}; must be at least 1")
        if not self.channel_mult or min(self.channel_mult) < 1:
            raise ValueError(f"first_stage.channel_mult={self.channel_mult}; give one multiple of at least 1 a level")
        require_reached("first_stage.attention_factors", self.attention_factors, len(self.channel_mult))
        require_group_widths("first_stage.norm_groups", self.norm_groups, self.widths)

    @property
    def widths(self) -> list[int]:
        """Channels of each level, from the image's resolution down."""
        return [self.channels * multiple for multiple in self.channel_mult]

    @property
    def factor(self) -> int:
        return int(2 ** (len(self.channel_mult) - 1))

    @property
    def latent_channels(self) -> int:
        return self.embed_dim

    def build(self) -> "AutoencoderKL":
        return AutoencoderKL(self)


class AutoencoderKL(FirstStage):
    """Encoder to a diagonal Gaussian over latents, and decoder."""

    def __init__(self, config: AutoencoderKLConfig) -> None:
        super().__init__()
        self.config = config
        self.factor = config.factor
        self.latent_channels = config.latent_channels
        self.encoder = Encoder(
            config.image_channels,
            2 * config.z_channels,
            widths=config.widths,
            num_res_blocks=config.num_res_blocks,
            attention_factors=config.attention_factors,
            groups=config.norm_groups,
        )
        self.decoder = Decoder(
            config.z_channels,
            config.image_channels,
            widths=config.widths,
            num_res_blocks=config.num_res_blocks,
            attention_factors=config.attention_factors,
            groups=config.norm_groups,
        )
        self.quant_conv = nn.Conv2d(2 * config.z_channels, 2 * config.embed_dim, kernel_size=1)
        self.post_quant_conv = nn.Conv2d(config.embed_dim, config.z_channels, kernel_size=1)

    def encode(self, images_BCHW: Tensor) -> Moments:
        self._require_divisible(images_BCHW)
        mean, logvar = self.quant_conv(self.encoder(images_BCHW)).chunk(2, dim=1)
        return Moments(mean, logvar.clamp(LOGVAR_MIN, LOGVAR_MAX))

    def decode(self, latents_BCHW: Tensor) -> Tensor:
        images_BCHW: Tensor = self.decoder(self.post_quant_conv(latents_BCHW))
        return images_BCHW

    def forward(self, images_BCHW: Tensor, noise_BCHW: Tensor) -> tuple[Tensor, Moments]:
        moments = self.encode(images_BCHW)
        return self.decode(moments.sample(noise_BCHW)), moments
