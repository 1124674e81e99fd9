"""What every sampler shares: the denoiser it calls, the noise it draws, its configuration; classifier-free guidance.

A sampler sees only `Denoise`: what the network predicts, what it is conditioned on and how guidance mixes is settled
here.

Shape letters: B batch, C channels, H W latent height and width.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ldm_scale.diffusion.objective import Objective
from ldm_scale.diffusion.schedule import NoiseSchedule, Spacing

Denoise = Callable[[Tensor, int], Tensor]
"""(z_t BCHW, timestep) -> estimate of z_0 BCHW."""

Noise = Callable[[int, Tensor], Tensor]
"""(number of the step, from 0; a tensor like the one wanted) -> standard normal noise. Being told the step, it can draw
from one named stream per image (core/rng.py), so that an image does not depend on the batch it is sampled in."""

Progress = Callable[[int, int], None]
"""(steps done, steps in all), after every step."""


class Sampler(Protocol):
    """Noise in, latents out, with everything but the denoiser and the randomness settled."""

    def __call__(
        self, denoise: Denoise, z_T: Tensor, *, noise: Noise | None = None, progress: Progress | None = None
    ) -> Tensor: ...


@dataclass(kw_only=True, slots=True)
class SamplerConfig(ABC):
    """What all samplers are told."""

    steps: int = 50
    """Network evaluations per image (under guidance each on two halves)."""
    guidance: float = 1.0
    """Scale s of classifier-free guidance; 1 is none, and halves the cost. The paper's text-to-image FID uses 1.5, its
    figures 10."""
    spacing: Spacing = Spacing.leading
    """Which of the training timesteps are visited."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"sampler.steps={self.steps}; must be at least 1")
        if self.guidance < 0:
            raise ValueError(f"sampler.guidance={self.guidance}; must be at least 0 (1 is no guidance)")

    @abstractmethod
    def build(self, schedule: NoiseSchedule) -> Sampler:
        """The sampler on this schedule; raises ValueError if the schedule has fewer steps than asked for."""


def guided_denoiser(
    network: Callable[..., Tensor],
    schedule: NoiseSchedule,
    objective: Objective,
    conditional: Mapping[str, Tensor],
    unconditional: Mapping[str, Tensor] | None = None,
    scale: float = 1.0,
) -> Denoise:
    """A `Denoise` of a conditional network, with classifier-free guidance (Ho & Salimans 2022, eq. 6).

    out = out_u + scale (out_c - out_u). All three predictions are affine in one another at a given z_t, so guiding the
    output guides the noise. Both halves go through the network in one call, the unconditional one first, as in the
    reference. Nothing waits for the device.

    network        called as network(z_BCHW, t_B, **conditions), e.g. a U-Net
    conditional    the network's further arguments by name, each (B, ...); empty for an unconditional model
    unconditional  the same for the null condition, same names and shapes; not needed where scale is 1
    scale          1 skips the unconditional half; 0 is the unconditional model
    raises         ValueError if the two conditions do not match
    """
    guided = scale != 1
    conditions = _both_halves(unconditional, conditional) if guided else dict(conditional)

    def denoise(z_BCHW: Tensor, t: int) -> Tensor:
        network_input = torch.cat((z_BCHW, z_BCHW)) if guided else z_BCHW
        t_B = torch.full((len(network_input),), t, dtype=torch.int64, device=z_BCHW.device)
        out = network(network_input, t_B, **conditions)
        if guided:
            out_u, out_c = out.to(torch.promote_types(out.dtype, torch.float32)).chunk(2)
            out = out_u + scale * (out_c - out_u)
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
