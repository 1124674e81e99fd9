"""Captions or other conditions in, images out: conditioner, noise, sampler, first stage.

The noise of an image has its own stream, (seed, index), so a picture depends neither on the batch it is made in nor on
how many processes share the work.

Shape letters: B batch, C channels, H W height and width.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ldm_scale.core import rng
from ldm_scale.first_stage.base import FirstStage
from ldm_scale.latent_diffusion.model import LatentDiffusion
from ldm_scale.samplers.base import SamplerConfig, guided_denoiser


@dataclass(frozen=True, kw_only=True, slots=True)
class Generator:
    """Draws images of captions, classes, maps ...: of what the model's conditioner prepares.

    latent_scale  what unscaled latents were multiplied by in training; undone before decoding
    size          side of the images, pixels
    """

    model: LatentDiffusion
    first_stage: FirstStage
    latent_scale: float
    sampler: SamplerConfig
    size: int
    seed: int

    @torch.no_grad()
    def images(self, conditions: Sequence[Any], indices: Sequence[int]) -> Tensor:
        """One image a condition, (B, 3, size, size) in [-1, 1], on the model's device; image i of stream indices[i]."""
        device = next(self.model.parameters()).device
        index_B = torch.tensor(indices, dtype=torch.int64, device=device)
        z_T_BCHW = rng.normal(self.seed, "sample/start", index_B, self.first_stage.config.latent_shape(self.size))
        z_BCHW = self.sampler.build(self.model.schedule)(
            self._denoiser(conditions, device),
            z_T_BCHW,
            noise=lambda step, like: rng.normal(self.seed, f"sample/step {step}", index_B, tuple(like.shape[1:])),
        )
        return self.first_stage.decode(z_BCHW / self.latent_scale).clamp(-1, 1)

    def batches(self, conditions: Sequence[Any], batch: int, first_index: int = 0) -> Iterator[Tensor]:
        """Images of any number of conditions, `batch` at a time; condition i is image first_index + i."""
        for start in range(0, len(conditions), batch):
            part = conditions[start : start + batch]
            yield self.images(part, range(first_index + start, first_index + start + len(part)))

    def _denoiser(self, conditions: Sequence[Any], device: torch.device) -> Callable[[Tensor, int], Tensor]:
        """The guided denoiser for these conditions; the conditioner runs once, not once a step."""
        conditioner = self.model.conditioner
        parts = (self.model.network, self.model.schedule, self.model.objective)
        if conditioner is None:
            return guided_denoiser(*parts, {})
        inputs = conditioner.prepare(conditions).to(device)
        conditional = self.model.conditions(inputs)
        if self.sampler.guidance == 1:
            return guided_denoiser(*parts, conditional)
        everywhere = torch.ones(len(inputs), dtype=torch.bool, device=device)
        unconditional = self.model.conditions(conditioner.dropped(inputs, everywhere))
        return guided_denoiser(*parts, conditional, unconditional, self.sampler.guidance)
