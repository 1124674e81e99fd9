"""SIGTERM to one rank of two, or a file that a person touches: both save, say so and exit; the run goes on the same."""

import signal
from pathlib import Path

import pytest
from fault_runs import Launch, Toy, curve, differing, events, saving

from ldm_scale.core import storage
from ldm_scale.core.run_dir import RunDir
from ldm_scale.training.checkpoint_files import complete_ones, images_of, read_state

# Twenty batches to draw for a score.
HOW = ("every.evaluate=48", "every.sample=48", "every.save=8", "evaluation.images=40", "evaluation.batch=2")


def stopped(launch: Launch, run: Path, rank: int) -> int:
    """Tell one rank to stop; images seen when both had."""
    launch.send(signal.SIGTERM, rank)
    assert launch.ended() == [75, 75], launch.said()
    status = storage.read_json(RunDir(run).status)
    assert status["state"] == "preempted"
    return int(status["images"])


@pytest.mark.slow
def test_told_to_stop_at_the_start_in_an_evaluation_and_in_a_save(toy: Toy, tmp_path: Path) -> None:
    undisturbed, run = tmp_path / "undisturbed", tmp_path / "run"
    toy.train(undisturbed, *HOW).finish()
    checkpoints = RunDir(run).checkpoints

    launch = toy.train(run, *HOW)
    assert launch.reaches(lambda: events(run, "start") != []), launch.said()  # and what is not trained yet is scored
    assert stopped(launch, run, rank=1) == 0
    assert (complete_ones(checkpoints), curve(run, "eval/fd_random")) == ([], {})

    launch = toy.train(run, *HOW)
    assert launch.reaches(lambda: bool(saving(run))), launch.said()
    images = stopped(launch, run, rank=0)
    assert images < 48, "too late to be in the first save"
    assert complete_ones(checkpoints)[0].name == f"images_{images:012d}" and not saving(run)

    launch = toy.train(run, *HOW)
    assert launch.reaches(lambda: 48 in curve(run)), launch.said()
    assert stopped(launch, run, rank=1) == 48
    assert list(curve(run, "eval/fd_random")) == [0]
    assert read_state(complete_ones(checkpoints)[0])["due"] == {"evaluate": True, "show": True}

    toy.train(run, *HOW).finish()
    assert differing(run, undisturbed) == []
    for name in ("train/loss", "val/loss", "eval/fd_random"):
        assert curve(run, name) == curve(undisturbed, name)
    # Of what a model was given nothing is left after a relaunch, so that is missing where a signal came in between.
    pictures = [[str(path.relative_to(one)) for path in sorted(one.glob("media/*/*"))] for one in (run, undisturbed)]
    assert pictures[0] == [one for one in pictures[1] if one != "media/samples__eaten/000000000048.png"]


@pytest.mark.slow
def test_control_files_sample_save_and_stop_where_weights_are_sharded(toy: Toy, tmp_path: Path) -> None:
    run, told = tmp_path / "run", tmp_path / "told.jsonl"
    how = ("total_images=400", "every.save=400", f"tracker.alert_command='cat >> {told}'")
    control, checkpoints = RunDir(run).control, RunDir(run).checkpoints
    control.mkdir(parents=True)
    (control / "sample").touch()  # before there is a run
    launch = toy.train(run, *how, engine="zero3")
    assert launch.reaches(lambda: not (control / "sample").exists()), launch.said()
    (control / "save").touch()
    assert launch.reaches(lambda: not (control / "save").exists()), launch.said()
    saved = images_of(complete_ones(checkpoints)[0])
    RunDir(run).report.mkdir()  # which nobody can write then: no reason to have failed
    (control / "stop").touch()
    assert launch.ended() == [0, 0], launch.said()

    status = storage.read_json(RunDir(run).status)
    assert "not shown (IsADirectoryError" in launch.said()
    assert status["state"] == "stopped" and status["reason"].startswith("asked by control/stop, touched 2")
    assert images_of(complete_ones(checkpoints)[0]) == status["images"] < 400
    asked = [(event["images_seen"], list(event["asked"])) for event in events(run, "control")]
    assert asked == [(8, ["sample"]), (saved, ["save"]), (status["images"], ["stop"])]
    assert [path.stem for path in (run / "media" / "samples__grid").iterdir()] == [f"{8:012d}"]
    assert list(control.iterdir()) == []
    (alert,) = RunDir(run).read_lines(RunDir(run).alerts)
    assert (alert["alert"], alert["text"]) == ("stopped", status["reason"])
    assert RunDir(run).read_lines(told) == [alert]
    more = status["images"] + 16
    toy.train(run, *how, f"total_images={more}", "amend=true", engine="zero3").finish()
    assert max(curve(run)) == more
