"""Guidance by an image against closed forms: the posterior of Gaussian data, and its formula."""

import pytest
import torch
from torch import Tensor

from ldm_scale.diffusion.schedule import NoiseSchedule, ScheduleConfig
from ldm_scale.samplers.base import Denoise, Frame, SamplerConfig
from ldm_scale.samplers.ddim import DDIMConfig
from ldm_scale.samplers.ddpm import DDPMConfig
from ldm_scale.samplers.dpm_solver import DPMSolverConfig
from ldm_scale.samplers.image_guiding import guided_by_image
from ldm_scale.samplers.plms import PLMSConfig

SCHEDULE = ScheduleConfig().build()
STD = 0.8  # of the Gaussian data


def ideal(schedule: NoiseSchedule) -> Denoise:
    """E[z_0 | z_t] of data N(0, STD^2)."""

    def denoise(z: Tensor, t: int) -> Tensor:
        alpha, sigma = schedule.at(t)
        return alpha * STD**2 / ((alpha * STD) ** 2 + sigma**2) * z

    return denoise


def means(z: Tensor) -> Tensor:
    """What the image shows of a latent: averages of 2 x 2 cells."""
    return torch.nn.functional.avg_pool2d(z, 2)


def to(seen: Tensor):
    return lambda z_0: 0.5 * (means(z_0) - seen).square().flatten(1).sum(1)


def test_the_estimate_moves_against_the_slope_through_the_denoiser():
    t, scale = 500, 3.0
    alpha, sigma = SCHEDULE.at(t)
    gain = alpha * STD**2 / ((alpha * STD) ** 2 + sigma**2)
    z, seen = torch.randn(2, 1, 4, 4), torch.randn(2, 1, 2, 2)
    guided = guided_by_image(ideal(SCHEDULE), SCHEDULE, to(seen), scale)(z, t)
    slope = gain * (means(gain * z) - seen).repeat_interleave(2, -1).repeat_interleave(2, -2) / 4
    torch.testing.assert_close(guided, gain * z - scale * sigma**2 / alpha * slope)
    eps, eps_guided = ((z - alpha * z_0) / sigma for z_0 in (gain * z, guided))
    torch.testing.assert_close(eps_guided, eps + scale * sigma * slope, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "config", [DDIMConfig(steps=50), DDPMConfig(steps=100), PLMSConfig(steps=50), DPMSolverConfig(steps=20)]
)
def test_guided_latents_are_less_than_half_as_far(config: SamplerConfig):
    seen = torch.randn(8, 1, 4, 4)
    timesteps = config.timesteps(SCHEDULE)
    z_T = torch.randn(8, 1, 8, 8)
    sampler = config.build(SCHEDULE, timesteps)
    free = sampler(ideal(SCHEDULE), z_T)
    held = sampler(guided_by_image(ideal(SCHEDULE), SCHEDULE, to(seen), 20.0), z_T)
    assert to(seen)(held).sum() < 0.5 * to(seen)(free).sum()
    unguided = sampler(guided_by_image(ideal(SCHEDULE), SCHEDULE, to(seen), 0.0), z_T)
    if not isinstance(config, DDPMConfig):
        torch.testing.assert_close(unguided, free)


def test_a_sample_is_guided_by_its_own_distance_alone():
    seen, z = torch.randn(3, 1, 4, 4), torch.randn(3, 1, 8, 8)
    together = guided_by_image(ideal(SCHEDULE), SCHEDULE, to(seen), 5.0)(z, 300)
    alone = [guided_by_image(ideal(SCHEDULE), SCHEDULE, to(seen[i : i + 1]), 5.0)(z[i : i + 1], 300) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone))


def test_no_step_keeps_the_graph_of_the_one_before():
    frames: list[Frame] = []
    config = DDIMConfig(steps=5)
    sampler = config.build(SCHEDULE, config.timesteps(SCHEDULE))
    denoise = guided_by_image(ideal(SCHEDULE), SCHEDULE, to(torch.zeros(1, 1, 2, 2)), 1.0)
    z = sampler(denoise, torch.randn(1, 1, 4, 4), watch=frames.append)
    assert len(frames) == 5
    assert not any(x.requires_grad for frame in frames for x in (frame.z, frame.z_0, z))


def test_pure_noise_is_not_guided():
    """Where nothing is left of z_0 the slope would be divided by zero."""
    schedule = ScheduleConfig(zero_terminal_snr=True).build()
    z = torch.randn(1, 1, 4, 4)
    guided = guided_by_image(lambda z, t: 0.1 * z, schedule, to(torch.zeros(1, 1, 2, 2)), 1.0)(z, 999)
    torch.testing.assert_close(guided, 0.1 * z)
