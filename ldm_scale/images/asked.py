"""What a model was asked for as pictures, to lie beside what it drew: boxes, label maps, masked pictures.

Colours of classes are PASCAL VOC's: bits of the number, in turn to red, green and blue, from the highest bit down. Its
entry 0, black, is no label here, and class k has entry k + 1; so any two classes differ.

Shape letters: H W height and width in pixels, 3 colour channels; `...` any axes.
"""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Box = tuple[float, float, float, float]
"""Left, top, right, bottom as shares of the picture's sides."""

_FONT_SIZE = 12  # pixels
_ROW = 16  # height of a line of a legend, pixels
_EDGE = 2  # width of a box's outline, pixels
_CHECKS, _CHECK_GREYS = 8, (176, 208)  # side of a square, pixels, and the two greys of what is not there
_PAPER, _INK = (255, 255, 255), (34, 34, 34)


def class_colours(classes: np.ndarray) -> np.ndarray:
    """Colour of each class id, uint8 (..., 3); black for -1, no label.

    classes  integers (...), -1 to 2^24 - 2: a label map too
    """
    entries, colours = classes.astype(np.int64) + 1, np.zeros((*classes.shape, 3), np.uint8)
    for bit in range(24):
        colours[..., bit % 3] |= ((entries >> bit & 1) << (7 - bit // 3)).astype(np.uint8)
    return colours


def class_name(names: Sequence[str], class_id: int) -> str:
    """What people call a class; `class 7` where `names` does not go that far."""
    return names[class_id] if class_id < len(names) else f"class {class_id}"


def legend(labels_HW: np.ndarray, names: Sequence[str], size: tuple[int, int]) -> np.ndarray:
    """The colours of a label map in words, the largest areas first, as many as fit; uint8 (height, width, 3).

    labels_HW  class ids, -1 for no label
    size       height and width, pixels
    """
    page = Image.new("RGB", size[::-1], _PAPER)
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(_FONT_SIZE)
    found, counts = np.unique(labels_HW, return_counts=True)
    for row, class_id in enumerate(found[np.argsort(-counts, kind="stable")][: size[0] // _ROW]):
        top = row * _ROW
        draw.rectangle((0, top + 2, _ROW - 5, top + _ROW - 3), _colour(class_id))
        draw.text((_ROW, top), class_name(names, class_id) if class_id >= 0 else "no label", _INK, font)
    return np.asarray(page)


def with_boxes(picture_HW3: np.ndarray, boxes: Sequence[tuple[int, Box]], names: Sequence[str]) -> np.ndarray:
    """A copy of a picture with boxes drawn on it, each in its class's colour and with its name.

    boxes  (class id, box); what lies outside the picture is cut off, and small ones are drawn over large ones
    """
    page = Image.fromarray(picture_HW3)
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(_FONT_SIZE)
    height, width = picture_HW3.shape[:2]
    tags: list[tuple[tuple[int, int], int]] = []
    for class_id, (left, top, right, bottom) in sorted(boxes, key=lambda one: -_area(one[1])):
        x0, y0, x1, y1 = round(left * width), round(top * height), round(right * width), round(bottom * height)
        draw.rectangle((x0, y0, max(x1 - 1, x0), max(y1 - 1, y0)), outline=_colour(class_id), width=_EDGE)
        tags.append(((max(x0, 0) + _EDGE, max(y0, 0) + _EDGE), class_id))
    for (x, y), class_id in tags:
        colour, name = _colour(class_id), class_name(names, class_id)
        place = (max(0, min(x, width - _EDGE - math.ceil(font.getlength(name)))), y)
        draw.rectangle(draw.textbbox(place, name, font), colour)
        draw.text(place, name, _PAPER if _is_dark(colour) else _INK, font)
    return np.asarray(page)


def paper(size: tuple[int, int]) -> np.ndarray:
    """A white picture of a height and width, uint8 (H, W, 3)."""
    return np.full((*size, 3), _PAPER, np.uint8)


def masked(picture_HW3: np.ndarray, paint_HW: np.ndarray) -> np.ndarray:
    """A copy of a picture, with grey checks where `paint_HW` is true: what a model is not shown."""
    rows, columns = np.indices(paint_HW.shape) // _CHECKS
    checks_HW = np.choose((rows + columns) % 2, _CHECK_GREYS).astype(np.uint8)
    return np.where(paint_HW[..., None], checks_HW[..., None], picture_HW3)


def within(box: Box, crop: Box) -> Box:
    """A box of a whole image as one of the crop that is drawn of it; it may reach out of it."""
    left, top, right, bottom = crop
    width, height = max(right - left, 1e-6), max(bottom - top, 1e-6)
    return (box[0] - left) / width, (box[1] - top) / height, (box[2] - left) / width, (box[3] - top) / height


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def _colour(class_id: int) -> tuple[int, int, int]:
    red, green, blue = class_colours(np.array(class_id)).tolist()
    return red, green, blue


def _is_dark(colour: tuple[int, int, int]) -> bool:
    red, green, blue = colour
    return 0.299 * red + 0.587 * green + 0.114 * blue < 128
