import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ldm_scale.core import rng

POSITIONS = torch.arange(2000)
SIGMAS = 4.5  # of the statistic's own spread; one test in 150,000 would fail by chance, and the draws are fixed

GOLDEN_KEY = -7979015019187123924
GOLDEN_INTEGERS = [8, 972, 106]
GOLDEN_UNIFORM = [
    [0.8609653115272522, 0.4663432240486145],
    [0.18059182167053223, 0.6929581165313721],
    [0.8747848272323608, 0.5667620897293091],
]
GOLDEN_NORMAL = [
    [-0.9590635, -1.3032181, 0.1460455],
    [-0.9488491, -0.4059654, -2.2118139],
    [0.1311562, -0.504492, -0.7137305],
]
GOLDEN_TEXT = 0.09547476615914574


def assert_uncorrelated(a: torch.Tensor, b: torch.Tensor) -> None:
    a, b = a.flatten().double(), b.flatten().double()
    correlation = float(torch.corrcoef(torch.stack((a, b)))[0, 1])
    assert abs(correlation) < SIGMAS / math.sqrt(len(a))


def test_golden_values():
    """Runs on disk were drawn with these numbers: a change here breaks their resume."""
    positions = torch.tensor([0, 1, 10**12])
    assert rng.integers(7, "timestep", positions, 1000).tolist() == GOLDEN_INTEGERS
    assert rng.uniform(7, "crop", positions, (2,)).tolist() == GOLDEN_UNIFORM
    torch.testing.assert_close(
        rng.normal(7, "noise", positions, (3,)), torch.tensor(GOLDEN_NORMAL), rtol=1e-6, atol=1e-7
    )
    assert rng.stream_key(7, "noise") == GOLDEN_KEY
    assert rng.text_uniform("some key") == GOLDEN_TEXT


def test_normal_numbers_are_standard_normal():
    x = rng.normal(1, "noise", POSITIONS, (100,)).flatten().double()
    n = len(x)
    for power, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(float(x.pow(power).mean()) - expected) < SIGMAS * math.sqrt(variance / n), power
    assert stats.kstest(x.numpy(), "norm").pvalue > 1e-3
    assert 4 < float(x.abs().max()) < 5.8


def test_uniform_numbers_are_uniform():
    x = rng.uniform(1, "crop", POSITIONS, (100,)).flatten().numpy()
    assert x.min() >= 0 and x.max() < 1
    assert stats.kstest(x, "uniform").pvalue > 1e-3
    assert stats.kstest(rng.uniform(1, "crop", torch.arange(100_000)).numpy(), "uniform").pvalue > 1e-3


@pytest.mark.parametrize("high", [2, 3, 1000])
def test_integers_are_uniform(high: int):
    counts = np.bincount(rng.integers(1, "timestep", torch.arange(200_000), high).numpy(), minlength=high)
    assert len(counts) == high
    assert stats.chisquare(counts).pvalue > 1e-3


def test_integers_reach_both_ends_of_a_wide_range():
    x = rng.integers(1, "shuffle", torch.arange(100_000), 2**31)
    assert 0 <= int(x.min()) < 10**6 and 2**31 - 10**6 < int(x.max()) < 2**31
    assert rng.integers(1, "shuffle", POSITIONS, 1).unique().tolist() == [0]


@pytest.mark.parametrize("draw", [rng.normal, rng.uniform])
@pytest.mark.parametrize("lag", [1, 2, 8, 256])
def test_neighbouring_positions_and_elements_are_uncorrelated(draw, lag: int):
    x = draw(1, "noise", POSITIONS, (512,))
    assert_uncorrelated(x[lag:], x[:-lag])
    assert_uncorrelated(x[:, lag:], x[:, :-lag])
    assert_uncorrelated(x[lag:, lag:], x[:-lag, :-lag])
    assert_uncorrelated(x[lag:, :-lag], x[:-lag, lag:])
    assert_uncorrelated(x[lag:].square(), x[:-lag].square())
    assert_uncorrelated(x[:, lag:].square(), x[:, :-lag].square())


