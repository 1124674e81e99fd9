"""Scores that take long can be broken off between batches."""

import numpy as np
import pytest
import torch

from ldm_scale.core.runtime import Preempted
from ldm_scale.data.sources import ImageBatch
from ldm_scale.first_stage.base import FirstStage
from ldm_scale.jobs import config
from ldm_scale.jobs.schemas.train import TrainJob
from ldm_scale.jobs.scores import HeldOutImages, ReconstructionScores


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
    held_out = HeldOutImages(Given(8), 8, digest="none")  # type: ignore[arg-type]
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
