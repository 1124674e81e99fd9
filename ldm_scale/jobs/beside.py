"""The page that `sample.py` ends with: what was asked beside what came, where that can be drawn.

    boxes      boxes | drawn | drawn, with the boxes     | truth
    label map  colours | their names | drawn             | truth
    small picture, masked picture      given | drawn     | truth
    captions, classes, nothing         drawn, the words under it

A row is one condition; of several pictures of it, each has its place. Truth is there where `truth=` gives it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image
from torch import Tensor

from ldm_scale.conditioning.base import ConditionerConfig
from ldm_scale.conditioning.layout import Layout
from ldm_scale.conditioning.spatial import NO_LABEL, LabelMapConfig
from ldm_scale.core.tensors import to_uint8
from ldm_scale.images import fit
from ldm_scale.images.asked import Box, class_colours, legend, masked, paper, with_boxes, within
from ldm_scale.jobs.pictures import Pictures
from ldm_scale.jobs.requests import Request
from ldm_scale.tracking.grid import enlarged, labelled_grid

_PICTURES = 100  # that were drawn, on one page
_COLUMNS = 10  # of them in a row

Cell = tuple[np.ndarray, str]
"""A picture and the words under it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Page:
    """Lays out one page."""

    conditioning: ConditionerConfig | None
    """What the model is told."""
    small: tuple[int, int]
    """Height and width of a small picture as the model is given it."""
    names: Sequence[str]
    """Of classes."""
    each: int
    """Pictures of each condition."""

    def of(self, pictures: Pictures, requests: Sequence[Request], title: str) -> np.ndarray:
        """Uint8 (H, W, 3), of the first hundred pictures."""
        each = min(self.each, _COLUMNS)
        firsts = range(0, len(requests), self.each)[: max(1, _PICTURES // each)]
        rows = [self._row(pictures, requests, range(first, first + each)) for first in firsts]
        if each * len(rows) < len(requests):
            title = f"{title} ({each * len(rows)} of {len(requests)})"
        cells = [cell for row in rows for cell in row]
        alone = len(rows[0]) == 1
        columns = min(_COLUMNS, max(1, round(len(rows) ** 0.5))) if alone else len(rows[0])
        images_BHWC = np.stack([image for image, _ in cells])
        return labelled_grid(images_BHWC, [label for _, label in cells], columns=columns, title=title)

    def _row(self, pictures: Pictures, requests: Sequence[Request], indices: range) -> list[Cell]:
        """What was asked, what came, and what should have come, all of one size."""
        request = requests[indices.start]
        drawn = [enlarged(pictures.thumbnail(index)[None])[0] for index in indices]
        size = drawn[0].shape[:2]
        words, asked_for = request.label(self.names), self._asked(request, size)
        cells = [(picture, "" if place else words) for place, picture in enumerate(asked_for)]
        for index, picture in zip(indices, drawn, strict=True):
            cells.append((picture, f"{index:05d}" if asked_for else words))
            if isinstance(request.condition, Layout):
                cells.append((with_boxes(picture, _boxes(request.condition), self.names), f"{index:05d}, boxes"))
        if request.truth is not None:
            cells.append((_pixels(fit.read_picture(request.truth, size)), "truth"))
        return cells

    def _asked(self, request: Request, size: tuple[int, int]) -> list[np.ndarray]:
        """What can be drawn of what was asked."""
        files, shown = request.files, list[np.ndarray]()
        if isinstance(request.condition, Layout):
            shown.append(with_boxes(paper(size), _boxes(request.condition), self.names))
        if isinstance(self.conditioning, LabelMapConfig):
            classes = self.conditioning.classes
            labels_HW = fit.read_labels(files["label_maps"], size, classes=classes, no_label=NO_LABEL).numpy()
            shown += [class_colours(labels_HW), legend(labels_HW, self.names, size)]
        if "low_resolution" in files:
            small_HWC = _pixels(fit.read_picture(files["low_resolution"], self.small))
            shown.append(np.asarray(Image.fromarray(small_HWC).resize(size[::-1], Image.Resampling.BOX)))
        if "images" in files:
            paint_HW = fit.read_mask(files["masks"], size)[0].numpy() > 0.5
            shown.append(masked(_pixels(fit.read_picture(files["images"], size)), paint_HW))
        return shown


def _boxes(layout: Layout) -> list[tuple[int, Box]]:
    """Of a layout, as shares of the crop that is drawn."""
    return [(thing.class_id, within(thing.box, layout.crop)) for thing in layout.objects]


def _pixels(picture_CHW: Tensor) -> np.ndarray:
    return to_uint8(picture_CHW).permute(1, 2, 0).numpy()
