"""What the engine tests train, in their own process and in launched ones: a tiny model on a fixed stream of samples."""

import math
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm_scale.core import rng
from ldm_scale.training.checkpoint import Checkpoints
from ldm_scale.training.ema import EMA
from ldm_scale.training.engine import Engine, EngineConfig, EngineKind, Precision
from ldm_scale.training.movement import Movement
from ldm_scale.training.optimizer import Decay, OptimizerConfig

GLOBAL_BATCH = 8
MICRO_BATCH = 2
HALF_LIVES = [4, 400]
LATENT_SCALE = 0.18215


class Tiny(nn.Module):
    """Convolution, norms, an odd-sized parameter, one too large to be persistent under zero3, and a buffer."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.GroupNorm(2, width)
        self.first = nn.Linear(width * 16, 900)
        self.second = nn.Linear(900, 7)
        self.gain = nn.Parameter(torch.ones(1))
        self.register_buffer("latent_scale", torch.tensor(LATENT_SCALE))
        self.register_buffer("table", torch.linspace(0, 1, 5), persistent=False)

    def forward(self, x_BCHW: Tensor, y_BK: Tensor) -> Tensor:
        """(B,) squared errors."""
        hidden = nn.functional.silu(self.norm(self.conv(x_BCHW * self.latent_scale)))
        out_BK = self.second(nn.functional.silu(self.first(hidden.flatten(1)))) * self.gain
        return (out_BK.float() - y_BK).square().mean(1)


def tiny(width: int = 8) -> Tiny:
    torch.manual_seed(0)
    return Tiny(width)


def part_of(parameter: str) -> str:
    """Three parts, of which one is smaller than any rank's share."""
    return {"gain": "gain", "second": "head"}.get(parameter.partition(".")[0], "body")


def samples(positions: Tensor) -> tuple[Tensor, Tensor]:
    return rng.normal(0, "x", positions, (3, 4, 4)), rng.normal(0, "y", positions, (7,))


def engine_of(
    kind: str,
    *,
    precision: str = "fp32",
    grad_clip: float = 0.5,
    micro_batch: int = MICRO_BATCH,
    width: int = 8,
    decay: str = "matrices",
) -> Engine:
    """Two groups of parameters, unless everything decays."""
    config = EngineConfig(kind=EngineKind(kind), precision=Precision(precision), grad_clip=grad_clip)
    engine = config.build(global_batch=GLOBAL_BATCH, micro_batch=micro_batch)
    optimizer = OptimizerConfig(learning_rate=3e-3, weight_decay=0.1, warmup_images=32, decay=Decay(decay))
    engine.prepare(tiny(width), optimizer)
    return engine


class Training:
    """Engine, EMA and checkpoints over the fixed stream; `run` takes some optimizer steps and returns their losses."""

    def __init__(self, engine: Engine, directory: Path) -> None:
        self.engine, self.images_seen = engine, 0
        self.ema, self.movement = EMA(engine.masters, HALF_LIVES), Movement(engine.masters, part_of)
        self.checkpoints = Checkpoints(directory, masters=engine.masters, ema=self.ema, module=engine.module)
        self.optimizer = OptimizerConfig(learning_rate=3e-3, warmup_images=32)
        self.norms: list[float] = []

    def run(self, steps: int) -> list[float]:
        return [self._step() for _ in range(steps)]

    def _step(self) -> float:
        engine, losses = self.engine, []
        stride = engine.micro_batch * engine.world
        for micro in range(engine.accumulation):
            first = self.images_seen + micro * stride
            x, y = samples(torch.arange(first + engine.rank, first + stride, engine.world))
            with engine.accumulate():
                loss = engine.model(x.to(engine.device), y.to(engine.device)).mean()
                engine.backward(loss)
                norm = engine.step(self.optimizer.learning_rate_at(self.images_seen, 1000))
            assert engine.at_boundary == (micro == engine.accumulation - 1)
            losses.append(loss.detach())
        self.images_seen += engine.global_batch
        self.ema.update(engine.global_batch, self.images_seen)
        self.norms.append(float(norm))
        return engine.mean_over_ranks({"loss": torch.stack(losses).mean()})["loss"]

    def watched_step(self) -> tuple[float, dict[str, float], dict[str, float]]:
        """The loss of a step, what is told of the weights and averages, and on rank 0 the same from whole weights."""
        before = self.weights()
        self.movement.watch(True)
        loss = self._step()
        self.movement.watch(False)
        squares = self.movement.numbers(torch.tensor(self.norms[-1]))
        squares |= {f"train/ema_distance_{half_life}": ratio for half_life, ratio in self.ema.distances().items()}
        told = {name: math.sqrt(square) for name, square in self.engine.mean_over_ranks({}, squares).items()}
        after = self.weights()
        averages = {half_life: self.ema.consolidated(half_life) for half_life in HALF_LIVES}
        if before is None or after is None:
            return loss, told, {}
        direct = {f"train/ema_distance_{half_life}": _apart(whole, after) for half_life, whole in averages.items()}
        for part in {part_of(name) for name in after}:
            own = {name: weight for name, weight in after.items() if part_of(name) == part}
            direct[f"train/update_{part}"] = _apart(before, own)
        return loss, told, direct

    def save(self) -> Path:
        path = self.checkpoints.save({"images_seen": self.images_seen, "wandb_id": "abc"})
        self.checkpoints.drain()
        return path

    def resume(self, path: Path) -> None:
        self.images_seen = self.checkpoints.load(path)["images_seen"]

    def weights(self) -> dict[str, Tensor] | None:
        return self.engine.masters.consolidated(self.engine.masters.tensors)

    def everything(self) -> dict[str, Tensor] | None:
        """Whole weights, moments and averages on rank 0."""
        masters = self.engine.masters
        kinds = {"weight": masters.tensors, **{key: masters.moments(key) for key in ("exp_avg", "exp_avg_sq")}}
        kinds |= {f"ema/{half_life}": shadow for half_life, shadow in self.ema.shadows.items()}
        whole = {kind: masters.consolidated(tensors) for kind, tensors in kinds.items()}
        return {
            f"{kind}:{n}": t for kind, named in whole.items() if named is not None for n, t in named.items()
        } or None


def _apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """|one - other| / |other| over all names of the other."""
    away = sum(float((one[name].double() - weight.double()).square().sum()) for name, weight in other.items())
    return math.sqrt(away / sum(float(weight.double().square().sum()) for weight in other.values()))
