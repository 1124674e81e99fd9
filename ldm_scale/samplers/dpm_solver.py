"""DPM-Solver++(2M): a second-order multistep solver in terms of z_0 (Lu et al. 2022b).

Tensors and a denoiser in, latents out; knows neither what the network predicts nor what it is conditioned on.

Shape letters: B batch, C channels, H W latent height and width.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ldm_scale.diffusion.schedule import NoiseSchedule, Spacing
from ldm_scale.samplers.base import (
    Denoise,
    Frame,
    Noise,
    Sampler,
    SamplerConfig,
    Step,
    Watch,
    full_precision,
    steps_through,
)

_FEW_STEPS = 15
"""Below this many steps the last one is of first order: steadier, the authors' advice (`lower_order_final`)."""


@dataclass(kw_only=True, slots=True)
class DPMSolverConfig(SamplerConfig):
    """DPM-Solver++(2M), Lu et al. 2022b: 10 to 20 steps do the work of 50 to 100 of DDIM."""

    steps: int = 20
    spacing: Spacing = Spacing.trailing

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
    """Walk from noise to a latent along extrapolated estimates of it; Lu et al. 2022b, algorithm 2.

    Each step is DDIM's, but heads for the estimate that is to be expected half way in lambda. The first step has no
    earlier one to extrapolate from, and the last does not where it removes all noise, or where steps are few.

    denoise    (z_t, t) -> estimate of z_0
    z          (B, ...) latents at the level of timesteps[0]: standard normal noise, or a noised image; computed in its
               dtype, at least float32
    timesteps  descending, e.g. `schedule.timesteps(20)`; after the last one the walk ends at `schedule.at(None)`
    noise      not drawn: the walk is deterministic
    watch      told of every step
    returns    (B, ...) latents
    raises     ValueError for timesteps that do not descend or that the schedule does not have
    """
    z = full_precision(z)
    before: tuple[float, Tensor] | None = None
    for step in steps_through(timesteps, schedule):
        z_0 = target = denoise(z, step.t)
        length = _length(step)
        plain_end = step.s is None and (length == math.inf or len(timesteps) < _FEW_STEPS)
        if before is not None and not plain_end:
            length_before, z_0_before = before
            target = z_0 + length / length_before / 2 * (z_0 - z_0_before)
        before = length, z_0
        z = step.carry(z, target)
        if watch is not None:
            watch(Frame(step.number + 1, len(timesteps), z, target))
    return z


def _length(step: Step) -> float:
    """Of a step, in lambda = log(alpha / sigma); infinite from pure noise, and to none at all."""
    if step.alpha_t == 0 or step.sigma_s == 0:
        return math.inf
    return math.log(step.alpha_s / step.sigma_s) - math.log(step.alpha_t / step.sigma_t)
