"""What a first stage and a discriminator teach each other (Esser et al. 2021; Rombach et al. 2022, appendix G).

The discriminator learns to tell originals from reconstructions by a hinge or a logistic loss, the autoencoder to raise
its logits of reconstructions. How much that counts against the reconstruction is measured at the decoder's last layer.
Knows nothing of optimizers, files or ranks.

Shape letters: B batch, C channels, H W height and width, h w patches down and across.
"""

import math
from dataclasses import dataclass
from enum import Enum

from torch import Tensor
from torch.nn import functional

from ldm_scale.nn.discriminator import NORM_CHANNELS, PatchDiscriminator, batch_norm, group_norm, smallest_side

_LARGEST_WEIGHT = 1e4  # of the adversarial term; facts.md W7
_WEIGHT_EPSILON = 1e-4


class AdversarialKind(Enum):
    """How the discriminator learns."""

    none = "none"
    """There is none."""
    hinge = "hinge"
    """Logits need not go beyond 1 and -1 (Lim & Ye 2017)."""
    vanilla = "vanilla"
    """Logistic loss (Goodfellow et al. 2014)."""


class DiscriminatorNorm(Enum):
    """What the discriminator normalises over."""

    batch = "batch"
    """Each channel over the micro batches of all ranks: needs a GPU where there are several."""
    group = "group"
    """Groups of channels of each image: the same on any number of processes and in any micro batch."""


@dataclass(kw_only=True, slots=True)
class AdversarialConfig:
    """The discriminator and its share in the loss; the defaults are those of the reference's kl-f8."""

    kind: AdversarialKind = AdversarialKind.hinge
    """How the discriminator learns; none trains without one."""
    weight: float = 0.5
    """Of the adversarial term's gradient at the decoder's last layer, against that of the reconstruction."""
    start_images: int = 0
    """Images seen before the discriminator is asked and trained."""
    layers: int = 3
    """Convolutions that halve the resolution: 2 judge patches of 34 pixels a side, 3 of 70."""
    channels: int = 64
    """Width of the first of them; doubled by every further one, up to 8 times."""
    norm: DiscriminatorNorm = DiscriminatorNorm.batch
    """What it normalises over; the released models: batch."""
    learning_rate_ratio: float = 1.0
    """Its learning rate in those of the autoencoder."""

    def __post_init__(self) -> None:
        for name, value, low in (
            ("weight", self.weight, 0),
            ("start_images", self.start_images, 0),
            ("layers", self.layers, 1),
            ("channels", self.channels, 1),
        ):
            if not low <= value < math.inf:
                raise ValueError(f"autoencoder_loss.adversarial.{name}={value}; must be at least {low} and finite")
        if not 0 < self.learning_rate_ratio < math.inf:
            raise ValueError(
                f"autoencoder_loss.adversarial.learning_rate_ratio={self.learning_rate_ratio}; above 0, and finite"
            )
        if self.norm is DiscriminatorNorm.group and self.channels % (NORM_CHANNELS // 2):
            raise ValueError(
                f"autoencoder_loss.adversarial.channels={self.channels} with norm=group, whose groups have "
                f"{NORM_CHANNELS} channels of twice as many: take a multiple of {NORM_CHANNELS // 2}, or norm=batch"
            )

    @property
    def exists(self) -> bool:
        """Whether there is a discriminator at all."""
        return self.kind is not AdversarialKind.none

    def require_fits(self, side: int) -> None:
        """Refuse images too small to have a single logit.

        side    of the images, in pixels
        raises  ValueError naming the key
        """
        if self.exists and side < (smallest := smallest_side(self.layers)):
            raise ValueError(
                f"autoencoder_loss.adversarial.layers={self.layers} judges images of {smallest} pixels a side or more, "
                f"these have {side}: fewer layers, or adversarial.kind=none"
            )

    def build(self, image_channels: int) -> PatchDiscriminator:
        """The discriminator with fresh weights, on torch's default device."""
        norm = batch_norm if self.norm is DiscriminatorNorm.batch else group_norm
        return PatchDiscriminator(image_channels, channels=self.channels, layers=self.layers, norm=norm)


def generator_loss(rebuilt_B1hw: Tensor) -> Tensor:
    """What the autoencoder minimises, for both kinds: minus the mean logit of each reconstruction, (B,)."""
    return -rebuilt_B1hw.flatten(1).mean(1)


def discriminator_loss(kind: AdversarialKind, originals_B1hw: Tensor, rebuilt_B1hw: Tensor) -> Tensor:
    """What the discriminator minimises: mean loss over the patches of each original and its reconstruction, (B,)."""
    if kind is AdversarialKind.hinge:
        losses_B1hw = functional.relu(1 - originals_B1hw) + functional.relu(1 + rebuilt_B1hw)
    else:
        losses_B1hw = functional.softplus(-originals_B1hw) + functional.softplus(rebuilt_B1hw)
    return 0.5 * losses_B1hw.flatten(1).mean(1)


def adaptive_weight(reconstruction_grad: Tensor, adversarial_grad: Tensor) -> Tensor:
    """What makes the adversarial gradient as large as the reconstruction's, (), at most 1e4 (Esser et al. 2021, eq. 7).

    Both are gradients of the decoder's last weight; norms are taken in float32.
    """
    ratio = reconstruction_grad.float().norm() / (adversarial_grad.float().norm() + _WEIGHT_EPSILON)
    return ratio.clamp(max=_LARGEST_WEIGHT)
