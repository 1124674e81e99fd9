"""Trains a tiny VQ first stage whose dead codebook entries start again.

usage  codebook.py OUT     on ranks that a launcher started; every rank writes its codebook and what it found of its
                           use, rank 0 the codebooks that ZeRO ends at without restarts
"""

import sys
from pathlib import Path

import torch
from torch import Tensor

from ldm_scale.core import rng, runtime
from ldm_scale.first_stage.loss import AutoencoderLossConfig, PerceptualKind, ReconstructionLoss
from ldm_scale.first_stage.vq import AutoencoderVQConfig
from ldm_scale.training.checkpoint import Checkpoints
from ldm_scale.training.codebook import ENTRIES, CodebookWatch
from ldm_scale.training.ema import EMA
from ldm_scale.training.engine import EngineConfig, EngineKind, Precision
from ldm_scale.training.optimizer import OptimizerConfig

GLOBAL_BATCH, MICRO_BATCH, STEPS, ENTRY_COUNT = 8, 2, 6, 24
WINDOW = 16  # images: two steps
FIRST_STAGE = AutoencoderVQConfig(
    channels=8, channel_mult=[1, 2], num_res_blocks=1, norm_groups=4, codebook_size=ENTRY_COUNT, mid_attention=False
)


class Training:
    """Engine, EMA, watch and checkpoints over a fixed stream of images."""

    def __init__(self, kind: str, directory: Path, *, restart: bool = True) -> None:
        config = EngineConfig(kind=EngineKind(kind), precision=Precision.fp32)
        self.engine, self.images_seen = config.build(global_batch=GLOBAL_BATCH, micro_batch=MICRO_BATCH), 0
        torch.manual_seed(0)
        self.engine.prepare(FIRST_STAGE.build(), OptimizerConfig(learning_rate=3e-3))
        self.ema = EMA(self.engine.masters, [100])
        self.watch = CodebookWatch(self.engine, self.ema, window=WINDOW, restart=restart, seed=0)
        self.loss = ReconstructionLoss(AutoencoderLossConfig(perceptual=PerceptualKind.none))
        self.checkpoints = Checkpoints(
            directory, masters=self.engine.masters, ema=self.ema, module=self.engine.module, keep_last=9
        )
        self.found: list[dict[str, float]] = []
        self.latents: list[Tensor] = []

    def step(self) -> None:
        engine, self.latents = self.engine, []
        stride = engine.micro_batch * engine.world
        for micro in range(engine.accumulation):
            first = self.images_seen + micro * stride
            images = rng.normal(0, "x", torch.arange(first + engine.rank, first + stride, engine.world), (3, 8, 8))
            with engine.accumulate():
                rebuilt = engine.model(images, torch.zeros(len(images), *FIRST_STAGE.latent_shape(8)))
                engine.backward(self.loss(images, rebuilt).total.mean())
                engine.step(3e-3)
            self.latents.append(rebuilt.moments.mean.detach())
            found = self.watch.take(rebuilt)
        self.images_seen += engine.global_batch
        self.ema.update(engine.global_batch, self.images_seen)
        self.found.append({name: float(value) for name, value in found.items()})

    @property
    def tables(self) -> dict[str, Tensor]:
        """Every tensor that has a row for each entry."""
        masters = self.engine.masters
        index = next(piece.master for piece in masters.pieces if piece.name == ENTRIES)
        kept = {"weight": masters.tensors, "ema": self.ema.shadows[100]}
        kept |= {key: masters.moments(key) for key in ("exp_avg", "exp_avg_sq")}
        return {name: tensors[index].detach().clone() for name, tensors in kept.items()}

    def save(self) -> Path:
        path = self.checkpoints.save({"images_seen": self.images_seen, "step": self.watch.state()})
        self.checkpoints.drain()
        return path

    def resume(self, path: Path) -> None:
        state = self.checkpoints.load(path)
        self.images_seen = state["images_seen"]
        self.watch.resume(state["step"])


def main() -> None:
    out = Path(sys.argv[1])
    training = Training("ddp", out / "checkpoints")
    for step in range(STEPS):
        training.step()
        if step == 2:
            training.save()  # in the middle of a window
    torch.save({"tables": training.tables, "found": training.found}, out / f"rank{training.engine.rank}.pt")
    training.engine.close()
    for kind in ("zero1", "zero2"):
        cut_up = Training(kind, out / kind, restart=False)
        for _ in range(STEPS):
            cut_up.step()
        whole = cut_up.engine.masters.consolidated(cut_up.engine.masters.tensors)
        if whole is not None:
            torch.save({"weight": whole[ENTRIES], "found": cut_up.found}, out / f"{kind}.pt")
        cut_up.engine.close()
    runtime.leave()


if __name__ == "__main__":
    main()
