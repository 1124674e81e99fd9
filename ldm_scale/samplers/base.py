"""What every sampler shares: the denoiser it calls, the noise it draws, its steps, its configuration; guidance.

A sampler sees only `Denoise`: what the network predicts, what it is conditioned on and how guidance mixes is settled
here. Levels are Python floats, so that no step waits for the device.

Shape letters: B batch, C channels, H W latent height and width.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from ldm_scale.core.tensors import over_samples
from ldm_scale.diffusion.objective import Objective
from ldm_scale.diffusion.schedule import NoiseSchedule, Spacing

Denoise = Callable[[Tensor, int], Tensor]
"""(z_t BCHW, timestep) -> estimate of z_0 BCHW."""

Noise = Callable[[int, Tensor], Tensor]
"""(number of the step, from 0; a tensor like the one wanted) -> standard normal noise. Being told the step, it can draw
from one named stream per image (core/rng.py), so that an image does not depend on the batch it is sampled in."""


@dataclass(frozen=True, slots=True)
class Frame:
    """Where a walk is after a step; for progress bars and intermediate pictures."""

    done: int
    """Steps done."""
    steps: int
    """Steps in all."""
    z: Tensor
    """(B, ...) latents at the level that the step arrived at."""
    z_0: Tensor
    """(B, ...) the clean latents that the step headed for."""


Watch = Callable[[Frame], None]
"""Called after every step."""


class Sampler(Protocol):
    """Noise in, latents out, with everything but the denoiser and the randomness settled."""

    def __call__(
        self, denoise: Denoise, z: Tensor, *, noise: Noise | None = None, watch: Watch | None = None
    ) -> Tensor: ...


@dataclass(kw_only=True, slots=True)
class SamplerConfig(ABC):
    """What all samplers are told."""

    steps: int = 50
    """Steps per image: network evaluations, but for PLMS, which needs one more (under guidance each on two halves)."""
    guidance: float = 1.0
    """Scale s of classifier-free guidance; 1 is none, and halves the cost. The paper's text-to-image FID uses 1.5, its
    figures 10."""
    guidance_rescale: float = 0.0
    """Share of the spread added by guidance that is taken back from the network's output, 0 ... 1; against overexposed
    images. 0.7 in Lin et al. 2024, section 3.4; 0 in the reference."""
    spacing: Spacing = Spacing.leading
    """Which of the training timesteps are visited."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"sampler.steps={self.steps}; must be at least 1")
        if self.guidance < 0:
            raise ValueError(f"sampler.guidance={self.guidance}; must be at least 0 (1 is no guidance)")
        if not 0 <= self.guidance_rescale <= 1:
            raise ValueError(f"sampler.guidance_rescale={self.guidance_rescale}; must lie in 0 ... 1 (0 is none)")

    def timesteps(self, schedule: NoiseSchedule, strength: float = 1.0) -> list[int]:
        """The timesteps to visit, descending; the walk starts from latents at the level of the first.

        strength  share of the steps that is walked, above 0 and at most 1: the last ones, at least one. Below 1 a given
                  image is redrawn, from its latents noised to the first level
        raises    ValueError if the schedule has fewer steps than asked for, or for another strength
        """
        if not 0 < strength <= 1:
            raise ValueError(f"strength={strength}; must lie above 0 and at most at 1 (1 keeps nothing of the image)")
        return schedule.timesteps(self.steps, self.spacing)[-max(1, round(strength * self.steps)) :]

    @abstractmethod
    def build(self, schedule: NoiseSchedule, timesteps: Sequence[int]) -> Sampler:
        """The sampler that visits these timesteps, e.g. `self.timesteps(schedule)`."""


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a walk, from timestep t to the next one s, at the levels z = alpha z_0 + sigma noise."""

    number: int
    """From 0."""
    t: int
    s: int | None
    """None after the last timestep, where sampling ends."""
    alpha_t: float
    sigma_t: float
    alpha_s: float
    sigma_s: float

    def noise_in(self, z: Tensor, z_0: Tensor) -> Tensor:
        """eps of z at level t, if z_0 is what it holds."""
        return (z - self.alpha_t * z_0) / self.sigma_t

    def carry(self, z: Tensor, z_0: Tensor, fresh: float = 0.0) -> Tensor:
        """z at level s, holding z_0 and its own noise, which leaves room for fresh noise; Song et al. 2021, eq. 12.

        fresh  standard deviation of the noise that the caller adds; with `posterior_std`, this is the posterior's mean
        """
        return self.alpha_s * z_0 + math.sqrt(max(self.sigma_s**2 - fresh**2, 0.0)) * self.noise_in(z, z_0)

    def posterior_std(self) -> float:
        """Standard deviation of q(z_s | z_t, z_0); Ho et al. 2020, eq. 7, between any two levels."""
        return self.sigma_s / self.sigma_t * math.sqrt(max(1 - (self.alpha_t / self.alpha_s) ** 2, 0.0))


def steps_through(timesteps: Sequence[int], schedule: NoiseSchedule) -> list[Step]:
    """The steps from each timestep to the next, and from the last to `schedule.at(None)`.

    raises  ValueError for timesteps that do not descend, or that the schedule does not have
    """
    if not timesteps or any(s >= t for t, s in pairwise(timesteps)):
        raise ValueError(f"timesteps must descend and be at least one; got {list(timesteps)}")
    pairs = zip(timesteps, [*timesteps[1:], None], strict=True)
    return [Step(number, t, s, *schedule.at(t), *schedule.at(s)) for number, (t, s) in enumerate(pairs)]


def full_precision(z: Tensor) -> Tensor:
    """At least float32: what a walk is computed in, whatever the dtype of its start."""
    return z.to(torch.promote_types(z.dtype, torch.float32))


def global_noise(step: int, like: Tensor) -> Tensor:
    """The `Noise` of torch's global generator."""
    return torch.randn_like(like)


