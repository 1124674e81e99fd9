"""How far apart two sets of images are, from their features: Frechet distance (Heusel et al. 2017).

Features in, a number out; knows no image and no network. Sums are float64, so that the order of batches and the number
of ranks do not show in a score's printed digits.

Shape letters: B batch, D feature width.
"""

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Gaussian:
    """Mean and covariance of a set's features.

    count       images in the set
    mean        (D,) float64, on the CPU
    covariance  (D, D) float64, on the CPU; unbiased (divided by count - 1)
    """

    count: int
    mean: Tensor
    covariance: Tensor


class FeatureMoments:
    """Mean and covariance of features, summed batch by batch.

    Ranks add up: all-reduce `count`, `sum_D` and `outer_DD` (all float64 tensors), or `merge` one into another.

    dim     D
    device  where the sums live; it must know float64
    """

    def __init__(self, dim: int, device: torch.device | str = "cpu"):
        self.count = torch.zeros((), dtype=torch.float64, device=device)
        self.sum_D = torch.zeros(dim, dtype=torch.float64, device=device)
        self.outer_DD = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    def add(self, features_BD: Tensor) -> None:
        """Take in one batch; raises ValueError unless it is (B, D)."""
        if features_BD.ndim != 2 or features_BD.shape[1] != len(self.sum_D):
            raise ValueError(f"features of shape {tuple(features_BD.shape)}; these moments take (B, {len(self.sum_D)})")
        features_BD = features_BD.detach().to(self.sum_D)
        self.count += len(features_BD)
        self.sum_D += features_BD.sum(0)
        self.outer_DD += features_BD.T @ features_BD

    def merge(self, other: "FeatureMoments") -> None:
        """Take in everything that `other` took in."""
        self.count += other.count.to(self.count)
        self.sum_D += other.sum_D.to(self.sum_D)
        self.outer_DD += other.outer_DD.to(self.outer_DD)

    def finish(self) -> Gaussian:
        """The moments of everything taken in so far.

        Warns when there are no more images than features: the covariance is then singular, and distances too large.

        raises  ValueError for fewer than two images, or features that are not finite
        """
        count, dim = int(self.count), len(self.sum_D)
        if count < 2:
            raise ValueError(f"a covariance needs at least 2 images; got {count}. Raise the number of images evaluated")
        if count <= dim:
            warnings.warn(
                f"{count} images for {dim} features: the covariance is singular and the distance biased upwards; "
                f"compare only scores of equal numbers, or give more than {dim} images",
                stacklevel=2,
            )
        mean_D = self.sum_D / count
        covariance_DD = (self.outer_DD - count * mean_D.outer(mean_D)) / (count - 1)
        if not bool(covariance_DD.isfinite().all()):
            raise ValueError("some features are not finite: the images evaluated hold NaN or infinity")
        return Gaussian(count, mean_D.cpu(), covariance_DD.cpu())


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """Squared Frechet distance of two Gaussians; Heusel et al. 2017, eq. 6. At least 0, up to rounding.

    |m_a - m_b|^2 + tr(A + B - 2 (A B)^(1/2)). The last trace is the sum of the singular values of A^(1/2) B^(1/2):
    unlike a matrix square root of A B, it needs no offset and discards no imaginary part when a covariance is singular.

    raises  ValueError if the two come from features of different widths
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"features of {len(a.mean)} and of {len(b.mean)} dimensions do not compare; use one network")
    overlap = torch.linalg.svdvals(_square_root(a.covariance) @ _square_root(b.covariance)).sum()
    means = (a.mean - b.mean).square().sum()
    return float(means + a.covariance.trace() + b.covariance.trace() - 2 * overlap)


def _square_root(covariance_DD: Tensor) -> Tensor:
    """The symmetric square root; eigenvalues below zero are rounding."""
    values_D, vectors_DD = torch.linalg.eigh(covariance_DD)
    return (vectors_DD * values_D.clamp(min=0).sqrt()) @ vectors_DD.T
