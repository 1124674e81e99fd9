"""What a step was given is what is shown and counted: latents scaled and without noise, captions by their tokens."""

from collections.abc import Iterator

import pytest
import torch

from ldm_scale.conditioning.class_label import ClassLabelConfig
from ldm_scale.conditioning.text import TextConditioner, TextTransformerConfig
from ldm_scale.conditioning.tokenizer import train_wordpiece
from ldm_scale.core import rng
from ldm_scale.data.sources import LatentBatch
from ldm_scale.diffusion.objective import ObjectiveConfig, Prediction
from ldm_scale.diffusion.schedule import ScheduleConfig
from ldm_scale.first_stage.base import MomentsKind
from ldm_scale.latent_diffusion.model import DiffusionConfig
from ldm_scale.training.engine import Engine, EngineConfig, EngineKind, Precision
from ldm_scale.training.intake import Intake, Spread
from ldm_scale.training.optimizer import OptimizerConfig
from ldm_scale.training.steps import CachedMoments, DiffusionStep

CAPTIONS = ["a red circle", "", "a blue square left of a red circle", "a green star", "a red star above a circle"]
SCALE, LENGTH = 0.5, 8


@pytest.fixture(scope="module")
def conditioner(tmp_path_factory: pytest.TempPathFactory) -> TextConditioner:
    path = tmp_path_factory.mktemp("words") / "tokenizer.json"
    train_wordpiece(CAPTIONS, 128, path)
    return TextTransformerConfig(
        width=8, layers=1, heads=1, head_dim=8, max_length=LENGTH, vocab_size=128, tokenizer=str(path), dropout=0.5
    ).build()


class Denoiser(torch.nn.Module):
    """Is given everything, and learns one number."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.given: list[torch.Tensor] = []

    def forward(self, z: torch.Tensor, noise: torch.Tensor, t: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
        self.given.append(inputs)
        return (noise - self.weight).square().flatten(1).mean(1)


def latents(positions: torch.Tensor) -> torch.Tensor:
    return 3 + 2 * rng.normal(0, "latents", positions, (4, 4, 4))


Trained = tuple[Engine, Intake, Denoiser]


@pytest.fixture
def trained(conditioner: TextConditioner) -> Iterator[Trained]:
    """Two global batches in four micro batches; each row is told the caption of the row after it."""
    engine = EngineConfig(kind=EngineKind.one_process, precision=Precision.fp32).build(global_batch=10, micro_batch=5)
    model = Denoiser()
    engine.prepare(model, OptimizerConfig())
    objective = ObjectiveConfig(prediction=Prediction.eps)
    intake = Intake(shown=6, expected=Spread(1.5, 1.0), conditioner=conditioner)
    step = DiffusionStep(
        engine, conditioner=conditioner, moments=CachedMoments(MomentsKind.POINT), latent_scale=SCALE,
        diffusion=DiffusionConfig(schedule=ScheduleConfig(), objective=objective), seed=0, intake=intake,
    )  # fmt: skip
    conditioner.cut()
    memory = torch.empty(5, 4, 4, 4)  # as a loader's, which it fills anew
    for positions in torch.arange(20).split(5):
        if positions[0] % engine.global_batch == 0:
            intake.watch(True)
        memory.copy_(latents(positions))
        told = conditioner.read(CAPTIONS)
        keys = [f"key{position}" for position in positions]
        step(LatentBatch(positions, keys, CAPTIONS, memory, told.roll(-1, 0)), learning_rate=0.0, images_seen=0)
    memory.zero_()
    yield engine, intake, model
    engine.close()


def test_the_newest_samples_are_shown_as_the_model_was_given_them(
    conditioner: TextConditioner, trained: Trained
) -> None:
    _, intake, model = trained
    given = intake.newest()
    assert given is not None and given.told is not None
    assert given.keys == [f"key{position}" for position in range(10, 16)]
    assert torch.equal(given.samples, latents(torch.arange(10, 16)) * SCALE)
    assert torch.equal(given.told, torch.cat(model.given[2:])[:6])
    words = conditioner.in_words(given.told, given.captions)
    dropped = rng.uniform(0, "diffusion/dropout", torch.arange(10, 16)) < conditioner.dropout
    assert dropped.any() and not dropped.all()
    told = [
        "",
        "a blue square left of a",
        "a green star",
        "a red star above a circle",
        "a red circle",
    ]  # not each row's own: it shows
    assert words == ["" if gone else told[row % 5] for row, gone in enumerate(dropped)]


def test_a_line_tells_of_all_that_was_given_since_the_one_before(trained: Trained) -> None:
    """Captions as they were before any was dropped: [CLS], three words and [SEP] make five tokens; eight just fit."""
    engine, intake, _ = trained
    means, squares = intake.since_last_line()
    z = latents(torch.arange(20)) * SCALE
    found = engine.mean_over_ranks({}, {**means, **squares})
    assert found == pytest.approx(
        {
            "data/latent_mean": float(z.mean()),
            "data/latent_std": float((z - 1.5).square().mean()),
            "data/caption_tokens": (5 + 2 + LENGTH + 5 + LENGTH) / 5,
            "data/caption_truncated": 0.2,
            "data/caption_empty": 0.2,
        },
        rel=1e-5,
    )
    assert engine.mean_over_ranks({}, intake.since_last_line()[0]) == {}
    assert intake.expected() == {"data/latent_mean_expected": 1.5, "data/latent_std_expected": 1.0}


def test_conditions_that_cannot_be_read_back_are_told_unless_they_were_dropped() -> None:
    classes = ClassLabelConfig(classes=3, width=4).build()
    told = classes.dropped(classes.prepare([0, 1, 2]), torch.tensor([False, True, False]))
    assert classes.in_words(told, ["cat", "dog", "owl"]) == ["cat", "", "owl"]


def test_nothing_is_shown_before_anything_was_given() -> None:
    assert Intake(shown=4).newest() is None and Intake(shown=4).expected() == {}
