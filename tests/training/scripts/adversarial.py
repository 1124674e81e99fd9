"""Trains a tiny first stage with a discriminator: in the tests' own process, and as a script on two processes.

usage  adversarial.py OUT     rank 0 writes what happened to OUT/found.json
"""

import json
import sys
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
from ldm_scale.training.ema import EMA
from ldm_scale.training.engine import EngineConfig, EngineKind, Precision
from ldm_scale.training.intake import Intake
from ldm_scale.training.masters import MOMENTS
from ldm_scale.training.optimizer import OptimizerConfig
from ldm_scale.training.steps import AutoencoderStep

GLOBAL_BATCH, SIDE, START = 8, 16, 16
STEPS = 12  # of which the discriminator sits out the first two
ADVERSARIAL = AdversarialConfig(channels=8, layers=2, norm=DiscriminatorNorm.group, start_images=START)


SHAPE: dict[str, Any] = {
    "channels": 8, "channel_mult": [1, 2], "num_res_blocks": 1, "z_channels": 2, "embed_dim": 2, "norm_groups": 4,
}  # fmt: skip
KL, VQ = AutoencoderKLConfig(**SHAPE), AutoencoderVQConfig(**SHAPE, codebook_size=16)


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
        micro_batch: int = 8,
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
        self.engine = engine = config.build(global_batch=GLOBAL_BATCH, micro_batch=micro_batch)
        loss, module = ReconstructionLoss(self.config), first_stage.build()
        engine.prepare(module, optimizer)
        if adversarial.exists:
            engine.accompany(DISCRIMINATOR, adversarial.build(3), optimizer, learning_rate_ratio=0.5)
        assert loss.variance is not None
        engine.accompany("variance", loss.variance, optimizer)
        last = module.get_parameter("decoder.conv_out.weight")
        self.adversary = Adversary(engine, adversarial, last) if adversarial.exists else None
        shape = first_stage.latent_shape(SIDE)
        self.step = AutoencoderStep(
            engine, loss=loss, latent_shape=shape, seed=0, codebook=None, adversary=self.adversary,
            intake=Intake(shown=0),
        )  # fmt: skip
        self.ema = EMA(engine.masters, [16])
        self.checkpoints = Checkpoints(
            directory, masters=engine.masters, ema=self.ema, module=module, companions=engine.companion_masters
        )
        self.images_seen = 0

    def run(self, steps: int) -> list[dict[str, float]]:
        """The numbers of each optimizer step, over all ranks."""
        return [self._global_batch() for _ in range(steps)]

    def _global_batch(self) -> dict[str, float]:
        stride = self.engine.micro_batch * self.engine.world
        for micro in range(self.engine.accumulation):
            first = self.images_seen + micro * stride
            positions = torch.arange(first + self.engine.rank, first + stride, self.engine.world)
            batch = ImageBatch(positions, [], [], self.images(positions), None)
            metrics = self.step(batch, 2e-3, self.images_seen)
        self.images_seen += GLOBAL_BATCH
        self.ema.update(GLOBAL_BATCH, self.images_seen)
        return self.engine.mean_over_ranks(metrics)

    def images(self, positions: Tensor) -> Tensor:
        return images(positions)

    def save(self) -> Path:
        path = self.checkpoints.save({"images_seen": self.images_seen})
        self.checkpoints.drain()
        return path

    def resume(self, path: Path) -> None:
        self.images_seen = self.checkpoints.load(path)["images_seen"]

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
    training = Training("ddp", out, micro_batch=4)
    training.run(3)
    before = training.everything()
    whole = training.images
    training.images = lambda p: whole(p) + (torch.nan if runtime.rank() == 1 else 0)  # type: ignore[method-assign]
    training.run(1)
    moved = any(not torch.equal(before[name], now) for name, now in training.everything().items() if "ema" not in name)
    training.engine.close()
    return moved


def main(out: Path) -> None:
    found: dict[str, Any] = {}
    runs: tuple[tuple[str, dict[str, Any]], ...] = (
        ("plain", {"micro_batch": 4}),
        ("accumulated", {"micro_batch": 2}),
        ("bf16", {"micro_batch": 4, "precision": "bf16"}),
    )
    for name, how in runs:
        training = Training("ddp", out / name, **how)
        found[name] = training.run(STEPS)
        if name == "plain":
            whole = training.everything()
        training.engine.close()
    first = Training("ddp", out / "halves", micro_batch=4)
    first.run(1)  # before the discriminator's turn
    path = first.save()
    first.engine.close()
    second = Training("ddp", out / "halves", micro_batch=4)
    second.resume(path)
    found["resumed"] = second.run(STEPS // 2)
    second.save()
    found["resumed"] += second.run(STEPS - 1 - STEPS // 2)
    found["same"] = [name for name, tensor in second.everything().items() if not torch.equal(tensor, whole[name])] == []
    second.engine.close()
    found["moved"] = poisoned(out / "poisoned")
    if runtime.is_main():
        (out / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    runtime.leave()
