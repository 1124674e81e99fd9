from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from torch.distributions import Normal, kl_divergence
from torch.nn.functional import l1_loss, mse_loss

from ldm_scale.core.tensors import over_samples
from ldm_scale.diffusion.objective import Loss, Objective, ObjectiveConfig, Prediction, Weighting
from ldm_scale.diffusion.schedule import ScheduleConfig
from ldm_scale.latent_diffusion.model import DiffusionConfig

SCHEDULE = ScheduleConfig().build()
T_B = torch.tensor([0, 1, 250, 600, 999])


@pytest.fixture
def latents() -> tuple[torch.Tensor, torch.Tensor]:
    z_0, noise = torch.randn(2, len(T_B), 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return z_0, noise


def objective(prediction: Prediction, loss: Loss = Loss.l2) -> Objective:
    return ObjectiveConfig(prediction=prediction, loss=loss).build()


@pytest.mark.parametrize("prediction", Prediction)
def test_a_perfect_answer_gives_back_what_went_in(prediction: Prediction, latents):
    z_0, noise = latents
    alpha, sigma = SCHEDULE.levels(T_B, z_0)
    z_t = SCHEDULE.noised(z_0, noise, T_B)
    out = objective(prediction).target(z_0, noise, alpha, sigma)
    torch.testing.assert_close(objective(prediction).to_z0(out, z_t, alpha, sigma), z_0, rtol=0, atol=1e-12)
    torch.testing.assert_close(objective(prediction).to_eps(out, z_t, alpha, sigma), noise, rtol=0, atol=1e-12)


@pytest.mark.parametrize("first", Prediction)
@pytest.mark.parametrize("second", Prediction)
def test_any_answer_means_the_same_in_every_prediction(first: Prediction, second: Prediction, latents):
    """Also a wrong one: z_0, eps and v of an output, re-expressed in another prediction, stay what they were."""
    z_t, out = latents
    alpha, sigma = SCHEDULE.levels(T_B, z_t)
    z_0 = objective(first).to_z0(out, z_t, alpha, sigma)
    eps = objective(first).to_eps(out, z_t, alpha, sigma)
    torch.testing.assert_close(alpha * z_0 + sigma * eps, z_t, rtol=0, atol=1e-11)
    again = objective(second).target(z_0, eps, alpha, sigma)
    torch.testing.assert_close(objective(second).to_z0(again, z_t, alpha, sigma), z_0, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(objective(second).to_eps(again, z_t, alpha, sigma), eps, rtol=1e-10, atol=1e-10)
    v = alpha * eps - sigma * z_0
    torch.testing.assert_close(objective(first).to_v(out, z_t, alpha, sigma), v, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(objective(second).to_v(again, z_t, alpha, sigma), v, rtol=1e-10, atol=1e-10)


CONVERSIONS = {Prediction.eps: Objective.to_eps, Prediction.z0: Objective.to_z0, Prediction.v: Objective.to_v}


@pytest.mark.parametrize("first", Prediction)
@pytest.mark.parametrize("second", Prediction)
def test_conversions_round_trip(first: Prediction, second: Prediction, latents):
    z_t, out = latents
    alpha, sigma = SCHEDULE.levels(T_B, z_t)
    there = CONVERSIONS[second](objective(first), out, z_t, alpha, sigma)
    back = CONVERSIONS[first](objective(second), there, z_t, alpha, sigma)
    torch.testing.assert_close(back, out, rtol=1e-10, atol=1e-10)


def test_conversions_are_exact_where_there_is_no_signal_or_no_noise(latents):
    z_t, out = latents
    for prediction, z_0, eps, v in (
        (Prediction.z0, out, z_t, -out),
        (Prediction.v, -out, z_t, out),
    ):
        no_signal = (out, z_t, 0.0, 1.0)
        assert torch.equal(objective(prediction).to_z0(*no_signal), z_0)
        assert torch.equal(objective(prediction).to_eps(*no_signal), eps)
        assert torch.equal(objective(prediction).to_v(*no_signal), v)
    for prediction in (Prediction.eps, Prediction.v):
        no_noise = (out, z_t, 1.0, 0.0)
        assert torch.equal(objective(prediction).to_z0(*no_noise), z_t)
        assert torch.equal(objective(prediction).to_eps(*no_noise), out)
        assert torch.equal(objective(prediction).to_v(*no_noise), out)


def test_targets(latents):
    z_0, noise = latents
    assert objective(Prediction.eps).target(z_0, noise, 0.6, 0.8) is noise
    assert objective(Prediction.z0).target(z_0, noise, 0.6, 0.8) is z_0
    theirs = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    v = objective(Prediction.v).target(z_0, noise, *SCHEDULE.levels(T_B, z_0))
    torch.testing.assert_close(v, theirs.get_velocity(z_0, noise, T_B).double(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prediction", Prediction)
def test_levels_may_be_floats(prediction: Prediction, latents):
    z_t, out = latents
    alpha, sigma = SCHEDULE.at(600)
    per_sample = [over_samples(torch.full((len(T_B),), x, dtype=torch.float64), z_t) for x in (alpha, sigma)]
    torch.testing.assert_close(
        objective(prediction).to_z0(out, z_t, alpha, sigma), objective(prediction).to_z0(out, z_t, *per_sample)
    )


@pytest.mark.parametrize("prediction", Prediction)
def test_half_precision_outputs_are_converted_in_float32(prediction: Prediction, latents):
    z_t, out = latents[0].float(), latents[1].bfloat16()
    z_0 = objective(prediction).to_z0(out, z_t, *SCHEDULE.at(600))
    assert z_0.dtype == torch.float32
    assert torch.equal(z_0, objective(prediction).to_z0(out.float(), z_t, *SCHEDULE.at(600)))


@pytest.mark.parametrize("loss, theirs", [(Loss.l2, mse_loss), (Loss.l1, l1_loss)])
def test_the_loss_is_one_mean_per_sample_in_float32(loss: Loss, theirs, latents):
    out, target = latents[0].bfloat16(), latents[1].float()
    loss_B = objective(Prediction.eps, loss).per_sample_loss(out, target)
    assert loss_B.shape == (len(T_B),) and loss_B.dtype == torch.float32
    for i in range(len(T_B)):
        torch.testing.assert_close(loss_B[i], theirs(out[i].float(), target[i]))
    torch.testing.assert_close(loss_B.mean(), theirs(out.float(), target))


def test_loss_and_target_carry_gradients(latents):
    out = latents[0].float().requires_grad_()
    objective(Prediction.v).per_sample_loss(out, latents[1].float()).sum().backward()
    torch.testing.assert_close(out.grad, 2 * (latents[0] - latents[1]).float() / out[0].numel())


def weighted(prediction: Prediction, weighting: Weighting, **keys: Any) -> Objective:
    return ObjectiveConfig(prediction=prediction, weighting=weighting, **keys).build()


@pytest.mark.parametrize("prediction", Prediction)
def test_uniform_weights_leave_the_loss_as_it_is(prediction: Prediction):
    weights = weighted(prediction, Weighting.uniform).weights(SCHEDULE.snr)
    assert torch.equal(weights, torch.ones(1000, dtype=torch.float64))


@pytest.mark.parametrize("weighting", [Weighting.min_snr, Weighting.vlb])
def test_a_weighted_loss_is_the_same_whatever_is_predicted(weighting: Weighting, latents):
    """One wrong estimate of z_0, said as eps, z_0 or v. At timestep 0 the bound is by convention, not by this rule."""
    t_B = T_B.clamp(min=1)
    (z_0, noise), estimate = latents, latents[0].roll(1)
    alpha, sigma = SCHEDULE.levels(t_B, z_0)
    z_t = SCHEDULE.noised(z_0, noise, t_B)
    losses = []
    for prediction, convert in CONVERSIONS.items():
        out = convert(objective(Prediction.z0), estimate, z_t, alpha, sigma)
        loss_B = objective(prediction).per_sample_loss(out, objective(prediction).target(z_0, noise, alpha, sigma))
        losses.append(loss_B * weighted(prediction, weighting).weights(SCHEDULE.snr)[t_B])
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-10, atol=0)
    torch.testing.assert_close(losses[2], losses[1], rtol=1e-10, atol=0)


def test_min_snr_is_that_of_its_paper():
    """Hang et al. 2023: min(SNR, gamma) on z_0, over SNR on eps, over SNR + 1 on v."""
    snr = torch.tensor([100.0, 5.0, 1.0, 0.25], dtype=torch.float64)
    expected = {
        Prediction.eps: [0.05, 1.0, 1.0, 1.0],
        Prediction.z0: [5.0, 5.0, 1.0, 0.25],
        Prediction.v: [5 / 101, 5 / 6, 0.5, 0.2],
    }
    for prediction, weights in expected.items():
        found = weighted(prediction, Weighting.min_snr).weights(snr)
        torch.testing.assert_close(found, torch.tensor(weights, dtype=torch.float64), rtol=1e-14, atol=0)
    twenty = weighted(Prediction.z0, Weighting.min_snr, min_snr_gamma=20.0).weights(snr)
    assert twenty.tolist() == [20.0, 5.0, 1.0, 0.25]


def test_the_bound_weighs_noise_as_ho_s_equation_12():
    alphas_cumprod = SCHEDULE.alphas_cumprod
    alphas = alphas_cumprod[1:] / alphas_cumprod[:-1]
    variances = (1 - alphas_cumprod[:-1]) / (1 - alphas_cumprod[1:]) * (1 - alphas)
    ho = (1 - alphas).square() / (2 * variances * alphas * (1 - alphas_cumprod[1:]))
    weights = weighted(Prediction.eps, Weighting.vlb).weights(SCHEDULE.snr)
    torch.testing.assert_close(weights[1:], ho, rtol=1e-10, atol=0)
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    "prediction, zero_terminal_snr",
    [*((prediction, False) for prediction in Prediction), (Prediction.z0, True), (Prediction.v, True)],
)
def test_the_bound_is_a_divergence_between_gaussians(prediction: Prediction, zero_terminal_snr: bool, latents):
    """KL(q(z_s | z_t, z_0) || q(z_s | z_t, estimate)), s = t - 1, with the posterior of two Gaussians by Bayes."""
    schedule = ScheduleConfig(zero_terminal_snr=zero_terminal_snr).build()
    t_B = torch.tensor([1, 2, 250, 600, 999])
    z_0, noise = latents
    alpha, sigma = schedule.levels(t_B, z_0)
    alpha_s, sigma_s = schedule.levels(t_B - 1, z_0)
    z_t, target = schedule.noised(z_0, noise, t_B), objective(prediction).target(z_0, noise, alpha, sigma)
    out = target + 0.1 * noise.roll(1)
    decay = alpha / alpha_s
    variance = 1 / (1 / sigma_s**2 + decay**2 / (1 - decay**2))

    def posterior(z_0: torch.Tensor) -> Normal:
        mean = variance * (alpha_s * z_0 / sigma_s**2 + decay * z_t / (1 - decay**2))
        return Normal(mean, variance.sqrt())

    estimate = objective(prediction).to_z0(out, z_t, alpha, sigma)
    divergence_B = kl_divergence(posterior(z_0), posterior(estimate)).flatten(1).mean(1)
    weights = weighted(prediction, Weighting.vlb).weights(schedule.snr)
    loss_B = weights[t_B] * objective(prediction).per_sample_loss(out, target)
    torch.testing.assert_close(loss_B, divergence_B, rtol=1e-8, atol=0)


@pytest.mark.parametrize("weighting", Weighting)
@pytest.mark.parametrize("prediction", [Prediction.z0, Prediction.v])
def test_weights_are_finite_without_any_signal(prediction: Prediction, weighting: Weighting):
    weights = weighted(prediction, weighting).weights(ScheduleConfig(zero_terminal_snr=True).build().snr)
    assert weights.isfinite().all() and (weights >= 0).all()


@pytest.mark.parametrize(
    "keys, message",
    [
        (
            {"loss": Loss.l1, "weighting": Weighting.min_snr},
            r"weighting=min_snr .*diffusion\.objective\.loss=l1: choose",
        ),
        ({"loss": Loss.l1, "weighting": Weighting.vlb}, r"weighting=vlb .*diffusion\.objective\.loss=l1: choose"),
        ({"min_snr_gamma": 0.0}, r"min_snr_gamma=0\.0; must be above 0"),
    ],
)
def test_impossible_objectives_are_refused(keys: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=rf"^diffusion\.objective\.{message}"):
        ObjectiveConfig(**keys)


def test_the_noise_cannot_be_predicted_at_zero_terminal_snr():
    schedule = ScheduleConfig(zero_terminal_snr=True)
    with pytest.raises(ValueError, match=r"diffusion\.schedule\.zero_terminal_snr=true .*prediction=eps.* v or z0"):
        DiffusionConfig(schedule=schedule, objective=ObjectiveConfig())
    DiffusionConfig(schedule=schedule, objective=ObjectiveConfig(prediction=Prediction.v))
