"""What the network is asked to predict, and how far it is from it.

The three predictions are views of one another given z_t (Salimans & Ho 2022, appendix D): the noise `eps`, the clean
latent `z0`, or the velocity `v` = alpha noise - sigma z_0. Knows no network and no schedule: levels are arguments,
floats or tensors that broadcast over the latents. Low-precision network outputs are compared and converted in float32.

Shape letters: B batch, C channels, H W latent height and width.
"""

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

Level = float | Tensor


class Prediction(Enum):
    """What the network's output estimates."""

    eps = "eps"
    z0 = "z0"
    v = "v"


class Loss(Enum):
    """Distance between output and target."""

    l2 = "l2"
    """Squared error; Ho et al. 2020, eq. 14."""
    l1 = "l1"
    """Absolute error; the reference's layout, inpainting, semantic and churches models."""


@dataclass(kw_only=True, slots=True)
class ObjectiveConfig:
    """What the network predicts and by which distance it learns."""

    prediction: Prediction = Prediction.eps
    """eps in all of the reference's models."""
    loss: Loss = Loss.l2
    """Per-element distance; averaged over C, H, W."""

    def build(self) -> "Objective":
        return Objective(prediction=self.prediction, loss=self.loss)


@dataclass(frozen=True, kw_only=True, slots=True)
class Objective:
    """Converts between predictions, and measures the error of one."""

    prediction: Prediction
    loss: Loss

    def target(self, z_0: Tensor, noise: Tensor, alpha: Level, sigma: Level) -> Tensor:
        """What the network should answer for z_t = alpha z_0 + sigma noise; (B, ...)."""
        match self.prediction:
            case Prediction.eps:
                return noise
            case Prediction.z0:
                return z_0
            case Prediction.v:
                return alpha * noise - sigma * z_0

    def to_z0(self, out: Tensor, z_t: Tensor, alpha: Level, sigma: Level) -> Tensor:
        """The clean latent that an output at z_t implies; (B, ...), at least float32."""
        out, z_t = _full_precision(out), _full_precision(z_t)
        match self.prediction:
            case Prediction.eps:
                return (z_t - sigma * out) / alpha
            case Prediction.z0:
                return out
            case Prediction.v:
                return alpha * z_t - sigma * out

    def to_eps(self, out: Tensor, z_t: Tensor, alpha: Level, sigma: Level) -> Tensor:
        """The noise that an output at z_t implies; (B, ...), at least float32."""
        out, z_t = _full_precision(out), _full_precision(z_t)
        match self.prediction:
            case Prediction.eps:
                return out
            case Prediction.z0:
                return (z_t - alpha * out) / sigma
            case Prediction.v:
                return sigma * z_t + alpha * out

    def per_sample_loss(self, out: Tensor, target: Tensor) -> Tensor:
        """(B,) mean over C, H, W, at least float32; the caller averages it, or logs it by timestep."""
        error = _full_precision(out) - _full_precision(target)
        distance = error.square() if self.loss is Loss.l2 else error.abs()
        return distance.flatten(1).mean(1)


def _full_precision(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
