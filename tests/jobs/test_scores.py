"""Held-out images and the scores made of them, which can be broken off between batches."""

import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from data_tools.make_toy_world import Recipe, write_world
from ldm_scale.core.runtime import Preempted
from ldm_scale.data.config import DataConfig
from ldm_scale.data.sources import ImageBatch
from ldm_scale.first_stage.base import FirstStage
from ldm_scale.images.resize import Border, Crop, ImageTransformConfig
from ldm_scale.jobs import config
from ldm_scale.jobs.schemas.train import TrainJob
from ldm_scale.jobs.scores import GenerationScores, HeldOutImages, ReconstructionScores


@pytest.fixture(scope="module")
def job() -> TrainJob:
    sizes = ["first_stage.channels=8", "evaluation.images=8", "evaluation.batch=2"]
    found: TrainJob = config.compose("train", ["+experiment=autoencoder_kl_f4", "scale=toy", *sizes])
    return found


class Given:
    """Images that are there already, read as `ImageSource` reads."""

    def __init__(self, count: int) -> None:
        self.images = torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def read(self, positions: np.ndarray) -> ImageBatch:
        names = [str(i) for i in positions]
        return ImageBatch(torch.from_numpy(positions), names, names, self.images[positions], None)


def test_a_score_ends_where_it_is_told_to(job: TrainJob) -> None:
    torch.manual_seed(0)
    first_stage: FirstStage = job.first_stage.build()
    held_out = HeldOutImages(Given(8), 8, digest="none", transform=job.data.transform)
    scores = ReconstructionScores(job.evaluation, job.paths, held_out, torch.device("cpu"))
    asked = 0

    def between() -> None:
        nonlocal asked
        asked += 1
        if asked == stop_at:
            raise Preempted

    stop_at = 3
    with pytest.raises(Preempted):
        scores(first_stage, between)
    stop_at, asked = -1, 0
    assert scores(first_stage, between).scores == scores(first_stage).scores
    assert asked == 4  # batches


@pytest.fixture(scope="module")
def val(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    write_world(folder, Recipe(train=1, val=6, objects=1, size=40, shard_size=6, seed=0))
    return folder / "val"


def test_held_out_images_are_prepared_the_same_way_whatever_training_does(val: Path) -> None:
    plain = DataConfig(validation=str(val), transform=ImageTransformConfig(size=32))
    varied = replace(plain.transform, crop=Crop.random, flip=True, border=Border.reject, min_side=1000)
    one, other = (HeldOutImages.open(replace(plain, transform=how), 6) for how in (plain.transform, varied))
    assert one.transform == other.transform == plain.transform
    assert torch.equal(one.read(range(6)).images, other.read(range(6)).images)


def test_held_out_images_that_cannot_be_read_are_refused_by_name(val: Path, tmp_path: Path) -> None:
    (shard,) = val.glob("*.tar")
    content = bytearray(shard.read_bytes())
    with tarfile.open(shard) as tar:
        image = next(member for member in tar if member.name.endswith(".png") and ".seg." not in member.name)
    content[image.offset_data : image.offset_data + 40] = bytes(40)
    (tmp_path / shard.name).write_bytes(content)
    data = DataConfig(validation=str(tmp_path), transform=ImageTransformConfig(size=32))
    key = image.name.partition(".")[0]
    with pytest.raises(ValueError, match=f"{key} of the held-out images .* cannot be read: unreadable.*mend it"):
        HeldOutImages.open(data, None).read(range(6))


def test_looking_at_held_out_images_ends_where_it_is_told_to(job: TrainJob, val: Path) -> None:
    held_out = HeldOutImages.open(replace(job.data, validation=str(val)), None)
    asked = 0

    def between() -> None:
        nonlocal asked
        asked += 1
        if asked == 2:
            raise Preempted

    with pytest.raises(Preempted):
        GenerationScores(job.evaluation, job.paths, held_out, torch.device("cpu"), between)


def test_a_first_stage_takes_no_reference_file(job: TrainJob) -> None:
    held_out = HeldOutImages(Given(8), 8, digest="none", transform=job.data.transform)
    with pytest.raises(ValueError, match=r"evaluation\.reference=file: a first stage .*evaluation\.reference=null"):
        ReconstructionScores(replace(job.evaluation, reference="file"), job.paths, held_out, torch.device("cpu"))
