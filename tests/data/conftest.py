import io
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm_scale.data.shards import ShardWriter


@pytest.fixture(scope="session")
def jpeg() -> Callable[[int], bytes]:
    """A 12 x 16 JPEG of one colour, by number."""

    def encode(number: int) -> bytes:
        pixels = np.full((12, 16, 3), (number * 37 % 256, number * 11 % 256, 128), np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=95)
        return file.getvalue()

    return encode


@pytest.fixture
def image_shards(tmp_path: Path, jpeg: Callable[[int], bytes]) -> str:
    """Three shards of 5, 7 and 3 image samples."""
    number = 0
    for shard, count in enumerate((5, 7, 3)):
        with ShardWriter(tmp_path / "images" / f"{shard:05d}.tar") as writer:
            for _ in range(count):
                members = {"jpg": jpeg(number), "txt": f"caption {number}".encode()}
                writer.add(f"{number:06d}", members)
                number += 1
    return str(tmp_path / "images")


@pytest.fixture
def foreign_tar() -> Callable[..., bytes]:
    """A tar as Python's tarfile writes it."""

    def make(members: Sequence[tuple[str, bytes]], *, format: int, mtime: float = 1.5) -> bytes:  # noqa: A002
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w", format=format) as archive:
            for name, data in members:
                entry = tarfile.TarInfo(name)
                entry.size, entry.mtime = len(data), mtime
                archive.addfile(entry, io.BytesIO(data))
        return file.getvalue()

    return make
