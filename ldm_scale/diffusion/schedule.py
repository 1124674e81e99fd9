"""Noise schedules: how much signal and how much noise a latent holds at each timestep (Ho et al. 2020, section 2).

z_t = alpha_t z_0 + sigma_t noise, with alpha_t^2 = prod(1 - beta) and alpha_t^2 + sigma_t^2 = 1. Tables are float64.
Knows no network, loss or sampler; `timesteps` chooses which levels a sampler visits (Lin et al. 2024, table 2).

Shape letters: B batch, C channels, H W latent height and width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from fractions import Fraction

import torch
from torch import Tensor

from ldm_scale.core.tensors import over_samples


class ScheduleKind(Enum):
    """The curve that the betas follow."""

    scaled_linear = "scaled_linear"
    """Linear in sqrt(beta); what the reference code calls "linear", and diffusers "scaled_linear"."""
    linear = "linear"
    """Linear in beta; Ho et al. 2020, section 4. What the reference code calls "sqrt_linear"."""
    cosine = "cosine"
    """alpha_t^2 follows a squared cosine; Nichol & Dhariwal 2021, eq. 17. Does not use `beta_start` and `beta_end`."""


class End(Enum):
    """The noise level that a sampler's last step arrives at."""

    first_level = "first_level"
    """The level of timestep 0, as in the reference: the result keeps its trace of noise (sigma 0.03 to 0.04)."""
    clean = "clean"
    """No noise at all: alpha 1, sigma 0. For spacings that visit timestep 0."""


class Spacing(Enum):
    """Which of the training timesteps a sampler with fewer steps visits."""

    leading = "leading"
    """i N / S, shifted up by one as in the reference: for N 1000 and S 50, 981 ... 21, 1."""
    trailing = "trailing"
    """Counted down from the last level, which is always visited: 999 ... 39, 19."""
    linspace = "linspace"
    """From the last level to level 0, both visited. With `End.first_level` the last step then changes nothing."""


@dataclass(kw_only=True, slots=True)
class ScheduleConfig:
    """The noise levels that a model is trained on. Defaults: the text-to-image model of Rombach et al. 2022."""

    kind: ScheduleKind = ScheduleKind.scaled_linear
    """The curve between the two ends."""
    beta_start: float = 0.00085
    """Variance added by the first timestep; dimensionless, above 0. Not used by the cosine."""
    beta_end: float = 0.012
    """Variance added by the last timestep; dimensionless, below 1. Not used by the cosine."""
    steps: int = 1000
    """Training timesteps, 0 ... steps - 1."""
    zero_terminal_snr: bool = False
    """Shift the levels so that the last timestep holds no signal (Lin et al. 2024, algorithm 1). The network must then
    predict v or z0, and the sampler visit the last timestep: `spacing` trailing or linspace."""
    end: End = End.first_level
    """Where sampling ends; training does not depend on it."""

    def __post_init__(self) -> None:
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(
                f"diffusion.schedule.beta_start={self.beta_start}, diffusion.schedule.beta_end={self.beta_end}; "
                "must satisfy 0 < beta_start <= beta_end < 1"
            )
        if self.steps < 2:
            raise ValueError(f"diffusion.schedule.steps={self.steps}; must be at least 2")

    def build(self) -> "NoiseSchedule":
        alphas_cumprod = torch.cumprod(1 - _BETAS[self.kind](self), dim=0)
        if self.zero_terminal_snr:
            alphas_cumprod = _without_terminal_signal(alphas_cumprod)
        return NoiseSchedule(alphas_cumprod, end=self.end)


def _scaled_linear(config: ScheduleConfig) -> Tensor:
    return torch.linspace(
        config.beta_start**0.5, config.beta_end**0.5, config.steps, dtype=torch.float64, device="cpu"
    ).square()


def _linear(config: ScheduleConfig) -> Tensor:
    return torch.linspace(config.beta_start, config.beta_end, config.steps, dtype=torch.float64, device="cpu")


def _cosine(config: ScheduleConfig) -> Tensor:
    share = torch.linspace(0, 1, config.steps + 1, dtype=torch.float64, device="cpu")
    signal = ((share + 0.008) / 1.008 * (torch.pi / 2)).cos().square()
    return (1 - signal[1:] / signal[:-1]).clamp(max=0.999)


_BETAS: dict[ScheduleKind, Callable[[ScheduleConfig], Tensor]] = {
    ScheduleKind.scaled_linear: _scaled_linear,
    ScheduleKind.linear: _linear,
    ScheduleKind.cosine: _cosine,
}


