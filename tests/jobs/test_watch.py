"""Scores in training, and the same scores made beside it by `evaluate.py watch=RUN`."""

import json
import os
import shutil
import signal
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from ldm_scale.core import storage
from ldm_scale.core.run_dir import RunDir
from ldm_scale.jobs import watch
from ldm_scale.jobs.looks import Looks
from ldm_scale.tracking.tracker import JsonLines, Silent


def scores(run_dir: RunDir) -> dict[tuple[int, str], dict[str, float]]:
    events = [line for line in run_dir.read_events() if line["event"] == "evaluation"]
    return {(line["images_seen"], line["weights"]): line["scores"] for line in events}


@pytest.mark.slow
def test_scores_in_training_and_beside_it_are_the_same_numbers(world: Any) -> None:
    asked = ["every.save=48", "evaluation.weights=[ema,raw]", "evaluation.batch=2", "unet.dropout=0.2"]
    world.run(world.tiny_training("name=scored", *asked))
    scored = RunDir(world.path / "runs" / "txt2img_laion" / "scored")
    inside = scores(scored)
    lines = {line["images_seen"]: line for line in scored.read_lines(scored.metrics) if "eval/fd_random" in line}
    for images_seen, line in lines.items():  # all weights at once, when it is known what each score depends on
        known = [event for event in scored.read_lines(scored.events) if event["images_seen"] == images_seen]
        known = [event for event in known if event["event"] == "evaluation"]
        assert len(known) == 2 and "eval/fd_random_raw" in line
        assert line["time"] >= max(event["time"] for event in known)
    world.run(world.tiny_training("name=watched", "every.evaluate=0", *asked))
    watched = RunDir(world.path / "runs" / "txt2img_laion" / "watched")
    assert scores(watched) == {}
    gone = watched.checkpoints / "images_000000000104"  # without a byte of weights, as if just deleted
    meta = storage.read_json(watched.checkpoints / "images_000000000096" / "complete.json")
    storage.write_json(gone / "complete.json", {**meta, "digest": "another"})
    command = world.job("evaluate.py", f"watch={watched.path}")
    kept, number = watched.unfinished("watch"), signal.SIGKILL
    assert world.interrupted(command, lambda: len(list(kept.rglob("0*.safetensors"))) >= 2, number) == -number
    assert list(kept.rglob("0*.safetensors")) and scores(watched) == {}
    assert [path.parent.name for path in watched.checkpoints.glob("*/held")] == ["images_000000000096"]
    said = world.run(command)
    assert f"{gone} cannot be scored" in said and not list(watched.checkpoints.glob("*/held"))
    assert [line["images_seen"] for line in watched.read_watched()] == [96, 96, 48, 48]
    assert storage.read_json(watched.wandb / "sent.json")["beside"] == 4
    assert "eval/fd_random_raw" in watched.report.read_text()
    beside = scores(watched)
    assert beside.keys() == {(images, weights) for images in (48, 96) for weights in ("ema/32", "raw")}
    assert beside == {key: inside[key] for key in beside}
    assert "eval/fd_random_raw" in beside[96, "raw"] and "eval/fd_random" in beside[96, "ema/32"]
    began = time.time()
    world.run(command)  # nothing is left to do
    assert watched.watched.stat().st_mtime < began


def checkpoint(run_dir: RunDir, images: int, digest: str) -> Path:
    path = run_dir.checkpoints / f"images_{images:012d}"
    storage.write_json(path / "complete.json", {"digest": digest, "state": {}})
    return path


def scored(run_dir: RunDir, images: int, digest: str) -> None:
    run_dir.watched.parent.mkdir(exist_ok=True)
    with open(run_dir.watched, "a") as file:
        line = {"time": time.time(), "images_seen": images, "event": "evaluation", "checkpoint": digest, "scores": {}}
        file.write(json.dumps(line) + "\n")


def test_what_was_begun_comes_first_then_the_newest_and_again_what_was_gone_back_from(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    run_dir.write_status("running", images=0)
    paths = [checkpoint(run_dir, images, f"at {images}") for images in (8, 16, 24, 32)]

    def next_one(every: int = 0, *tried: str) -> str:
        found = watch._look(run_dir, every, {*tried})[1]
        return "" if found is None else found.digest

    assert (next_one(), next_one(0, "at 32"), next_one(24)) == ("at 32", "at 24", "at 32")
    (paths[1] / "held").touch()
    assert next_one() == "at 16"
    (paths[1] / "held").unlink()
    scored(run_dir, 32, "at 32")
    assert (next_one(), next_one(24), next_one(16)) == ("at 24", "at 16", "at 24")
    shutil.rmtree(paths[3])
    JsonLines(run_dir).event(24, "rollback")
    checkpoint(run_dir, 32, "at 32 again")
    assert (next_one(), next_one(24)) == ("at 32 again", "at 32 again")
    for images in (8, 16, 24):
        JsonLines(run_dir).event(images, "evaluation", scores={})
    scored(run_dir, 32, "at 32 again")
    assert next_one() == ""


def test_a_training_is_waited_for_while_it_may_go_on(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    for state, cause in (("running", ""), ("preempted", ""), ("failed", "lost")):
        run_dir.write_status(state, images=8, cause=cause)  # type: ignore[arg-type]
        run_dir.metrics.write_text("{}\n")
        assert watch._over(run_dir) == ""
        for file in (run_dir.status, run_dir.metrics):
            os.utime(file, (0, time.time() - 1.5 * watch.SILENT_S))
        assert watch._over(run_dir).startswith(f"the training is {state}, and gave no sign of life for 1.5 h")
    run_dir.write_status("failed", images=8, cause="error")
    assert watch._over(run_dir) == "the training is failed"


def test_a_run_that_is_none_is_refused(world: Any, tmp_path: Any) -> None:
    said = world.refusal(world.job("evaluate.py", f"watch={tmp_path}"))
    assert f"watch={tmp_path} is not a training run" in said
    said = world.refusal(world.job("evaluate.py", f"watch={tmp_path}", f"run_dir={tmp_path}"))
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
