"""What the KL and VQ autoencoders share: the shape of their encoder and decoder (Rombach et al. 2022, appendix G)."""

from dataclasses import dataclass, field

from ldm_scale.first_stage.base import FirstStageConfig
from ldm_scale.nn.autoencoder import Decoder, Encoder
from ldm_scale.nn.blocks import require_group_widths, require_reached


@dataclass(kw_only=True, slots=True)
class ConvolutionalConfig(FirstStageConfig):
    """Shape of a convolutional autoencoder, in the terms of Rombach et al. 2022, table 8."""

    image_channels: int = 3
    """Channels of an image."""
    channels: int = 128
    """Width of the highest resolution; every other width is a multiple of it."""
    channel_mult: list[int] = field(default_factory=lambda: [1, 2, 4, 4])
    """Width of each level in channels, from the image's resolution down; f = 2^(levels - 1)."""
    num_res_blocks: int = 2
    """Residual blocks a level of the encoder; the decoder has one more."""
    attention_factors: list[int] = field(default_factory=list)
    """Downsampling factors (1, 2, 4 ...) of the levels that have attention."""
    mid_attention: bool = True
    """Whether the middle of encoder and decoder, at the lowest resolution, has attention too."""
    z_channels: int = 4
    """Channels between encoder and decoder, before and after the latent's own projections."""
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

    def encoder(self, out_channels: int) -> Encoder:
        """From images to `out_channels` feature maps, with fresh weights."""
        return Encoder(
            self.image_channels,
            out_channels,
            widths=self.widths,
            num_res_blocks=self.num_res_blocks,
            attention_factors=self.attention_factors,
            mid_attention=self.mid_attention,
            groups=self.norm_groups,
        )

    def decoder(self) -> Decoder:
        """From z_channels feature maps to images, with fresh weights."""
        return Decoder(
            self.z_channels,
            self.image_channels,
            widths=self.widths,
            num_res_blocks=self.num_res_blocks,
            attention_factors=self.attention_factors,
            mid_attention=self.mid_attention,
            groups=self.norm_groups,
        )
