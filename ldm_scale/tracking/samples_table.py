"""A run's newest samples as a W&B table, a row a picture: what was asked, guidance, weights, what came.

Grids are the truth: each PNG says where its pictures lie and what was told of them, and they are cut out of it here.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ldm_scale.core.run_dir import RunDir
from ldm_scale.tracking.grid import CELLS_KEY

if TYPE_CHECKING:
    import wandb


def newest_samples(run_dir: RunDir) -> list[Path]:
    """Of every name the newest grid, where it says what its pictures are; all of one `images_seen`."""
    newest = [max(folder.glob("*.png"), default=None) for folder in sorted(run_dir.media.glob("*"))]
    told = [path for path in newest if path is not None and _cells(path)]
    return [path for path in told if path.name == max(told, key=lambda one: one.name).name]


def samples_of(grid: Path) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
    """What was told of each picture of a grid, and the picture, uint8 (H, W, 3)."""
    with Image.open(grid) as page:
        pixels_HWC = np.asarray(page.convert("RGB"))
    for cell in _cells(grid):
        left, top, width, height = cell["place"]
        yield cell["told"], pixels_HWC[top : top + height, left : left + width]


def samples_table(grids: list[Path]) -> "wandb.Table":
    """The table; a column for everything that is told of any picture."""
    import wandb

    samples = [(grid.parent.name.replace("__", "/"), *sample) for grid in grids for sample in samples_of(grid)]
    columns = list(dict.fromkeys(key for _, told, _ in samples for key in told))
    table = wandb.Table(columns=["grid", *columns, "picture"], allow_mixed_types=True)
    for name, told, picture in samples:
        table.add_data(name, *(told.get(key) for key in columns), wandb.Image(picture, file_type="png"))
    return table


def _cells(grid: Path) -> list[dict[str, Any]]:
    with Image.open(grid) as page:
        cells: list[dict[str, Any]] = json.loads(page.info.get(CELLS_KEY, "[]"))
    return cells
