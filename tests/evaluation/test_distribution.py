import warnings

import numpy as np
import pytest
import torch
from scipy import linalg
from torch import nn
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric
from torchmetrics.image.fid import _compute_fid
from torchmetrics.image.inception import InceptionScore as TheirInceptionScore
from torchmetrics.image.kid import poly_mmd

from ldm_scale.evaluation import distribution
from ldm_scale.evaluation.distribution import (
    FeatureMoments,
    Gaussian,
    InceptionScore,
    frechet_distance,
    kernel_distance,
    precision_recall,
)


def features(n: int, dim: int, seed: int, *, rank: int | None = None, shift: float = 0.0) -> torch.Tensor:
    """Correlated, non-negative and skewed, as pooled features are."""
    generator = torch.Generator().manual_seed(seed)
    factors = torch.randn(n, rank or dim, generator=generator, dtype=torch.float64)
    mixing = torch.randn(rank or dim, dim, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return (factors @ mixing / dim**0.5 + shift).abs().float() if rank is None else (factors @ mixing).float()


def gaussian(x: torch.Tensor) -> Gaussian:
    sums = FeatureMoments(x.shape[1])
    sums.add(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return sums.finish()


def test_moments_are_those_of_all_features_at_once():
    x = features(1000, 20, 0, shift=3.0)
    moments = gaussian(x)
    assert moments.count == 1000
    np.testing.assert_allclose(moments.mean, x.double().mean(0), rtol=1e-12)
    np.testing.assert_allclose(moments.covariance, np.cov(x.double().numpy(), rowvar=False), rtol=0, atol=1e-9)


def test_moments_do_not_depend_on_batches_or_ranks():
    x = features(1000, 20, 0)
    streamed, ranks = FeatureMoments(20), [FeatureMoments(20) for _ in range(3)]
    for i, batch in enumerate(x.split(37)):
        streamed.add(batch)
        ranks[i % 3].add(batch)
    for other in ranks[1:]:
        ranks[0].merge(other)
    whole = gaussian(x)
    for sums in (streamed, ranks[0]):
        assert sums.finish().count == 1000
        torch.testing.assert_close(sums.finish().mean, whole.mean, rtol=1e-13, atol=0)
        torch.testing.assert_close(sums.finish().covariance, whole.covariance, rtol=0, atol=1e-12)
        assert abs(frechet_distance(sums.finish(), whole)) < 1e-10


def test_half_precision_features_are_summed_in_float64():
    x = features(300, 8, 0).bfloat16()
    torch.testing.assert_close(gaussian(x).covariance, torch.cov(x.double().T), rtol=0, atol=1e-12)


@pytest.mark.parametrize("n, dim", [(2000, 32), (500, 200)])
def test_distance_equals_torch_fidelity_and_torchmetrics(n: int, dim: int):
    a, b = features(n, dim, 0), features(n, dim, 1, shift=0.2)
    ours = frechet_distance(gaussian(a), gaussian(b))
    stats_a, stats_b = (fid_features_to_statistics(x.double()) for x in (a, b))
    fidelity = fid_statistics_to_metric(stats_a, stats_b, verbose=False)["frechet_inception_distance"]
    torchmetrics = _compute_fid(
        a.double().mean(0), torch.cov(a.double().T), b.double().mean(0), torch.cov(b.double().T)
    )
    assert ours > 0.1
    assert ours == pytest.approx(fidelity, rel=1e-4)
    assert ours == pytest.approx(float(torchmetrics), rel=1e-4)


def test_distance_equals_the_matrix_square_root():
    a, b = gaussian(features(400, 24, 0)), gaussian(features(400, 24, 1, shift=0.3))
    root = linalg.sqrtm(a.covariance.numpy() @ b.covariance.numpy()).real
    means = ((a.mean - b.mean) ** 2).sum()
    expected = float(means + (a.covariance + b.covariance).trace() - 2 * np.trace(root))
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_distance_of_known_gaussians():
    """Commuting covariances: sum of squared differences of means and of standard deviations."""
    mean_a, mean_b = torch.tensor([[0.0, 1.0, 2.0], [1.0, 1.0, 0.0]], dtype=torch.float64)
    std_a, std_b = torch.tensor([[1.0, 2.0, 0.0], [3.0, 0.5, 0.1]], dtype=torch.float64)
    rotation, _ = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))

    def known(mean_D, std_D):
        return Gaussian(10, rotation @ mean_D, rotation @ torch.diag(std_D**2) @ rotation.T)

    expected = float(((mean_a - mean_b) ** 2).sum() + ((std_a - std_b) ** 2).sum())
    assert frechet_distance(known(mean_a, std_a), known(mean_b, std_b)) == pytest.approx(expected, rel=1e-7)


