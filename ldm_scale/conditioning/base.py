"""What a condition is to the U-Net, and what every conditioner does.

Rombach et al. 2022, section 3.3: tokens to attend to, channels to concatenate, or (Dhariwal & Nichol 2021) a vector
added to the timestep embedding. Knows nothing of the diffusion process, files or ranks.

Shape letters: B batch, L tokens, D context width, C channels, H W latent height and width, E vector width.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ldm_scale.core.tensors import over_samples


@dataclass(frozen=True)  # without slots: zero3 of DeepSpeed looks through a module's output by `vars`
class Conditions:
    """What the U-Net is given beside the noisy latent; None where there is nothing of a kind.

    context  (B, L, D) tokens for cross-attention
    concat   (B, C, H, W) channels appended to the latent's
    vector   (B, E) added to the timestep embedding
    """

    context: Tensor | None = None
    concat: Tensor | None = None
    vector: Tensor | None = None


@dataclass(kw_only=True, slots=True)
class ConditionerConfig(ABC):
    """What every conditioner's configuration has."""

    dropout: float = 0.1
    """Probability that training replaces a sample's condition by the empty one, for guidance (Ho & Salimans 2022)."""

    def __post_init__(self) -> None:
        if not 0 <= self.dropout <= 1:
            raise ValueError(f"conditioning.dropout={self.dropout}; must be a probability, 0 to 1")

    @abstractmethod
    def build(self) -> "Conditioner":
        """The conditioner with fresh weights, on torch's default device."""

    def build_trained(self) -> "Conditioner":
        """What a training holds of it: all, unless it is frozen and its output comes from a cache."""
        return self.build()


class Conditioner(nn.Module, ABC):
    """Turns a caption, class or map into what the U-Net reads, in two steps.

    `prepare` is cheap, has no weights and runs in the loader's thread; `forward` has them and runs on the device.
    """

    config: ConditionerConfig
    """What it was built from."""
    dropout: float
    """Probability that training replaces a sample's condition by the empty one."""
    context_dim: int = 0
    """Width D of the context tokens; 0: no context."""
    concat_channels: int = 0
    """Channels C appended to the latent's; 0: none."""
    vector_dim: int = 0
    """Width E of the vector added to the timestep embedding; 0: none."""
    part: str = "conditioner"
    """What it is called where the parts of a model are told apart."""

    @abstractmethod
    def prepare(self, conditions: Sequence[Any]) -> Tensor:
        """Inputs of `forward`, one row a condition, on the CPU. May be called from several threads at once.

        conditions  one a sample: captions, class ids, maps ...; each conditioner says which
        raises      ValueError naming the first condition that is not one, and what is allowed
        """

    @abstractmethod
    def null_inputs(self, batch: int) -> Tensor:
        """Inputs that stand for no condition, `batch` equal rows, on the CPU.

        Those of maps and images are 1 x 1, which `dropped` and the model stretch over any height and width.
        """

    @abstractmethod
    def forward(self, inputs: Tensor) -> Conditions:
        """Conditions of prepared inputs."""

    def read(self, conditions: list[str]) -> Tensor:
        """`prepare` for the stream that a training reads, in the loader's thread."""
        return self.prepare(conditions)

    def cut(self) -> tuple[int, int]:
        """Conditions that were too long, and how many there were, in `read` since this was last asked; 0 of 0 where
        none can be."""
        return 0, 0

    def lengths(self, inputs: Tensor) -> dict[str, Tensor]:
        """What is to be known of the length of conditions, (B,) each by name; nothing where they have none."""
        return {}

    def in_words(self, inputs: Tensor, conditions: list[str]) -> list[str]:
        """What prepared inputs tell the model, one text a row; the empty condition is the empty text.

        conditions  what they were made of, before any was dropped: for inputs that cannot be read back
        """
        null = self.null_inputs(1).to(inputs)
        is_null_B = (inputs == null).reshape(len(inputs), -1).all(1).tolist()
        return ["" if is_null else text for is_null, text in zip(is_null_B, conditions, strict=True)]

    def dropped(self, inputs: Tensor, drop_B: Tensor) -> Tensor:
        """`inputs` with the rows where `drop_B` is true replaced by the empty condition; same device and dtype."""
        null = self.null_inputs(1).to(inputs)
        return torch.where(over_samples(drop_B, inputs), null, inputs)


def require_captions(conditions: Sequence[Any]) -> list[str]:
    """The conditions, which must all be strings.

    raises  ValueError naming the first that is not
    """
    for condition in conditions:
        if not isinstance(condition, str):
            raise ValueError(f"condition {condition!r} is no caption: the text conditioners take strings")
    return list(conditions)
