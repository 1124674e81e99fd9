"""The toy world: captioned scenes of one or two coloured shapes, drawn without any outside data.

A `Scene` is what a caption says and nothing more; `scene.draw` turns it into pixels. Position, size and colours vary a
little with uniform numbers that the caller passes in, so that one caption has many pictures, yet never so much that
two captions could share one. Captions that are held out for validation are a fixed, hashed tenth of all captions.
Knows nothing of files, shards or models.

Coordinates are shares of the image's side, x to the right and y down; class id = colour x shape.
Shape letters: H W image height and width (equal here).
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product

import numpy as np

from ldm_scale.core import rng

COLOURS: Mapping[str, tuple[int, int, int]] = {
    "red": (216, 34, 40),
    "green": (24, 168, 68),
    "blue": (36, 84, 214),
    "yellow": (242, 196, 16),
}
"""RGB of each colour before jitter; far apart in hue, so that blur against any background keeps them apart."""
BACKGROUNDS: Mapping[str, int] = {"white": 248, "grey": 144, "black": 12}
"""Grey level of each background before jitter."""
SIZES: Mapping[str, float] = {"small": 0.18, "large": 0.24}
"""Radius of a circle of that size that is alone, as a share of the image's side; the other shapes look as large."""
PAIR_SCALE = 0.79
"""Each of two things is drawn so much smaller than one that is alone."""
PLACES: Mapping[str, tuple[float, float]] = {
    "at the top left": (0.3, 0.3),
    "at the top": (0.5, 0.3),
    "at the top right": (0.7, 0.3),
    "at the left": (0.3, 0.5),
    "in the centre": (0.5, 0.5),
    "at the right": (0.7, 0.5),
    "at the bottom left": (0.3, 0.7),
    "at the bottom": (0.5, 0.7),
    "at the bottom right": (0.7, 0.7),
}
"""Centre (x, y) of a single thing."""
RELATIONS: Mapping[str, tuple[int, int]] = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
"""Where the first of two things lies, seen from the second: (x, y) direction."""
HELD_OUT_SHARE = 0.1
"""Share of all captions that only validation may use."""
JITTER_NUMBERS = 14
"""How many uniform numbers one picture of a scene takes."""

_PAIR_REACH = 0.265  # from the image's centre to each of two things, along their axis
_PAIR_DRIFT = 0.1  # both things of a pair, across their axis
_POSITION_JITTER = 0.02
_SIZE_JITTER = 0.05  # relative
_COLOUR_JITTER = 10  # levels of 0..255, each channel
_BACKGROUND_JITTER = 6  # levels
_SUBPIXELS = 8  # samples per pixel and axis


