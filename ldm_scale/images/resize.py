"""Any image to a square of one size: white borders off, shorter side resized, cropped, perhaps flipped.

img2dataset's default resize mode pads every image to a square with white bars; `Border` says what becomes of those.
Randomness is passed in as uniform numbers, so the caller decides what it depends on. `fingerprint` names all that moves
a pixel: latents cached under another fingerprint are other latents. Knows nothing of files or datasets.

Shape letters: H W image height and width, C = 3 channels.
"""

from dataclasses import dataclass, replace
from enum import Enum

import numpy as np
import torch
from torch.nn import functional

UNIFORMS = 3
"""How many uniform numbers one transform takes: vertical crop, horizontal crop, flip."""

_WHITE = 225  # a bar's pixels are this bright at least, in every channel; JPEG dims pure white
_WHITE_SHARE = 0.95  # of a bar's pixels; JPEG rings where the bar meets the picture


class Crop(Enum):
    """Which part is kept of sides that are longer than the result's."""

    center = "center"
    random = "random"


class Border(Enum):
    """What becomes of white bars around a non-square original."""

    crop = "crop"
    reject = "reject"
    keep = "keep"


class RejectedImage(ValueError):
    """A sound image that the transform's settings refuse; `reason` is border or too_small."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


@dataclass(kw_only=True, slots=True)
class ImageTransformConfig:
    """How an image becomes a square of `size` pixels a side."""

    size: int
    """Side of the result, pixels."""
    resize: int | None = None
    """Shorter side before the crop, pixels; None for `size`. A larger one leaves more of both sides to crop from."""
    crop: Crop = Crop.center
    """Part kept of what is larger than `size`: its middle, or anywhere."""
    border: Border = Border.crop
    """White bars of img2dataset's default resize: cut off, or the image rejected, or kept."""
    flip: bool = False
    """Mirror half of the images left to right."""
    min_side: int = 1
    """Images whose shorter side has fewer pixels are rejected as too_small; measured without the bars."""

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"transform.size={self.size}; must be at least 1 pixel")
        if self.resize is not None and self.resize < self.size:
            raise ValueError(
                f"transform.resize={self.resize} leaves too little for a crop of transform.size={self.size}: at least "
                "as much, or null"
            )
        if self.min_side < 1:
            raise ValueError(f"transform.min_side={self.min_side}; must be at least 1 pixel")

    @property
    def fixed(self) -> "ImageTransformConfig":
        """The same for images that are compared: each its middle, unmirrored, and none rejected."""
        border = Border.crop if self.border is Border.reject else self.border
        return replace(self, crop=Crop.center, border=border, flip=False, min_side=1)

    def build(self) -> "ImageTransform":
        return ImageTransform(self)


class ImageTransform:
    """Image in any size -> square uint8 image; built from `ImageTransformConfig`."""

    def __init__(self, config: ImageTransformConfig) -> None:
        self.config = config

    @property
    def random(self) -> bool:
        """True where the result depends on the uniform numbers."""
        return self.config.flip or self.config.crop is Crop.random

    def __call__(
        self, image: np.ndarray, *, original_size: tuple[int, int] | None = None, u: np.ndarray | None = None
    ) -> np.ndarray:
        """Transform one image.

        image          (H, W, 3) uint8
        original_size  (width, height) before the dataset was made, from the sample's json; None where unknown
        u              (UNIFORMS,) in [0, 1); needed where the transform is random
        returns        (size, size, 3) uint8, contiguous
        raises         RejectedImage
        """
        if self.random and u is None:
            raise ValueError(f"a random transform needs {UNIFORMS} uniform numbers; u is None")
        image = self._without_border(image, original_size)
        if min(image.shape[:2]) < self.config.min_side:
            height, width = image.shape[:2]
            raise RejectedImage("too_small", f"{width} x {height}, transform.min_side={self.config.min_side}")
        resized = resize_shorter_side(image, self.config.resize or self.config.size)
        crop_y, crop_x = u[:2] if u is not None and self.config.crop is Crop.random else (0.5, 0.5)
        square = _crop(resized, self.config.size, float(crop_y), float(crop_x))
        if u is not None and self.config.flip and u[2] < 0.5:
            square = square[:, ::-1]
        return np.ascontiguousarray(square)

    def fingerprint(self) -> dict[str, str | int | bool]:
        """All that decides which pixels the first stage sees; JSON-able. What is as it always was is not named."""
        resize = {} if self.config.resize in (None, self.config.size) else {"resize": self.config.resize}
        return {
            "size": self.config.size,
            **resize,
            "crop": self.config.crop.value,
            "border": self.config.border.value,
            "flip": self.config.flip,
            "resampling": "bicubic, antialiased, shorter side",
            "library": "torch uint8",
            "normalisation": "x / 127.5 - 1",
        }

    def _without_border(self, image: np.ndarray, original_size: tuple[int, int] | None) -> np.ndarray:
        if self.config.border is Border.keep or original_size is None:
            return image
        content = find_content(image, original_size)
        if content is None:
            return image
        if self.config.border is Border.reject:
            raise RejectedImage("border", f"white bars around an original of {original_size[0]} x {original_size[1]}")
        return image[content]


def find_content(image: np.ndarray, original_size: tuple[int, int]) -> tuple[slice, slice] | None:
    """The part of a padded image that is picture: rows and columns; None where there are no bars.

    Bars are found where the image is square, the original was not, and what padding would have added is white. A
    picture that is itself white there looks the same, and loses only that white. A bar of a single line that JPEG has
    mixed with the picture may be missed.

    image          (H, W, 3) uint8
    original_size  (width, height) of the image that was resized and padded
    """
    side, across = image.shape[:2]
    longer, shorter = max(original_size), min(original_size)
    if side != across or shorter < 1:
        return None
    padding = side - max(round(shorter * side / longer), 1)
    if padding < 1:
        return None
    turned = original_size[0] < original_size[1]  # a tall original has its bars left and right
    lines = image.swapaxes(0, 1) if turned else image
    start, stop = padding // 2, side - (padding - padding // 2)
    if not (_is_white(lines[:start]) and _is_white(lines[stop:])):
        return None
    start += stop - start > 2 and _is_white(lines[start])  # the resizer's rounding may leave one line more
    stop -= stop - start > 2 and _is_white(lines[stop - 1])
    return (slice(None), slice(start, stop)) if turned else (slice(start, stop), slice(None))


def resize_shorter_side(image: np.ndarray, size: int) -> np.ndarray:
    """Resize so that the shorter side has `size` pixels and the proportions stay; bicubic, antialiased.

    image    (H, W, 3) uint8
    returns  (H', W', 3) uint8, min(H', W') = size
    """
    height, width = image.shape[:2]
    scale = size / min(height, width)
    target = (max(round(height * scale), size), max(round(width * scale), size))
    if target == (height, width):
        return image
    pixels_1CHW = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None]
    resized = functional.interpolate(pixels_1CHW, size=target, mode="bicubic", antialias=True, align_corners=False)
    return resized[0].permute(1, 2, 0).numpy()


def _crop(image: np.ndarray, size: int, crop_y: float, crop_x: float) -> np.ndarray:
    top = int(crop_y * (image.shape[0] - size + 1))
    left = int(crop_x * (image.shape[1] - size + 1))
    return image[top : top + size, left : left + size]


def _is_white(lines: np.ndarray) -> bool:
    """True for no lines at all."""
    return lines.size == 0 or float((lines >= _WHITE).all(axis=-1).mean()) >= _WHITE_SHARE
