"""Objects and their boxes as context (Rombach et al. 2022, section 4.3.2; tokens after Jahn et al. 2021).

A layout becomes `3 max_objects + 2` token ids below `vocab_size` (92 of 8192 in the paper), in this order:

    class, top left, bottom right     of each object, in the order given
    none, none, none                  for each object there is not
    top left, bottom right            of the crop, where the model was trained to be told it

A class is its id. A corner is row * s + column of the nearest point of an s x s grid over the whole image, the outer
points on its edges; s = floor(sqrt(vocab_size)). `none` is vocab_size - 1. An id thus means a class in one place and a
corner in another; positions tell them apart. The empty condition is `none` throughout.

Knows nothing of the diffusion process, names of classes, files or ranks.

Shape letters: B batch, L tokens, D width.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from ldm_scale.conditioning.base import Conditioner, ConditionerConfig, Conditions
from ldm_scale.nn.transformer import TextTransformer

Box = tuple[float, float, float, float]
"""Left, top, right, bottom as shares of the image's sides, 0 to 1 from its top left."""
WHOLE: Box = (0.0, 0.0, 1.0, 1.0)


@dataclass(frozen=True, slots=True)
class LayoutObject:
    """One thing in the picture."""

    class_id: int
    """Which kind of thing; what the numbers mean is the data set's affair."""
    box: Box
    """Where it is, in the whole image even where only a crop of it is drawn."""

    def __post_init__(self) -> None:
        _require_box(f"object of class {self.class_id}", self.box)


@dataclass(frozen=True, slots=True)
class Layout:
    """What is where in one picture."""

    objects: Sequence[LayoutObject]
    """In any order."""
    crop: Box = WHOLE
    """The part of the image that is drawn."""

    def __post_init__(self) -> None:
        _require_box("crop", self.crop)


