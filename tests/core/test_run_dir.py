import json
from pathlib import Path

import pytest

from ldm_scale.core.run_dir import RunDir


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "runs" / "toy" / "first")


def test_status_says_how_the_run_stands(run_dir: RunDir):
    run_dir.write_status("running", images=0)
    run_dir.write_status("failed", images=640, reason="rank 1 was lost", cause="lost")
    status = json.loads(run_dir.status.read_text())
    told = tuple(status[name] for name in ("state", "images", "reason", "cause"))
    assert told == ("failed", 640, "rank 1 was lost", "lost")
    assert status["host"] and status["time"] > 1.7e9
    assert [file.name for file in run_dir.path.iterdir()] == ["status.json"]


def test_lines_of_a_run_that_has_written_none(run_dir: RunDir):
    assert run_dir.read_lines(run_dir.metrics) == []


def test_a_torn_last_line_is_left_out(run_dir: RunDir):
    run_dir.path.mkdir(parents=True)
    run_dir.metrics.write_bytes(b'{"images_seen": 64}\n{"images_seen": 128}\n{"images_se')
    assert run_dir.read_lines(run_dir.metrics) == [{"images_seen": 64}, {"images_seen": 128}]


def test_a_line_torn_inside_a_character_is_left_out(run_dir: RunDir):
    run_dir.path.mkdir(parents=True)
    run_dir.events.write_bytes('{"key": "a"}\n{"key": "\u00e4'.encode()[:-1])
    assert run_dir.read_lines(run_dir.events) == [{"key": "a"}]


def test_the_run_after_a_torn_line_stays_readable(run_dir: RunDir):
    run_dir.path.mkdir(parents=True)
    run_dir.metrics.write_bytes(b'{"images_seen": 64}\n{"images_se{"images_seen": 128}\n\n{"images_seen": 192}\n')
    assert run_dir.read_lines(run_dir.metrics) == [{"images_seen": 64}, {"images_seen": 192}]


def test_scores_of_weights_that_were_gone_back_from_are_left_out(run_dir: RunDir):
    def line(time: float, images: int, event: str = "evaluation", **more: object) -> str:
        return json.dumps({"time": time, "images_seen": images, "event": event, **more}) + "\n"

    run_dir.watched.parent.mkdir(parents=True)
    scored = [(1.0, 8), (3.0, 16), (3.5, 32), (6.0, 32)]
    run_dir.watched.write_text("".join(line(*one, scores={"eval/fid": one[0]}) for one in scored))
    run_dir.events.write_text(line(0.0, 0, "start") + line(2.0, 8, "resume") + line(5.0, 16, "rollback"))
    assert [one["time"] for one in run_dir.read_watched()] == [1.0, 3.0, 6.0]
    assert [one["eval/fid"] for one in run_dir.read_metrics()] == [1.0, 3.0, 6.0]
    assert [one["event"] for one in run_dir.read_events()][-1] == "evaluation" and len(run_dir.read_events()) == 6


def test_no_two_things_share_a_name(run_dir: RunDir):
    places = [
        run_dir.config, run_dir.status, run_dir.metrics, run_dir.events, run_dir.alerts, run_dir.media,
        run_dir.checkpoints, run_dir.weights, run_dir.report, run_dir.wandb, run_dir.control,
        run_dir.told, run_dir.claims,
    ]  # fmt: skip
    assert len(set(places)) == len(places)
    assert {place.parent for place in places} == {run_dir.path}
