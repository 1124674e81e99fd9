import math

import pytest
import torch
from torch import nn

from ldm_scale.core import runtime
from ldm_scale.training.ema import EMA, RAMP, decay, half_life_of
from ldm_scale.training.masters import plain_masters
from ldm_scale.training.optimizer import OptimizerConfig

LATE = 10**9  # images seen when the ramp no longer acts


def model_and_ema(half_lives: list[int]) -> tuple[nn.Module, EMA]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    return model, EMA(plain_masters(model, OptimizerConfig().build(model)), half_lives)


def distances(ema: EMA) -> dict[int, float]:
    return {half_life: math.sqrt(above / below) for half_life, (above, below) in ema.distances().items()}


def jump(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)


@pytest.mark.parametrize("images", [1, 50, 100, 250, 1000])
def test_half_of_the_past_is_forgotten_in_a_half_life_whatever_the_batch(images):
    model, ema = model_and_ema([1000])
    start = [shadow.clone() for shadow in ema.shadows[1000]]
    jump(model)
    for _ in range(1000 // images):
        ema.update(images, LATE)
    for before, now in zip(start, ema.shadows[1000], strict=True):
        torch.testing.assert_close(now, (before + 1) / 2, rtol=1e-4, atol=1e-6)


def test_a_long_half_life_moves_in_float32():
    """In bfloat16 (or with a float32 that is rounded to it) this update is lost."""
    model, ema = model_and_ema([10_000_000])
    start = ema.shadows[10_000_000][0].clone()
    jump(model)
    for _ in range(200):
        ema.update(1000, LATE)
    expected = 1 + (start - 1) * 0.5 ** (200 * 1000 / 10_000_000)
    torch.testing.assert_close(ema.shadows[10_000_000][0], expected, rtol=1e-5, atol=1e-6)


def test_early_on_the_initial_weights_are_forgotten():
    model, ema = model_and_ema([10**6])
    jump(model)
    ema.update(32, 32)
    for shadow in ema.shadows[10**6]:
        torch.testing.assert_close(shadow, torch.ones_like(shadow), rtol=0, atol=1e-5)


def test_decay_follows_the_shorter_half_life():
    assert decay(1000, 10, LATE) == 0.5 ** (10 / 1000)
    assert decay(1000, 10, 2000) == 0.5 ** (10 / (RAMP * 2000))


def test_weights_come_back_bit_for_bit():
    model, ema = model_and_ema([10, 1000])
    jump(model)
    ema.update(1, LATE)
    own = [parameter.detach().clone() for parameter in model.parameters()]
    with pytest.raises(runtime.Preempted), ema.swapped(10):
        for parameter, shadow in zip(model.parameters(), ema.shadows[10], strict=True):
            assert torch.equal(parameter, shadow)
        assert not torch.equal(own[0], next(model.parameters()))
        raise runtime.Preempted
    assert all(torch.equal(a, b) for a, b in zip(own, model.parameters(), strict=True))


def test_distance_is_zero_at_the_start_and_has_a_closed_form():
    model, ema = model_and_ema([10, 1000])
    assert distances(ema) == {10: 0.0, 1000: 0.0}
    start = torch.cat([p.detach().flatten() for p in model.parameters()])
    jump(model)
    ema.update(10, LATE)
    away = float((start - 1).norm()) / math.sqrt(start.numel())
    assert distances(ema) == pytest.approx({10: away / 2, 1000: away * 0.5 ** (10 / 1000)}, rel=1e-5)


def test_reset_starts_again_at_the_weights():
    model, ema = model_and_ema([10])
    jump(model)
    ema.reset()
    assert all((shadow == 1).all() for shadow in ema.shadows[10])


def test_consolidated_has_the_modules_names():
    model, ema = model_and_ema([10])
    whole = ema.consolidated(10)
    assert whole is not None
    assert {name: t.shape for name, t in whole.items()} == {n: p.shape for n, p in model.named_parameters()}


@pytest.mark.parametrize("half_lives", [[0], [-5, 10], [10, 10]])
def test_impossible_half_lives_are_refused(half_lives):
    with pytest.raises(ValueError, match="ema_half_lives"):
        model_and_ema(half_lives)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "zero1", "zero2", "zero3"])
def test_partitions_swap_like_whole_weights(kind, two_processes):
    _, found = two_processes
    curve = found["curve"][kind]
    assert curve["swap"]["exact"]
    assert curve["swap"]["restored"] == curve["swap"]["own"] != curve["swap"]["averaged"]


def test_weights_go_by_name():
    assert [half_life_of(name, [20, 5]) for name in ("raw", "ema", "ema/5", "ema/20")] == [None, 20, 5, 20]
    with pytest.raises(ValueError, match=r"weights='ema/7'; there are raw, ema \(which is ema/20\), ema/20, ema/5"):
        half_life_of("ema/7", [20, 5])
