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
from ldm_scale.core.shares import add_up, ranges, shared
from ldm_scale.diffusion.timesteps import BUCKETS, bucket_names, bucket_width
from ldm_scale.latent_diffusion.model import LatentDiffusion

VALIDATED = 2048
"""Held-out images that the loss is of, at most: each is seen at ten timesteps, with every set of weights."""


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
    def loss(
        self, model: LatentDiffusion, between: Callable[[], None] = lambda: None, suffix: str = ""
    ) -> dict[str, float]:
        """`val/loss`, and `val/loss_t000` ... `val/loss_t900`.

        Of a model that is told something, and only without a suffix, also `val/caption_gap`: by how much the loss is
        greater where each image has the next one's condition. All ranks share the work. Collective.

        between  called between batches, by all ranks together; what it raises ends the rest
        suffix   of `val/loss`, to tell weights apart
        """
        losses = self._losses(model, self.inputs, between)
        stem = f"val/loss{suffix}"
        found = {stem: sum(losses) / BUCKETS, **dict(zip(bucket_names(stem), losses, strict=True))}
        if self.inputs is not None and not suffix:
            shuffled = self._losses(model, self.inputs.roll(1, dims=0), between)
            found["val/caption_gap"] = sum(shuffled) / BUCKETS - found[stem]
        return found

    def _losses(self, model: LatentDiffusion, inputs: Tensor | None, between: Callable[[], None]) -> list[float]:
        """One mean over all images for each range."""
        parts = [(bucket, part) for bucket in range(BUCKETS) for part in ranges(len(self.z_0_NCHW), self.batch)]
        sums = torch.zeros(BUCKETS, dtype=torch.float64)
        for (bucket, part), counts in shared(parts):
            between()
            loss = self._loss(model, inputs, bucket, part)
            if counts:
                sums[bucket] += loss
        add_up(sums)
        means: list[float] = (sums / len(self.z_0_NCHW)).tolist()
        return means

    def _loss(self, model: LatentDiffusion, inputs: Tensor | None, bucket: int, part: range) -> float:
        """Sum over the images of `part`."""
        z_0_BCHW = self.z_0_NCHW[part.start : part.stop]
        index_B = torch.arange(part.start, part.stop, device=z_0_BCHW.device)
        noise_BCHW = rng.normal(self.seed, f"validation/noise {bucket}", index_B, tuple(z_0_BCHW.shape[1:]))
        width = bucket_width(model.schedule.steps)
        t_B = bucket * width + rng.integers(self.seed, f"validation/timestep {bucket}", index_B, width)
        told = None if inputs is None else inputs[part.start : part.stop].to(z_0_BCHW.device)
        return float(model(z_0_BCHW, noise_BCHW, t_B, told).sum())
