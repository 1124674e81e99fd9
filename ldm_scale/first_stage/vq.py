"""VQ-regularised autoencoder (Rombach et al. 2022, section 3.1 and appendix G; vq-f4 to vq-f32).

The latent is what the encoder gives before quantisation; quantising it is the first thing that decoding does, so the
diffusion model learns a continuous latent (facts.md 5.2). State dicts have the names of diffusers' VQModel. Knows
nothing of losses, files or ranks.

Shape letters: B batch, C latent channels, H W height and width, K vectors of the codebook, N vectors looked up at once.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ldm_scale.first_stage.base import Codes, FirstStage, Moments, Rebuilt
from ldm_scale.first_stage.convolutional import ConvolutionalConfig

DISTANCES_AT_ONCE = 2**22  # 16 MiB of float32; all (B H W, K) of them would be gigabytes for a batch of vq-f4


@dataclass(kw_only=True, slots=True)
class AutoencoderVQConfig(ConvolutionalConfig):
    """The defaults are vq-f4."""

    channel_mult: list[int] = field(default_factory=lambda: [1, 2, 4])
    """Width of each level in channels, from the image's resolution down; f = 2^(levels - 1)."""
    z_channels: int = 3
    """Channels between encoder and decoder, before and after the latent's own projections."""
    embed_dim: int = 3
    """Latent channels C, and width of the codebook's vectors."""
    codebook_size: int = 8192
    """Vectors K of the codebook."""

    def __post_init__(self) -> None:
        ConvolutionalConfig.__post_init__(self)
        if self.codebook_size < 1:
            raise ValueError(f"first_stage.codebook_size={self.codebook_size}; must be at least 1")

    def build(self) -> "AutoencoderVQ":
        return AutoencoderVQ(self)


class AutoencoderVQ(FirstStage):
    """Encoder to one latent an image, and decoder that snaps it to the codebook first."""

    def __init__(self, config: AutoencoderVQConfig) -> None:
        super().__init__()
        self.config = config
        self.factor = config.factor
        self.latent_channels = config.latent_channels
        self.encoder = config.encoder(config.z_channels)
        self.decoder = config.decoder()
        self.quant_conv = nn.Conv2d(config.z_channels, config.embed_dim, kernel_size=1)
        self.quantize = Codebook(config.codebook_size, config.embed_dim)
        self.post_quant_conv = nn.Conv2d(config.embed_dim, config.z_channels, kernel_size=1)

    def encode(self, images_BCHW: Tensor) -> Moments:
        self._require_divisible(images_BCHW)
        return Moments(self.quant_conv(self.encoder(images_BCHW)), None)

    def decode(self, latents_BCHW: Tensor) -> Tensor:
        """Images of unscaled latents, around [-1, 1] and not clamped; quantises first, quantised latents stay."""
        return self._decode(latents_BCHW, self.quantize(latents_BCHW))

    def decoding_parts(self) -> list[Callable[[Tensor], Tensor]]:
        first, *others = self.decoder.parts()

        def begin(latents_BCHW: Tensor) -> Tensor:
            return first(self.post_quant_conv(_straight_through(latents_BCHW, self.quantize(latents_BCHW))))

        return [begin, *others]

    def forward(self, images_BCHW: Tensor, noise_BCHW: Tensor) -> Rebuilt:
        """The latent is certain, so the noise changes nothing. Gradients of the images pass the codebook by."""
        moments = self.encode(images_BCHW)
        codes = self.quantize(moments.mean)
        return Rebuilt(self._decode(moments.mean, codes), moments, codes)

    def _decode(self, latents_BCHW: Tensor, codes: Codes) -> Tensor:
        images_BCHW: Tensor = self.decoder(self.post_quant_conv(_straight_through(latents_BCHW, codes)))
        return images_BCHW


def _straight_through(latents_BCHW: Tensor, codes: Codes) -> Tensor:
    """Exactly the nearest vectors, (B, C, H, W); their gradient goes to the latents as if nothing had happened."""
    return codes.quantised.detach() + (latents_BCHW - latents_BCHW.detach())


class Codebook(nn.Module):
    """K learnt vectors; replaces each latent vector by the nearest of them (van den Oord et al. 2017, eq. 1 and 2)."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(size, width)
        nn.init.uniform_(self.embedding.weight, -1 / size, 1 / size)

    def forward(self, latents_BCHW: Tensor) -> Codes:
        indices_BHW = self.nearest(latents_BCHW)
        quantised_BHWC = self.embedding(indices_BHW)
        return Codes(quantised_BHWC.movedim(-1, 1), indices_BHW, self.embedding.num_embeddings)

    @torch.no_grad()
    def nearest(self, latents_BCHW: Tensor) -> Tensor:
        """Which vector is the nearest to each latent vector, (B, H, W) int64; the first of equally near ones."""
        batch, _, height, width = latents_BCHW.shape
        rows_MC = latents_BCHW.movedim(1, -1).flatten(0, 2).float()
        at_once = max(1, DISTANCES_AT_ONCE // self.embedding.num_embeddings)
        return torch.cat([self._nearest_of_rows(rows_NC) for rows_NC in rows_MC.split(at_once)]).view(
            batch, height, width
        )

    def _nearest_of_rows(self, rows_NC: Tensor) -> Tensor:
        """Smallest squared distance, (N,), summed channel by channel.

        A matrix product would expand the square, lose the last bits where vectors lie close together, and be
        computed in bfloat16 under autocast and in TF32 where that is on. C is 3 to 64: this costs little.
        """
        distances_NK = rows_NC.new_zeros(len(rows_NC), self.embedding.num_embeddings)
        for channel_N1, channel_K in zip(rows_NC.split(1, dim=1), self.embedding.weight.float().unbind(1), strict=True):
            difference_NK = channel_N1 - channel_K
            distances_NK.addcmul_(difference_NK, difference_NK)
        return distances_NK.argmin(dim=1)


def usage(counts_K: Tensor) -> Tensor:
    """Share of a codebook's entries that were taken at all, () float32, from how often each was."""
    return (counts_K > 0).float().mean()


def perplexity(counts_K: Tensor) -> Tensor:
    """e to the entropy of the entry taken, () float32: K where all are taken equally often, 1 where one always is."""
    return torch.special.entr(counts_K / counts_K.sum()).sum().exp()