def guided_denoiser(
    network: Callable[..., Tensor],
    schedule: NoiseSchedule,
    objective: Objective,
    conditional: Mapping[str, Tensor],
    unconditional: Mapping[str, Tensor] | None = None,
    scale: float = 1.0,
    rescale: float = 0.0,
) -> Denoise:
    """A `Denoise` of a conditional network, with classifier-free guidance (Ho & Salimans 2022, eq. 6).

    out = out_u + scale (out_c - out_u). All three predictions are affine in one another at a given z_t, so guiding the
    output guides the noise. Both halves go through the network in one call, the unconditional one first, as in the
    reference. Nothing waits for the device.

    network        called as network(z_BCHW, t_B, **conditions), e.g. a U-Net
    conditional    the network's further arguments by name, each (B, ...); empty for an unconditional model
    unconditional  the same for the null condition, same names and shapes; not needed where scale is 1
    scale          1 skips the unconditional half; 0 is the unconditional model
    rescale        0 ... 1, see SamplerConfig.guidance_rescale
    raises         ValueError if the two conditions do not match
    """
    guided = scale != 1
    conditions = _both_halves(unconditional, conditional) if guided else dict(conditional)

    def denoise(z_BCHW: Tensor, t: int) -> Tensor:
        network_input = torch.cat((z_BCHW, z_BCHW)) if guided else z_BCHW
        t_B = torch.full((len(network_input),), t, dtype=torch.int64, device=z_BCHW.device)
        out = network(network_input, t_B, **conditions)
        if guided:
            out_u, out_c = full_precision(out).chunk(2)
            out = out_u + scale * (out_c - out_u)
            if rescale > 0:
                out = out * _towards_spread(out, out_c, rescale)
        return objective.to_z0(out, z_BCHW, *schedule.at(t))

    return denoise


def _both_halves(unconditional: Mapping[str, Tensor] | None, conditional: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Null conditions first, then the real ones, in one batch."""
    shapes_u = {name: tuple(value.shape) for name, value in (unconditional or {}).items()}
    shapes_c = {name: tuple(value.shape) for name, value in conditional.items()}
    if not shapes_c or shapes_u != shapes_c:
        raise ValueError(
            f"guidance mixes a conditional and an unconditional half, which must have the same inputs: conditional "
            f"{shapes_c}, unconditional {shapes_u}. Give both, or use sampler.guidance=1"
        )
    assert unconditional is not None
    return {name: torch.cat((unconditional[name], value)) for name, value in conditional.items()}


def _towards_spread(guided: Tensor, conditional: Tensor, share: float) -> Tensor:
    """Factor of each sample that takes its standard deviation towards the conditional output's; (B, 1, ...)."""
    std_B, wanted_B = guided.flatten(1).std(1), conditional.flatten(1).std(1)
    # An untrained network answers zero everywhere: no spread, and nothing to scale.
    return over_samples(1 + share * (wanted_B / std_B.clamp_min(torch.finfo(std_B.dtype).tiny) - 1), guided)
