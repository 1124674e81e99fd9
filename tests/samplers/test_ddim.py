import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from ldm_scale.core import rng
from ldm_scale.diffusion.objective import ObjectiveConfig
from ldm_scale.diffusion.schedule import End, NoiseSchedule, ScheduleConfig, Spacing
from ldm_scale.samplers.base import guided_denoiser
from ldm_scale.samplers.ddim import DDIMConfig, fresh_noise, sample

SCHEDULE = ScheduleConfig().build()
MEAN, STD = 0.7, 0.4  # of the Gaussian data below


def spread(level: tuple[float, float]) -> float:
    """Standard deviation of z_t for data of standard deviation STD."""
    alpha, sigma = level
    return math.sqrt((alpha * STD) ** 2 + sigma**2)


def ideal_denoiser(schedule: NoiseSchedule):
    """E[z_0 | z_t] for z_0 ~ N(MEAN, STD^2): linear regression."""

    def denoise(z, t):
        alpha, sigma = schedule.at(t)
        return MEAN + alpha * STD**2 / spread((alpha, sigma)) ** 2 * (z - alpha * MEAN)

    return denoise


def ideal_start_and_end(schedule: NoiseSchedule, t: int, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The exact solution keeps (z - alpha MEAN) / spread constant along the deterministic walk."""
    (alpha_t, _), (alpha_0, _) = schedule.at(t), schedule.at(None)
    return alpha_t * MEAN + spread(schedule.at(t)) * u, alpha_0 * MEAN + spread(schedule.at(None)) * u


@pytest.mark.parametrize("spacing, end", [(Spacing.leading, End.first_level), (Spacing.trailing, End.clean)])
def test_error_falls_with_the_first_order(spacing: Spacing, end: End):
    schedule = ScheduleConfig(end=end).build()
    u = torch.linspace(-2, 2, 9, dtype=torch.float64)
    counts, errors = [16, 32, 64, 128, 256], []
    for steps in counts:
        timesteps = schedule.timesteps(steps, spacing)
        start, end_z = ideal_start_and_end(schedule, timesteps[0], u)
        z_0 = sample(ideal_denoiser(schedule), start, timesteps, schedule)
        errors.append(float((z_0 - end_z).abs().mean()))
    slope = -np.polyfit(np.log2(counts), np.log2(errors), deg=1)[0]
    assert slope == pytest.approx(1, abs=0.25)
    assert errors[-1] < 0.01


def toy_noise_predictor(z: torch.Tensor, t: int) -> torch.Tensor:
    """A smooth nonlinear eps whose trajectories neither die nor explode."""
    return torch.tanh(z) + 0.3 * torch.cos(z.roll(1, -1) + t / 100)


def toy_denoise(z: torch.Tensor, t: int) -> torch.Tensor:
    alpha, sigma = SCHEDULE.at(t)
    return (z - sigma * toy_noise_predictor(z, t)) / alpha


def diffusers_trajectory(z: torch.Tensor, noises: list[torch.Tensor], eta: float, steps: int) -> torch.Tensor:
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
        steps_offset=1, set_alpha_to_one=False, clip_sample=False,
    )  # fmt: skip
    scheduler.set_timesteps(steps)
    for noise, t in zip(noises, scheduler.timesteps, strict=True):
        eps = toy_noise_predictor(z, int(t))
        z = scheduler.step(eps, t, z, eta=eta, variance_noise=noise if eta > 0 else None).prev_sample
    return z


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_the_walk_is_that_of_diffusers_set_up_as_the_reference(eta: float):
    generator = torch.Generator().manual_seed(0)
    z_T = torch.randn(4, 4, 8, 8, generator=generator)
    noises = [torch.randn(z_T.shape, generator=generator) for _ in range(50)]
    ours = sample(toy_denoise, z_T, SCHEDULE.timesteps(50), SCHEDULE, eta=eta, noise=lambda step, like: noises[step])
    theirs = diffusers_trajectory(z_T, noises, eta, steps=50)
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < 1e-4


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_every_eta_keeps_the_marginal_distributions(eta: float):
    """With one possible z_0, z_s is N(alpha_s z_0, sigma_s^2) after every step; Song et al., lemma 1."""
    timesteps, point = SCHEDULE.timesteps(10), 0.8
    alpha, sigma = SCHEDULE.at(timesteps[0])
    n = 200_000
    z = alpha * point + sigma * rng.normal(0, "start", torch.arange(n), (1,))
    visited = {}

    def denoise(z, t):
        visited[t] = z
        return torch.full_like(z, point)

    visited[None] = sample(
        denoise,
        z,
        timesteps,
        SCHEDULE,
        eta=eta,
        noise=lambda i, like: rng.normal(0, f"fresh{i}", torch.arange(n), (1,)),
    )
    for t, z_t in visited.items():
        alpha, sigma = SCHEDULE.at(t)
        assert float(z_t.mean()) == pytest.approx(alpha * point, abs=5 * sigma / math.sqrt(n)), t
        assert float(z_t.std()) == pytest.approx(sigma, rel=5 / math.sqrt(2 * n)), t


@pytest.mark.parametrize("t, s", [(981, 961), (500, 1), (21, 1), (1, 0)])
def test_eta_one_draws_the_posterior_of_the_forward_process(t: int, s: int):
    """Variance of q(z_s | z_t, z_0), by conditioning the joint Gaussian of (z_s, z_t) given z_0."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = SCHEDULE.at(t), SCHEDULE.at(s)
    covariance = alpha_t / alpha_s * sigma_s**2
    variance = sigma_s**2 - covariance**2 / sigma_t**2
    assert fresh_noise(alpha_t, sigma_t, alpha_s, sigma_s) ** 2 == pytest.approx(variance, rel=1e-6)

    n = 200_000
    fresh = rng.normal(0, "fresh", torch.arange(n), (1,)).double()
    z = sample(
        lambda z, _: torch.full_like(z, 0.3), torch.full((n, 1), 0.9, dtype=torch.float64), [t],
        _ending_at(s), eta=1.0, noise=lambda step, like: fresh,
    )  # fmt: skip
    mean = alpha_s * 0.3 + covariance / sigma_t**2 * (0.9 - alpha_t * 0.3)
    assert float(z.mean()) == pytest.approx(mean, abs=5 * math.sqrt(variance / n))
    assert float(z.var()) == pytest.approx(variance, rel=0.02)


def _ending_at(s: int) -> NoiseSchedule:
    """The same levels from s upwards, so that one step from t ends there."""
    table = SCHEDULE.alphas_cumprod.clone()
    table[0] = table[s]
    return NoiseSchedule(table)


def test_a_clean_end_returns_the_last_estimate():
    schedule = ScheduleConfig(end=End.clean).build()
    estimates = []

    def denoise(z, t):
        estimates.append(torch.tanh(z))
        return estimates[-1]

    for eta in (0.0, 1.0):
        z_0 = sample(denoise, torch.randn(2, 3), schedule.timesteps(5), schedule, eta=eta)
        torch.testing.assert_close(z_0, estimates[-1])


def test_eta_zero_draws_nothing_and_repeats_itself():
    def no_noise(step, like):
        raise AssertionError("drew noise")

    z_T = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    walks = [sample(toy_denoise, z_T, SCHEDULE.timesteps(20), SCHEDULE, noise=no_noise) for _ in range(2)]
    assert torch.equal(*walks)
    assert not torch.equal(walks[0], z_T)


def test_an_image_does_not_depend_on_the_batch_it_is_sampled_in():
    def draw(indices):
        def noise(step, like):
            return rng.normal(3, f"sampler/{step}", indices, like.shape[1:])

        z_T = rng.normal(3, "z_T", indices, (4, 8, 8))
        return sample(toy_denoise, z_T, SCHEDULE.timesteps(10), SCHEDULE, eta=1.0, noise=noise)

    whole = draw(torch.arange(6))
    torch.testing.assert_close(torch.cat((draw(torch.tensor([0, 1])), draw(torch.tensor([2, 3, 4, 5])))), whole)


def test_noise_is_told_the_step_and_what_it_should_be_like():
    asked = []

    def noise(step, like):
        asked.append((step, like.shape, like.dtype))
        return torch.zeros_like(like)

    sample(toy_denoise, torch.randn(2, 4, 8, 8), SCHEDULE.timesteps(3), SCHEDULE, eta=1.0, noise=noise)
    assert asked == [(step, (2, 4, 8, 8), torch.float32) for step in range(3)]


def test_noise_comes_from_the_global_generator_by_default():
    z_T = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    walks = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        walks.append(sample(toy_denoise, z_T, SCHEDULE.timesteps(5), SCHEDULE, eta=1.0))
    assert torch.equal(walks[0], walks[1]) and not torch.equal(walks[0], walks[2])


def test_progress_and_visited_timesteps():
    seen, visited = [], []

    def denoise(z, t):
        visited.append(t)
        assert not torch.is_grad_enabled()
        return z

    sample(denoise, torch.randn(1, 4), [900, 500, 3], SCHEDULE, progress=lambda done, total: seen.append((done, total)))
    assert visited == [900, 500, 3]
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_half_precision_noise_is_walked_in_float32():
    assert sample(toy_denoise, torch.randn(1, 4).bfloat16(), [10], SCHEDULE).dtype == torch.float32


@pytest.mark.parametrize("timesteps", [[], [1, 500], [500, 500], [1000, 1], [5, -1]])
def test_impossible_timesteps_are_refused(timesteps: list[int]):
    with pytest.raises(ValueError, match="timestep"):
        sample(toy_denoise, torch.randn(1, 4), timesteps, SCHEDULE)


def test_config_builds_the_same_walk():
    z_T = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    config = DDIMConfig(steps=7, eta=1.0, spacing=Spacing.trailing)
    walk = config.build(SCHEDULE)(toy_denoise, z_T, noise=lambda step, like: torch.ones_like(like))
    timesteps = SCHEDULE.timesteps(7, Spacing.trailing)
    expected = sample(toy_denoise, z_T, timesteps, SCHEDULE, eta=1.0, noise=lambda step, like: torch.ones_like(like))
    assert torch.equal(walk, expected)


@pytest.mark.parametrize("values", [{"steps": 0}, {"eta": -0.1}, {"eta": 1.1}, {"guidance": -1.0}])
def test_impossible_configs_are_refused(values: dict):
    ((key, value),) = values.items()
    with pytest.raises(ValueError, match=rf"sampler\.{key}={value}"):
        DDIMConfig(**values)


def test_more_steps_than_the_schedule_has_are_refused():
    with pytest.raises(ValueError, match="1001 sampling steps"):
        DDIMConfig(steps=1001).build(SCHEDULE)


def test_guided_walk_through_a_noise_predicting_network():
    """The whole chain against the same arithmetic written out: network, guidance, conversion, walk."""
    context = torch.rand(2, 3, 5)

    def network(z, t_B, context_BLD):
        return torch.tanh(z) * context_BLD.mean((1, 2))[:, None, None, None] + t_B[:, None, None, None] / 2000

    null = torch.zeros_like(context)
    denoise = guided_denoiser(
        network, SCHEDULE, ObjectiveConfig().build(), {"context_BLD": context}, {"context_BLD": null}, 3.0
    )
    z = z_T = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    timesteps = SCHEDULE.timesteps(10)
    for t, s in zip(timesteps, [*timesteps[1:], None], strict=True):
        (alpha_t, sigma_t), (alpha_s, sigma_s) = SCHEDULE.at(t), SCHEDULE.at(s)
        eps_u, eps_c = (network(z, torch.full((2,), t), c) for c in (null, context))
        eps = eps_u + 3.0 * (eps_c - eps_u)
        z = alpha_s * (z - sigma_t * eps) / alpha_t + sigma_s * eps
    torch.testing.assert_close(sample(denoise, z_T, timesteps, SCHEDULE), z, rtol=1e-4, atol=1e-4)
