"""DDPM: denoising diffusion probabilistic models, sampled from step to step (Ho et al. 2020).

Tensors and a denoiser in, latents out; knows neither what the network predicts nor what it is conditioned on. The
estimate of z_0 is not clipped, as in the reference's latent models.

Shape letters: B batch, C channels, H W latent height and width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ldm_scale.diffusion.schedule import NoiseSchedule
from ldm_scale.samplers.base import (
    Denoise,
    Frame,
    Noise,
    Sampler,
    SamplerConfig,
    Watch,
    full_precision,
    global_noise,
    steps_through,
)


@dataclass(kw_only=True, slots=True)
class DDPMConfig(SamplerConfig):
    """Ancestral sampling, Ho et al. 2020: every training timestep once. With fewer, DDIM needs less for the same."""

    steps: int = 1000

    def build(self, schedule: NoiseSchedule, timesteps: Sequence[int]) -> Sampler:
        return partial(sample, timesteps=timesteps, schedule=schedule)


@torch.no_grad()
def sample(
    denoise: Denoise,
    z: Tensor,
    timesteps: Sequence[int],
    schedule: NoiseSchedule,
    *,
    noise: Noise | None = None,
    watch: Watch | None = None,
) -> Tensor:
    """Walk from noise to a latent, drawing each level from its posterior; Ho et al. 2020, algorithm 2.

    The variance is the posterior's ("fixed small", the reference's), between the timesteps visited where they are not
    all. Up to its end this is DDIM at eta 1; the last step returns the estimate of z_0 itself, without noise.

    denoise    (z_t, t) -> estimate of z_0
    z          (B, ...) latents at the level of timesteps[0]: standard normal noise, or a noised image; computed in its
               dtype, at least float32
    timesteps  descending, e.g. `schedule.timesteps(1000)`
    noise      fresh noise of all steps but the last; by default from torch's global generator
    watch      told of every step
    returns    (B, ...) latents
    raises     ValueError for timesteps that do not descend or that the schedule does not have
    """
    draw, z = noise or global_noise, full_precision(z)
    for step in steps_through(timesteps, schedule):
        z_0 = denoise(z, step.t)
        if step.s is None:
            z = z_0
        else:
            fresh = step.posterior_std()
            z = step.carry(z, z_0, fresh) + fresh * draw(step.number, z)
        if watch is not None:
            watch(Frame(step.number + 1, len(timesteps), z, z_0))
    return z
