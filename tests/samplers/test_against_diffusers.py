"""Samplers against the schedulers of diffusers, 50 steps on a toy network, all set up as the reference."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, PNDMScheduler
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

from ldm_scale.diffusion.objective import ObjectiveConfig, Prediction
from ldm_scale.diffusion.schedule import End, NoiseSchedule, ScheduleConfig, Spacing
from ldm_scale.samplers import ddim, ddpm, dpm_solver, plms
from ldm_scale.samplers.base import Denoise, guided_denoiser

SCHEDULE = ScheduleConfig().build()
TIMESTEPS = SCHEDULE.timesteps(50)
SCALED_LINEAR = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
LEADING = {"steps_offset": 1, "set_alpha_to_one": False}
THEIRS = {Prediction.eps: "epsilon", Prediction.v: "v_prediction"}
Z_T = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def network(z: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
    """Smooth and nonlinear; taken as eps or as v, its trajectories neither die nor explode."""
    return torch.tanh(z) + 0.3 * torch.cos(z.roll(1, -1) + t_B[:, None, None, None] / 100)


def denoiser(prediction: Prediction, schedule: NoiseSchedule = SCHEDULE) -> Denoise:
    return guided_denoiser(network, schedule, ObjectiveConfig(prediction=prediction).build(), {})


def seeded_noise(seed: int):
    generator = torch.Generator().manual_seed(seed)
    return lambda step, like: torch.randn(like.shape, generator=generator)


def their_walk(scheduler, model=network, **step) -> torch.Tensor:
    z = Z_T
    for t in scheduler.timesteps:
        z = scheduler.step(model(z, t.expand(len(z))), t, z, **step).prev_sample
    return z


def assert_same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < 1e-4


@pytest.mark.parametrize("prediction", THEIRS)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim(prediction: Prediction, eta: float):
    scheduler = DDIMScheduler(**SCALED_LINEAR, **LEADING, clip_sample=False, prediction_type=THEIRS[prediction])
    scheduler.set_timesteps(50)
    theirs = their_walk(scheduler, eta=eta, generator=torch.Generator().manual_seed(1))
    assert_same(ddim.sample(denoiser(prediction), Z_T, TIMESTEPS, SCHEDULE, eta=eta, noise=seeded_noise(1)), theirs)


def test_ddim_from_zero_terminal_snr():
    schedule = ScheduleConfig(zero_terminal_snr=True).build()
    timesteps = schedule.timesteps(50, Spacing.trailing)
    assert schedule.at(timesteps[0]) == (0.0, 1.0)
    scheduler = DDIMScheduler(
        **SCALED_LINEAR, **LEADING, clip_sample=False, prediction_type="v_prediction",
        rescale_betas_zero_snr=True, timestep_spacing="trailing",
    )  # fmt: skip
    scheduler.set_timesteps(50)
    assert_same(ddim.sample(denoiser(Prediction.v, schedule), Z_T, timesteps, schedule), their_walk(scheduler))


@pytest.mark.parametrize("prediction", THEIRS)
def test_ddpm(prediction: Prediction):
    scheduler = DDPMScheduler(
        **SCALED_LINEAR, steps_offset=1, variance_type="fixed_small", clip_sample=False,
        prediction_type=THEIRS[prediction],
    )  # fmt: skip
    scheduler.set_timesteps(50)
    theirs = their_walk(scheduler, generator=torch.Generator().manual_seed(1))
    assert_same(ddpm.sample(denoiser(prediction), Z_T, TIMESTEPS, SCHEDULE, noise=seeded_noise(1)), theirs)


def test_plms():
    scheduler = PNDMScheduler(**SCALED_LINEAR, **LEADING, skip_prk_steps=True)
    scheduler.set_timesteps(50)
    assert_same(plms.sample(denoiser(Prediction.eps), Z_T, TIMESTEPS, SCHEDULE), their_walk(scheduler))


def test_plms_with_v_extrapolates_the_noise():
    """Theirs, told of v, extrapolates v and leaves z where it is, which is of first order; so they are given eps."""
    objective = ObjectiveConfig(prediction=Prediction.v).build()

    def implied_eps(z: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
        return objective.to_eps(network(z, t_B), z, *SCHEDULE.at(int(t_B[0])))

    scheduler = PNDMScheduler(**SCALED_LINEAR, **LEADING, skip_prk_steps=True)
    scheduler.set_timesteps(50)
    assert_same(plms.sample(denoiser(Prediction.v), Z_T, TIMESTEPS, SCHEDULE), their_walk(scheduler, implied_eps))


@pytest.mark.parametrize("prediction", THEIRS)
@pytest.mark.parametrize("steps", [50, 14])
@pytest.mark.parametrize("end, sigma_last", [(End.first_level, "sigma_min"), (End.clean, "zero")])
def test_dpm_solver(prediction: Prediction, steps: int, end: End, sigma_last: str):
    schedule = ScheduleConfig(end=end).build()
    timesteps = schedule.timesteps(steps)
    scheduler = DPMSolverMultistepScheduler(
        **SCALED_LINEAR, final_sigmas_type=sigma_last, prediction_type=THEIRS[prediction]
    )
    scheduler.set_timesteps(timesteps=timesteps)
    assert_same(dpm_solver.sample(denoiser(prediction, schedule), Z_T, timesteps, schedule), their_walk(scheduler))


@pytest.mark.parametrize("rescale", [0.3, 0.7, 1.0])
@pytest.mark.parametrize("prediction", Prediction)
def test_guidance_rescale(prediction: Prediction, rescale: float):
    objective, t = ObjectiveConfig(prediction=prediction).build(), 600
    brightness_u, brightness_c = torch.rand(2, 4, generator=torch.Generator().manual_seed(2))

    def conditional(z: torch.Tensor, t_B: torch.Tensor, vector_BE: torch.Tensor) -> torch.Tensor:
        return network(z, t_B) * vector_BE[:, :, None, None]

    denoise = guided_denoiser(
        conditional, SCHEDULE, objective, {"vector_BE": brightness_c[:, None]}, {"vector_BE": brightness_u[:, None]},
        scale=7.5, rescale=rescale,
    )  # fmt: skip
    t_B = torch.full((4,), t)
    out_u, out_c = (conditional(Z_T, t_B, b[:, None]) for b in (brightness_u, brightness_c))
    theirs = rescale_noise_cfg(out_u + 7.5 * (out_c - out_u), out_c, guidance_rescale=rescale)
    assert_same(denoise(Z_T, t), objective.to_z0(theirs, Z_T, *SCHEDULE.at(t)))