@dataclass(frozen=True, slots=True)
class Outline:
    """Geometry of one shape around the centre of its bounding box, for radius 1."""

    half_width: float
    half_height: float
    area: float
    centroid_y: float

    def contains(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Which of the points (broadcast against each other) lie inside."""
        raise NotImplementedError


class _Circle(Outline):
    def contains(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return x * x + y * y < 1


class _Square(Outline):
    def contains(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return (np.abs(x) < self.half_width) & (np.abs(y) < self.half_height)


class _Triangle(Outline):
    def contains(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        slope = self.half_width / (2 * self.half_height)
        return (np.abs(x) < (y + self.half_height) * slope) & (y < self.half_height)


_SIDE, _BASE = 0.88, 1.05  # half the square's side, half the triangle's base
_RISE = _BASE * math.sqrt(3) / 2  # half the height of the equilateral triangle

SHAPES: Mapping[str, Outline] = {
    "circle": _Circle(1, 1, math.pi, 0),
    "square": _Square(_SIDE, _SIDE, 4 * _SIDE**2, 0),
    "triangle": _Triangle(_BASE, _RISE, 2 * _BASE * _RISE, _RISE / 3),
}

CLASS_NAMES: tuple[str, ...] = tuple(f"{colour} {shape}" for colour, shape in product(COLOURS, SHAPES))
"""Name of each class id, 0 to 11."""


@dataclass(frozen=True, slots=True)
class Thing:
    """One object, as a caption names it."""

    size: str
    colour: str
    shape: str

    def __post_init__(self) -> None:
        _require("size", self.size, SIZES)
        _require("colour", self.colour, COLOURS)
        _require("shape", self.shape, SHAPES)

    @property
    def class_id(self) -> int:
        return CLASS_NAMES.index(f"{self.colour} {self.shape}")

    @property
    def phrase(self) -> str:
        return f"a {self.size} {self.colour} {self.shape}"


@dataclass(frozen=True, slots=True)
class Box:
    """Where one thing lies: x0 <= x1, y0 <= y1, in 0..1."""

    x0: float
    y0: float
    x1: float
    y1: float
    class_id: int


@dataclass(frozen=True, slots=True)
class Drawing:
    """One picture of a scene, with what layout-to-image and segmentation need."""

    image: np.ndarray
    """(H, W, 3) uint8."""
    boxes: list[Box]
    """In the order of the caption."""
    labels: np.ndarray
    """(H, W) uint8: 0 background, class id + 1 inside a thing."""


@dataclass(frozen=True, slots=True)
class _Placed:
    """A thing with its geometry and colour settled."""

    thing: Thing
    x: float
    y: float
    radius: float
    rgb: np.ndarray


@dataclass(frozen=True, slots=True)
class Scene:
    """What one caption says: one thing and its place, or two that differ in class and their relation; a background."""

    things: tuple[Thing, ...]
    where: str
    """A key of PLACES for one thing, of RELATIONS for two."""
    background: str

    def __post_init__(self) -> None:
        if len(self.things) not in (1, 2):
            raise ValueError(f"a scene of {len(self.things)} things; choose 1 or 2")
        if len(self.things) == 1:
            _require("place", self.where, PLACES)
        else:
            _require("relation", self.where, RELATIONS)
            if self.things[0].class_id == self.things[1].class_id:
                raise ValueError(f"two things of class {CLASS_NAMES[self.things[0].class_id]!r}; they must differ")
        _require("background", self.background, BACKGROUNDS)

    def caption(self) -> str:
        """The one sentence that says it; `parse_caption` reads it back."""
        others = "".join(f" {thing.phrase}" for thing in self.things[1:])
        return f"{self.things[0].phrase} {self.where}{others} on a {self.background} background"

    def canonical(self) -> "Scene":
        """The same scene in the spelling that its paraphrase shares: "B right of A" becomes "A left of B"."""
        if len(self.things) == 2 and self.where in ("right of", "below"):
            opposite = {"right of": "left of", "below": "above"}[self.where]
            return Scene(self.things[::-1], opposite, self.background)
        return self

    @property
    def held_out(self) -> bool:
        """True where only validation may show this caption or its paraphrase; depends on the caption alone."""
        return rng.text_uniform(self.canonical().caption()) < HELD_OUT_SHARE

    def render(self, size: int = 32, jitter: np.ndarray | None = None) -> np.ndarray:
        """The picture alone, (H, W, 3) uint8; arguments as `draw`."""
        return self.draw(size, jitter).image

    def draw(self, size: int = 32, jitter: np.ndarray | None = None) -> Drawing:
        """Draw the scene, antialiased.

        size    side of the image in pixels, at least 16
        jitter  (JITTER_NUMBERS,) uniform in [0, 1); None draws the scene exactly as named
        """
        if size < 16:
            raise ValueError(f"size={size}; a scene needs at least 16 pixels a side")
        signed = np.zeros(JITTER_NUMBERS) if jitter is None else 2 * np.asarray(jitter, dtype=np.float64) - 1
        image = np.full((size, size, 3), BACKGROUNDS[self.background] + _BACKGROUND_JITTER * signed[0], np.float32)
        labels = np.zeros((size, size), np.uint8)
        boxes = []
        for placed in self._placed(signed):
            window, cover = _cover_window(placed.thing.shape, placed.x, placed.y, placed.radius, size)
            image[window] += cover[..., None] * (placed.rgb - image[window])
            labels[window][cover >= 0.5] = placed.thing.class_id + 1
            boxes.append(_box(placed))
        return Drawing((image + 0.5).clip(0, 255).astype(np.uint8), boxes, labels)

    def _placed(self, signed: np.ndarray) -> list[_Placed]:
        """Settle each thing's geometry and colour from numbers in [-1, 1)."""
        placed = []
        for i, (thing, (x, y)) in enumerate(zip(self.things, self._centres(signed[1]), strict=True)):
            own = signed[2 + 6 * i : 8 + 6 * i]
            placed.append(
                _Placed(
                    thing,
                    x=x + _POSITION_JITTER * own[0],
                    y=y + _POSITION_JITTER * own[1],
                    radius=circle_radius(thing.size, len(self.things)) * (1 + _SIZE_JITTER * own[2]),
                    rgb=(np.array(COLOURS[thing.colour]) + _COLOUR_JITTER * own[3:]).astype(np.float32),
                )
            )
        return placed

    def _centres(self, drift: float) -> list[tuple[float, float]]:
        if len(self.things) == 1:
            return [PLACES[self.where]]
        dx, dy = RELATIONS[self.where]
        x, y = 0.5 + _PAIR_DRIFT * drift * abs(dy), 0.5 + _PAIR_DRIFT * drift * abs(dx)
        return [(x + _PAIR_REACH * dx, y + _PAIR_REACH * dy), (x - _PAIR_REACH * dx, y - _PAIR_REACH * dy)]


def circle_radius(size: str, things: int) -> float:
    """Radius of a circle of that size in a scene of so many things, as a share of the image's side."""
    return SIZES[size] * (PAIR_SCALE if things == 2 else 1)


def coverage(shape: str, x: float, y: float, radius: float, size: int) -> np.ndarray:
    """Share of each pixel that a shape covers, (H, W) float32 in 0..1; 8 x 8 samples a pixel."""
    window, inside = _cover_window(shape, x, y, radius, size)
    whole = np.zeros((size, size), np.float32)
    whole[window] = inside
    return whole


def all_scenes(things: int) -> list[Scene]:
    """Every scene of one thing (648 captions) or of two (6336), in a fixed order."""
    if things == 1:
        return [
            Scene((thing,), place, background)
            for thing, place, background in product(_all_things(), PLACES, BACKGROUNDS)
        ]
    if things == 2:
        return [
            Scene((first, second), relation, background)
            for first, relation, second, background in product(_all_things(), RELATIONS, _all_things(), BACKGROUNDS)
            if first.class_id != second.class_id
        ]
    raise ValueError(f"things={things}; the toy world has scenes of 1 or 2")


def parse_caption(text: str) -> Scene:
    """The scene that a caption names; the inverse of `Scene.caption`.

    raises  ValueError for any other sentence
    """
    match = _CAPTION.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is no caption of the toy world; one is {all_scenes(1)[0].caption()!r}")
    first = Thing(*match.group("size", "colour", "shape"))
    if match["place"]:
        return Scene((first,), match["place"], match["background"])
    second = Thing(*match.group("size_2", "colour_2", "shape_2"))
    return Scene((first, second), match["relation"], match["background"])


def _choice(name: str, words: Mapping[str, object]) -> str:
    return f"(?P<{name}>{'|'.join(sorted(words, key=len, reverse=True))})"


def _thing_pattern(suffix: str) -> str:
    parts = (("size", SIZES), ("colour", COLOURS), ("shape", SHAPES))
    return "a " + " ".join(_choice(name + suffix, words) for name, words in parts)


_CAPTION = re.compile(
    f"{_thing_pattern('')} (?:{_choice('place', PLACES)}|{_choice('relation', RELATIONS)} {_thing_pattern('_2')})"
    f" on a {_choice('background', BACKGROUNDS)} background"
)


def _all_things() -> list[Thing]:
    return [Thing(size, colour, shape) for size, colour, shape in product(SIZES, COLOURS, SHAPES)]


def _require(name: str, value: str, allowed: Mapping[str, object]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r}; choose one of {', '.join(allowed)}")


def _box(placed: _Placed) -> Box:
    outline = SHAPES[placed.thing.shape]
    width, height = outline.half_width * placed.radius, outline.half_height * placed.radius
    corners = (placed.x - width, placed.y - height, placed.x + width, placed.y + height)
    x0, y0, x1, y1 = (float(min(max(corner, 0.0), 1.0)) for corner in corners)
    return Box(x0, y0, x1, y1, placed.thing.class_id)


def _cover_window(shape: str, x: float, y: float, radius: float, size: int) -> tuple[tuple[slice, slice], np.ndarray]:
    """The pixels a shape can touch, and the share of each that it covers."""
    outline = SHAPES[shape]
    rows, grid_y = _subpixels(y, outline.half_height * radius, size)
    columns, grid_x = _subpixels(x, outline.half_width * radius, size)
    inside = outline.contains((grid_x - x)[None, :] / radius, (grid_y - y)[:, None] / radius)
    blocks = inside.reshape(rows.stop - rows.start, _SUBPIXELS, columns.stop - columns.start, _SUBPIXELS)
    return (rows, columns), blocks.mean(axis=(1, 3), dtype=np.float32)


def _subpixels(centre: float, half: float, size: int) -> tuple[slice, np.ndarray]:
    """The pixels within `half` of `centre` along one axis, and the positions of the samples inside them."""
    start = min(max(math.floor((centre - half) * size), 0), size)
    stop = min(max(math.ceil((centre + half) * size), start), size)
    return slice(start, stop), (np.arange(start * _SUBPIXELS, stop * _SUBPIXELS) + 0.5) / (_SUBPIXELS * size)
