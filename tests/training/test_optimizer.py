import copy
import math

import pytest
import torch
from torch import nn

from ldm_scale.training.optimizer import Decay, LearningRateSchedule, OptimizerConfig, clip_and_step


def test_warm_up_is_linear_and_then_constant():
    config = OptimizerConfig(learning_rate=2.0, warmup_images=100)
    assert [config.learning_rate_at(n, 0) for n in (0, 25, 100, 10**9)] == [0.0, 0.5, 2.0, 2.0]


def test_cosine_goes_from_peak_to_zero():
    config = OptimizerConfig(learning_rate=2.0, warmup_images=100, schedule=LearningRateSchedule.cosine)
    rates = [config.learning_rate_at(n, 1100) for n in (50, 100, 350, 600, 1100, 2000)]
    assert rates == pytest.approx([1.0, 2.0, 1 + math.cos(math.pi / 4), 1.0, 0.0, 0.0])


def test_cosine_needs_a_length():
    config = OptimizerConfig(warmup_images=100, schedule=LearningRateSchedule.cosine)
    with pytest.raises(ValueError, match="total_images"):
        config.learning_rate_at(0, 100)


@pytest.mark.parametrize(
    "wrong", [{"learning_rate": -1.0}, {"beta_1": 1.0}, {"beta_2": -0.1}, {"eps": 0.0}, {"warmup_images": -1}]
)
def test_impossible_values_are_refused_by_name(wrong):
    with pytest.raises(ValueError, match=f"optimizer.{next(iter(wrong))}="):
        OptimizerConfig(**wrong)


@pytest.mark.parametrize("decay", Decay)
def test_what_decays_and_what_does_not(decay):
    """Without gradients a step is the decay alone."""
    layers = {"table": nn.Embedding(5, 4), "conv": nn.Conv2d(2, 4, 3), "norm": nn.GroupNorm(2, 4)}
    module = nn.ModuleDict({**layers, "linear": nn.Linear(4, 3)})
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    adam = OptimizerConfig(learning_rate=0.1, weight_decay=0.5, decay=decay).build(module)
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    adam.step()
    for name, parameter in module.named_parameters():
        decays = decay is Decay.all or name in ("conv.weight", "linear.weight")
        torch.testing.assert_close(parameter.detach(), before[name] * (0.95 if decays else 1.0), rtol=1e-6, atol=0)


def test_adam_is_fused_and_no_group_is_empty():
    for module in (nn.Linear(3, 2, bias=False), nn.GroupNorm(2, 4)):
        adam = OptimizerConfig(decay=Decay.matrices).build(module)
        assert adam.defaults["fused"]
        assert [len(group["params"]) for group in adam.param_groups] == [len(list(module.parameters()))]


@pytest.mark.parametrize("max_norm", [0.0, 0.1, 100.0])
def test_clipping_equals_torch_clip_grad_norm(max_norm):
    """Oracle: unfused AdamW after torch.nn.utils.clip_grad_norm_."""
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    theirs = copy.deepcopy(ours)
    adam = OptimizerConfig(learning_rate=0.01, weight_decay=0.1).build(ours)
    oracle = torch.optim.AdamW(theirs.parameters(), lr=0.01, weight_decay=0.1, foreach=False, fused=False)
    for _ in range(20):
        x = torch.randn(4, 5)
        for model in (ours, theirs):
            model.zero_grad()
            model(x).square().mean().backward()
        norm = nn.utils.get_total_norm([p.grad for p in ours.parameters()])
        if max_norm:
            nn.utils.clip_grad_norm_(theirs.parameters(), max_norm)
        clip_and_step(adam, norm, max_norm)
        oracle.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_norm_that_is_not_finite_moves_nothing(bad):
    layer = nn.Linear(3, 1, bias=False)
    weight, adam = layer.weight, OptimizerConfig().build(layer)
    for norm in (1.0, bad, 1.0):
        weight.grad = torch.full((1, 3), norm)
        before = weight.detach().clone(), adam.state[weight].get("step", torch.zeros(())).clone()
        clip_and_step(adam, torch.tensor(norm), 0.5)
        if not math.isfinite(norm):
            assert torch.equal(weight, before[0])
            assert torch.equal(adam.state[weight]["step"], before[1])
    assert adam.state[weight]["step"] == 2
    assert weight.isfinite().all()
