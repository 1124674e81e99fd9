import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ldm_scale.data.shards import ShardWriter

Row = Mapping[str, Any]


def picture(number: int, size: tuple[int, int] = (16, 12), kind: str = "png") -> bytes:
    """An image of noise, by number; (width, height)."""
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def dataset(folder: Path, shards: Sequence[Sequence[Row]], *, parquet: bool = True, stats: bool = True) -> Path:
    """Image shards by the img2dataset convention; a row's `image` is its bytes, `text` its caption, the rest its facts.

    Keys are `{shard:05d}{place:04d}` unless a row has one.
    """
    number = 0
    for shard, rows in enumerate(shards):
        facts = []
        with ShardWriter(folder / f"{shard:05d}.tar") as writer:
            for place, row in enumerate(rows):
                known = {name: value for name, value in row.items() if name not in ("image", "text", "members")}
                known = {"key": f"{shard:05d}{place:04d}", "caption": row.get("text", f"caption {number}")} | known
                members = {"png": row.get("image", picture(number)), "txt": known["caption"].encode()}
                members |= {"json": json.dumps(known).encode()} | dict(row.get("members", {}))
                writer.add(known["key"], members)
                facts.append(known | {"status": "success"})
                number += 1
        if parquet:
            pq.write_table(pa.Table.from_pylist(facts), folder / f"{shard:05d}.parquet")
        if stats:
            content = {"count": len(rows), "successes": len(rows), "status_dict": {"success": len(rows)}}
            (folder / f"{shard:05d}_stats.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(name="dataset")
def dataset_fixture() -> Callable[..., Path]:
    return dataset


@pytest.fixture(name="picture")
def picture_fixture() -> Callable[..., bytes]:
    return picture
