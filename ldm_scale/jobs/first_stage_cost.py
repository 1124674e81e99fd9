"""What judges a first stage in training, counted without weights: a perceptual network and a discriminator."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from ldm_scale.first_stage.base import Rebuilt
from ldm_scale.first_stage.loss import AutoencoderLossConfig, ReconstructionLoss, perceptual_architecture
from ldm_scale.training.throughput import forward_flops

IMAGE_CHANNELS = 3
_OF_ADAM = 4 * 4  # bytes: float32 weight, gradient, two moments


class Judges:
    """The networks beside an autoencoder in training, on the meta device.

    Shape letters: B batch, C channels, H W height and width.
    """

    def __init__(self, loss: AutoencoderLossConfig) -> None:
        distance = perceptual_architecture(loss)
        self._perceptual = None if distance is None else distance.to("meta")
        self._discriminator = None
        if loss.adversarial.exists:
            with torch.device("meta"):
                self._discriminator = loss.adversarial.build(IMAGE_CHANNELS)
        self._loss = ReconstructionLoss(replace(loss, learn_variance=False), self._perceptual)
        self.networks = nn.ModuleList(one for one in (self._perceptual, self._discriminator) if one is not None)

    @property
    def bytes(self) -> int:
        """What they hold on each GPU; a discriminator with its gradients and moments."""
        return 4 * _numel(self._perceptual) + _OF_ADAM * _numel(self._discriminator)

    def flops(self, side: int) -> float:
        """Operations for one image of that side, in a step in which each of them has its turn.

        The perceptual network: two forward passes, and through one of them a backward pass to the image; two of these
        where the adaptive weight asks for its own gradient. The discriminator: two forward passes, two backward passes
        and one to the image.
        """
        image_BCHW, total = torch.empty(1, IMAGE_CHANNELS, side, side, device="meta"), 0.0
        if (distance := self._perceptual) is not None:
            backward = 1 if self._discriminator is None else 2
            total += (2 + backward) / 2 * forward_flops(lambda: distance(image_BCHW, image_BCHW))
        if (discriminator := self._discriminator) is not None:
            total += 7 * forward_flops(lambda: discriminator(image_BCHW))
        return total

    def keep(self, images_BCHW: Tensor, rebuilt: Rebuilt) -> list[object]:
        """Everything that a step holds of them until its backward passes are over."""
        terms = self._loss(images_BCHW, rebuilt)
        if self._discriminator is None:
            return [terms]
        shown_BCHW = rebuilt.images.float().detach().requires_grad_()
        return [terms, self._discriminator(images_BCHW), self._discriminator(shown_BCHW)]


def _numel(module: nn.Module | None) -> int:
    return 0 if module is None else sum(parameter.numel() for parameter in module.parameters())
