"""What the configurations share of jobs that draw images with a trained model."""

from dataclasses import dataclass, field

from ldm_scale.jobs.schemas.experiment import PathsConfig
from ldm_scale.samplers.base import SamplerConfig


@dataclass(kw_only=True, slots=True)
class Drawing:
    """What jobs share that draw images with a trained model."""

    checkpoint: str = "latest"
    """Of a training run: `latest`, or the name of a directory in its `checkpoints`."""
    weights: str = "ema"
    """Of a training run: `ema` (the first half-life), `ema/HALF_LIFE`, or `raw`."""
    imports: list[str] = field(default_factory=list)
    """Modules imported before the configuration is composed."""
    sampler: SamplerConfig
    """How images are made."""
    seed: int
    """Of the noise; image i has its own stream (seed, i)."""
    paths: PathsConfig
    """Where things lie that no run owns."""

    def __post_init__(self) -> None:
        if self.weights not in ("raw", "ema") and not self.weights.removeprefix("ema/").isdigit():
            raise ValueError(f"weights={self.weights!r}; raw, ema, or ema/HALF_LIFE_IN_IMAGES")