def test_distance_is_symmetric_and_zero_for_equals():
    a, b = gaussian(features(500, 16, 0)), gaussian(features(500, 16, 1, shift=0.1))
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-10)
    assert abs(frechet_distance(a, a)) < 1e-12


def test_singular_covariances_are_exact():
    """Fewer images than features, as with 2,048 features: no offset on the diagonal, no negative distance."""
    a, b = gaussian(features(300, 60, 0, rank=5)), gaussian(features(300, 60, 1, rank=5))
    expected = fid_statistics_to_metric(
        {"mu": a.mean.numpy(), "sigma": a.covariance.numpy()},
        {"mu": b.mean.numpy(), "sigma": b.covariance.numpy()},
        verbose=False,
    )["frechet_inception_distance"]
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-4)
    trace = float(a.covariance.trace())
    assert abs(frechet_distance(a, a)) < 1e-10 * trace


@pytest.mark.parametrize("n", [0, 1])
def test_too_few_images_are_refused(n: int):
    sums = FeatureMoments(4)
    sums.add(torch.zeros(n, 4))
    with pytest.raises(ValueError, match=f"at least 2 images; got {n}"):
        sums.finish()


@pytest.mark.parametrize("n, singular", [(4, True), (5, False)])
def test_a_singular_covariance_is_announced(n: int, singular: bool):
    sums = FeatureMoments(4)
    sums.add(features(n, 4, 0))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sums.finish()
    assert ["singular" in str(warning.message) for warning in caught] == [True] * singular


def test_features_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(B, 4\)"):
        FeatureMoments(4).add(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="4 and of 5"):
        frechet_distance(gaussian(features(9, 4, 0)), gaussian(features(9, 5, 0)))


def test_features_that_are_not_finite_are_refused():
    x = features(9, 4, 0)
    x[3, 2] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        gaussian(x)


@pytest.mark.parametrize("n, m", [(300, 300), (257, 400)])
def test_kernel_distance_equals_torch_fidelity_and_torchmetrics(n: int, m: int):
    a, b = features(n, 32, 0), features(m, 32, 1, shift=0.3)
    ours = kernel_distance(a, b, subsets=20, size=100)
    fidelity = kid_features_to_metric(a, b, kid_subsets=20, kid_subset_size=100, verbose=False)
    assert ours.mean > 1e-3
    assert ours.mean == pytest.approx(fidelity["kernel_inception_distance_mean"], rel=1e-4)
    assert ours.std == pytest.approx(fidelity["kernel_inception_distance_std"], rel=1e-4)
    whole = kernel_distance(a[:200], b[:200], subsets=1, size=200)
    assert whole.mean == pytest.approx(float(poly_mmd(b[:200].double(), a[:200].double())), rel=1e-6)


def test_kernel_distance_is_unbiased():
    """Two halves of one set: zero within a few standard errors, and below zero about as often as above."""
    found = [kernel_distance(*features(400, 16, seed).split(200), subsets=1).mean for seed in range(40)]
    assert abs(np.mean(found)) < 3 * np.std(found) / 40**0.5
    assert 8 < sum(value < 0 for value in found) < 32


