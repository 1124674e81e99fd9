"""The arithmetic of goodput, on logs written by hand: launched at 1000, killed, launched again."""

import json
from pathlib import Path
from typing import Any

import pytest

from ldm_scale.core.run_dir import RunDir
from ldm_scale.tracking.goodput import LOST, Launch, Ledger, gpu_hours, idle_before

FIRST = {"event": "start", "launched": 1000.0, "idle_s": 0.0, "time": 1010.0, "images_seen": 0, "world": 1}
SPENT = {"data": 5.0, "forward_backward": 60.0, "optimizer": 10.0, "evaluation": 8.0, "checkpoint": 2.0, "other": 5.0}


def write(path: Path, *lines: dict[str, Any]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def logged(ledger: Ledger, now: float, images: int) -> dict[str, Any]:
    return {"images_seen": images, "time": now, **ledger.shares(now)}


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    run_dir = RunDir(tmp_path)
    write(run_dir.events, FIRST)
    return run_dir


def test_one_launch_in_good_order(run_dir: RunDir) -> None:
    ledger = Ledger.read(run_dir)
    ledger.add(SPENT)
    shares = ledger.shares(1100)
    assert shares == pytest.approx(
        {
            "perf/goodput": 0.75, "perf/lost_data": 0.05, "perf/lost_checkpoint": 0.02, "perf/lost_evaluation": 0.08,
            "perf/lost_startup": 0.1, "perf/lost_idle": 0, "perf/lost_replay": 0, "perf/hours": 100 / 3600,
        }
    )  # fmt: skip
    assert shares["perf/goodput"] + sum(shares[f"perf/lost_{part}"] for part in LOST) == pytest.approx(1)


def test_a_kill_and_a_resume(run_dir: RunDir) -> None:
    """Killed 50 s after the last line that is kept, back after 30 s, 20 s to start, then 100 s of training."""
    ledger = Ledger.read(run_dir)
    ledger.add(SPENT)
    kept = logged(ledger, 1100, 100)
    write(run_dir.metrics, kept, {"images_seen": 150, "time": 1150.0})
    assert idle_before(run_dir, 1180.0) == 30
    resume = {"event": "resume", "launched": 1180.0, "idle_s": 30.0, "time": 1200.0, "images_seen": 100, "world": 1}
    write(run_dir.events, FIRST, resume)
    write(run_dir.metrics, kept)  # as the tracker does at the start
    ledger = Ledger.read(run_dir)
    ledger.add({"forward_backward": 100.0})
    seconds = {name: share * 300 for name, share in ledger.shares(1300).items()}
    assert seconds["perf/goodput"] == pytest.approx(175)
    assert seconds["perf/lost_startup"] == pytest.approx(10 + 20)
    assert (seconds["perf/lost_idle"], seconds["perf/lost_replay"]) == (pytest.approx(30), pytest.approx(50))
    write(run_dir.metrics, kept, logged(ledger, 1300, 200))
    assert Ledger.read(run_dir).shares(1300) == pytest.approx(ledger.shares(1300))  # nothing counts twice


def test_a_launch_of_which_no_number_is_left(run_dir: RunDir) -> None:
    write(run_dir.events, FIRST, {**FIRST, "launched": 1100.0, "idle_s": 40.0, "time": 1110.0})
    seconds = Ledger.read(run_dir).seconds
    assert (seconds["train"], seconds["startup"], seconds["idle"]) == (0, 20, 40)
    assert Ledger.read(run_dir).shares(1110)["perf/lost_replay"] == pytest.approx(50 / 110)


def test_nobody_waited_for_the_first_launch(tmp_path: Path) -> None:
    assert idle_before(RunDir(tmp_path), 1000.0) == 0


def launch(event: str, launched: float, *, world: int = 4, idle_s: float = 0.0) -> dict[str, Any]:
    """One that took 600 s to start."""
    took = {"launched": launched, "time": launched + 600, "idle_s": idle_s}
    return {"event": event, **took, "world": world, "images_seen": 0}


HISTORIES: dict[str, tuple[list[dict[str, Any]], float]] = {
    "starting up costs": ([launch("start", 0)], 4 * 1800),
    "what a crash lost costs, and a smaller world less": (
        [launch("start", 0), launch("resume", 9000, world=2, idle_s=6000)], 4 * 3000 + 2 * 600,
    ),
    "a queue that holds it does not": (
        [launch("start", 0), {"event": "failed", "reason": "held: 3 attempts", "time": 90_000.0}], 4 * 1800,
    ),
    "one that hangs and fails does": (
        [launch("start", 0), {"event": "failed", "launched": 0.5, "world": 4, "time": 2700.0}], 4 * 2700,
    ),
    "so does one that fails before it begins, but not the time before it": (
        [launch("start", 0), {"event": "failed", "launched": 9000.0, "world": 4, "time": 9100.0, "images_seen": 0}],
        4 * 1800 + 4 * 100,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HISTORIES)
def test_gpu_hours(name: str) -> None:
    """A line at 1800 s is all that is left of the first launch."""
    events, seconds = HISTORIES[name]
    launches = Launch.all_of([{"images_seen": 100, "time": 1800.0}], events)
    assert gpu_hours(launches)(1e9) * 3600 == pytest.approx(seconds)
    assert gpu_hours(launches)(600) * 3600 == pytest.approx(4 * 600)


def test_a_queue_that_holds_a_run_is_no_sign_of_life(run_dir: RunDir) -> None:
    write(run_dir.events, FIRST, {"event": "failed", "reason": "held", "time": 5000.0})
    assert idle_before(run_dir, 5010.0) == 4000
