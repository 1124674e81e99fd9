"""How runs stand, from files alone."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from ldm_scale.core import storage
from ldm_scale.core.run_dir import RunDir
from ldm_scale.jobs import status
from ldm_scale.jobs.status import RunStatus, duration, find_runs

BEGAN = 1_000_000.0


def a_run(
    path: Path, *, state: str = "running", reason: str = "", at: float = BEGAN, restarted: bool = False
) -> RunDir:
    """Four processes for half an hour to image 200 of 1000; then, if restarted, two more for an hour to image 400."""
    run_dir = RunDir(path)
    storage.write_json(run_dir.config, {"total_images": 1000})
    storage.write_json(run_dir.status, {"state": state, "reason": reason, "images": 0, "host": "node7", "time": at})
    events: list[dict[str, Any]] = [{"time": BEGAN, "images_seen": 0, "event": "start", "world": 4}]
    metrics: list[dict[str, Any]] = [
        {"images_seen": 100, "time": BEGAN + 900, "train/loss": 0.5, "perf/images_per_s": 2.0},
        {"images_seen": 200, "time": BEGAN + 1800, "train/loss": 0.25, "perf/images_per_s": 2.0, "perf/goodput": 0.9},
    ]
    if restarted:
        events.append({"time": BEGAN + 7200, "images_seen": 200, "event": "resume", "world": 2})
        metrics.append({"images_seen": 400, "time": BEGAN + 10800, "train/loss": 0.125, "perf/images_per_s": 1.0})
    for file, lines in ((run_dir.events, events), (run_dir.metrics, metrics)):
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run_dir


def test_a_running_run(tmp_path: Path) -> None:
    found = RunStatus.read(a_run(tmp_path), now=BEGAN + 1830)
    assert (found.state, found.images, found.loss, found.images_per_s) == ("running", 200, 0.25, 2.0)
    assert found.eta_s == 800 / 2.0
    assert found.heartbeat_age_s == 30
    assert found.goodput == 0.9
    assert found.cost.spent == pytest.approx(4 * 0.5)
    assert (found.gpus, found.restarts, found.host) == (4, 0, "node7")


def test_gpu_hours_leave_out_the_time_between_launches(tmp_path: Path) -> None:
    found = RunStatus.read(a_run(tmp_path, restarted=True), now=BEGAN + 10_900)
    assert found.cost.spent == pytest.approx(4 * 0.5 + 2 * 1)
    assert (found.gpus, found.restarts, found.eta_s) == (2, 1, 600)


def test_cost_is_told_as_spent_at_completion_and_planned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Half an hour of four GPUs for a fifth of the images; a plan for as many, and one for others."""
    run_dir = a_run(tmp_path)
    found = RunStatus.read(run_dir, now=BEGAN + 1830).cost
    assert (found.at_completion, found.planned, found.price) == (pytest.approx(10.0), None, None)
    status.main([str(tmp_path)])
    assert "2.0 / 10.0 " in capsys.readouterr().out
    scales = [
        {"step": {"world": world, "images_per_s": 9.0}, "mfu": 0.4, "gpu_hours": hours}
        for world, hours in ((2, 7), (4, 8))
    ]
    storage.write_json(run_dir.plan, {"machine": {"name": "H100"}, "scales": scales})
    storage.write_json(run_dir.config, {"total_images": 1000, "tracker": {"gpu_hour_price": 2.5}})
    status.main([str(tmp_path)])
    said = capsys.readouterr().out
    assert "2.0 / 10.0 / 8.0" in said and "5.0 / 25.0 / 20.0" in said


def test_a_branch_pays_for_its_own_images_only(tmp_path: Path) -> None:
    """Two GPU hours for the second hundred images of a thousand: eighteen for the nine hundred."""
    run_dir = a_run(tmp_path)
    (start,) = run_dir.read_lines(run_dir.events)
    run_dir.events.write_text(json.dumps(start | {"images_seen": 100}) + "\n")
    found = RunStatus.read(run_dir, now=BEGAN + 1830).cost
    assert (found.spent, found.at_completion) == (pytest.approx(2), pytest.approx(18))


@pytest.mark.parametrize("age, state", [(899, "running"), (901, "stale")])
def test_a_run_that_says_nothing_for_long_is_stale(tmp_path: Path, age: float, state: str) -> None:
    found = RunStatus.read(a_run(tmp_path), now=BEGAN + 1800 + age)
    assert found.state == state
    assert (found.eta_s is None) == (state == "stale")