def test_the_two_numbers_of_a_pair_are_independent():
    """Box-Muller: both come from one word's radius and angle."""
    pairs = rng.normal(1, "noise", torch.arange(100_000), (2,)).double()
    angle = torch.atan2(pairs[:, 1], pairs[:, 0])
    radius = pairs.square().sum(1)
    assert stats.kstest(angle.numpy() / (2 * math.pi) + 0.5, "uniform").pvalue > 1e-3
    assert stats.kstest(radius.numpy(), "chi2", args=(2,)).pvalue > 1e-3
    assert_uncorrelated(radius, angle.cos())
    assert_uncorrelated(radius, (2 * angle).cos())


def test_positions_never_share_a_sequence_of_elements():
    """A counter scheme that adds position and element would repeat one position's row, shifted, in another."""
    words = rng.integers(1, "noise", torch.arange(1500), 2**31, (1000,)).flatten()
    pairs = words[:-1] * 2**31 + words[1:]
    assert len(pairs.unique()) == len(pairs)


@pytest.mark.parametrize(
    "other", [(1, "posterior"), (2, "noise"), (11, "noise"), (1, "noise ")], ids=["purpose", "seed", "prefix", "space"]
)
def test_other_seeds_and_purposes_are_other_streams(other):
    x, y = rng.normal(1, "noise", POSITIONS, (50,)), rng.normal(*other, POSITIONS, (50,))
    assert_uncorrelated(x, y)
    assert_uncorrelated(x.square(), y.square())


@settings(max_examples=60, deadline=None)
@given(
    positions=st.lists(st.integers(0, 2**48), min_size=1, max_size=40),
    shape=st.sampled_from([(), (1,), (3,), (5, 3), (4, 8, 8)]),
    purpose=st.sampled_from(["noise", "crop"]),
)
def test_a_draw_does_not_depend_on_the_batch(positions: list[int], shape: tuple[int, ...], purpose: str):
    batch = torch.tensor(positions)
    for draw in (rng.normal, rng.uniform, lambda *a: rng.integers(*a[:3], 1000, a[3])):
        whole = draw(5, purpose, batch, shape)
        assert whole.shape == (len(positions), *shape)
        alone = torch.cat([draw(5, purpose, batch[i : i + 1], shape) for i in range(len(batch))])
        assert torch.equal(whole, alone)
        assert torch.equal(whole.flip(0), draw(5, purpose, batch.flip(0), shape))


def test_a_draw_does_not_depend_on_threads():
    threads = torch.get_num_threads()
    try:
        draws = []
        for count in (1, 3):
            torch.set_num_threads(count)
            draws.append(rng.normal(1, "noise", torch.arange(64), (4, 32, 32)))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*draws)


def test_global_generators_are_neither_read_nor_moved():
    torch.manual_seed(0)
    first, state = rng.normal(1, "noise", POSITIONS[:4], (3,)), torch.get_rng_state()
    torch.manual_seed(99)
    assert torch.equal(first, rng.normal(1, "noise", POSITIONS[:4], (3,)))
    torch.manual_seed(0)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_device_does_not_matter():
    cpu, gpu = POSITIONS, POSITIONS.cuda()
    assert torch.equal(rng.integers(1, "t", cpu, 1000), rng.integers(1, "t", gpu, 1000).cpu())
    assert torch.equal(rng.uniform(1, "u", cpu, (7,)), rng.uniform(1, "u", gpu, (7,)).cpu())
    torch.testing.assert_close(
        rng.normal(1, "n", cpu, (99,)), rng.normal(1, "n", gpu, (99,)).cpu(), rtol=1e-5, atol=1e-6
    )


def test_text_uniform():
    x = np.array([rng.text_uniform(f"{i:09d}") for i in range(20_000)])
    assert x.min() >= 0 and x.max() < 1
    assert stats.kstest(x, "uniform").pvalue > 1e-3
