"""Weights and drawn timesteps arrive in the training loss of a latent diffusion model."""

import pytest
import torch

from ldm_scale.core import rng
from ldm_scale.data.sources import LatentBatch
from ldm_scale.diffusion.objective import ObjectiveConfig, Prediction, Weighting
from ldm_scale.diffusion.schedule import ScheduleConfig
from ldm_scale.diffusion.timesteps import TimestepDraw, draw_timesteps
from ldm_scale.first_stage.base import MomentsKind
from ldm_scale.latent_diffusion.model import DiffusionConfig, LatentDiffusion, LatentDiffusionConfig
from ldm_scale.nn.unet import UNetConfig
from ldm_scale.training.engine import EngineConfig, EngineKind, Precision
from ldm_scale.training.optimizer import OptimizerConfig
from ldm_scale.training.steps import CachedMoments, DiffusionStep

SEED, GLOBAL_BATCH = 5, 8


def build(weighting: Weighting = Weighting.uniform, timesteps: TimestepDraw = TimestepDraw.uniform) -> LatentDiffusion:
    torch.manual_seed(0)
    model = LatentDiffusionConfig(
        unet=UNetConfig(
            in_channels=4, out_channels=4, model_channels=16, channel_mult=[1], attention_factors=[], head_channels=8,
            norm_groups=8, num_res_blocks=1,
        ),
        conditioning=None,
        diffusion=DiffusionConfig(
            schedule=ScheduleConfig(zero_terminal_snr=True),
            objective=ObjectiveConfig(prediction=Prediction.v, weighting=weighting),
            timesteps=timesteps,
        ),
    ).build()  # fmt: skip
    for parameter in model.parameters():  # a zero-initialised output would not depend on the timestep
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@torch.no_grad()
@pytest.mark.parametrize("weighting", Weighting)
def test_the_loss_of_each_sample_is_weighted_by_its_timestep(weighting: Weighting):
    t_B = torch.tensor([0, 1, 400, 998, 999])
    z_0, noise = torch.randn(2, 5, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    plain_B, model = build()(z_0, noise, t_B, None), build(weighting)
    weights = model.objective.weights(model.schedule.snr).float()
    loss_B = model(z_0, noise, t_B, None)
    assert loss_B.dtype == torch.float32 and loss_B.isfinite().all()
    assert torch.equal(loss_B, plain_B * weights[t_B])
    assert torch.equal(loss_B, plain_B) == (weighting is Weighting.uniform)


def loss_of_a_batch(timesteps: TimestepDraw, micro_batch: int) -> float:
    """`train/loss` of the second global batch."""
    model = build(timesteps=timesteps)
    engine = EngineConfig(kind=EngineKind.one_process, precision=Precision.fp32).build(
        global_batch=GLOBAL_BATCH, micro_batch=micro_batch
    )
    engine.prepare(model, OptimizerConfig())
    step = DiffusionStep(
        engine, conditioner=None, moments=CachedMoments(MomentsKind.POINT), latent_scale=1.0,
        diffusion=model.config.diffusion, seed=SEED,
    )  # fmt: skip
    for positions in torch.arange(GLOBAL_BATCH, 2 * GLOBAL_BATCH).split(micro_batch):
        metrics = step(LatentBatch(positions, [], [], latents(positions), None), learning_rate=0.0, images_seen=0)
    engine.close()
    return float(metrics["train/loss"])


def latents(positions: torch.Tensor) -> torch.Tensor:
    return rng.normal(0, "latents", positions, (4, 4, 4))


@pytest.mark.parametrize("timesteps", TimestepDraw)
@pytest.mark.parametrize("micro_batch", [8, 2])
def test_a_step_draws_by_position_in_the_global_batch(timesteps: TimestepDraw, micro_batch: int):
    positions, model = torch.arange(GLOBAL_BATCH, 2 * GLOBAL_BATCH), build()
    noise = rng.normal(SEED, "diffusion/noise", positions, (4, 4, 4))
    t_B = draw_timesteps(timesteps, steps=1000, seed=SEED, positions_B=positions, global_batch=GLOBAL_BATCH)
    expected = float(model(latents(positions), noise, t_B, None).detach().mean())
    assert loss_of_a_batch(timesteps, micro_batch) == pytest.approx(expected, rel=1e-5)
