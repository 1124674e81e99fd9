import math

import pytest
import torch

from ldm_scale.diffusion.schedule import End, NoiseSchedule, ScheduleConfig, Spacing
from ldm_scale.samplers import ddim, dpm_solver
from ldm_scale.samplers.base import Frame

SCHEDULE = ScheduleConfig().build()
Z_T = torch.randn(2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def shrink(z: torch.Tensor, t: int) -> torch.Tensor:
    return torch.tanh(z / 2)


def walk(timesteps: list[int], schedule: NoiseSchedule = SCHEDULE) -> list[Frame]:
    frames: list[Frame] = []
    dpm_solver.sample(shrink, Z_T, timesteps, schedule, watch=frames.append)
    return frames


def test_it_is_the_papers_algorithm():
    """Algorithm 2 as printed, in h and r."""
    timesteps = SCHEDULE.timesteps(20)
    levels = [SCHEDULE.at(t) for t in [*timesteps, None]]
    lambdas = [math.log(alpha / sigma) for alpha, sigma in levels]
    z, before = Z_T, torch.empty(0)
    for i, t in enumerate(timesteps):
        (_, sigma_t), (alpha_s, sigma_s) = levels[i : i + 2]
        h = lambdas[i + 1] - lambdas[i]
        z_0 = shrink(z, t)
        if i == 0:
            mixed = z_0
        else:
            r = (lambdas[i] - lambdas[i - 1]) / h
            mixed = (1 + 1 / (2 * r)) * z_0 - 1 / (2 * r) * before
        z, before = sigma_s / sigma_t * z - alpha_s * (math.exp(-h) - 1) * mixed, z_0
    torch.testing.assert_close(walk(timesteps)[-1].z, z)


@pytest.mark.parametrize(
    "steps, end, plain", [(14, End.first_level, True), (15, End.first_level, False), (15, End.clean, True)]
)
def test_the_last_step_is_plain_where_steps_are_few_or_no_noise_is_left(steps: int, end: End, plain: bool):
    schedule = ScheduleConfig(end=end).build()
    timesteps = schedule.timesteps(steps)
    *_, before, last = walk(timesteps, schedule)
    assert torch.equal(last.z, ddim.sample(shrink, before.z, timesteps[-1:], schedule)) is plain
    assert torch.equal(last.z_0, shrink(before.z, timesteps[-1])) is plain


def test_pure_noise_is_the_limit_of_little_signal():
    """At alpha 0 lambda is -inf: the first step is DDIM's, and the second has nothing within reach to extrapolate."""
    table = ScheduleConfig(zero_terminal_snr=True).build().alphas_cumprod
    assert table[-1] == 0
    little = table.clone()
    little[-1] = 1e-300
    timesteps = SCHEDULE.timesteps(20, Spacing.trailing)
    exact, limit = walk(timesteps, NoiseSchedule(table)), walk(timesteps, NoiseSchedule(little))
    assert torch.equal(exact[1].z_0, shrink(exact[0].z, timesteps[1]))
    assert exact[-1].z.isfinite().all()
    torch.testing.assert_close(exact[-1].z, limit[-1].z, rtol=1e-3, atol=1e-3)
