"""The run directory's files: what is written, and that a killed and resumed run leaves what an undisturbed one does."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ldm_scale.core.run_dir import RunDir
from ldm_scale.tracking.tracker import CAPTION_KEY, JsonLines, Several, Silent, Tracker, TrackerConfig

PICTURE = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)


def train(tracker: Tracker, *, start: int, stop: int) -> None:
    """A training whose numbers are functions of images_seen: log every 10, evaluate every 20, show every 30."""
    for seen in range(start + 10, stop + 1, 10):
        tracker.log(seen, {"train/loss": 1 / seen, "train/images_seen": float(seen)})
        if seen % 20 == 0:
            tracker.log(seen, {"eval/fd": 100 / seen})
        if seen % 30 == 0:
            tracker.images(seen, "samples/grid", PICTURE + seen % 7, f"after {seen}")


def without_time(run_dir: RunDir) -> list[dict[str, object]]:
    return [{k: v for k, v in line.items() if k != "time"} for line in run_dir.read_lines(run_dir.metrics)]


def pictures(run_dir: RunDir) -> dict[str, bytes]:
    return {str(p.relative_to(run_dir.media)): p.read_bytes() for p in sorted(run_dir.media.glob("*/*"))}


@settings(max_examples=40, deadline=None)
@given(killed_at=st.integers(0, 12), saved_at=st.integers(0, 12), torn=st.integers(0, 60))
def test_killed_and_resumed_is_undisturbed(tmp_path_factory, killed_at, saved_at, torn):
    killed_at, saved_at = 10 * max(killed_at, saved_at), 10 * min(killed_at, saved_at)
    whole, halves = (RunDir(tmp_path_factory.mktemp("run") / name) for name in ("whole", "halves"))
    tracker = JsonLines(whole)
    tracker.start({})
    train(tracker, start=0, stop=150)

    tracker = JsonLines(halves)
    tracker.start({})
    train(tracker, start=0, stop=killed_at)
    with open(halves.metrics, "a") as file:
        file.write(json.dumps({"images_seen": killed_at + 10, "time": 0.0, "train/loss": 0.123456789})[:torn])
    tracker = JsonLines(halves)
    tracker.start({}, resume_at=saved_at)
    train(tracker, start=saved_at, stop=150)

    assert without_time(halves) == without_time(whole)
    assert pictures(halves) == pictures(whole)


def test_no_temporary_file_is_left(tmp_path):
    run_dir = RunDir(tmp_path)
    for _ in range(2):
        tracker = JsonLines(run_dir)
        tracker.start({}, resume_at=30)
        train(tracker, start=30, stop=90)
    assert {p.name for p in tmp_path.iterdir()} == {"metrics.jsonl", "media"}


def test_events_are_history_and_stay(tmp_path):
    run_dir = RunDir(tmp_path)
    tracker = JsonLines(run_dir)
    tracker.start({})
    tracker.event(90, "alert", host="node7")
    with open(run_dir.events, "a") as file:
        file.write('{"time": 1, "ima')
    tracker = JsonLines(run_dir)
    tracker.start({}, resume_at=50)
    tracker.event(50, "resume", world=2)
    lines = [json.loads(line) for line in run_dir.events.read_text().splitlines()]
    assert [(line["images_seen"], line["event"]) for line in lines] == [(90, "alert"), (50, "resume")]
    assert lines[0]["host"] == "node7" and lines[1]["world"] == 2


def test_numbers_that_are_not_finite_stay_readable(tmp_path):
    run_dir = RunDir(tmp_path)
    tracker = JsonLines(run_dir)
    tracker.start({})
    tracker.log(10, {"train/loss": float("nan"), "train/grad_norm": float("inf"), "train/lr": np.float32(0.5)})
    tracker.event(10, "alert", losses=[1.5, float("nan")])
    (event,) = run_dir.read_lines(run_dir.events)
    assert event["losses"] == [1.5, "nan"]
    text = run_dir.metrics.read_text()
    line = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert (line["train/loss"], line["train/grad_norm"], line["train/lr"]) == (None, None, 0.5)


def test_pictures_keep_pixels_and_caption(tmp_path):
    run_dir = RunDir(tmp_path)
    tracker = JsonLines(run_dir)
    tracker.start({})
    tracker.images(120, "samples/grid", PICTURE, 'a "red" circle; 50% \u00fcber')
    path = run_dir.picture("samples/grid", 120)
    assert path == tmp_path / "media" / "samples__grid" / "000000000120.png"
    with Image.open(path) as image:
        assert image.info[CAPTION_KEY] == 'a "red" circle; 50% \u00fcber'
        np.testing.assert_array_equal(np.asarray(image), PICTURE)


def test_several_tells_all_and_silent_nothing(tmp_path):
    first, second = RunDir(tmp_path / "a"), RunDir(tmp_path / "b")
    tracker = Several([JsonLines(first), Silent(), JsonLines(second)])
    tracker.start({}, resume_at=0)
    train(tracker, start=0, stop=60)
    tracker.event(60, "end")
    tracker.finish("finished")
    assert without_time(first) == without_time(second) != []
    assert len(second.read_lines(second.events)) == 1


def test_config_builds_and_refuses(tmp_path):
    assert isinstance(TrackerConfig(wandb=False).build(RunDir(tmp_path)), JsonLines)
    assert isinstance(TrackerConfig().build(RunDir(tmp_path)), Several)
    with pytest.raises(ValueError, match=r"tracker\.project"):
        TrackerConfig(project="a/b")


def test_lines_that_a_disk_does_not_take_wait_and_are_told_of_once(tmp_path, caplog):
    run_dir = RunDir(tmp_path)
    tracker = JsonLines(run_dir)
    tracker.start({})
    tracker.log(10, {"train/loss": 3.0})
    run_dir.metrics.rename(tmp_path / "aside")
    run_dir.metrics.symlink_to("/dev/full")
    tracker.log(20, {"train/loss": 2.0})
    run_dir.metrics.unlink()
    run_dir.metrics.mkdir()  # as good as a disk that fails
    tracker.log(30, {"train/loss": 1.0})
    run_dir.metrics.rmdir()
    run_dir.media.write_text("no directory")
    tracker.images(30, "samples/grid", PICTURE, "left out")
    (tmp_path / "aside").rename(run_dir.metrics)
    tracker.log(40, {"train/loss": 0.0})
    assert [line["images_seen"] for line in run_dir.read_lines(run_dir.metrics)] == [10, 20, 30, 40]
    assert ["metrics.jsonl" in told.message for told in caplog.records] == [True, False]
