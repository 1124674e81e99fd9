"""Does a picture show what its caption says? `ClipScore` asks CLIP; `caption_accuracy` reads toy pictures into words.

The latter has no learned part. All backgrounds are grey, so the chroma of a pixel is the coverage of a thing times the
thing's chroma, whatever lies behind: its direction names the colour, its length the coverage. Connected coverage is one
thing; its shape is the outline that fits best, drawn with the same area and centre of mass. Takes images, not models.

Shape letters: B images, C channels, H W height and width (equal), K colours, D width of an embedding.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor, nn
from torch.nn import functional

from ldm_scale.core import tensors, weights
from ldm_scale.images.scenes import (
    BACKGROUNDS,
    COLOURS,
    PLACES,
    RELATIONS,
    SHAPES,
    Scene,
    Thing,
    circle_radius,
    coverage,
)
from ldm_scale.images.scenes import parse_caption as parse

_CHROMA = np.array([[1.0, -0.5, -0.5], [0.0, math.sqrt(3) / 2, -math.sqrt(3) / 2]])  # removes grey
_COLOUR_CHROMA = np.array(list(COLOURS.values())) @ _CHROMA.T  # (K, 2)
_LENGTHS = np.linalg.norm(_COLOUR_CHROMA, axis=1)
_DIRECTIONS = _COLOUR_CHROMA / _LENGTHS[:, None]
_EDGE = 0.5  # coverage above which a pixel belongs to a thing
_SMALLEST = 0.3 * SHAPES["triangle"].area * circle_radius("small", things=2) ** 2  # share of the image: else a speck
_POOREST_FIT = 0.6  # overlap below which a thing has none of the shapes
_SOFTNESS = (0.0, 0.75 / 32, 1.5 / 32)  # blurs at which outlines are compared: deviations, shares of the side


class ClipScore(nn.Module):
    """How well pictures fit captions: 100 times the cosine of their embeddings by CLIP, at least 0.

    Hessel et al. 2021, eq. 1, with 100 for their 2.5, as torchmetrics has it. NVIDIA and MLPerf print a
    hundredth of it.
    """

    def __init__(self, directory: str) -> None:
        """Read CLIP: network, tokenizer and preprocessing as transformers saves them.

        raises  FileNotFoundError where they are not in `directory`, ValueError where it holds another network
        """
        from transformers import CLIPModel, CLIPProcessor  # seconds to import, and most runs do without

        super().__init__()
        try:
            self._processor = CLIPProcessor.from_pretrained(directory, local_files_only=True)
            loaded: Any = CLIPModel.from_pretrained(
                directory, local_files_only=True, dtype=torch.float32, output_loading_info=True
            )
        except (OSError, ValueError) as error:
            raise FileNotFoundError(
                f"evaluation.clip={directory} does not hold CLIP with its tokenizer and preprocessor_config.json: run "
                "`make fetch-weights` on a machine with internet and copy the folder here, or evaluation.clip=null"
            ) from error
        self.network, found = loaded
        if found["missing_keys"]:  # which transformers would fill with random numbers
            raise ValueError(
                f"evaluation.clip={directory} is not CLIP for images and text: it lacks {len(found['missing_keys'])} "
                f"tensors, {', '.join(sorted(found['missing_keys'])[:3])} ...; `make fetch-weights` fetches it whole"
            )
        self.network.requires_grad_(False).eval()
        self.digest = weights.digest(self.network.state_dict())
        """sha256 of the weights; two scores compare only if it is the same."""

    @torch.no_grad()
    def forward(self, captions: Sequence[str], images_BCHW: Tensor) -> Tensor:
        """(B,) scores of images in [-1, 1], each with its caption, which is cut where it is too long."""
        length = self.network.config.text_config.max_position_embeddings
        pixels = list(tensors.to_uint8(images_BCHW).cpu())
        text = self._processor(
            text=list(captions), return_tensors="pt", padding=True, truncation=True, max_length=length
        ).to(self.network.device)
        seen = self._processor(images=pixels, return_tensors="pt").to(self.network.device)
        text_BD = self.network.get_text_features(**text).pooler_output
        seen_BD = self.network.get_image_features(**seen).pooler_output
        return 100 * functional.cosine_similarity(text_BD, seen_BD).clamp(min=0)


@dataclass(frozen=True, slots=True)
class SeenThing:
    """One thing read from a picture."""

    colour: str
    shape: str | None
    """None where no shape fits."""
    size: str
    x: float
    y: float
    """Centre, shares of the side."""

    @property
    def place(self) -> str:
        """The nearest key of PLACES."""
        return min(PLACES, key=lambda name: math.dist(PLACES[name], (self.x, self.y)))


@dataclass(frozen=True, slots=True)
class SeenScene:
    """What a picture shows: background and things, the largest first."""

    background: str
    things: tuple[SeenThing, ...]


@dataclass(frozen=True, slots=True)
class Judgement:
    """Which parts of a caption a picture gets right; every part needs the right number of things."""

    colour: bool
    shape: bool
    position: bool
    """Place of one thing, relation of two."""
    size: bool
    background: bool

    @property
    def holds(self) -> bool:
        """Colour, shape and position all right; size and background are reported apart."""
        return self.colour and self.shape and self.position


@dataclass(frozen=True, slots=True)
class CaptionAccuracy:
    """Shares, 0 to 1, of `n` pictures that get each part of their caption right."""

    overall: float
    """Colour, shape and position, all of every thing."""
    colour: float
    shape: float
    position: float
    size: float
    background: float
    n: int


def caption_accuracy(captions: Sequence[str], images_BHWC: np.ndarray) -> CaptionAccuracy:
    """How many of the pictures show what their captions say.

    captions     of the toy world, one a picture
    images_BHWC  uint8
    raises       ValueError for a foreign caption, or for other numbers of captions than pictures
    """
    if len(captions) != len(images_BHWC) or not len(captions):
        raise ValueError(f"{len(captions)} captions for {len(images_BHWC)} images; give one for each, at least one")
    judged = [judge(caption, image) for caption, image in zip(captions, images_BHWC, strict=True)]
    return CaptionAccuracy(
        overall=_share([one.holds for one in judged]),
        colour=_share([one.colour for one in judged]),
        shape=_share([one.shape for one in judged]),
        position=_share([one.position for one in judged]),
        size=_share([one.size for one in judged]),
        background=_share([one.background for one in judged]),
        n=len(judged),
    )


def caption_holds(caption: str, image: np.ndarray) -> bool:
    """True where colour, shape and position (or relation) of every thing are as the caption says."""
    return judge(caption, image).holds


def judge(caption: str, image: np.ndarray) -> Judgement:
    """Compare a picture, (H, W, 3) uint8, with a caption of the toy world, part by part."""
    wanted, seen = parse(caption), read_scene(image)
    background = seen.background == wanted.background
    if len(seen.things) != len(wanted.things):
        return Judgement(colour=False, shape=False, position=False, size=False, background=background)
    things = max(permutations(seen.things), key=lambda order: _agreement(wanted.things, order))
    pairs = list(zip(wanted.things, things, strict=True))
    return Judgement(
        colour=all(ours.colour == theirs.colour for ours, theirs in pairs),
        shape=all(ours.shape == theirs.shape for ours, theirs in pairs),
        position=_position_holds(wanted, things),
        size=all(ours.size == theirs.size for ours, theirs in pairs),
        background=background,
    )


def read_scene(image: np.ndarray) -> SeenScene:
    """Read a square picture, (H, W, 3) uint8, of at least 16 pixels a side."""
    if image.ndim != 3 or image.shape[2] != 3 or image.shape[0] != image.shape[1] or image.dtype != np.uint8:
        raise ValueError(f"an image of shape {image.shape}, {image.dtype}; needs (side, side, 3), uint8")
    chroma = image.astype(np.float64) @ _CHROMA.T
    along_KHW = np.einsum("kc,hwc->khw", _DIRECTIONS, chroma)
    colour_HW = along_KHW.argmax(axis=0)
    cover_HW = along_KHW.max(axis=0) / _LENGTHS[colour_HW]
    regions = _regions(colour_HW, cover_HW)
    things = [_read_thing(region, regions, along_KHW) for region in regions]
    return SeenScene(_read_background(image), tuple(things))


@dataclass(frozen=True, slots=True, eq=False)
class _Region:
    """Connected pixels of one colour."""

    colour: int
    inside: np.ndarray


def _regions(colour_HW: np.ndarray, cover_HW: np.ndarray) -> list[_Region]:
    """Connected pixels of one colour, the largest first, without specks."""
    found = []
    for colour in range(len(COLOURS)):
        labels, count = ndimage.label((colour_HW == colour) & (cover_HW > _EDGE))
        areas = np.bincount(labels.ravel(), minlength=count + 1)
        found += [_Region(colour, labels == i) for i in range(1, count + 1) if areas[i] >= _SMALLEST * cover_HW.size]
    return sorted(found, key=lambda region: -int(region.inside.sum()))


def _read_thing(region: _Region, regions: list[_Region], along_KHW: np.ndarray) -> SeenThing:
    """Fit every shape to the soft coverage of a region and its rim; the best one wins."""
    side = len(region.inside)
    near = ndimage.binary_dilation(region.inside, iterations=max(side // 16, 1))
    for other in regions:
        if other is not region:
            near &= ~ndimage.binary_dilation(other.inside, iterations=max(side // 32, 1)) | region.inside
    cover = np.where(near, along_KHW[region.colour] / _LENGTHS[region.colour], 0.0)
    level = np.quantile(cover[region.inside], 0.9)  # what full coverage is here: colours vary a little
    cover = (cover / level).clip(0, 1)
    fits = {shape: _fit(shape, cover) for shape in SHAPES}
    shape = max(fits, key=lambda name: fits[name].overlap)
    best = fits[shape]
    return SeenThing(
        colour=list(COLOURS)[region.colour],
        shape=shape if best.overlap >= _POOREST_FIT else None,
        size=_size(best.radius, len(regions)),
        x=best.x,
        y=best.y,
    )


def _size(radius: float, things: int) -> str:
    middle = math.sqrt(circle_radius("small", things) * circle_radius("large", things))
    return "large" if radius > middle else "small"


@dataclass(frozen=True, slots=True)
class _Fit:
    """One shape laid over a coverage; `overlap` is intersection over union of the two, 0 to 1."""

    overlap: float
    x: float
    y: float
    radius: float


def _fit(shape: str, cover_HW: np.ndarray) -> _Fit:
    """Draw a shape with the coverage's area and centre of mass, sharp to soft, and measure the overlap."""
    side, outline = len(cover_HW), SHAPES[shape]
    radius = math.sqrt(float(cover_HW.sum()) / outline.area) / side
    centre_y, centre_x = (float(c + 0.5) / side for c in ndimage.center_of_mass(cover_HW))
    centre_y -= outline.centroid_y * radius
    sharp = coverage(shape, centre_x, centre_y, radius, side)
    outlines = (ndimage.gaussian_filter(sharp, softness * side) if softness else sharp for softness in _SOFTNESS)
    return _Fit(max(_overlap(cover_HW, outline) for outline in outlines), centre_x, centre_y, radius)


