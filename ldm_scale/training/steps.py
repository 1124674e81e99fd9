"""One micro batch: from what was read to gradients, and at the end of a global batch to new weights.

Every random number is drawn per position of the data stream (core/rng.py), so engines, world sizes and micro batches
give the same losses.

Shape letters: B batch, C channels, H W height and width, K ranges of timesteps.
"""

from collections.abc import Mapping
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from ldm_scale.conditioning.base import Conditioner
from ldm_scale.core import rng
from ldm_scale.core.shares import add_up
from ldm_scale.data.sources import ImageBatch, LatentBatch
from ldm_scale.diffusion.timesteps import BUCKETS, bucket_names, bucket_width, draw_timesteps
from ldm_scale.first_stage.base import FirstStage, Moments, MomentsKind
from ldm_scale.first_stage.loss import ReconstructionLoss
from ldm_scale.latent_diffusion.model import DiffusionConfig
from ldm_scale.training.adversary import Adversary
from ldm_scale.training.codebook import CodebookWatch
from ldm_scale.training.engine import Engine
from ldm_scale.training.intake import Given, Intake
from ldm_scale.training.masters import Ratio

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

    def since_last_line(self) -> dict[str, Ratio]:
        """Means over all that was trained on since this was last called: sums and counts of this rank, by name."""
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
        intake: Intake,
    ) -> None:
        self._engine, self._conditioner, self._seed = engine, conditioner, seed
        self._moments, self._latent_scale, self._diffusion, self._intake = moments, latent_scale, diffusion, intake
        self._mean, self._by_timestep = _Mean(engine), LossByTimestep(diffusion.schedule.steps, engine.device)

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
        inputs, dropped, told = self._inputs(batch, positions_B)
        self._intake.take(Given(z_0_BCHW, dropped, batch.captions, batch.keys), inputs)
        with self._engine.accumulate():
            loss_B = self._engine.model(z_0_BCHW, noise_BCHW, t_B, dropped)
            loss = loss_B.mean()
            self._engine.backward(loss)
            grad_norm = self._engine.step(learning_rate)
        self._by_timestep.add(t_B, loss_B.detach())
        return {**self._mean({"train/loss": loss, **told}), "train/grad_norm": grad_norm}

    def since_last_line(self) -> dict[str, Ratio]:
        """`train/loss_t000` ... `train/loss_t900`, as `val/loss_t*`."""
        return dict(zip(bucket_names("train/loss"), self._by_timestep.take(), strict=True))

    def state(self) -> dict[str, Any]:
        """The losses of the line to come; every draw is a function of the position."""
        return {"losses_by_timestep": self._by_timestep.over_ranks()}

    def resume(self, state: Mapping[str, Any]) -> None:
        """Checkpoints from before there were such losses begin the line anew."""
        begun = state["step"].get("losses_by_timestep") if self._engine.rank == 0 else None
        self._by_timestep.begin(begun)

    def _latents(self, batch: Any, positions_B: Tensor) -> Tensor:
        """A draw from each posterior, scaled to unit variance, (B, C, H, W) float32."""
        moments = self._moments(batch, self._engine.device)
        noise_BCHW = rng.normal(self._seed, "diffusion/posterior", positions_B, tuple(moments.mean.shape[1:]))
        return moments.sample(noise_BCHW) * self._latent_scale

    def _inputs(
        self, batch: LatentBatch | ImageBatch, positions_B: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Metrics]:
        """The conditioner's inputs; the same, some replaced by its null inputs; and the share of those."""
        if self._conditioner is None or batch.inputs is None:
            return None, None, {}
        inputs = batch.inputs.to(self._engine.device, non_blocking=True)
        if self._conditioner.dropout == 0:
            return inputs, inputs, {}
        drop_B = rng.uniform(self._seed, "diffusion/dropout", positions_B) < self._conditioner.dropout
        share = {"train/caption_dropout": drop_B.float().mean()}
        return inputs, self._conditioner.dropped(inputs, drop_B), share


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
        intake: Intake,
    ) -> None:
        """`codebook` watches the first stage's, `adversary` judges what it makes; None where there is none."""
        self._engine, self._loss, self._latent_shape, self._seed = engine, loss, latent_shape, seed
        self._codebook, self._adversary, self._intake = codebook, adversary, intake
        self._mean = _Mean(engine)

    def __call__(self, batch: ImageBatch, learning_rate: float, images_seen: int) -> Metrics:
        positions_B = batch.positions.to(self._engine.device, non_blocking=True)
        images_BCHW = batch.images.to(self._engine.device, non_blocking=True)
        self._intake.take(Given(images_BCHW, None, batch.captions, batch.keys), None)
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

    def since_last_line(self) -> dict[str, Ratio]:
        return {}

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


class LossByTimestep:
    """Sums of losses by range of timesteps, and how many there were; those that are no numbers are in neither."""

    def __init__(self, steps: int, device: torch.device) -> None:
        self._width, self._bucket_K = bucket_width(steps), torch.arange(BUCKETS, device=device)
        self.begin(None)

    def begin(self, sums_2K: list[list[float]] | None) -> None:
        """Go on from these; None begins with nothing."""
        device, dtype = self._bucket_K.device, torch.float64
        self._sums_2K = torch.zeros(2, BUCKETS, device=device, dtype=dtype)
        if sums_2K is not None:
            self._sums_2K += torch.tensor(sums_2K, device=device, dtype=dtype)

    def add(self, t_B: Tensor, loss_B: Tensor) -> None:
        bucket_B = (t_B // self._width).clamp(max=BUCKETS - 1)
        here_KB = (bucket_B == self._bucket_K[:, None]) & loss_B.isfinite()
        self._sums_2K += torch.stack((torch.where(here_KB, loss_B, 0).sum(1), here_KB.sum(1)))

    def take(self) -> list[Ratio]:
        """One sum and count for each range; they begin again."""
        taken_2K = self._sums_2K
        self.begin(None)
        return list(zip(*taken_2K.unbind(), strict=True))

    def over_ranks(self) -> list[list[float]]:
        """Sums and counts of all ranks. Collective; waits for the device."""
        total_2K = self._sums_2K.clone()
        add_up(total_2K)
        sums: list[list[float]] = total_2K.tolist()
        return sums
