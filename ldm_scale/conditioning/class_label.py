"""Class ids as one context token, or as a vector added to the timestep embedding (Rombach et al. 2022, section 4.3).

Knows nothing of the diffusion process, names of classes, files or ranks.

Shape letters: B batch, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from ldm_scale.conditioning.base import Conditioner, ConditionerConfig, Conditions


class Gives(Enum):
    """The way by which the U-Net hears of the class."""

    context = "context"
    """One token to attend to; the paper's ImageNet models."""
    vector = "vector"
    """Added to the timestep embedding (Dhariwal & Nichol 2021)."""


@dataclass(kw_only=True, slots=True)
class ClassLabelConfig(ConditionerConfig):
    """One learnt vector a class; the defaults are those of the published LDM-4 for ImageNet."""

    classes: int = 1000
    """Classes; ids are 0 .. classes - 1."""
    null_class: bool = True
    """Whether there is one more vector, the last, for no class: guidance and dropout need it."""
    width: int = 512
    """Width D of the vectors; the U-Net's context_dim or vector_dim."""
    give: Gives = Gives.context
    """As a context token, or as a vector."""

    def __post_init__(self) -> None:
        ConditionerConfig.__post_init__(self)
        self.give = Gives(self.give)
        for name, value in (("classes", self.classes), ("width", self.width)):
            if value < 1:
                raise ValueError(f"conditioning.{name}={value}; must be at least 1")
        if self.dropout > 0 and not self.null_class:
            raise ValueError(
                f"conditioning.dropout={self.dropout} with conditioning.null_class=false: there is no vector to put in "
                "place of a dropped class; set null_class=true, or dropout=0"
            )

    def build(self) -> "ClassConditioner":
        return ClassConditioner(self)


class ClassConditioner(Conditioner):
    """Class ids to one context token or one vector each. The empty condition is a class of its own, the last."""

    config: ClassLabelConfig

    def __init__(self, config: ClassLabelConfig) -> None:
        super().__init__()
        self.config = config
        self.dropout = config.dropout
        self.context_dim = config.width if config.give is Gives.context else 0
        self.vector_dim = config.width if config.give is Gives.vector else 0
        self.embedding = nn.Embedding(config.classes + config.null_class, config.width)

    def prepare(self, conditions: Sequence[Any]) -> Tensor:
        """Class ids, integers, to (B,) int64."""
        for condition in conditions:
            if not isinstance(condition, Integral) or not 0 <= int(condition) < self.config.classes:
                raise ValueError(f"class {condition!r}; must be an integer from 0 to {self.config.classes - 1}")
        return torch.tensor(conditions, dtype=torch.int64, device="cpu")

    def null_inputs(self, batch: int) -> Tensor:
        """The id of the null class, (batch,).

        raises  ValueError where there is none
        """
        if not self.config.null_class:
            raise ValueError(
                "conditioning.null_class=false: this model knows no empty condition. Draw from it without guidance "
                "(sampler.guidance=1), or train with conditioning.null_class=true"
            )
        return torch.full((batch,), self.config.classes, device="cpu")

    def forward(self, inputs: Tensor) -> Conditions:
        """(B,) ids -> context (B, 1, D), or vector (B, D)."""
        vector_BD: Tensor = self.embedding(inputs)
        return Conditions(vector=vector_BD) if self.vector_dim else Conditions(context=vector_BD[:, None])