def _require_box(whose: str, box: Box) -> None:
    left, top, right, bottom = box
    if not (0 <= left <= right <= 1 and 0 <= top <= bottom <= 1):
        raise ValueError(
            f"{whose} has box {box}; must be (left, top, right, bottom) as shares of the image: "
            "0 <= left <= right <= 1 and 0 <= top <= bottom <= 1"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class LayoutTokens:
    """Layouts to token ids and back, as the head of this file says."""

    vocab_size: int
    """Ids are below this; the last is `none`."""
    max_objects: int
    """Of more objects than this, the largest ones are told."""
    crop: bool
    """Whether the crop is told."""

    @property
    def none(self) -> int:
        """The id that stands for nothing."""
        return self.vocab_size - 1

    @property
    def side(self) -> int:
        """Points s on each side of the grid."""
        return math.isqrt(self.vocab_size)

    @property
    def length(self) -> int:
        """Tokens L of every layout."""
        return 3 * self.max_objects + 2 * self.crop

    def encode(self, layout: Layout) -> list[int]:
        """L token ids.

        raises  ValueError where a class id is not below `none`
        """
        ids: list[int] = []
        for thing in self._told(layout.objects):
            if not isinstance(thing.class_id, Integral) or not 0 <= thing.class_id < self.none:
                raise ValueError(f"object of class {thing.class_id!r}; must be an integer from 0 to {self.none - 1}")
            ids += [thing.class_id, *self._corners(thing.box)]
        ids += [self.none] * (3 * self.max_objects - len(ids))
        return ids + self._corners(layout.crop) if self.crop else ids

    def decode(self, ids: Sequence[int]) -> Layout:
        """The layout back, corners on the grid: within half its spacing, 1 / (s - 1), of where they were.

        ids  as `encode` gives them; of the empty condition, no objects
        """
        ends = range(0, 3 * self.max_objects, 3)
        objects = [LayoutObject(ids[i], self._box(ids[i + 1 : i + 3])) for i in ends if ids[i] != self.none]
        told = self.crop and ids[-1] != self.none
        return Layout(objects, self._box(ids[-2:]) if told else WHOLE)

    def _told(self, objects: Sequence[LayoutObject]) -> list[LayoutObject]:
        """The largest `max_objects`, in the order given: what little ones say is little."""
        if len(objects) <= self.max_objects:
            return list(objects)
        largest = sorted(range(len(objects)), key=lambda i: -_area(objects[i].box))[: self.max_objects]
        return [objects[i] for i in sorted(largest)]

    def _corners(self, box: Box) -> list[int]:
        left, top, right, bottom = (round(share * (self.side - 1)) for share in box)
        return [top * self.side + left, bottom * self.side + right]

    def _box(self, corners: Sequence[int]) -> Box:
        (top, left), (bottom, right) = (divmod(corner, self.side) for corner in corners)
        last = self.side - 1
        return left / last, top / last, right / last, bottom / last


def _area(box: Box) -> float:
    left, top, right, bottom = box
    return (right - left) * (bottom - top)


@dataclass(kw_only=True, slots=True)
class LayoutConfig(ConditionerConfig):
    """Shape of the layout transformer; the defaults are the paper's (Rombach et al. 2022, table 17)."""

    width: int = 512
    """Width D of the tokens; the U-Net's context_dim."""
    layers: int = 16
    """Transformer layers."""
    heads: int = 8
    """Attention heads."""
    head_dim: int = 64
    """Channels of one head; heads x head_dim need not be the width."""
    max_objects: int = 30
    """Objects of one picture; of more, the largest ones are told."""
    vocab_size: int = 8192
    """Token ids: classes and points of the grid share them, the last is none."""
    crop: bool = True
    """Whether two more tokens say which part of the image is drawn."""
    embedding_std: float = 0.02
    """Standard deviation of token and position embeddings at the start of training."""

    def __post_init__(self) -> None:
        ConditionerConfig.__post_init__(self)
        for name, value, least in (
            ("width", self.width, 1),
            ("layers", self.layers, 1),
            ("heads", self.heads, 1),
            ("head_dim", self.head_dim, 1),
            ("max_objects", self.max_objects, 1),
            ("vocab_size", self.vocab_size, 4),
        ):
            if value < least:
                raise ValueError(f"conditioning.{name}={value}; must be at least {least}")
        if not self.embedding_std > 0:
            raise ValueError(f"conditioning.embedding_std={self.embedding_std}; must be above 0")

    def build(self) -> "LayoutConditioner":
        return LayoutConditioner(self)


class LayoutConditioner(Conditioner):
    """Layouts to context tokens."""

    config: LayoutConfig

    def __init__(self, config: LayoutConfig) -> None:
        super().__init__()
        self.config = config
        self.dropout = config.dropout
        self.context_dim = config.width
        self.tokens = LayoutTokens(vocab_size=config.vocab_size, max_objects=config.max_objects, crop=config.crop)
        self.transformer = TextTransformer(
            vocab_size=config.vocab_size,
            max_length=self.tokens.length,
            width=config.width,
            layers=config.layers,
            heads=config.heads,
            head_dim=config.head_dim,
            embedding_std=config.embedding_std,
        )

    def prepare(self, conditions: Sequence[Any]) -> Tensor:
        """`Layout`s to (B, L) int64 token ids."""
        for condition in conditions:
            if not isinstance(condition, Layout):
                raise ValueError(f"condition {condition!r} is no Layout(objects, crop)")
        return torch.tensor([self.tokens.encode(layout) for layout in conditions], dtype=torch.int64, device="cpu")

    def null_inputs(self, batch: int) -> Tensor:
        """`none` in every place, (batch, L)."""
        return torch.full((batch, self.tokens.length), self.tokens.none, device="cpu")

    def forward(self, inputs: Tensor) -> Conditions:
        """(B, L) token ids -> context (B, L, D)."""
        return Conditions(context=self.transformer(inputs))
