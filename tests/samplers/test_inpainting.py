"""What is known stays known, at its own level of noise, in every sampler."""

import pytest
import torch
from torch import Tensor

from ldm_scale.diffusion.schedule import End, ScheduleConfig, Spacing
from ldm_scale.samplers.base import Frame, SamplerConfig
from ldm_scale.samplers.ddim import DDIMConfig
from ldm_scale.samplers.ddpm import DDPMConfig
from ldm_scale.samplers.dpm_solver import DPMSolverConfig
from ldm_scale.samplers.inpainting import keep_known
from ldm_scale.samplers.plms import PLMSConfig

SAMPLERS = {
    "ddim": DDIMConfig(steps=12),
    "ddim_ancestral": DDIMConfig(steps=12, eta=1.0),
    "ddpm": DDPMConfig(steps=12),
    "plms": PLMSConfig(steps=12),
    "dpm_solver": DPMSolverConfig(steps=12, spacing=Spacing.leading),
}


def contrary(z: Tensor, t: int) -> Tensor:
    """An estimate that has nothing to do with what is known."""
    return torch.tanh(z.flip(-1)) - 3


@pytest.mark.parametrize("name", SAMPLERS)
def test_known_cells_are_the_known_latent_noised_to_each_level(name: str):
    config: SamplerConfig = SAMPLERS[name]
    schedule = ScheduleConfig(end=End.clean).build()
    timesteps = config.timesteps(schedule)
    known, paint = torch.randn(4, 4, 32, 32), torch.zeros(1, 1, 32, 32)
    paint[..., 16:] = 1
    noise = torch.randn_like(known)
    alpha, sigma = schedule.at(timesteps[0])
    frames: list[Frame] = []
    z = config.build(schedule, timesteps)(
        keep_known(contrary, known, paint), alpha * known + sigma * noise, watch=frames.append
    )
    for frame, t in zip(frames, [*timesteps[1:], None], strict=True):
        alpha, sigma = schedule.at(t)
        left = frame.z[..., :16] - alpha * known[..., :16]
        assert left.std() == pytest.approx(sigma, abs=0.03)
        assert abs(float(left.mean())) < 0.03
    torch.testing.assert_close(z[..., :16], known[..., :16], rtol=0, atol=1e-5)
    assert (z[..., 16:] - known[..., 16:]).abs().mean() > 1


def test_soft_masks_mix_the_estimates():
    known, paint = torch.ones(1, 1, 1, 3), torch.tensor([0.0, 0.25, 1.0]).view(1, 1, 1, 3)
    mixed = keep_known(lambda z, t: z, known, paint)(torch.full((1, 1, 1, 3), 5.0), 0)
    assert mixed.flatten().tolist() == [1.0, 2.0, 5.0]
