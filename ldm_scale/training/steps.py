"""One micro batch: from what was read to gradients, and at the end of a global batch to new weights.

Every random number is drawn per position of the data stream (core/rng.py), so engines, world sizes and micro batches
give the same losses.

Shape letters: B batch, C channels, H W height and width.
"""

from collections.abc import Mapping
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from ldm_scale.conditioning.base import Conditioner
from ldm_scale.core import rng
from ldm_scale.data.sources import ImageBatch, LatentBatch
from ldm_scale.diffusion.timesteps import draw_timesteps
from ldm_scale.first_stage.base import FirstStage, Moments, MomentsKind
from ldm_scale.first_stage.loss import ReconstructionLoss
from ldm_scale.latent_diffusion.model import DiffusionConfig
from ldm_scale.training.adversary import Adversary
from ldm_scale.training.codebook import CodebookWatch
from ldm_scale.training.engine import Engine

Batch = TypeVar("Batch", contravariant=True)
Metrics = Mapping[str, Tensor]


class Step(Protocol[Batch]):
    """What the loop calls for each micro batch."""

    def __call__(self, batch: Batch, learning_rate: float, images_seen: int) -> Metrics:
        """Forward and backward of one micro batch; at a boundary also the optimizer. Nothing waits for the device.

        images_seen  before this global batch
        returns  means over the micro batches of this rank so far in this global batch, as device scalars
        """
        ...

    def state(self) -> dict[str, Any]:
        """What a checkpoint must carry as `step`, as JSON values. Collective."""
        ...

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint's state."""
        ...


class CachedMoments:
    """The moments that a latent cache holds."""

    def __init__(self, kind: MomentsKind) -> None:
        self._kind = kind

    def __call__(self, batch: LatentBatch, device: torch.device) -> Moments:
        return Moments.unpack(batch.moments.to(device, non_blocking=True), self._kind)


class EncodedMoments:
    """The moments of images, encoded now, and rounded to float16 as a cache would hold them."""

    def __init__(self, first_stage: FirstStage) -> None:
        self._first_stage = first_stage

    @torch.no_grad()
    def __call__(self, batch: ImageBatch, device: torch.device) -> Moments:
        moments = self._first_stage.encode(batch.images.to(device, non_blocking=True))
        return Moments.unpack(moments.pack().half(), moments.kind)


class DiffusionStep:
    """Moments to the denoising loss (Rombach et al. 2022, equation 3), with condition dropout for guidance."""

    def __init__(
        self,
        engine: Engine,
        *,
        conditioner: Conditioner | None,
        moments: CachedMoments | EncodedMoments,
        latent_scale: float,
        diffusion: DiffusionConfig,
        seed: int,
    ) -> None:
        self._engine, self._conditioner, self._seed = engine, conditioner, seed
        self._moments, self._latent_scale, self._diffusion = moments, latent_scale, diffusion
        self._mean = _Mean(engine)

    def __call__(self, batch: Any, learning_rate: float, images_seen: int) -> Metrics:
        positions_B = batch.positions.to(self._engine.device, non_blocking=True)
        z_0_BCHW = self._latents(batch, positions_B)
        noise_BCHW = rng.normal(self._seed, "diffusion/noise", positions_B, tuple(z_0_BCHW.shape[1:]))
        t_B = draw_timesteps(
            self._diffusion.timesteps,
            steps=self._diffusion.schedule.steps,
            seed=self._seed,
            positions_B=positions_B,
            global_batch=self._engine.global_batch,
        )
        inputs, told = self._inputs(batch, positions_B)
        with self._engine.accumulate():
            loss = self._engine.model(z_0_BCHW, noise_BCHW, t_B, inputs).mean()
            self._engine.backward(loss)
            grad_norm = self._engine.step(learning_rate)
        return {**self._mean({"train/loss": loss, **told}), "train/grad_norm": grad_norm}

    def state(self) -> dict[str, Any]:
        """Nothing: every draw is a function of the position."""
        return {}

    def resume(self, state: Mapping[str, Any]) -> None:
        """There is nothing to go on from."""

    def _latents(self, batch: Any, positions_B: Tensor) -> Tensor:
        """A draw from each posterior, scaled to unit variance, (B, C, H, W) float32."""
        moments = self._moments(batch, self._engine.device)
        noise_BCHW = rng.normal(self._seed, "diffusion/posterior", positions_B, tuple(moments.mean.shape[1:]))
        return moments.sample(noise_BCHW) * self._latent_scale

    def _inputs(self, batch: LatentBatch | ImageBatch, positions_B: Tensor) -> tuple[Tensor | None, Metrics]:
        """The conditioner's inputs, some replaced by its null inputs; and the share of those."""
        if self._conditioner is None or batch.inputs is None:
            return None, {}
        inputs = batch.inputs.to(self._engine.device, non_blocking=True)
        if self._conditioner.dropout == 0:
            return inputs, {}
        drop_B = rng.uniform(self._seed, "diffusion/dropout", positions_B) < self._conditioner.dropout
        return self._conditioner.dropped(inputs, drop_B), {"train/caption_dropout": drop_B.float().mean()}


