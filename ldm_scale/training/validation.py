"""Validation loss of a diffusion model, whole and by timestep: fixed images, fixed noise, fixed timesteps.

Every held-out image is noised once in each of ten equal ranges of timesteps. Noise and timestep depend on (seed, image,
range) alone, so two checkpoints, or raw and averaged weights, are compared on the same numbers.

Shape letters: B batch, C channels, H W latent height and width.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm_scale.core import rng
from ldm_scale.latent_diffusion.model import LatentDiffusion

BUCKETS = 10


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Held-out latents and what belongs to them.

    z_0_NCHW  clean latents, scaled to unit variance, on the model's device
    inputs    the conditioner's inputs for each, anywhere; None for an unconditional model
    """

    z_0_NCHW: Tensor
    inputs: Tensor | None
    seed: int
    batch: int

    @torch.no_grad()
    def loss(self, model: LatentDiffusion, between: Callable[[], None] = lambda: None) -> dict[str, float]:
        """`val/loss`, and `val/loss_t000` ... `val/loss_t900`, named by where the range begins, in thousandths.

        between  called between batches; what it raises ends the rest
        """
        losses = [self._bucket(model, bucket, between) for bucket in range(BUCKETS)]
        named = {f"val/loss_t{bucket * 1000 // BUCKETS:03d}": loss for bucket, loss in enumerate(losses)}
        return {"val/loss": sum(losses) / BUCKETS, **named}

    def _bucket(self, model: LatentDiffusion, bucket: int, between: Callable[[], None]) -> float:
        total = 0.0
        for start in range(0, len(self.z_0_NCHW), self.batch):
            between()
            z_0_BCHW = self.z_0_NCHW[start : start + self.batch]
            index_B = torch.arange(start, start + len(z_0_BCHW), device=z_0_BCHW.device)
            noise_BCHW = rng.normal(self.seed, f"validation/noise {bucket}", index_B, tuple(z_0_BCHW.shape[1:]))
            width = model.schedule.steps // BUCKETS
            t_B = bucket * width + rng.integers(self.seed, f"validation/timestep {bucket}", index_B, width)
            inputs = None if self.inputs is None else self.inputs[start : start + len(z_0_BCHW)].to(z_0_BCHW.device)
            total += float(model(z_0_BCHW, noise_BCHW, t_B, inputs).sum())
        return total / len(self.z_0_NCHW)
