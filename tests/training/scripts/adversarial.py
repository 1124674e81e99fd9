"""Trains a tiny first stage with a discriminator: in the tests' own process, and as a script on two processes.

usage  adversarial.py OUT NAME ...     of RUNS; rank 0 writes what happened to OUT/found.json
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm_scale.core import rng, runtime
from ldm_scale.data.sources import ImageBatch
from ldm_scale.first_stage.adversarial import AdversarialConfig, DiscriminatorNorm
from ldm_scale.first_stage.convolutional import ConvolutionalConfig
from ldm_scale.first_stage.kl import AutoencoderKLConfig
from ldm_scale.first_stage.loss import AutoencoderLossConfig, PerceptualKind, ReconstructionLoss
from ldm_scale.first_stage.vq import AutoencoderVQConfig
from ldm_scale.training.adversary import DISCRIMINATOR, Adversary
from ldm_scale.training.checkpoint import Checkpoints
from ldm_scale.training.codebook import CodebookWatch
from ldm_scale.training.ema import EMA
from ldm_scale.training.engine import EngineConfig, EngineKind, Precision
from ldm_scale.training.intake import Intake
from ldm_scale.training.masters import MOMENTS
from ldm_scale.training.optimizer import OptimizerConfig
from ldm_scale.training.steps import AutoencoderStep, Metrics

GLOBAL_BATCH, SIDE, START = 8, 16, 16
STEPS = 12  # of which the discriminator sits out the first two
WINDOW = 24  # images: of every three steps the codebook's dead entries start again
ADVERSARIAL = AdversarialConfig(channels=8, layers=2, norm=DiscriminatorNorm.group, start_images=START)
BATCH = replace(ADVERSARIAL, norm=DiscriminatorNorm.batch)


SHAPE: dict[str, Any] = {
    "channels": 8, "channel_mult": [1, 2], "num_res_blocks": 1, "z_channels": 2, "embed_dim": 2, "norm_groups": 4,
}  # fmt: skip
KL, VQ = AutoencoderKLConfig(**SHAPE), AutoencoderVQConfig(**SHAPE, codebook_size=64)
RUNS: dict[str, dict[str, Any]] = {
    "plain": {}, "accumulated": {"accumulation": 2}, "bf16": {"precision": "bf16"}, "vq": {"first_stage": VQ},
    "batch": {"adversarial": BATCH},
}  # fmt: skip
"""Of two processes, by name; `batch` needs GPUs."""


def images(positions: Tensor) -> Tensor:
    """Noise that a first stage can compress: two random colours each, one above the other."""
    return rng.normal(0, "images", positions, (3, 2, 1)).repeat_interleave(SIDE // 2, 2).expand(-1, -1, -1, SIDE) / 2


class Training:
    """Everything that a run has, but for the loop."""

    def __init__(
        self,
        kind: str,
        directory: Path,
        *,
        accumulation: int = 1,
        precision: str = "fp32",
        adversarial: AdversarialConfig = ADVERSARIAL,
        first_stage: ConvolutionalConfig = KL,
    ) -> None:
        torch.manual_seed(0)
        self.config = AutoencoderLossConfig(
            perceptual=PerceptualKind.none, learn_variance=True, adversarial=adversarial, kl_weight=1e-3
        )
        optimizer = OptimizerConfig(learning_rate=2e-3, beta_1=0.5, beta_2=0.9, weight_decay=0.0)
        config = EngineConfig(kind=EngineKind(kind), precision=Precision(precision))
        micro_batch = GLOBAL_BATCH // runtime.world() // accumulation
        self.engine = engine = config.build(global_batch=GLOBAL_BATCH, micro_batch=micro_batch)
        loss, module = ReconstructionLoss(self.config), first_stage.build()
        engine.prepare(module, optimizer)
        if adversarial.exists:
            engine.accompany(DISCRIMINATOR, adversarial.build(3), optimizer, learning_rate_ratio=0.5)
        assert loss.variance is not None
        engine.accompany("variance", loss.variance, optimizer)
        last = module.get_parameter("decoder.conv_out.weight")
        self.adversary = Adversary(engine, adversarial, last) if adversarial.exists else None
        self.ema = EMA(engine.masters, [16])
        codebook = None
        if first_stage is VQ:
            codebook = CodebookWatch(engine, self.ema, window=WINDOW, restart=True, seed=0)
        shape = first_stage.latent_shape(SIDE)
        self.step = AutoencoderStep(
            engine, loss=loss, latent_shape=shape, seed=0, codebook=codebook, adversary=self.adversary,
            intake=Intake(shown=0),
        )  # fmt: skip
        self.checkpoints = Checkpoints(
            directory, masters=engine.masters, ema=self.ema, module=module, companions=engine.companion_masters
        )
        self.images_seen = 0

    def run(self, steps: int) -> list[dict[str, float]]:
        """The numbers of each optimizer step, over all ranks."""
        return [self.engine.mean_over_ranks(self.global_batch()) for _ in range(steps)]

    def global_batch(self) -> Metrics:
        """The numbers of one optimizer step, on this rank."""
        stride = self.engine.micro_batch * self.engine.world
        for micro in range(self.engine.accumulation):
            first = self.images_seen + micro * stride
            positions = torch.arange(first + self.engine.rank, first + stride, self.engine.world)
            batch = ImageBatch(positions, [], [], self.images(positions), None)
            metrics = self.step(batch, 2e-3, self.images_seen)
        self.images_seen += GLOBAL_BATCH
        self.ema.update(GLOBAL_BATCH, self.images_seen)
        return metrics

    def images(self, positions: Tensor) -> Tensor:
        return images(positions)

    def save(self) -> Path:
        path = self.checkpoints.save({"images_seen": self.images_seen, "step": self.step.state()})
        self.checkpoints.drain()
        return path

    def resume(self, path: Path) -> None:
        state = self.checkpoints.load(path)
        self.images_seen = state["images_seen"]
        self.step.resume(state)

    def everything(self) -> dict[str, Tensor]:
        """Weights and moments of all that learns, and the average."""
        whole = {f"ema:{name}": t for name, t in (self.ema.consolidated(16) or {}).items()}
        for masters in (self.engine.masters, *self.engine.companion_masters.values()):
            kinds = {"weight": masters.tensors, **{key: masters.moments(key) for key in MOMENTS}}
            for kind, tensors in kinds.items():
                whole |= {f"{kind}:{name}": t.clone() for name, t in (masters.consolidated(tensors) or {}).items()}
        return whole


def poisoned(out: Path) -> bool:
    """An image of rank 1 that is no number: whether rank 0 has moved."""
    training = Training("ddp", out)
    training.run(3)
    before = training.everything()
    whole = training.images
    training.images = lambda p: whole(p) + (torch.nan if runtime.rank() == 1 else 0)  # type: ignore[method-assign]
    training.run(1)
    moved = any(not torch.equal(before[name], now) for name, now in training.everything().items() if "ema" not in name)
    training.engine.close()
    return moved


def broken_off(out: Path, **how: Any) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """A run of three launches, the first of which ends before the discriminator's turn and within a window."""
    numbers: list[dict[str, float]] = []
    saved: Path | None = None
    for steps in (1, STEPS // 2, STEPS - 1 - STEPS // 2):
        training = Training("ddp", out, **how)
        if saved:
            training.resume(saved)
        numbers += training.run(steps)
        saved, end = training.save(), training.everything()
        training.engine.close()
    return numbers, end


def main(out: Path, names: list[str]) -> None:
    found: dict[str, Any] = {}
    for name in names:
        training = Training("ddp", out / name, **RUNS[name])
        numbers, whole = training.run(STEPS), training.everything()
        training.engine.close()
        again, end = broken_off(out / f"{name}_broken_off", **RUNS[name])
        changed = [key for key, tensor in end.items() if not torch.equal(tensor, whole[key])]
        found[name] = {"numbers": numbers, "again": again, "changed": changed}
    found["moved"] = poisoned(out / "poisoned")
    if runtime.is_main():
        (out / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
    runtime.leave()
