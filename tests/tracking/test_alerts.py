"""Which events are alerts, and who is told: the run directory, a command, W&B where it is online."""

import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from ldm_scale.core.run_dir import RunDir
from ldm_scale.tracking.alerts import AlertCommand, alert_of
from ldm_scale.tracking.tracker import JsonLines
from ldm_scale.tracking.weights_and_biases import Place, Wandb

TROUBLE = {"start": 640, "why": "the loss is nan", "loss": "nan", "samples": []}
SLOW = {"rank": 3, "host": "node7", "own_ms": 340.0, "median_ms": 200.0, "share": 0.4}


@pytest.mark.parametrize(
    ("kind", "fields", "level", "said"),
    [
        ("failed", {"reason": "TooManyBadSamples: 80 of 4000"}, "error", "TooManyBadSamples: 80 of 4000"),
        ("failed", {"reason": "x" * 2001}, "error", "x" * 2000),
        ("save_failed", {"reason": "No space left on device"}, "error", "No space left on device"),
        ("trouble", {**TROUBLE, "action": "skip"}, "warn", "after 640 images the loss is nan; guard.policy=skip"),
        ("straggler", SLOW, "warn", "rank 3 on node7 keeps the others waiting: 340 ms"),
        ("resume", {"damaged": ["images_000000000640: no rank0"]}, "warn", "images_000000000640"),
        ("stopped", {"reason": "asked by control/stop"}, "info", "asked by control/stop"),
        ("preempted", {}, "info", "the launcher starts it again"),
    ],
)
def test_what_is_told_of(kind: str, fields: dict[str, Any], level: str, said: str) -> None:
    alert = alert_of(kind, fields)
    assert alert is not None and (alert.kind, alert.level) == (kind, level)
    assert said in alert.text and len(alert.text) <= 2000


@pytest.mark.parametrize(
    ("kind", "fields"),
    [("resume", {"damaged": []}), ("trouble", {**TROUBLE, "action": "stop"}), ("bad_sample", {}), ("finished", {})],
)
def test_what_is_no_alert(kind: str, fields: dict[str, Any]) -> None:
    assert alert_of(kind, fields) is None


def test_the_command_gets_the_line_and_no_kind_twice_in_a_while(tmp_path: Path) -> None:
    run_dir, told = RunDir(tmp_path / "run"), tmp_path / "told"
    tracker = JsonLines(run_dir, f"cat >> '{told}'")
    tracker.start({})
    for images in (8, 16):
        tracker.event(images, "straggler", **SLOW)
        tracker.event(images, "bad_sample", key="a")
    tracker.event(16, "save_failed", reason="\u00fcber")
    tracker.finish("failed")
    lines = run_dir.read_lines(run_dir.alerts)
    assert [(line["images_seen"], line["alert"]) for line in lines] == [
        (8, "straggler"), (16, "straggler"), (16, "save_failed"),
    ]  # fmt: skip
    assert lines[0]["run"] == str(run_dir.path) and lines[0]["host"] and lines[0]["time"]
    heard = sorted(run_dir.read_lines(told), key=lambda line: line["images_seen"])  # two processes
    assert heard == [lines[0], lines[2]]
    tracker.start({}, resume_at=8)
    assert run_dir.read_lines(run_dir.alerts) == lines  # history stays


def test_a_command_that_fails_hangs_or_does_not_read_holds_nothing_up(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ldm_scale.tracking.alerts._LAST_S", 0.3)
    monkeypatch.setattr("ldm_scale.tracking.alerts._COMMAND_S", 0.1)
    alert, began = {"alert": "failed", "text": "x" * 8000}, time.monotonic()
    with caplog.at_level(logging.WARNING):
        for command in ("exit 3", "sleep 30", "exec 0<&-; no_such_command_anywhere 2>&-"):
            runner = AlertCommand(command)
            runner.tell(alert)
            runner.close()
    assert time.monotonic() - began < 5
    assert [record.message.split()[-1] for record in caplog.records] == ["3", "-9", "127"]


@dataclass
class Online:
    """As much of a W&B run as an alert needs: there is no network here."""

    offline: bool
    sent: list[Any] = field(default_factory=list)

    rows: list[int] = field(default_factory=list)

    def log(self, values: dict[str, Any], step: int, commit: bool) -> None:
        self.rows.append(step)

    def define_metric(self, *args: Any, **named: Any) -> None: ...

    def alert(self, title: str, text: str, level: str, wait_duration: float) -> None:
        self.sent.append((title, text, level, wait_duration))


@pytest.mark.parametrize("offline", [False, True])
def test_wandb_is_sent_alerts_only_where_it_is_online(offline: bool, tmp_path: Path) -> None:
    path = tmp_path / ("n" * 40) / ("m" * 40)
    (path / "wandb").mkdir(parents=True)
    view, run = Wandb(RunDir(path), Place(project="p")), Online(offline)
    view._run = run  # type: ignore[assignment]
    view.event(8, "bad_sample", key="a")
    view.event(8, "save_failed", reason="quota")
    (found,) = run.sent or [None]
    if offline:
        assert found is None
    else:
        title, text, level, quiet = found
        assert title.startswith("save_failed: nnn") and len(title) < 64
        assert text.endswith("quota") and (level, quiet) == ("ERROR", 600)


def test_a_full_disk_ends_neither_wandb_nor_the_alert_about_it(tmp_path: Path) -> None:
    """What was sent is noted once there is room."""
    (tmp_path / "wandb").mkdir()
    view, run = Wandb(RunDir(tmp_path), Place(project="p")), Online(offline=False)
    view._run = run  # type: ignore[assignment]
    note = tmp_path / "wandb" / "sent.tmp"
    note.symlink_to("/dev/full")
    view.log(8, {"train/loss": 1.0})
    view.event(8, "save_failed", reason="No space left on device")
    assert len(run.sent) == 1 and not (tmp_path / "wandb" / "sent.json").exists()
    note.unlink()
    view.log(16, {"train/loss": 0.5})
    again = Wandb(RunDir(tmp_path), Place(project="p"))
    again._run = run  # type: ignore[assignment]
    again.log(16, {"train/loss": 0.5})
    again.log(24, {"train/loss": 0.25})
    assert run.rows == [0, 1, 2, 3]