def _without_terminal_signal(alphas_cumprod: Tensor) -> Tensor:
    """Lin et al. 2024, algorithm 1: alpha is shifted to end at 0, and scaled to begin where it began."""
    alphas = alphas_cumprod.sqrt()
    first, last = alphas[0], alphas[-1]
    return (first * ((alphas - last) / (first - last))).square()


class TimestepTable:
    """Numbers by timestep, looked up on any device, in float32 or better; nothing waits for the device.

    values  (..., steps) float64 on the CPU
    """

    def __init__(self, values: Tensor) -> None:
        self._values = values
        self._copies: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def __call__(self, t_B: Tensor, like: Tensor) -> Tensor:
        """The entries of timesteps `t_B`, (..., B), on the device of `like` and at least float32."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        values = self._copies.get((like.device, dtype))
        if values is None:
            values = self._copies[like.device, dtype] = self._values.to(dtype).to(like.device)
        return values[..., t_B]


class NoiseSchedule:
    """A table of noise levels, indexed by timestep.

    alphas_cumprod  (steps,) float64 on the CPU: alpha_t^2, the share of signal in the variance; falls with t
    snr             (steps,) float64 on the CPU: alpha_t^2 / sigma_t^2, the signal-to-noise ratio
    """

    def __init__(self, alphas_cumprod: Tensor, *, end: End = End.first_level):
        self.alphas_cumprod = alphas_cumprod.to("cpu", torch.float64)
        self.snr = self.alphas_cumprod / (1 - self.alphas_cumprod)
        self.steps = len(alphas_cumprod)
        alphas, sigmas = self.alphas_cumprod.sqrt(), (1 - self.alphas_cumprod).sqrt()
        self._levels = list(zip(alphas.tolist(), sigmas.tolist(), strict=True))
        self._end = self._levels[0] if end is End.first_level else (1.0, 0.0)
        self._table = TimestepTable(torch.stack((alphas, sigmas)))

    def at(self, t: int | None) -> tuple[float, float]:
        """(alpha, sigma) of timestep t; None is where sampling ends (see `End`)."""
        if t is None:
            return self._end
        if not 0 <= t < self.steps:
            raise ValueError(f"timestep {t} is outside this schedule's 0 ... {self.steps - 1}")
        return self._levels[t]

    def levels(self, t_B: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma of each sample, shaped to broadcast over `like` (B, ...), on its device, at least float32.

        t_B  (B,) int64 timesteps; no wait for the device
        """
        alpha_B, sigma_B = self._table(t_B, like)
        return over_samples(alpha_B, like), over_samples(sigma_B, like)

    def noised(self, z_0: Tensor, noise: Tensor, t_B: Tensor) -> Tensor:
        """z_t of each sample, (B, ...), at least float32; Ho et al. 2020, eq. 4.

        z_0, noise  (B, ...) latents and standard normal noise
        t_B         (B,) int64 timesteps
        """
        alpha, sigma = self.levels(t_B, z_0)
        return alpha * z_0 + sigma * noise

    def timesteps(self, steps: int, spacing: Spacing = Spacing.leading) -> list[int]:
        """`steps` different timesteps, descending.

        The reference truncates the stride to an integer, and breaks or takes another number of steps where `steps` does
        not divide the schedule; here the spacing stays even and the number is always the one asked for. The two agree
        wherever the reference works as asked.

        raises  ValueError unless 1 <= steps <= the schedule's own
        """
        if not 1 <= steps <= self.steps:
            raise ValueError(f"{steps} sampling steps; a schedule of {self.steps} allows 1 ... {self.steps}")
        return _SPACINGS[spacing](self.steps, steps)[::-1]


def _leading(total: int, steps: int) -> list[int]:
    shift = 1 if steps < total else 0  # all of them leaves no room to shift
    return [i * total // steps + shift for i in range(steps)]


def _trailing(total: int, steps: int) -> list[int]:
    return [round(Fraction(i * total, steps)) - 1 for i in range(1, steps + 1)]


def _linspace(total: int, steps: int) -> list[int]:
    if steps == 1:
        return [total - 1]
    return [round(Fraction(i * (total - 1), steps - 1)) for i in range(steps)]


_SPACINGS: dict[Spacing, Callable[[int, int], list[int]]] = {
    Spacing.leading: _leading,
    Spacing.trailing: _trailing,
    Spacing.linspace: _linspace,
}
