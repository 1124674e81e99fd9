"""The configuration of `precompute_latents.py`."""

from dataclasses import dataclass
from enum import Enum

from ldm_scale.conditioning.clip_text import ClipTextConfig
from ldm_scale.jobs.schemas.experiment import Experiment


class Precision(Enum):
    """Arithmetic of the encoder."""

    float32 = "float32"
    """Exact: on a GPU without TensorFloat-32 too."""
    bfloat16 = "bfloat16"
    """Several times faster on a GPU; its error against float32 is measured on the audited images and recorded."""


@dataclass(kw_only=True, slots=True)
class PrecomputeConfig:
    """How images become latents."""

    batch: int
    """Images encoded at once."""
    audit: int
    """Images of each shard that are decoded again and compared."""
    min_psnr: float
    """Decibels below which a shard's audit fails; 0 turns the gate off, not the measurement."""
    latent_std: list[float]
    """Lowest and highest standard deviation of a shard's latents; outside, its audit fails."""
    max_latent_mean: float
    """Highest absolute mean of a shard's latents, in their standard deviations."""
    max_white_bars: float
    """Highest share, 0 to 1, of a shard's images that may have white bars, unless transform.border=keep wants them."""
    limit_shards: int = 0
    """Encode only the first so many shards; 0 for all. What is done already stays."""
    precision: Precision = Precision.float32
    """Of the encoder's arithmetic; the cache holds float16 either way."""
    compile: bool = False
    """Compile the encoder: a minute or more before the first image, faster from then on."""
    flip: bool = False
    """Store the latent of each image's mirror image too, as `{key}.flip.npy`: twice the work and the space."""
    text_embeddings: bool = False
    """Store what a frozen text encoder (conditioning=clip_text) makes of each caption, as `{key}.text.npy`."""
    overwrite: bool = False
    """Replace a cache that was made with other settings, instead of refusing it."""

    def __post_init__(self) -> None:
        if self.batch < 1 or self.audit < 1 or self.limit_shards < 0:
            raise ValueError(
                f"precompute.batch={self.batch}, precompute.audit={self.audit}: each at least 1; "
                f"precompute.limit_shards={self.limit_shards}: a number of shards, or 0 for all"
            )
        if len(self.latent_std) != 2 or not 0 <= self.latent_std[0] < self.latent_std[1]:
            raise ValueError(f"precompute.latent_std={self.latent_std}; give [LOWEST, HIGHEST], neither below 0")
        if self.max_latent_mean <= 0 or not 0 <= self.max_white_bars <= 1:
            raise ValueError(
                f"precompute.max_latent_mean={self.max_latent_mean}: above 0; "
                f"precompute.max_white_bars={self.max_white_bars}: a share, 0 to 1"
            )


@dataclass(kw_only=True, slots=True)
class PrecomputeJob(Experiment):
    """`precompute_latents.py`."""

    precompute: PrecomputeConfig
    """How images become latents."""

    def __post_init__(self) -> None:
        Experiment.__post_init__(self)
        if self.precompute.text_embeddings and not isinstance(self.conditioning, ClipTextConfig):
            raise ValueError(
                "precompute.text_embeddings=true without conditioning=clip_text: only what a frozen text encoder says "
                "can be cached: +experiment=stable_diffusion_v1"
            )
