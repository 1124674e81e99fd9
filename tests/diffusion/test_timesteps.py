import pytest
import torch

from ldm_scale.core import rng
from ldm_scale.diffusion.timesteps import TimestepDraw, draw_timesteps

STEPS = 1000


def drawn(
    draw: TimestepDraw, positions_B: torch.Tensor, global_batch: int, steps: int = STEPS, seed: int = 3
) -> torch.Tensor:
    return draw_timesteps(draw, steps=steps, seed=seed, positions_B=positions_B, global_batch=global_batch)


def test_uniform_is_the_stream_that_runs_were_trained_on():
    positions = torch.arange(10_000, 10_008)
    expected = rng.integers(3, "diffusion/timestep", positions, STEPS)
    for global_batch in (1, 8, 64):
        assert torch.equal(drawn(TimestepDraw.uniform, positions, global_batch), expected)
    assert expected.tolist() == [643, 993, 321, 657, 173, 47, 778, 497]


@pytest.mark.parametrize("draw", TimestepDraw)
def test_every_timestep_is_equally_likely(draw: TimestepDraw):
    t = drawn(draw, torch.arange(400_000), global_batch=48)
    counts = torch.bincount(t, minlength=STEPS).double()
    assert len(counts) == STEPS
    expected = len(t) / STEPS
    chi_squared = float(((counts - expected) ** 2 / expected).sum())
    assert chi_squared < STEPS + 4 * (2 * STEPS) ** 0.5  # 999 degrees of freedom, four standard deviations


@pytest.mark.parametrize("global_batch", [1, 7, 64, 1000, 1536])
def test_a_stratified_batch_has_one_sample_in_each_range(global_batch: int):
    for batch in (0, 1, 12_345):
        positions = torch.arange(batch * global_batch, (batch + 1) * global_batch)
        t = drawn(TimestepDraw.stratified, positions, global_batch).sort().values
        begin = torch.arange(global_batch) * STEPS // global_batch
        end = -(-(torch.arange(global_batch) + 1) * STEPS // global_batch)
        assert (t >= begin).all() and (t < end).all()


def test_a_place_in_the_batch_is_not_bound_to_a_range():
    """An order that keeps some samples to one place of every batch must not keep them to one noise level."""
    t = drawn(TimestepDraw.stratified, torch.arange(0, 64 * 64, 64), global_batch=64)
    assert len((t * 64 // STEPS).unique()) > 60


@pytest.mark.parametrize("draw", TimestepDraw)
def test_a_draw_depends_on_the_position_alone(draw: TimestepDraw):
    whole = drawn(draw, torch.arange(640, 704), global_batch=64)
    for rank in range(4):
        assert torch.equal(drawn(draw, torch.arange(640 + rank, 704, 4), global_batch=64), whole[rank::4])
    assert not torch.equal(drawn(draw, torch.arange(640, 704), global_batch=64, seed=4), whole)


def test_stratified_means_vary_less_from_batch_to_batch():
    """Of a smooth function of the timestep: by the square of the batch at best; here by far more than a hundred."""
    positions = torch.arange(500 * 64)
    variances = {
        draw: drawn(draw, positions, global_batch=64).reshape(500, 64).double().mean(1).var() for draw in TimestepDraw
    }
    assert variances[TimestepDraw.stratified] * 1000 < variances[TimestepDraw.uniform]


@pytest.mark.parametrize("draw", TimestepDraw)
@pytest.mark.parametrize("steps, global_batch", [(2, 1 << 20), (1000, 1 << 20), (100_000, 65_536)])
def test_large_batches_stay_in_range(draw: TimestepDraw, steps: int, global_batch: int):
    last = torch.arange(global_batch - 1000, global_batch) + global_batch * 1_000_000
    t = drawn(draw, last, global_batch, steps=steps)
    assert t.dtype == torch.int64 and t.min() >= 0 and t.max() < steps
