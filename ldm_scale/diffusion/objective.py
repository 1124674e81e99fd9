"""What the network is asked to predict, how far it is from it, and how much that counts at each timestep.

The three predictions are views of one another given z_t (Salimans & Ho 2022, appendix D): the noise `eps`, the clean
latent `z0`, or the velocity `v` = alpha noise - sigma z_0. Knows no network and no schedule: levels are arguments,
floats or tensors that broadcast over the latents. Low-precision network outputs are compared and converted in float32.

Shape letters: B batch, C channels, H W latent height and width, T training timesteps.
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


class Weighting(Enum):
    """How much the error counts at each timestep.

    Each but `uniform` is a weight on the squared error of z_0 in terms of SNR = alpha^2 / sigma^2, so that it asks for
    the same whatever is predicted: the squared error of eps is SNR times that of z_0, the squared error of v SNR + 1
    times.
    """

    uniform = "uniform"
    """1 on what is predicted; Ho et al. 2020, eq. 14 ("simple"), as in all of the reference's models."""
    min_snr = "min_snr"
    """min(SNR, gamma); Hang et al. 2023. Nearly 0 where there is hardly a signal."""
    vlb = "vlb"
    """(SNR(t - 1) - SNR(t)) / 2, Kingma et al. 2021: the loss of a timestep is its term of the variational bound with
    the posterior's variance (Ho et al. 2020, eq. 12), in nats per dimension. Timestep 0 has no such term; it takes the
    weight of timestep 1, as in the reference."""


@dataclass(kw_only=True, slots=True)
class ObjectiveConfig:
    """What the network predicts, by which distance it learns, and how timesteps are weighed."""

    prediction: Prediction = Prediction.eps
    """eps in all of the reference's models."""
    loss: Loss = Loss.l2
    """Per-element distance; averaged over C, H, W."""
    weighting: Weighting = Weighting.uniform
    """What the loss is multiplied by at each timestep; all but uniform are made for l2."""
    min_snr_gamma: float = 5.0
    """Where `min_snr` stops to follow the signal-to-noise ratio; dimensionless. Not used by the others."""

    def __post_init__(self) -> None:
        if self.weighting is not Weighting.uniform and self.loss is not Loss.l2:
            raise ValueError(
                f"diffusion.objective.weighting={self.weighting.value} weighs squared errors, but "
                f"diffusion.objective.loss={self.loss.value}: choose loss l2 or weighting uniform"
            )
        if self.min_snr_gamma <= 0:
            raise ValueError(f"diffusion.objective.min_snr_gamma={self.min_snr_gamma}; must be above 0")

    def build(self) -> "Objective":
        return Objective(
            prediction=self.prediction, loss=self.loss, weighting=self.weighting, min_snr_gamma=self.min_snr_gamma
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Objective:
    """Converts between predictions, measures the error of one, and weighs it."""

    prediction: Prediction
    loss: Loss
    weighting: Weighting
    min_snr_gamma: float

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

    def to_v(self, out: Tensor, z_t: Tensor, alpha: Level, sigma: Level) -> Tensor:
        """The velocity that an output at z_t implies; (B, ...), at least float32."""
        out, z_t = _full_precision(out), _full_precision(z_t)
        match self.prediction:
            case Prediction.eps:
                return (out - sigma * z_t) / alpha
            case Prediction.z0:
                return (alpha * z_t - out) / sigma
            case Prediction.v:
                return out

    def per_sample_loss(self, out: Tensor, target: Tensor) -> Tensor:
        """(B,) mean over C, H, W, at least float32, unweighted; the caller averages it, or logs it by timestep."""
        error = _full_precision(out) - _full_precision(target)
        distance = error.square() if self.loss is Loss.l2 else error.abs()
        return distance.flatten(1).mean(1)

    def weights(self, snr_T: Tensor) -> Tensor:
        """What the loss of each timestep is multiplied by, (T,) like `snr_T`, the signal-to-noise ratio of each."""
        if self.weighting is Weighting.uniform:
            return torch.ones_like(snr_T)
        per_z0_T = {Prediction.eps: snr_T, Prediction.z0: torch.ones_like(snr_T), Prediction.v: snr_T + 1}
        errors_T = per_z0_T[self.prediction]
        if self.weighting is Weighting.min_snr:
            return snr_T.clamp(max=self.min_snr_gamma) / errors_T
        bound_T = (snr_T[:-1] - snr_T[1:]) / 2 / errors_T[1:]
        return torch.cat((bound_T[:1], bound_T))


def _full_precision(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
