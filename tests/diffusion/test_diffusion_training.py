"""Weights and drawn timesteps arrive in the training loss of a latent diffusion model."""

import json

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
from ldm_scale.training.engine import Engine, EngineConfig, EngineKind, Precision
from ldm_scale.training.intake import Intake
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


def step_of(micro_batch: int, timesteps: TimestepDraw = TimestepDraw.uniform) -> tuple[Engine, DiffusionStep]:
    model = build(timesteps=timesteps)
    engine = EngineConfig(kind=EngineKind.one_process, precision=Precision.fp32).build(
        global_batch=GLOBAL_BATCH, micro_batch=micro_batch
    )
    engine.prepare(model, OptimizerConfig())
    return engine, DiffusionStep(
        engine, conditioner=None, moments=CachedMoments(MomentsKind.POINT), latent_scale=1.0,
        diffusion=model.config.diffusion, seed=SEED, intake=Intake(shown=0),
    )  # fmt: skip


def take(step: DiffusionStep, positions: torch.Tensor) -> dict[str, torch.Tensor]:
    """One micro batch; no weight moves."""
    batch = LatentBatch(positions, [], [], latents(positions), None)
    return dict(step(batch, learning_rate=0.0, images_seen=0))


def loss_of_a_batch(timesteps: TimestepDraw, micro_batch: int) -> float:
    """`train/loss` of the second global batch."""
    engine, step = step_of(micro_batch, timesteps)
    for positions in torch.arange(GLOBAL_BATCH, 2 * GLOBAL_BATCH).split(micro_batch):
        metrics = take(step, positions)
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


def losses_by_hand(positions: torch.Tensor) -> dict[str, float]:
    """The mean loss of the samples in each range of timesteps; nothing of a range without samples."""
    noise, found = rng.normal(SEED, "diffusion/noise", positions, (4, 4, 4)), dict[str, list[float]]()
    t_B = draw_timesteps(TimestepDraw.uniform, steps=1000, seed=SEED, positions_B=positions, global_batch=GLOBAL_BATCH)
    for t, loss in zip(t_B.tolist(), build()(latents(positions), noise, t_B, None).tolist(), strict=True):
        found.setdefault(f"train/loss_t{t // 100}00", []).append(loss)
    return {name: sum(losses) / len(losses) for name, losses in found.items()}


def test_losses_by_timestep_are_of_all_since_the_last_line_and_go_on_after_a_resume():
    first, second = torch.arange(2 * GLOBAL_BATCH), torch.arange(2 * GLOBAL_BATCH, 3 * GLOBAL_BATCH)
    engine, step = step_of(micro_batch=2)
    for positions in first.split(2):
        take(step, positions)
    assert engine.mean_over_ranks({}, step.since_last_line()) == pytest.approx(losses_by_hand(first), rel=1e-5)
    assert engine.mean_over_ranks({}, step.since_last_line()) == {}
    for positions in second.split(2):
        take(step, positions)
    state = {"step": json.loads(json.dumps(step.state()))}
    found = engine.mean_over_ranks({}, step.since_last_line())
    assert found == pytest.approx(losses_by_hand(second), rel=1e-5)
    assert 1 < len(found) < 10
    step.resume(state)
    assert engine.mean_over_ranks({}, step.since_last_line()) == found
    engine.close()


def test_a_loss_that_is_no_number_is_in_no_mean():
    engine, step = step_of(micro_batch=8)
    positions = torch.arange(GLOBAL_BATCH)
    moments = latents(positions)
    moments[0] = torch.nan
    step(LatentBatch(positions, [], [], moments, None), learning_rate=0.0, images_seen=0)
    assert engine.mean_over_ranks({}, step.since_last_line()) == pytest.approx(losses_by_hand(positions[1:]), rel=1e-5)
    engine.close()
