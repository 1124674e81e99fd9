from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from data_tools.make_shards import main as make_shards
from ldm_scale.core.runtime import Preempted
from ldm_scale.data.sources import ImageBatch
from ldm_scale.evaluation.features import RandomFeatures
from ldm_scale.evaluation.statistics import load_reference
from ldm_scale.jobs import config, reference_set


def asked(file: Path, images: Path, size: int = 32) -> list[str]:
    return [
        f"write_reference={file}", f"data.images={images}", f"data.size={size}", "evaluation.features=random",
        "evaluation.batch=4", "evaluation.scores=[frechet,precision_recall,inception_score]",
    ]  # fmt: skip


def written(file: Path, images: Path, size: int = 32) -> tuple[dict[str, Any], list[Any]]:
    """What it says of itself, and its numbers."""
    job = config.compose("evaluate", asked(file, images, size))
    reference_set.write(job, file)
    transform = {"size": size, "crop": "center", "border": "crop", "flip": False, "min_side": 1}  # before `resize`
    wanted = {"features": RandomFeatures().digest, "transform": transform}
    found = load_reference(file, wanted, job.evaluation.scores[:2])
    statistics = found.statistics
    return found.origin, [statistics.gaussian.mean, statistics.gaussian.covariance, statistics.features_ND]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven pictures of several sizes, one of them in a subfolder."""
    found = tmp_path_factory.mktemp("pictures")
    (found / "more").mkdir()
    for number in range(11):
        size = (32 + 4 * (number % 3), 40)
        Image.effect_noise(size, 40 + number).convert("RGB").save(found / ("more" * (number == 7)) / f"{number}.png")
    return found


@pytest.mark.filterwarnings("ignore:11 images for")
def test_a_folder_and_its_shards_give_the_same_numbers(folder: Path, tmp_path: Path) -> None:
    for picture in folder.rglob("*.png"):
        picture.with_suffix(".txt").write_text("noise")
    assert make_shards([str(folder), str(tmp_path / "shards"), "--val-share", "0"]) == 0
    told, (mean, covariance, features) = written(tmp_path / "folder.safetensors", folder)
    told_2, (mean_2, covariance_2, features_2) = written(tmp_path / "shards.safetensors", tmp_path / "shards/train")
    assert told["count"] == told_2["count"] == 11
    assert (told["images"], told_2["images"]) == (str(folder), str(tmp_path / "shards/train"))
    assert (mean - mean_2).abs().max() < 1e-12 and (covariance - covariance_2).abs().max() < 1e-12
    assert sorted(features.tolist()) == sorted(features_2.tolist())


@pytest.mark.filterwarnings("ignore:11 images for")
def test_a_reference_broken_off_goes_on(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = config.compose("evaluate", asked(tmp_path / "file", folder))
    read, batches = list[int](), 0

    def between() -> None:
        nonlocal batches
        batches += 1
        if batches == 3:
            raise Preempted

    def noted(self: reference_set.ImageFiles, positions: np.ndarray) -> ImageBatch:
        read.extend(positions.tolist())
        return really(self, positions)

    really = reference_set.ImageFiles.read
    monkeypatch.setattr(reference_set.ImageFiles, "read", noted)
    with pytest.raises(Preempted):
        reference_set.write(job, tmp_path / "file", between)
    reference_set.write(job, tmp_path / "file")
    assert read == list(range(11)) and [path.name for path in tmp_path.iterdir()] == ["file"]
    monkeypatch.undo()
    whole, undisturbed = written(tmp_path / "whole", folder), load_reference(tmp_path / "file", {}, [])
    assert torch.equal(whole[1][1], undisturbed.statistics.gaussian.covariance)


@pytest.mark.filterwarnings("ignore:11 images for")
def test_a_reference_of_another_size_is_refused(folder: Path, tmp_path: Path) -> None:
    written(tmp_path / "one", folder, 16)
    with safe_open(tmp_path / "one", "pt") as file:
        assert '"size":16' in file.metadata()["origin"]
    with pytest.raises(ValueError, match=r"was made otherwise: transform: .*'size': 16.* there, .*'size': 32.* here"):
        load_reference(tmp_path / "one", {"transform": {"size": 32}}, [])


def test_what_cannot_be_a_reference_is_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    with pytest.raises(FileNotFoundError, match="none holds neither shards"):
        written(tmp_path / "file", tmp_path / "none")
    (tmp_path / "none/bad.jpg").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"none/bad\.jpg: unreadable.*; take it out"):
        written(tmp_path / "file", tmp_path / "none")
    assert not (tmp_path / "file").exists()
    for overrides in (["write_reference=f"], ["write_reference=f", f"data.images={folder}"]):
        with pytest.raises(ValueError, match=r"run_dir=RUN, or data\.images=SHARDS_OR_FOLDER and data\.size=PIXELS"):
            config.compose("evaluate", overrides)