def _overlap(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.minimum(one, other).sum() / np.maximum(one, other).sum())


def _read_background(image: np.ndarray) -> str:
    """The grey nearest to the median of the rim, which things hardly touch."""
    rim = max(len(image) // 16, 1)
    inner = np.zeros(image.shape[:2], bool)
    inner[rim:-rim, rim:-rim] = True
    grey = float(np.median(image[~inner].mean(axis=-1)))
    return min(BACKGROUNDS, key=lambda name: abs(BACKGROUNDS[name] - grey))


def _agreement(wanted: tuple[Thing, ...], seen: tuple[SeenThing, ...]) -> tuple[int, int]:
    """How well an order of the seen things answers to the wanted ones: colours before shapes."""
    pairs = list(zip(wanted, seen, strict=True))
    colours = sum(ours.colour == theirs.colour for ours, theirs in pairs)
    shapes = sum(ours.shape == theirs.shape for ours, theirs in pairs)
    return colours + shapes, colours


def _position_holds(wanted: Scene, seen: tuple[SeenThing, ...]) -> bool:
    if len(seen) == 1:
        return seen[0].place == wanted.where
    dx, dy = seen[0].x - seen[1].x, seen[0].y - seen[1].y
    direction_x, direction_y = RELATIONS[wanted.where]
    along, across = dx * direction_x + dy * direction_y, dx * direction_y + dy * direction_x
    return along > abs(across)


def _share(flags: list[bool]) -> float:
    return sum(flags) / len(flags)
