"""DDIM: denoising diffusion implicit models (Song et al. 2021).

Tensors and a denoiser in, latents out; knows neither what the network predicts nor what it is conditioned on. The
latents are not clipped, as in the reference.

Shape letters: B batch, C channels, H W latent height and width.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from ldm_scale.diffusion.schedule import NoiseSchedule
from ldm_scale.samplers.base import Denoise, Noise, Progress, Sampler, SamplerConfig


@dataclass(kw_only=True, slots=True)
class DDIMConfig(SamplerConfig):
    """DDIM, Song et al. 2021. The paper's text-to-image FID: 250 steps, guidance 1.5; the README: 50 and 5."""

    eta: float = 0.0
    """Share of fresh noise, 0 ... 1: 0 is deterministic, 1 ancestral (the variance of DDPM's posterior)."""

    def __post_init__(self) -> None:
        SamplerConfig.__post_init__(self)  # super() does not work in a dataclass with slots
        _check_eta(self.eta)

    def build(self, schedule: NoiseSchedule) -> Sampler:
        timesteps = schedule.timesteps(self.steps, self.spacing)
        return partial(sample, timesteps=timesteps, schedule=schedule, eta=self.eta)


@torch.no_grad()
def sample(
    denoise: Denoise,
    z_T: Tensor,
    timesteps: Sequence[int],
    schedule: NoiseSchedule,
    *,
    eta: float = 0.0,
    noise: Noise | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Walk from noise to a latent; Song et al. 2021, eqs. 12 and 16.

    denoise    (z_t, t) -> estimate of z_0
    z_T        (B, ...) standard normal noise; computed in its dtype, at least float32
    timesteps  descending, e.g. `schedule.timesteps(50)`; after the last one the walk ends at `schedule.at(None)`
    eta        0 ... 1, see DDIMConfig; above 0 the last step too draws noise, as in the reference
    noise      fresh noise for eta above 0; by default from torch's global generator
    returns    (B, ...) latents
    raises     ValueError for timesteps that do not descend or that the schedule does not have, or another eta
    """
    _check_eta(eta)
    _check_descending(timesteps)
    draw = noise or (lambda step, like: torch.randn_like(like))
    z = z_T.to(torch.promote_types(z_T.dtype, torch.float32))
    for step, (t, s) in enumerate(zip(timesteps, [*timesteps[1:], None], strict=True)):
        (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule.at(t), schedule.at(s)
        fresh = eta * fresh_noise(alpha_t, sigma_t, alpha_s, sigma_s)
        z_0 = denoise(z, t)
        eps = (z - alpha_t * z_0) / sigma_t
        z = alpha_s * z_0 + math.sqrt(max(sigma_s**2 - fresh**2, 0.0)) * eps
        if fresh > 0:
            z = z + fresh * draw(step, z)
        if progress is not None:
            progress(step + 1, len(timesteps))
    return z


def fresh_noise(alpha_t: float, sigma_t: float, alpha_s: float, sigma_s: float) -> float:
    """Standard deviation of q(z_s | z_t, z_0), s before t: the fresh noise of an ancestral step (eq. 16 at eta 1)."""
    return sigma_s / sigma_t * math.sqrt(max(1 - (alpha_t / alpha_s) ** 2, 0.0))


def _check_eta(eta: float) -> None:
    if not 0 <= eta <= 1:
        raise ValueError(f"sampler.eta={eta}; must lie in 0 ... 1")


def _check_descending(timesteps: Sequence[int]) -> None:
    if not timesteps or any(s >= t for t, s in pairwise(timesteps)):
        raise ValueError(f"timesteps must descend and be at least one; got {list(timesteps)}")
