"""PLMS: pseudo linear multistep sampling (Liu et al. 2022).

Tensors and a denoiser in, latents out; knows neither what the network predicts nor what it is conditioned on. The
latents are not clipped, as in the reference.

Shape letters: B batch, C channels, H W latent height and width.
"""

from collections import deque
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
    steps_through,
)

_ADAMS_BASHFORTH = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)
"""Weights of the latest slopes, newest first, by how many there are; for steps of one length."""


@dataclass(kw_only=True, slots=True)
class PLMSConfig(SamplerConfig):
    """PLMS, Liu et al. 2022. Evaluates the network steps + 1 times (once for one step)."""

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
    """Walk from noise to a latent along extrapolated noise; Liu et al. 2022, eqs. 9 and 12.

    Each step is DDIM's, but with the Adams-Bashforth mean of the last four estimates of the noise. The first step has
    none to look back at: it averages over a trial step (pseudo improved Euler), at the cost of one more evaluation, as
    the reference does.

    denoise    (z_t, t) -> estimate of z_0
    z          (B, ...) latents at the level of timesteps[0]: standard normal noise, or a noised image; computed in its
               dtype, at least float32
    timesteps  descending and evenly spaced, e.g. `schedule.timesteps(50)`; after the last one the walk ends at
               `schedule.at(None)`
    noise      not drawn: the walk is deterministic
    watch      told of every step
    returns    (B, ...) latents
    raises     ValueError for timesteps that do not descend or that the schedule does not have
    """
    z = full_precision(z)
    steps = steps_through(timesteps, schedule)
    past: deque[Tensor] = deque(maxlen=len(_ADAMS_BASHFORTH))
    for step in steps:
        z_0 = denoise(z, step.t)
        past.appendleft(step.noise_in(z, z_0))
        # Where z_t is all noise (alpha 0) there is no other noise to try: the step is DDIM's.
        if step.alpha_t > 0:
            if step.number == 0 and step.s is not None:
                trial = step.carry(z, z_0)
                eps = (past[0] + steps[1].noise_in(trial, denoise(trial, step.s))) / 2
            else:
                weighted = zip(_ADAMS_BASHFORTH[len(past) - 1], past, strict=True)
                eps = sum((weight * slope for weight, slope in weighted), start=torch.zeros_like(z))
            z_0 = (z - step.sigma_t * eps) / step.alpha_t
        z = step.carry(z, z_0)
        if watch is not None:
            watch(Frame(step.number + 1, len(timesteps), z, z_0))
    return z