def test_a_finished_run_is_never_stale_and_a_failed_one_says_why(tmp_path: Path) -> None:
    assert RunStatus.read(a_run(tmp_path / "a", state="finished"), now=BEGAN + 1e6).state == "finished"
    failed = RunStatus.read(a_run(tmp_path / "b", state="failed", reason="OSError: disk full"), now=BEGAN + 1e6)
    assert (failed.state, failed.reason, failed.eta_s) == ("failed", "OSError: disk full", None)


def test_a_status_written_after_the_last_number_is_a_sign_of_life(tmp_path: Path) -> None:
    assert RunStatus.read(a_run(tmp_path, at=BEGAN + 5000), now=BEGAN + 5001).heartbeat_age_s == 1


def test_the_age_of_the_newest_checkpoint_and_the_alerts_since_the_last_launch(tmp_path: Path) -> None:
    run_dir = a_run(tmp_path, restarted=True)
    assert RunStatus.read(run_dir, now=BEGAN).checkpoint_age_s is None
    for name, at in (("100", 900), ("200", 1800), ("300.abandoned", 2700)):
        complete = run_dir.checkpoints / f"images_000000000{name}" / "complete.json"
        complete.parent.mkdir(parents=True)
        complete.touch()
        os.utime(complete, (BEGAN + at, BEGAN + at))
    (run_dir.checkpoints / "images_000000000400").mkdir()  # under way
    alerts = [(BEGAN + 1000, "failed"), (BEGAN + 7300, "save_failed"), (BEGAN + 7400, "straggler")]
    run_dir.alerts.write_text("".join(json.dumps({"time": at, "alert": kind}) + "\n" for at, kind in alerts))
    found = RunStatus.read(run_dir, now=BEGAN + 10_900)
    assert (found.checkpoint_age_s, found.alerts, found.last_alert) == (9100, 2, "straggler")


def test_runs_are_found_in_folders_of_runs(tmp_path: Path) -> None:
    runs = [a_run(tmp_path / "runs" / "txt2img" / name) for name in ("a", "b")]
    assert find_runs([tmp_path / "runs"]) == find_runs([tmp_path / "runs" / "txt2img"]) == runs
    assert find_runs([runs[1].path]) == [runs[1]]
    (tmp_path / "runs" / "txt2img" / "queued" / "snapshot").mkdir(parents=True)
    assert find_runs(sorted((tmp_path / "runs" / "txt2img").iterdir())) == runs
    for empty in ("nowhere", "runs/txt2img/queued"):
        with pytest.raises(FileNotFoundError, match=f"no run .*{empty}$"):
            find_runs([tmp_path / empty])
    with pytest.raises(FileNotFoundError, match=r"nowhere$"):
        find_runs([tmp_path / "runs", tmp_path / "nowhere"])


def test_runs_of_a_sweep_are_found_and_nothing_within_runs_is_searched(tmp_path: Path) -> None:
    """As `submit` lays them out: the tasks beside the code that they run, under a run of the sweep's own name."""
    home = a_run(tmp_path / "runs" / "txt2img" / "ablation")
    tasks = [a_run(home.path / label) for label in ("seed-1", "seed-2")]
    other = a_run(tmp_path / "runs" / "txt2img" / "lr" / "seed-1")
    a_run(other.path.parent / "snapshot" / "20260101T000000Z_train" / "code")
    a_run(other.checkpoints / "images_000000000100")
    assert find_runs([tmp_path / "runs"]) == [home, *tasks, other]


def test_a_run_that_failed_before_it_knew_what_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its directory was there from `submit` on."""
    RunDir(tmp_path / "a").write_status("failed", images=0, reason="ValueError: data.validation is not set")
    a_run(tmp_path / "b")
    assert status.main([str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "data.validation" in said and "0.2500" in said


def test_the_command_prints_a_line_or_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a_run(tmp_path / "a")
    assert status.main([str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "stale" in said and "20.0" in said and "0.2500" in said and "90.0%" in said
    assert status.main(["--json", "--stale", "1e12", str(tmp_path)]) == 0
    (one,) = json.loads(capsys.readouterr().out)
    assert (one["state"], one["images"], one["total_images"]) == ("running", 200, 1000)
    assert status.main([str(tmp_path / "a" / "nothing")]) == 2


def test_durations_in_words() -> None:
    assert [duration(s) for s in (42, 1020, 12_240, 1_036_800)] == ["42 s", "17 min", "3.4 h", "12.0 d"]
