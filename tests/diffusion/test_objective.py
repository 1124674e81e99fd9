import pytest
import torch
from diffusers import DDPMScheduler
from torch.nn.functional import l1_loss, mse_loss

from ldm_scale.core.tensors import over_samples
from ldm_scale.diffusion.objective import Loss, Objective, ObjectiveConfig, Prediction
from ldm_scale.diffusion.schedule import ScheduleConfig

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
    """Also a wrong one: z_0 and eps of an output, re-expressed in another prediction, stay what they were."""
    z_t, out = latents
    alpha, sigma = SCHEDULE.levels(T_B, z_t)
    z_0 = objective(first).to_z0(out, z_t, alpha, sigma)
    eps = objective(first).to_eps(out, z_t, alpha, sigma)
    torch.testing.assert_close(alpha * z_0 + sigma * eps, z_t, rtol=0, atol=1e-11)
    again = objective(second).target(z_0, eps, alpha, sigma)
    torch.testing.assert_close(objective(second).to_z0(again, z_t, alpha, sigma), z_0, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(objective(second).to_eps(again, z_t, alpha, sigma), eps, rtol=1e-10, atol=1e-10)


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
