"""A folder of numbered pictures that say how they were made, and so can be gone on with.

    {index:05d}.png   iTXt chunks: what was asked, and `request`, the digest of all that decides the picture
    grid.png          many on one page

Shape letters: H W height and width, C = 3 channels.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ldm_scale.core import storage

_REQUEST = "request"
_THUMBNAIL = 256  # pixels of its longer side, at most


class Pictures:
    """The pictures of one request, all there or in part."""

    def __init__(self, folder: Path, requests: Sequence[str]) -> None:
        """Look at what is there.

        requests  digest of each picture's request, by index
        raises    ValueError where `folder` holds a picture of another request
        """
        self.folder, self._requests = folder, requests
        for path in self._there():
            index = int(path.stem)
            with Image.open(path) as image:
                found = str(image.info.get(_REQUEST, "none"))
            if index >= len(requests) or found != requests[index]:
                raise ValueError(
                    f"{path} is of another request ({found[:12]}): model, prompt, seed, sampler or size differ. "
                    "Choose another out=, or leave it out: each request then has a directory of its own"
                )

    def path(self, index: int) -> Path:
        return self.folder / f"{index:05d}.png"

    @property
    def grid(self) -> Path:
        return self.folder / "grid.png"

    def lacking(self, indices: Sequence[int]) -> list[int]:
        """Those of `indices` that are not there."""
        return [index for index in indices if not self.path(index).exists()]

    def count(self) -> int:
        """How many are there, whoever drew them."""
        return len(self._there())

    def write(self, index: int, pixels_HWC: np.ndarray, told: Mapping[str, str]) -> None:
        """Write one picture with what is told of it."""
        text = PngInfo()
        for name, value in {**told, _REQUEST: self._requests[index]}.items():
            text.add_itxt(name, value)
        with storage.atomic_write(self.path(index)) as file:
            Image.fromarray(pixels_HWC).save(file, format="PNG", pnginfo=text)

    def thumbnail(self, index: int) -> np.ndarray:
        """One picture that is there, uint8 (H, W, 3), made smaller where it is big."""
        with Image.open(self.path(index)) as image:
            image.thumbnail((_THUMBNAIL, _THUMBNAIL))
            return np.asarray(image.convert("RGB"))

    def write_grid(self, page_HWC: np.ndarray) -> None:
        """Called when all are there."""
        with storage.atomic_write(self.grid) as file:
            Image.fromarray(page_HWC).save(file, format="PNG")

    def _there(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("*.png") if path.stem.isdigit())
