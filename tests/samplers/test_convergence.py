"""Samplers on a problem solved exactly: Gaussian data, whose ideal denoiser and walks have a closed form."""

import math
from collections.abc import Callable
from itertools import pairwise
from types import ModuleType

import numpy as np
import pytest
import torch

from ldm_scale.diffusion.schedule import End, NoiseSchedule, ScheduleConfig, Spacing
from ldm_scale.samplers import ddim, ddpm, dpm_solver, plms

MEAN, STD = 0.7, 0.4
PAPER = ScheduleConfig().build()
# Levels even in log(alpha / sigma), the variable in which all these solvers are smooth. The betas of real schedules are
# not: the first of their 1000 timesteps is half a unit long, and coarser walks are far from any order.
EVEN = NoiseSchedule(torch.sigmoid(2 * torch.linspace(4, -2.5, 961, dtype=torch.float64)))


def spread(level: tuple[float, float]) -> float:
    """Standard deviation of z_t."""
    alpha, sigma = level
    return math.hypot(alpha * STD, sigma)


def ideal_denoiser(schedule: NoiseSchedule) -> Callable[[torch.Tensor, int], torch.Tensor]:
    """E[z_0 | z_t] for z_0 ~ N(MEAN, STD^2): linear regression."""

    def denoise(z, t):
        alpha, sigma = schedule.at(t)
        return MEAN + alpha * STD**2 / spread((alpha, sigma)) ** 2 * (z - alpha * MEAN)

    return denoise


def error(sampler: ModuleType, timesteps: list[int], schedule: NoiseSchedule) -> float:
    """Of the deterministic walk, which keeps (z - alpha MEAN) / spread."""
    u = torch.linspace(-2, 2, 9, dtype=torch.float64)
    start, end = schedule.at(timesteps[0]), schedule.at(None)
    z = sampler.sample(ideal_denoiser(schedule), start[0] * MEAN + spread(start) * u, timesteps, schedule)
    return float((z - (end[0] * MEAN + spread(end) * u)).abs().mean())


@pytest.mark.parametrize("sampler, order", [(ddim, 1), (plms, 2), (dpm_solver, 2)])
def test_error_falls_with_the_order_of_the_solver(sampler: ModuleType, order: int):
    counts = [16, 32, 64, 96, 160]
    errors = [error(sampler, list(range(960, 0, -960 // steps)), EVEN) for steps in counts]
    slope = -np.polyfit(np.log2(counts), np.log2(errors), deg=1)[0]
    assert slope == pytest.approx(order, abs=0.25)
    assert errors[-1] < (0.005 if order == 1 else 5e-5)


@pytest.mark.parametrize("spacing, end", [(Spacing.leading, End.first_level), (Spacing.trailing, End.clean)])
def test_ddim_is_of_first_order_on_the_papers_schedule_too(spacing: Spacing, end: End):
    schedule = ScheduleConfig(end=end).build()
    counts = [16, 32, 64, 128, 256]
    errors = [error(ddim, schedule.timesteps(steps, spacing), schedule) for steps in counts]
    slope = -np.polyfit(np.log2(counts), np.log2(errors), deg=1)[0]
    assert slope == pytest.approx(1, abs=0.25)
    assert errors[-1] < 0.01


def walked_moments(walk: Callable[..., torch.Tensor], timesteps: list[int]) -> tuple[float, float]:
    """Mean and variance where a walk from N(0, 1) arrives, exactly: it is affine in its start and in each noise.

    Rows: nothing; only the start, of 1; only the noise of step 0, 1 ...
    """
    start = torch.zeros(len(timesteps) + 2, 1, dtype=torch.float64)
    start[1] = 1

    def noise(step, like):
        return torch.eye(len(like), dtype=like.dtype)[:, [step + 2]]

    z = walk(ideal_denoiser(PAPER), start, timesteps, PAPER, noise=noise)[:, 0]
    return float(z[0]), float((z[1:] - z[0]).square().sum())


def analytic_moments(timesteps: list[int], end: tuple[float, float]) -> tuple[float, float]:
    """The same by Ho et al. 2020, eq. 7, in closed form from level to level."""
    mean, variance = 0.0, 1.0
    levels = [*map(PAPER.at, timesteps), end]
    for (alpha_t, sigma_t), (alpha_s, sigma_s) in pairwise(levels):
        kept, beta = alpha_t / alpha_s, 1 - (alpha_t / alpha_s) ** 2
        of_z0, of_z = alpha_s * beta / sigma_t**2, kept * sigma_s**2 / sigma_t**2
        slope = alpha_t * STD**2 / ((alpha_t * STD) ** 2 + sigma_t**2)  # of E[z_0 | z_t]
        mean = of_z0 * (MEAN + slope * (mean - alpha_t * MEAN)) + of_z * mean
        variance = (of_z0 * slope + of_z) ** 2 * variance + beta * sigma_s**2 / sigma_t**2
    return mean, variance


ANCESTRAL = {
    "ddpm": (ddpm.sample, (1.0, 0.0)),
    "ddim, eta 1": (lambda *args, **kwargs: ddim.sample(*args, eta=1.0, **kwargs), PAPER.at(None)),
}


@pytest.mark.parametrize("steps", [1, 10, 50, 300])
@pytest.mark.parametrize("name", ANCESTRAL)
def test_ancestral_walks_have_the_analytic_mean_and_variance(name: str, steps: int):
    walk, end = ANCESTRAL[name]
    timesteps = PAPER.timesteps(steps)
    assert walked_moments(walk, timesteps) == pytest.approx(analytic_moments(timesteps, end), rel=1e-9)


@pytest.mark.parametrize("name", ANCESTRAL)
def test_a_thousand_ancestral_steps_arrive_at_the_data(name: str):
    walk, _ = ANCESTRAL[name]
    mean, variance = walked_moments(walk, PAPER.timesteps(1000))
    assert mean == pytest.approx(MEAN, rel=0.002)
    assert variance == pytest.approx(STD**2, rel=0.03)  # of the discretisation: 0.045 for ddpm at 500