@pytest.mark.parametrize("n, m", [(400, 300), (150, 500)])
def test_precision_and_recall_equal_torch_fidelity(n: int, m: int):
    generated, real = features(n, 8, 0), features(m, 8, 1, shift=0.4)
    ours = precision_recall(generated, real)
    fidelity = prc_features_to_metric(generated, real, verbose=False)
    assert 0.1 < ours.precision < 0.95 and 0.1 < ours.recall < 0.95
    assert ours.precision == pytest.approx(fidelity["precision"], rel=1e-4)
    assert ours.recall == pytest.approx(fidelity["recall"], rel=1e-4)


def test_precision_sees_bad_pictures_and_recall_sees_missing_ones():
    """On a line: half of the real places are drawn, and a third of what is drawn is elsewhere."""
    real = torch.arange(100.0)[:, None]
    generated = torch.cat((torch.arange(50.0), torch.arange(1000.0, 1025.0)))[:, None]
    found = precision_recall(generated, real)
    assert found.precision == pytest.approx(50 / 75)
    # Each of 0 .. 49 reaches 2 to 3 places further, each of 1000 ... likewise.
    assert found.recall == pytest.approx(52 / 100, abs=0.011)


def test_distances_in_parts_are_those_in_one_piece(monkeypatch: pytest.MonkeyPatch):
    generated, real = features(100, 8, 0), features(130, 8, 1, shift=0.4)
    whole = precision_recall(generated, real)
    monkeypatch.setattr(distribution, "_ROWS", 33)
    assert precision_recall(generated, real) == whole


@pytest.mark.parametrize("n, splits", [(103, 10), (64, 1), (10, 10)])
def test_inception_score_equals_torch_fidelity(n: int, splits: int):
    logits = 3 * torch.randn(n, 12, generator=torch.Generator().manual_seed(0))
    score = InceptionScore(n, 12, splits=splits)
    for start in range(0, n, 7):
        score.add(start, logits[start : start + 7])
    fidelity = isc_features_to_metric(logits, splits=splits)
    assert score.finish().mean == pytest.approx(fidelity["inception_score_mean"], rel=1e-9)
    assert score.finish().std == pytest.approx(fidelity["inception_score_std"], rel=1e-6, abs=1e-12)


@pytest.mark.filterwarnings("ignore::UserWarning:torchmetrics")
def test_inception_score_of_one_split_equals_torchmetrics():
    logits = 3 * torch.randn(64, 12, generator=torch.Generator().manual_seed(0))
    score = InceptionScore(64, 12, splits=1)
    score.add(0, logits)
    theirs = TheirInceptionScore(feature=nn.Identity(), splits=1)  # any network of the user's; here logits go in
    theirs.features = [logits]
    assert score.finish().mean == pytest.approx(float(theirs.compute()[0]), rel=1e-5)


def test_a_perfect_classifier_on_even_classes_scores_their_number():
    score = InceptionScore(40, 8, splits=1)
    score.add(0, 1000 * torch.eye(8).repeat(5, 1))
    assert score.finish().mean == pytest.approx(8)


def test_inception_score_adds_up_over_ranks_and_refuses_what_is_missing():
    logits = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
    whole, ranks = InceptionScore(40, 5, splits=4), [InceptionScore(40, 5, splits=4) for _ in range(2)]
    whole.add(0, logits)
    for batch, start in enumerate(range(0, 40, 8)):
        ranks[batch % 2].add(start, logits[start : start + 8])
    with pytest.raises(AssertionError, match="left out"):
        ranks[0].finish()
    for name in ("counts_S", "classes_SK", "negentropies_S"):
        getattr(ranks[0], name).add_(getattr(ranks[1], name))
    assert ranks[0].finish().mean == pytest.approx(whole.finish().mean, rel=1e-12)


def test_too_few_or_foreign_features_are_refused():
    a = features(9, 4, 0)
    with pytest.raises(ValueError, match="4 and of 5"):
        kernel_distance(a, features(9, 5, 0))
    with pytest.raises(ValueError, match="at least 2 images"):
        kernel_distance(a, a[:1])
    with pytest.raises(ValueError, match="9 generated and 3 real images"):
        precision_recall(a, a[:3])
    with pytest.raises(ValueError, match="5 images for an Inception score over 10 splits"):
        InceptionScore(5, 1008)
