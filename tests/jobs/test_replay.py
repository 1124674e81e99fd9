"""Replaying a run from its checkpoints, and what `repro.json` keeps for that."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

from ldm_scale.core import storage
from ldm_scale.core.run_dir import RunDir
from ldm_scale.jobs import repro
from ldm_scale.jobs.replay import Compared
from ldm_scale.training.checkpoint_files import find, read_state

REPLAY = ["-m", "ldm_scale.jobs.replay"]


@pytest.fixture(scope="session")
def resumed(world: Any) -> RunDir:
    """A run of two launches: 64 images, then to 96 under the same learning rate."""
    steady = ["name=resumed", "optimizer.schedule=constant", "every.log=8", "every.evaluate=0"]
    world.run(world.tiny_training(*steady, "total_images=64"))
    world.run(world.tiny_training(*steady, "total_images=96", "amend=true"))
    return RunDir(world.path / "runs" / "txt2img_laion" / "resumed")


def replayed(world: Any, where: Path, *arguments: str, expect: int = 0) -> str:
    said: str = world.run([*world.job("train.py")[:1], *REPLAY, str(where), *arguments], expect=expect)
    return said


def everything(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


@pytest.mark.slow
def test_the_same_bits_from_before_and_after_the_resume_and_nothing_is_written(world: Any, resumed: RunDir) -> None:
    before = everything(resumed.path)
    for where in (resumed.checkpoints / "images_000000000032", resumed.path):  # of the run, the one before its last
        said = replayed(world, where, "--steps", "3")
        assert "6 numbers" in said and "are the same bit for bit" in said
    assert "images_000000000064" in said
    assert everything(resumed.path) == before


@pytest.mark.slow
def test_one_perturbed_weight_is_found(world: Any, resumed: RunDir, tmp_path: Path) -> None:
    copy = RunDir(tmp_path / "copy")
    shutil.copytree(resumed.path, copy.path, symlinks=True)  # W&B's may lead nowhere
    perturb(copy.checkpoints / "images_000000000064", "weight:unet.conv_out.bias:0")
    said = replayed(world, copy.checkpoints / "images_000000000064", "--steps", "2", expect=1)
    assert "not the same bit for bit" in said and "train/loss at 72 images" in said


@pytest.mark.slow
def test_what_cannot_be_compared_is_refused(world: Any, resumed: RunDir) -> None:
    last = resumed.checkpoints / "images_000000000096"
    assert "nothing was logged after this checkpoint (96 images)" in replayed(world, last, expect=2)
    assert "neither a training run" in replayed(world, resumed.media, expect=2)


@pytest.mark.slow
def test_repro_json_tells_of_every_launch(resumed: RunDir) -> None:
    first, second = repro.launches(resumed)
    assert (first["images_seen"], second["images_seen"]) == (0, 64)
    assert repro.launch_of(resumed, 64) == first and repro.launch_of(resumed, 65) == second
    assert second["config"] == storage.read_json(resumed.config)
    assert first["config_sha256"] != second["config_sha256"] == storage.digest(second["config"])
    state = read_state(find(resumed.checkpoints))
    assert {key: first[key] for key in ("order", "order_id", "first_stage_sha256", "latent_scale")} == {
        key: state[key] for key in ("order", "order_id", "first_stage_sha256", "latent_scale")
    }
    manifest = storage.read_json(Path(first["config"]["data"]["latents"]) / "manifest.json")
    assert first["data"]["fingerprint"] == manifest["fingerprint"]
    assert first["packages"]["torch"] and first["engine"]["world"] == 1
    code = first["code"]
    assert code is None or not code["dirty"] or (resumed.path / code["diff"]).exists()


def perturb(checkpoint: Path, name: str) -> None:
    """Change a number in the only shard of a checkpoint, and write down digests that fit."""
    meta = json.loads((checkpoint / "complete.json").read_bytes())
    (entry,) = meta["files"]
    tensors = safetensors.torch.load_file(checkpoint / entry["file"])
    tensors[name][0] += 1e-3
    safetensors.torch.save_file(tensors, checkpoint / entry["file"])
    entry |= {
        "bytes": (checkpoint / entry["file"]).stat().st_size,
        "sha256": storage.sha256_file(checkpoint / entry["file"]),
    }
    del meta["digest"]
    storage.write_json(checkpoint / "complete.json", {**meta, "digest": storage.digest(meta)})


@pytest.mark.parametrize(
    "logged, found, band, differs",
    [
        (1.0, 1.0, 0.0, False),
        (1.0, 1.0000001, 0.0, True),
        (1.0, 1.009, 0.01, False),
        (-1.0, -1.011, 0.01, True),
        (None, float("nan"), 0.0, False),
        (None, 1.0, 0.1, True),
        (1.0, float("nan"), 0.1, True),
    ],
)
def test_bits_bands_and_numbers_that_are_not_finite(
    logged: float | None, found: float, band: float, differs: bool
) -> None:
    one = Compared(images_seen=8, name="train/loss", logged=logged, found=found)
    assert one.differs(band) is differs
