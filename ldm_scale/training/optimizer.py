"""AdamW (Loshchilov & Hutter 2019) and its learning rate, a pure function of images.

No scheduler object: the loop asks for the learning rate of a step and hands it to `Engine.step`. A prepared scheduler
would step once per process (Accelerate) and would have to be saved. Knows no engine and no rank.
"""

import math
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

_CLIP_EPSILON = 1e-6  # as torch.nn.utils.clip_grad_norm_ and DeepSpeed add to the norm


class LearningRateSchedule(Enum):
    """What follows the warm-up."""

    constant = "constant"
    cosine = "cosine"
    """Half a cosine from the peak at the end of the warm-up to zero at the run's last image."""


class Decay(Enum):
    """Which trained tensors decay."""

    all = "all"
    """Every one, as in the reference."""
    matrices = "matrices"
    """Weights of linear layers and convolutions; no biases, norms and embeddings."""


@dataclass(kw_only=True, slots=True)
class OptimizerConfig:
    """AdamW with decoupled weight decay and linear warm-up."""

    learning_rate: float = 1e-4
    """Peak, per optimizer step; not scaled by batch or world size."""
    beta_1: float = 0.9
    """Decay of the first moment per optimizer step; dimensionless, in [0, 1)."""
    beta_2: float = 0.999
    """Decay of the second moment per optimizer step; dimensionless, in [0, 1)."""
    eps: float = 1e-8
    """Added to the root of the second moment; dimensionless."""
    weight_decay: float = 0.01
    """Decoupled decay, per optimizer step and unit of learning rate."""
    decay: Decay = Decay.all
    """What decays."""
    warmup_images: int = 0
    """Images over which the learning rate rises linearly from zero; 0 starts at the peak."""
    schedule: LearningRateSchedule = LearningRateSchedule.constant
    """What follows the warm-up."""

    def __post_init__(self) -> None:
        for name, value, low, high in (
            ("learning_rate", self.learning_rate, 0.0, math.inf),
            ("beta_1", self.beta_1, 0.0, 1.0),
            ("beta_2", self.beta_2, 0.0, 1.0),
            ("weight_decay", self.weight_decay, 0.0, math.inf),
        ):
            if not low <= value < high:
                raise ValueError(f"optimizer.{name}={value}; must be at least {low:g} and below {high:g}")
        if self.eps <= 0:
            raise ValueError(f"optimizer.eps={self.eps}; must be above 0")
        if self.warmup_images < 0:
            raise ValueError(f"optimizer.warmup_images={self.warmup_images}; must be at least 0")

    def learning_rate_at(self, images_seen: int, total_images: int) -> float:
        """Learning rate of the optimizer step that follows `images_seen` images.

        images_seen   images trained on before that step
        total_images  length of the run; only the cosine schedule reads it
        """
        warm = min(1.0, images_seen / self.warmup_images) if self.warmup_images else 1.0
        if self.schedule is LearningRateSchedule.constant:
            return self.learning_rate * warm
        if total_images <= self.warmup_images:
            raise ValueError(
                f"optimizer.schedule=cosine needs total_images ({total_images}) above "
                f"optimizer.warmup_images ({self.warmup_images})"
            )
        progress = (images_seen - self.warmup_images) / (total_images - self.warmup_images)
        return self.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, progress))))

    def build(self, module: nn.Module) -> torch.optim.AdamW:
        """An optimizer of every parameter of `module`, fused."""
        return torch.optim.AdamW(
            self._groups(module),
            lr=self.learning_rate,
            betas=(self.beta_1, self.beta_2),
            eps=self.eps,
            weight_decay=self.weight_decay,
            fused=True,
        )

    def _groups(self, module: nn.Module) -> list[dict[str, Any]]:
        """Parameters that decay and, apart, those that do not; DeepSpeed wants neither empty."""
        if self.decay is Decay.all:
            return [{"params": list(module.parameters())}]
        tables = {layer.weight for layer in module.modules() if isinstance(layer, nn.Embedding)}
        matrices = {p for p in module.parameters() if p.ndim > 1} - tables
        decayed = [p for p in module.parameters() if p in matrices]
        kept = [p for p in module.parameters() if p not in matrices]
        groups: list[dict[str, Any]] = [{"params": decayed}, {"params": kept, "weight_decay": 0.0}]
        return [group for group in groups if group["params"]]


@torch.no_grad()
def clip_and_step(adam: torch.optim.AdamW, grad_norm: Tensor, max_norm: float) -> None:
    """One step with gradients scaled down to `max_norm` (0 leaves them), or none where the norm is not finite.

    Clips and skips inside the fused kernel, without another pass over the gradients and without a host sync, through
    torch's own protocol between `torch.amp.GradScaler` and fused optimizers: gradients are divided by `grad_scale`;
    where `found_inf` is 1, weights, moments and step count stay as they are.

    adam       fused, as `OptimizerConfig.build` makes it
    grad_norm  () float32 on the parameters' device
    """
    scale = ((grad_norm + _CLIP_EPSILON) / max_norm).clamp_(min=1.0) if max_norm > 0 else None
    adam.grad_scale = scale  # type: ignore[attr-defined]
    adam.found_inf = (~grad_norm.isfinite()).float()  # type: ignore[attr-defined]
    adam.step()
