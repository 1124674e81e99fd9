"""Files of pictures, masks and label maps, brought to a height and width: resized to cover it, the middle kept.

Shape letters: H W height and width, C = 3 channels.
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from ldm_scale.core.tensors import from_uint8
from ldm_scale.images.decode import UndecodableImage, decode

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
"""Of files that are taken for pictures where a directory is given."""
_LABEL_MODES = ("P", "L", "I", "I;16", "I;16B", "I;16L", "I;16N")


def read_picture(path: Path, size: tuple[int, int] | None = None) -> Tensor:
    """A picture as (C, H, W) float32 in [-1, 1]; as large as it is, or (height, width) in `size`.

    raises  ValueError naming the file that is none
    """
    pixels_CHW = torch.from_numpy(_decoded(path)).permute(2, 0, 1)
    return from_uint8(pixels_CHW if size is None else cover(pixels_CHW, size))


def read_mask(path: Path, size: tuple[int, int]) -> Tensor:
    """A mask as (1, H, W) float32: 1 where the picture is brighter than half (painted anew), else 0 (kept).

    raises  ValueError naming the file that is none
    """
    grey_1HW = torch.from_numpy(np.array(Image.fromarray(_decoded(path)).convert("L")))[None]
    return (cover(grey_1HW, size, nearest=True) > 127).float()


def read_labels(path: Path, size: tuple[int, int], *, classes: int, no_label: int) -> Tensor:
    """A label map as (H, W) int64: the values of a palette or grey PNG, 8 or 16 bits deep.

    classes   labels are 0 .. classes - 1
    no_label  what stands for the highest value of that depth (255 or 65535), which says that a pixel has no label
    raises    ValueError naming the file that is none, or has other labels
    """
    with Image.open(path) as image:
        if image.mode not in _LABEL_MODES:
            raise ValueError(f"{path} is a picture ({image.mode}), no label map; give palette or grey PNGs")
        labels_HW = torch.from_numpy(np.asarray(image).astype(np.int64))
        highest = 255 if image.mode in ("P", "L") else 65535
    unlabelled_HW = labels_HW == highest
    if int(labels_HW.masked_fill(unlabelled_HW, 0).max()) >= classes:
        found = sorted({*labels_HW[labels_HW >= classes].tolist()} - {highest})
        raise ValueError(
            f"{path} has labels {found[:5]}; this model's are 0 to {classes - 1}, and {highest} where there is none"
        )
    return cover(labels_HW.masked_fill(unlabelled_HW, no_label)[None], size, nearest=True)[0]


def cover(pixels_CHW: Tensor, size: tuple[int, int], *, nearest: bool = False) -> Tensor:
    """Resize so that both sides reach `size`, and keep the middle; what fits already is left as it is.

    pixels_CHW  uint8, resized bicubically with antialiasing; any integers, where `nearest`
    size        height and width, pixels
    """
    height, width = pixels_CHW.shape[-2:]
    scale = max(size[0] / height, size[1] / width)
    target = (max(round(height * scale), size[0]), max(round(width * scale), size[1]))
    if target != (height, width) and nearest:
        rows, columns = (
            ((torch.arange(to) + 0.5) * (of / to)).long().clamp(max=of - 1)
            for to, of in zip(target, (height, width), strict=True)
        )
        pixels_CHW = pixels_CHW[:, rows][:, :, columns]
    elif target != (height, width):
        pixels_CHW = functional.interpolate(pixels_CHW[None], size=target, mode="bicubic", antialias=True)[0]
    top, left = (target[0] - size[0]) // 2, (target[1] - size[1]) // 2
    return pixels_CHW[:, top : top + size[0], left : left + size[1]]


def _decoded(path: Path) -> np.ndarray:
    try:
        return decode(path.read_bytes())
    except UndecodableImage as error:
        raise ValueError(f"{path} is no picture that can be read: {error}") from error
