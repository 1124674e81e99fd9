import math

import pytest
import torch

from ldm_scale.core import rng
from ldm_scale.diffusion.schedule import ScheduleConfig, Spacing
from ldm_scale.samplers import ddim, ddpm

SCHEDULE = ScheduleConfig().build()


def shrink(z: torch.Tensor, t: int) -> torch.Tensor:
    return torch.tanh(z / 2)


def noise(step: int, like: torch.Tensor) -> torch.Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(step))


def test_the_last_step_returns_the_estimate_and_draws_nothing():
    estimates, asked = [], []

    def denoise(z, t):
        estimates.append(shrink(z, t))
        return estimates[-1]

    def asked_noise(step, like):
        asked.append(step)
        return noise(step, like)

    z_0 = ddpm.sample(denoise, torch.randn(2, 4), SCHEDULE.timesteps(5), SCHEDULE, noise=asked_noise)
    assert z_0 is estimates[-1]
    assert asked == [0, 1, 2, 3]


def test_up_to_its_end_it_is_ddim_at_eta_one():
    z, timesteps = torch.randn(2, 4, generator=torch.Generator().manual_seed(9)), SCHEDULE.timesteps(20)
    walks = {}
    for name, sampler, options in (("ddpm", ddpm, {}), ("ddim", ddim, {"eta": 1.0})):
        frames = []
        sampler.sample(shrink, z, timesteps, SCHEDULE, noise=noise, watch=frames.append, **options)
        walks[name] = frames
    for ours, theirs in zip(walks["ddpm"][:-1], walks["ddim"][:-1], strict=True):
        assert torch.equal(ours.z, theirs.z)
    assert not torch.equal(walks["ddpm"][-1].z, walks["ddim"][-1].z)


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_every_level_has_its_marginal_distribution(zero_terminal_snr: bool):
    """With one possible z_0, z_s is N(alpha_s z_0, sigma_s^2) after every step."""
    schedule = ScheduleConfig(zero_terminal_snr=zero_terminal_snr).build()
    timesteps, point, n = schedule.timesteps(8, Spacing.trailing), 0.8, 100_000
    alpha, sigma = schedule.at(timesteps[0])
    frames = []
    z_0 = ddpm.sample(
        lambda z, t: torch.full_like(z, point),
        alpha * point + sigma * rng.normal(0, "start", torch.arange(n), (1,)),
        timesteps,
        schedule,
        noise=lambda step, like: rng.normal(0, f"fresh{step}", torch.arange(n), (1,)),
        watch=frames.append,
    )
    for frame, t in zip(frames[:-1], timesteps[1:], strict=True):
        alpha, sigma = schedule.at(t)
        assert float(frame.z.mean()) == pytest.approx(alpha * point, abs=5 * sigma / math.sqrt(n)), t
        assert float(frame.z.std()) == pytest.approx(sigma, rel=5 / math.sqrt(2 * n)), t
    assert torch.equal(z_0, torch.full_like(z_0, point))


def test_visits_all_training_timesteps_by_default():
    assert ddpm.DDPMConfig().timesteps(SCHEDULE) == list(range(999, -1, -1))