class AutoencoderStep:
    """Images to the loss of a first stage (Rombach et al. 2022, section 3.1 and appendix G)."""

    def __init__(
        self,
        engine: Engine,
        *,
        loss: ReconstructionLoss,
        latent_shape: tuple[int, int, int],
        seed: int,
        codebook: CodebookWatch | None,
        adversary: Adversary | None,
    ) -> None:
        """`codebook` watches the first stage's, `adversary` judges what it makes; None where there is none."""
        self._engine, self._loss, self._latent_shape, self._seed = engine, loss, latent_shape, seed
        self._codebook, self._adversary = codebook, adversary
        self._mean = _Mean(engine)

    def __call__(self, batch: ImageBatch, learning_rate: float, images_seen: int) -> Metrics:
        positions_B = batch.positions.to(self._engine.device, non_blocking=True)
        images_BCHW = batch.images.to(self._engine.device, non_blocking=True)
        noise_BCHW = rng.normal(self._seed, "autoencoder/posterior", positions_B, self._latent_shape)
        with self._engine.accumulate():
            rebuilt = self._engine.model(images_BCHW, noise_BCHW)
            terms = self._loss(images_BCHW, rebuilt)
            loss, told = terms.total.mean(), dict[str, Tensor]()
            if self._adversary is not None and self._adversary.is_on(images_seen):
                term, told = self._adversary(images_BCHW, rebuilt.images.float(), terms.nll.mean())
                loss = loss + term
            self._engine.backward(loss)
            grad_norm = self._engine.step(learning_rate)
        if self._loss.variance is not None:
            told["train/logvar"] = self._loss.variance.logvar.mean()
        means = {
            **told,
            "train/loss": loss,
            "train/l1": terms.l1.mean(),
            "train/perceptual": terms.perceptual.mean(),
        }
        if rebuilt.codes is None:
            means["train/kl"] = terms.kl.mean()
        else:
            means["train/codebook"] = terms.codebook.mean()
        norms = {f"train/{name}_grad_norm": norm for name, norm in self._engine.companion_norms.items()}
        found = {} if self._codebook is None else self._codebook.take(rebuilt)
        return {**self._mean(means), **norms, "train/grad_norm": grad_norm, **found}

    def state(self) -> dict[str, Any]:
        return {} if self._codebook is None else self._codebook.state()

    def resume(self, state: Mapping[str, Any]) -> None:
        if self._codebook is not None:
            self._codebook.resume(state["step"])


class _Mean:
    """Means over the micro batches of one global batch."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._sums: dict[str, Tensor] = {}
        self._count = 0

    def __call__(self, values: Metrics) -> dict[str, Tensor]:
        self._count += 1
        self._sums = {name: self._sums.get(name, 0) + value.detach() for name, value in values.items()}
        means = {name: total / self._count for name, total in self._sums.items()}
        if self._engine.at_boundary:
            self._sums, self._count = {}, 0
        return means
