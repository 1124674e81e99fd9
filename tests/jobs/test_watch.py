"""Scores in training, and the same scores made beside it by `evaluate.py watch=RUN`."""

import signal
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from ldm_scale.core.run_dir import RunDir
from ldm_scale.jobs.looks import Looks
from ldm_scale.tracking.report import write_report
from ldm_scale.tracking.tracker import Silent


def scores(run_dir: RunDir) -> dict[tuple[int, str], dict[str, float]]:
    events = [line for line in run_dir.read_events() if line["event"] == "evaluation"]
    return {(line["images_seen"], line["weights"]): line["scores"] for line in events}


@pytest.mark.slow
def test_scores_in_training_and_beside_it_are_the_same_numbers(world: Any) -> None:
    asked = ["every.save=48", "evaluation.weights=[ema,raw]", "evaluation.batch=2", "unet.dropout=0.2"]
    world.run(world.tiny_training("name=scored", *asked))
    inside = scores(RunDir(world.path / "runs" / "txt2img_laion" / "scored"))
    world.run(world.tiny_training("name=watched", "every.evaluate=0", *asked))
    watched = RunDir(world.path / "runs" / "txt2img_laion" / "watched")
    assert scores(watched) == {}
    command = world.job("evaluate.py", f"watch={watched.path}")
    kept, number = watched.unfinished("watch"), signal.SIGKILL
    assert world.interrupted(command, lambda: len(list(kept.rglob("0*.safetensors"))) >= 2, number) == -number
    assert list(kept.rglob("0*.safetensors")) and scores(watched) == {}
    world.run(command)
    beside = scores(watched)
    assert beside.keys() == {(images, weights) for images in (48, 96) for weights in ("ema/32", "raw")}
    assert beside == {key: inside[key] for key in beside}
    assert "eval/fd_random_raw" in beside[96, "raw"] and "eval/fd_random" in beside[96, "ema/32"]
    began = time.time()
    world.run(command)  # nothing is left to do
    assert watched.watched.stat().st_mtime < began
    assert "eval/fd_random_raw" in write_report(watched).read_text()


def test_a_run_that_is_none_is_refused(world: Any, tmp_path: Any) -> None:
    said = world.run(world.job("evaluate.py", f"watch={tmp_path}"), expect=2)
    assert f"watch={tmp_path} is not a training run" in said
    said = world.run(world.job("evaluate.py", f"watch={tmp_path}", f"run_dir={tmp_path}"), expect=2)
    assert "one of run_dir=RUN, first_stage.checkpoint=DIRECTORY, watch=RUN" in said


class Seen:
    """A stage that says in which state its module was looked at."""

    def __init__(self) -> None:
        self.module = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
        self.states: list[bool] = []

    def validate(self, between: Any, suffix: str) -> dict[str, float]:
        self.states.append(self.module.training)
        return {f"val/loss{suffix}": 0.0}

    def evaluate(self, between: Any, kept: Any) -> dict[str, float]:
        self.states.append(self.module.training)
        return {"eval/fid": 1.0}

    def prompted(self, title: str, between: Any) -> None:
        self.states.append(self.module.training)

    def show(self, images_seen: int, tracker: Any, between: Any) -> None:
        self.states.append(self.module.training)

    def conditions(self) -> dict[str, Any]:
        return {"n": 1}

    identity = conditions


def test_a_model_is_looked_at_without_dropout_and_trains_on_with_it(tmp_path: Path) -> None:
    stage, put = Seen(), []

    def putting(half_life: int | None) -> Any:
        put.append(half_life)
        return nullcontext()

    looks = Looks(
        stage,  # type: ignore[arg-type]
        putting,
        half_lives=[20, 5],
        scored=["ema", "ema/5"],
        tracker=Silent(),
        between=lambda: None,
        whose=str,
        folder=tmp_path / "unfinished",
    )
    found = looks.evaluate()
    looks.show(3)
    assert put == [20, 5, None, 20, None, 20]
    assert [one.scores for one in found] == [
        {"val/loss": 0.0, "eval/fid": 1.0},
        {"val/loss_ema5": 0.0, "eval/fid_ema5": 1.0},
        {"val/loss_raw": 0.0},
    ]
    assert [one.conditions["weights"] for one in found] == ["ema/20", "ema/5", "raw"]
    assert not any(stage.states) and stage.module.training and list(tmp_path.iterdir()) == []
