"""DDIM: denoising diffusion implicit models (Song et al. 2021).

Tensors and a denoiser in, latents out; knows neither what the network predicts nor what it is conditioned on. The
latents are not clipped, as in the reference.

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
class DDIMConfig(SamplerConfig):
    """DDIM, Song et al. 2021. The paper's text-to-image FID: 250 steps, guidance 1.5; the README: 50 and 5."""

    eta: float = 0.0
    """Share of fresh noise, 0 ... 1: 0 is deterministic, 1 ancestral (the variance of DDPM's posterior)."""

    def __post_init__(self) -> None:
        SamplerConfig.__post_init__(self)  # super() does not work in a dataclass with slots
        _check_eta(self.eta)

    def build(self, schedule: NoiseSchedule, timesteps: Sequence[int]) -> Sampler:
        return partial(sample, timesteps=timesteps, schedule=schedule, eta=self.eta)


@torch.no_grad()
def sample(
    denoise: Denoise,
    z: Tensor,
    timesteps: Sequence[int],
    schedule: NoiseSchedule,
    *,
    eta: float = 0.0,
    noise: Noise | None = None,
    watch: Watch | None = None,
) -> Tensor:
    """Walk from noise to a latent; Song et al. 2021, eqs. 12 and 16.

    denoise    (z_t, t) -> estimate of z_0
    z          (B, ...) latents at the level of timesteps[0]: standard normal noise, or a noised image; computed in its
               dtype, at least float32
    timesteps  descending, e.g. `schedule.timesteps(50)`; after the last one the walk ends at `schedule.at(None)`
    eta        0 ... 1, see DDIMConfig; above 0 the last step too draws noise, as in the reference
    noise      fresh noise for eta above 0; by default from torch's global generator
    watch      told of every step
    returns    (B, ...) latents
    raises     ValueError for timesteps that do not descend or that the schedule does not have, or another eta
    """
    _check_eta(eta)
    draw, z = noise or global_noise, full_precision(z)
    for step in steps_through(timesteps, schedule):
        z_0 = denoise(z, step.t)
        fresh = eta * step.posterior_std()
        z = step.carry(z, z_0, fresh)
        if fresh > 0:
            z = z + fresh * draw(step.number, z)
        if watch is not None:
            watch(Frame(step.number + 1, len(timesteps), z, z_0))
    return z


def _check_eta(eta: float) -> None:
    if not 0 <= eta <= 1:
        raise ValueError(f"sampler.eta={eta}; must lie in 0 ... 1")
