"""A discriminator in training beside a first stage (Rombach et al. 2022, appendix G)."""

import torch
from torch import Tensor, nn

from ldm_scale.first_stage.adversarial import AdversarialConfig, adaptive_weight, discriminator_loss, generator_loss
from ldm_scale.training.engine import Engine

DISCRIMINATOR = "discriminator"
"""Its name among an engine's companions."""


class Adversary:
    """A discriminator in training, and the term by which the autoencoder learns from it.

    One forward of the autoencoder and one of the discriminator on what it made serve both. Gradients cannot stray: the
    discriminator's are asked for by name, the autoencoder gets one of its images.
    """

    def __init__(self, engine: Engine, config: AdversarialConfig, last_layer: nn.Parameter) -> None:
        """Take `engine.companions[DISCRIMINATOR]`.

        last_layer  weight of the decoder's last convolution, where gradients are compared
        """
        self._engine, self._config, self._last_layer = engine, config, last_layer
        self._discriminator = engine.companions[DISCRIMINATOR]

    def is_on(self, images_seen: int) -> bool:
        """Whether the discriminator has its turn in the global batch after so many images."""
        return images_seen >= self._config.start_images

    def __call__(self, images_BCHW: Tensor, rebuilt_BCHW: Tensor, nll: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Add the discriminator's gradients, and say what the autoencoder has to add to its loss, (). Collective.

        images   (B, C, H, W) originals
        rebuilt  (B, C, H, W) float32, with the graph of the autoencoder behind it
        nll      (), the reconstruction's part of the loss, of `rebuilt`
        """
        shown_BCHW = rebuilt_BCHW.detach().requires_grad_()
        originals, rebuilt = self._discriminator(images_BCHW), self._discriminator(shown_BCHW)
        fooling = generator_loss(rebuilt).mean()
        (pull_BCHW,) = torch.autograd.grad(fooling, shown_BCHW, retain_graph=True)
        weight = self._config.weight * self._balance(nll, rebuilt_BCHW, pull_BCHW)
        telling = discriminator_loss(self._config.kind, originals, rebuilt).mean()
        self._discriminator.backward(telling)
        # The value of the term, and as its gradient that of the discriminator: nothing of it is asked a second time.
        term = weight * (fooling.detach() + ((rebuilt_BCHW - shown_BCHW.detach()) * pull_BCHW).sum())
        told = {
            "train/adversarial": fooling,
            "train/adversarial_weight": weight,
            "train/discriminator": telling,
            "train/logits_originals": originals.mean(),
            "train/logits_rebuilt": rebuilt.mean(),
        }
        return term, told

    def _balance(self, nll: Tensor, rebuilt_BCHW: Tensor, pull_BCHW: Tensor) -> Tensor:
        """The adaptive weight of this micro batch of all ranks: the same number on each."""
        (of_nll,) = torch.autograd.grad(nll, self._last_layer, retain_graph=True)
        (of_pull,) = torch.autograd.grad(rebuilt_BCHW, self._last_layer, pull_BCHW, retain_graph=True)
        return adaptive_weight(*self._engine.mean(torch.stack((of_nll, of_pull))))
