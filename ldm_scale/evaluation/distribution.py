"""How far apart two sets of images are, from their features; and how sure and how varied a classifier finds one set.

Frechet distance (Heusel et al. 2017), kernel distance (Binkowski et al. 2018), precision and recall (Kynkaanniemi et
al. 2019), and Inception score (Salimans et al. 2016). Features or logits in, numbers out; knows no image and no
network. Sums are float64, so that the order of batches and the number of ranks do not show in a score's printed digits.
What is drawn at random, subsets and splits, is drawn as torch-fidelity draws it, so that the numbers are its numbers.

Shape letters: B batch, N M images of two sets, D feature width, K classes, S splits.
"""

import warnings
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ldm_scale.core.shares import add_up, own, ranges

_DRAWS = 2020  # torch-fidelity's default seed
_ROWS = 512  # of a distance matrix at once: 0.1 GB beside 50,000 others


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


@dataclass(frozen=True, slots=True)
class Estimate:
    """A score that is a mean over random subsets, and the standard deviation over them."""

    mean: float
    std: float


def kernel_distance(generated_ND: Tensor, real_MD: Tensor, *, subsets: int = 100, size: int = 1000) -> Estimate:
    """Squared maximum mean discrepancy under (x . y / D + 1)^3, unbiased: KID; Binkowski et al. 2018, section 4.

    Ranks share the subsets. Collective: all of them have all features.

    size    images of each set in a subset; all, where one set has fewer
    raises  ValueError for features of different widths, or a set of one image
    """
    _require_comparable(generated_ND, real_MD)
    size = min(size, len(generated_ND), len(real_MD))
    if size < 2:
        raise ValueError("a kernel distance needs at least 2 images of each set. Raise the number of images evaluated")
    draws, sets = np.random.RandomState(_DRAWS), (generated_ND, real_MD)
    drawn = [[draws.choice(len(of), size, replace=False) for of in sets] for _ in range(subsets)]
    found_S = torch.zeros(subsets, dtype=torch.float64)
    for subset in own(range(subsets)):
        x, y = (of[torch.from_numpy(rows)].double() for of, rows in zip(sets, drawn[subset], strict=True))
        found_S[subset] = _discrepancy(_kernel(x, x), _kernel(x, y), _kernel(y, y))
    add_up(found_S)
    return Estimate(float(found_S.mean()), float(found_S.std(correction=0)))


def _kernel(x_ND: Tensor, y_MD: Tensor) -> Tensor:
    return (x_ND @ y_MD.T / x_ND.shape[1] + 1) ** 3


def _discrepancy(xx_NN: Tensor, xy_NN: Tensor, yy_NN: Tensor) -> float:
    n = len(xx_NN)
    within = sum(float(kernel.sum() - kernel.trace()) for kernel in (xx_NN, yy_NN))
    return within / (n * (n - 1)) - 2 * float(xy_NN.mean())


@dataclass(frozen=True, slots=True)
class PrecisionRecall:
    """Shares, 0 to 1."""

    precision: float
    """Generated images that lie among the real ones."""
    recall: float
    """Real images that lie among the generated ones."""


def precision_recall(generated_ND: Tensor, real_MD: Tensor, *, neighbours: int = 3) -> PrecisionRecall:
    """Improved precision and recall; Kynkaanniemi et al. 2019, eq. 1 to 3.

    A set covers the balls around its members that reach to their k-th nearest neighbour in the set. On the features of
    VGG-16 this is the paper's protocol, on Inception's pooled features that of ADM (Dhariwal and Nichol 2021). Ranks
    share the rows of the distances. Collective: all of them have all features.

    neighbours  k
    raises      ValueError for features of different widths, or a set of k images or fewer
    """
    _require_comparable(generated_ND, real_MD)
    if min(len(generated_ND), len(real_MD)) <= neighbours:
        raise ValueError(
            f"{len(generated_ND)} generated and {len(real_MD)} real images; precision and recall with {neighbours} "
            f"neighbours need more than {neighbours} of each. Raise the number of images evaluated"
        )
    return PrecisionRecall(
        precision=_covered(generated_ND, real_MD, neighbours), recall=_covered(real_MD, generated_ND, neighbours)
    )


def _covered(these_ND: Tensor, by_MD: Tensor, neighbours: int) -> float:
    """Share of `these` inside a ball of `by`."""
    radii_M, inside = torch.zeros(len(by_MD)), torch.zeros((), dtype=torch.float64)
    for rows in own(ranges(len(by_MD), _ROWS)):
        part = slice(rows.start, rows.stop)
        radii_M[part] = _distances(by_MD[part], by_MD).kthvalue(neighbours + 1).values
    add_up(radii_M)
    for rows in own(ranges(len(these_ND), _ROWS)):
        inside += (_distances(these_ND[rows.start : rows.stop], by_MD) <= radii_M).any(dim=1).sum()
    add_up(inside)
    return float(inside / len(these_ND))


def _distances(a_BD: Tensor, b_MD: Tensor) -> Tensor:
    return torch.cdist(a_BD.float(), b_MD.float())


def _require_comparable(a_ND: Tensor, b_MD: Tensor) -> None:
    if a_ND.shape[1] != b_MD.shape[1]:
        raise ValueError(
            f"features of {a_ND.shape[1]} and of {b_MD.shape[1]} dimensions do not compare; use one network"
        )


class InceptionScore:
    """exp of the mean KL divergence of each image's classes from all images' classes; Salimans et al. 2016, eq. 1.

    Streamed: which split an image counts to is known from its index, and of a split only two sums are kept. Ranks add
    up: all-reduce `counts_S`, `classes_SK` and `negentropies_S` (float64).

    count    images in all
    classes  K
    """

    def __init__(self, count: int, classes: int, *, splits: int = 10):
        if count < splits:
            raise ValueError(f"{count} images for an Inception score over {splits} splits; give at least one for each")
        order_N = np.random.RandomState(_DRAWS).permutation(count)
        ends = [(split + 1) * count // splits for split in range(splits)]
        self._split_of_N = torch.empty(count, dtype=torch.int64)
        self._split_of_N[torch.from_numpy(order_N)] = torch.bucketize(
            torch.arange(count), torch.tensor(ends), right=True
        )
        self.counts_S = torch.zeros(splits, dtype=torch.float64)
        self.classes_SK = torch.zeros(splits, classes, dtype=torch.float64)
        self.negentropies_S = torch.zeros(splits, dtype=torch.float64)

    def add(self, start: int, logits_BK: Tensor) -> None:
        """Take in images `start`, `start` + 1, ..."""
        split_B = self._split_of_N[start : start + len(logits_BK)]
        logs_BK = logits_BK.detach().cpu().double().log_softmax(dim=1)
        self.counts_S.index_add_(0, split_B, torch.ones(len(split_B), dtype=torch.float64))
        self.classes_SK.index_add_(0, split_B, logs_BK.exp())
        self.negentropies_S.index_add_(0, split_B, (logs_BK.exp() * logs_BK).sum(1))

    def finish(self) -> Estimate:
        """Mean and standard deviation over the splits; every image must have been taken in once.

        The mean over a split of sum p (log p - log q) is the mean of sum p log p, less sum q log q: q is the mean of p.
        """
        assert self.counts_S.sum() == len(self._split_of_N), "some image was left out, or taken in twice"
        q_SK = self.classes_SK / self.counts_S[:, None]
        scores_S = (self.negentropies_S / self.counts_S - torch.special.xlogy(q_SK, q_SK).sum(1)).exp()
        return Estimate(float(scores_S.mean()), float(scores_S.std(correction=0)))
