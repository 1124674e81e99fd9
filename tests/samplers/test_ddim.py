import math

import pytest
import torch

from ldm_scale.core import rng
from ldm_scale.diffusion.objective import ObjectiveConfig
from ldm_scale.diffusion.schedule import End, NoiseSchedule, ScheduleConfig, Spacing
from ldm_scale.samplers.base import guided_denoiser, steps_through
from ldm_scale.samplers.ddim import DDIMConfig, sample

SCHEDULE = ScheduleConfig().build()


def toy_noise_predictor(z: torch.Tensor, t: int) -> torch.Tensor:
    """A smooth nonlinear eps whose trajectories neither die nor explode."""
    return torch.tanh(z) + 0.3 * torch.cos(z.roll(1, -1) + t / 100)


def toy_denoise(z: torch.Tensor, t: int) -> torch.Tensor:
    alpha, sigma = SCHEDULE.at(t)
    return (z - sigma * toy_noise_predictor(z, t)) / alpha


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
    step, _ = steps_through([t, s], SCHEDULE)
    assert step.posterior_std() ** 2 == pytest.approx(variance, rel=1e-6)

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


def test_config_builds_the_same_walk():
    z_T = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    config = DDIMConfig(steps=7, eta=1.0, spacing=Spacing.trailing)
    timesteps = config.timesteps(SCHEDULE)
    assert timesteps == SCHEDULE.timesteps(7, Spacing.trailing)
    walk = config.build(SCHEDULE, timesteps)(toy_denoise, z_T, noise=lambda step, like: torch.ones_like(like))
    expected = sample(toy_denoise, z_T, timesteps, SCHEDULE, eta=1.0, noise=lambda step, like: torch.ones_like(like))
    assert torch.equal(walk, expected)


@pytest.mark.parametrize("eta", [-0.1, 1.1])
def test_an_impossible_eta_is_refused(eta: float):
    with pytest.raises(ValueError, match=rf"sampler\.eta={eta}"):
        DDIMConfig(eta=eta)
    with pytest.raises(ValueError, match=rf"sampler\.eta={eta}"):
        sample(toy_denoise, torch.randn(1, 4), [10], SCHEDULE, eta=eta)


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
