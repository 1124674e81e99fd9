"""Damage that training meets: before its images were indexed, after, while it reads them, and in a cache.

What it does to precompute: test_precompute.py; what data_tools.verify says of it: test_verify.py.
"""

import io
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from damages import DAMAGES, FOUND
from PIL import Image

from data_tools import index
from ldm_scale.core import storage
from ldm_scale.data.cache import CacheShardWriter, fingerprint, finish_cache
from ldm_scale.data.config import DataConfig
from ldm_scale.data.shards import ShardWriter
from ldm_scale.data.sources import SampleSource
from ldm_scale.images.resize import ImageTransformConfig
from ldm_scale.jobs import stages

N, SIDE = 10, 16
KEYS = {f"{i:06d}" for i in range(N)}
CUTS = [name for name in DAMAGES if name.startswith("cut")]
HEADERS = ["zeroed header", "damaged size", "flipped bit in a header"]
"""Where an index says where members lie, nobody reads their headers."""


def pixels(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (SIDE, SIDE, 3), np.uint8)


@pytest.fixture
def images(tmp_path: Path) -> DataConfig:
    with ShardWriter(tmp_path / "images" / "00000.tar") as writer:
        for i in range(N):
            file = io.BytesIO()
            Image.fromarray(pixels(i)).save(file, "PNG")
            writer.add(f"{i:06d}", {"png": file.getvalue(), "txt": b"caption %d" % i})
    return config(images=f"{tmp_path}/images")


@pytest.fixture
def latents(tmp_path: Path) -> DataConfig:
    what: dict[str, Any] = {"transform": {"size": SIDE, "flip": False}, "kind": "point"}
    printed = fingerprint(first_stage_kind="kl", first_stage_sha256="0", **what)
    with CacheShardWriter(tmp_path / "latents" / "00000.tar", fingerprint=printed, kind="point") as writer:
        for i in range(N):
            writer.add(f"{i:06d}", np.full((3, 20, 20), i), f"caption {i}")
        record = writer.finish(source="00000.tar", source_sha256="0")
    finish_cache(tmp_path / "latents", [record], first_stage={"kind": "kl", "config": {}, "sha256": "0"}, **what)
    return config(latents=f"{tmp_path}/latents")


def config(**where: str) -> DataConfig:
    return DataConfig(**where, transform=ImageTransformConfig(size=SIDE), max_bad_share=1.0, threads=1)


def damage(name: str, tar: Path, member: str) -> None:
    tar.write_bytes(DAMAGES[name](tar.read_bytes(), member))


def read(open_source: Callable[..., SampleSource[Any]], found: list[str]) -> dict[str, np.ndarray]:
    """Two epochs of a stream, by key; `found` is told the reason of each bad sample."""
    source = open_source(seed=0, on_bad=lambda key, reason, position: found.append(reason))
    batch = source.read(np.arange(2 * N))
    values = batch.images if "images" in batch.__dataclass_fields__ else batch.moments
    return dict(zip(batch.keys, values.numpy(), strict=True))


def read_images(data: DataConfig, found: list[str]) -> dict[str, np.ndarray]:
    opened = data.open_images()
    return read(lambda **how: data.image_source(opened, **how), found)


def require_right(got: dict[str, np.ndarray]) -> None:
    for key, image_CHW in got.items():
        np.testing.assert_allclose(image_CHW.transpose(1, 2, 0), pixels(int(key)) / 127.5 - 1, atol=1e-5)


@pytest.mark.parametrize("name", DAMAGES)
def test_an_index_names_the_damage_it_was_made_over(images: DataConfig, tmp_path: Path, name: str) -> None:
    """A bit that flipped in a content before anyone hashed it is no damage to see; whoever decodes it finds it."""
    damage(name, tmp_path / "images" / "00000.tar", "000005.png")
    code = index.main([str(images.images), "-j", "1", "--report", f"{tmp_path}/report.json"])
    report, (reason, whole) = storage.read_json(tmp_path / "report.json"), FOUND[name]
    if name == "flipped bit in a content":
        assert code == 0 and report["samples"] == N
    else:
        assert code == 1 and reason in report["damaged"]["00000.tar"] and report["samples"] == whole


@pytest.mark.parametrize("name", DAMAGES)
def test_images_damaged_before_they_were_indexed(images: DataConfig, tmp_path: Path, name: str, caplog: Any) -> None:
    damage(name, tmp_path / "images" / "00000.tar", "000005.png")
    reason, whole = FOUND[name]
    found: list[str] = []
    with caplog.at_level(logging.WARNING):
        opened = stages.open_images(images)
    got = read(lambda **how: images.image_source(opened, **how), found)
    assert (reason in caplog.text) != (reason in found), "said once: when opened, or when read"
    assert len(got) == whole
    require_right(got)


@pytest.mark.parametrize("name", DAMAGES)
def test_images_damaged_after_they_were_indexed(images: DataConfig, tmp_path: Path, name: str) -> None:
    before = images.open_images()["data"]
    damage(name, tmp_path / "images" / "00000.tar", "000005.png")
    found: list[str] = []
    got, now = read_images(images, found), images.open_images()["data"]
    require_right(got)
    if name in CUTS:
        assert now.order_id != before.order_id, "no run goes on with other samples: see Stage.resume"
    elif name in HEADERS:
        assert got.keys() == KEYS and not found, "nothing is lost but for readers without an index"
    elif name == "end blocks lost":
        assert got.keys() == KEYS and now.rejected == {"no_end_blocks": 1}
    else:
        assert set(found) == {"checksum_png"} and got.keys() == KEYS - {"000005"}


@pytest.mark.parametrize("name", DAMAGES)
def test_images_damaged_while_they_are_read(images: DataConfig, tmp_path: Path, name: str) -> None:
    opened = images.open_images()
    source = images.image_source(opened, 0)
    source.read(np.arange(2))
    damage(name, tmp_path / "images" / "00000.tar", "000005.png")
    found: list[str] = []
    got = read(lambda **how: images.image_source(opened, **how), found)
    require_right(got)
    assert len(got) == (5 if name in CUTS else N - ("content" in name))
    assert bool(found) == (len(got) < N) and all(reason.startswith("checksum_") for reason in found)


@pytest.mark.parametrize("name", DAMAGES)
def test_latents_damaged_before_a_training(latents: DataConfig, tmp_path: Path, name: str) -> None:
    damage(name, tmp_path / "latents" / "00000.tar", "000005.npy")
    found: list[str] = []
    if name in CUTS or name == "end blocks lost":
        with pytest.raises(ValueError, match=r"00000\.tar has \d+ bytes, but its manifest\.json says"):
            latents.open_latents()
        return
    got = read(lambda **how: latents.latent_source(latents.open_latents(), **how), found)
    assert all((moments == int(key)).all() for key, moments in got.items())
    assert len(got) == N - ("content" in name)
    assert set(found) == ({"checksum_npy"} if len(got) < N else set())
