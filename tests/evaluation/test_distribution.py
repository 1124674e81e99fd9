import warnings

import numpy as np
import pytest
import torch
from scipy import linalg
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torchmetrics.image.fid import _compute_fid

from ldm_scale.evaluation.distribution import FeatureMoments, Gaussian, frechet_distance


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
