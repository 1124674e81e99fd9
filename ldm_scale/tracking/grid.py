"""One picture out of many: a grid with a readable caption under each image.

Shape letters: B images, H W height and width in pixels, C = 3 colour channels.
"""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

CELLS_KEY = "cells"  # PNG text chunk of a grid: where its pictures lie, and what is told of each

_CELL = 128  # smaller images are enlarged to at least this many pixels, each pixel a square
_GUTTER = 16  # between images, and around them
_TEXT_GAP = 6  # between an image and its caption
_CAPTION_SIZE, _TITLE_SIZE = 13, 18  # font heights in pixels
_LINE_SPACING = 1.3
_MAX_LINES = 4  # a longer caption ends in an ellipsis
_PAPER, _INK, _TITLE_INK = (255, 255, 255), (68, 68, 68), (34, 34, 34)


Rectangle = tuple[int, int, int, int]
"""Left, top, width and height on a page, pixels."""


def labelled_grid(
    images_BHWC: np.ndarray, labels: Sequence[str] = (), *, columns: int | None = None, title: str = ""
) -> np.ndarray:
    """Lay images out in rows on white paper.

    images_BHWC  uint8, all of one size; sides below 128 are enlarged by a whole factor, nearest neighbour
    labels       one caption per image, wrapped to its width; empty for none
    columns      images per row; None makes the grid about square
    title        a heading over the grid
    returns      uint8 (height, width, 3)
    raises       ValueError for another type or shape, or another number of labels than images
    """
    return placed_grid(images_BHWC, labels, columns=columns, title=title)[0]


def placed_grid(
    images_BHWC: np.ndarray, labels: Sequence[str] = (), *, columns: int | None = None, title: str = ""
) -> tuple[np.ndarray, list[Rectangle]]:
    """As `labelled_grid`, and where on the page each image lies."""
    _require_pictures(images_BHWC, labels)
    count = len(images_BHWC)
    columns = min(count, columns or math.ceil(math.sqrt(count)))
    images_BHWC = enlarged(images_BHWC)
    _, height, width, _ = images_BHWC.shape
    font, title_font = ImageFont.load_default(_CAPTION_SIZE), ImageFont.load_default(_TITLE_SIZE)
    captions = [_wrap(label, font, width) for label in labels] or [[] for _ in range(count)]
    rows = [range(start, min(start + columns, count)) for start in range(0, count, columns)]
    page_width = columns * (width + _GUTTER) + _GUTTER
    heading = _wrap(title, title_font, page_width - 2 * _GUTTER)
    heading_height = _text_height(heading, _TITLE_SIZE) + (_GUTTER if heading else 0)
    row_heights = [height + max(_caption_height(captions[i]) for i in row) + _GUTTER for row in rows]
    page = Image.new("RGB", (page_width, _GUTTER + heading_height + sum(row_heights)), _PAPER)
    draw = ImageDraw.Draw(page)
    _write(draw, heading, title_font, _TITLE_SIZE, (_GUTTER, _GUTTER), _TITLE_INK)
    top, places = _GUTTER + heading_height, list[Rectangle]()
    for row, row_height in zip(rows, row_heights, strict=True):
        for column, i in enumerate(row):
            left = _GUTTER + column * (width + _GUTTER)
            places.append((left, top, width, height))
            page.paste(Image.fromarray(images_BHWC[i]), (left, top))
            _write(draw, captions[i], font, _CAPTION_SIZE, (left, top + height + _TEXT_GAP), _INK)
        top += row_height
    return np.asarray(page), places


def enlarged(images_BHWC: np.ndarray) -> np.ndarray:
    """Small images as a grid shows them: both sides 128 or more, by a whole factor, each pixel a square."""
    factor = max(1, math.ceil(_CELL / min(images_BHWC.shape[1:3])))
    return images_BHWC.repeat(factor, axis=1).repeat(factor, axis=2)


def _require_pictures(images_BHWC: np.ndarray, labels: Sequence[str]) -> None:
    if images_BHWC.dtype != np.uint8 or images_BHWC.ndim != 4 or images_BHWC.shape[-1] != 3 or not images_BHWC.size:
        raise ValueError(f"images are {images_BHWC.dtype} {images_BHWC.shape}; give uint8 (B, H, W, 3), none empty")
    if labels and len(labels) != len(images_BHWC):
        raise ValueError(f"{len(labels)} labels for {len(images_BHWC)} images; give one each, or none")


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Lines of `text` no wider than `width`; a word that is too wide by itself is broken."""
    lines: list[str] = []
    line = ""
    for word in text.split():
        if line and font.getlength(f"{line} {word}") > width:
            lines.append(line)
            line = ""
        line = f"{line} {word}" if line else word
        while font.getlength(line) > width and len(line) > 1:
            fits = next(n for n in range(len(line) - 1, 0, -1) if n == 1 or font.getlength(line[:n]) <= width)
            lines.append(line[:fits])
            line = line[fits:]
    lines += [line] if line else []
    if len(lines) > _MAX_LINES:
        last = lines[_MAX_LINES - 1]
        while last and font.getlength(f"{last}...") > width:
            last = last[:-1]
        lines = [*lines[: _MAX_LINES - 1], f"{last.rstrip()}..."]
    return lines


def _text_height(lines: Sequence[str], size: int) -> int:
    return round(len(lines) * size * _LINE_SPACING)


def _caption_height(lines: Sequence[str]) -> int:
    return _TEXT_GAP + _text_height(lines, _CAPTION_SIZE) if lines else 0


def _write(
    draw: ImageDraw.ImageDraw,
    lines: Sequence[str],
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    size: int,
    corner: tuple[int, int],
    ink: tuple[int, int, int],
) -> None:
    left, top = corner
    for i, line in enumerate(lines):
        draw.text((left, top + round(i * size * _LINE_SPACING)), line, font=font, fill=ink)
