"""A relay that follows a training: both are killed, and one W&B run has everything once, in order."""

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from offline_wandb import inspect, parts, rows, train

from ldm_scale.core import storage
from ldm_scale.core.run_dir import RunDir
from ldm_scale.jobs import relay
from ldm_scale.jobs.relay import Row, rows_behind
from ldm_scale.tracking.tracker import JsonLines

PLACE = {"project": "trial", "entity": None, "group": "study", "tags": ["a"]}


def step(tracker: JsonLines, seen: int) -> Iterator[None]:
    """What a training writes at one log line; numbers are functions of images_seen."""
    tracker.log(seen, {"train/loss": 1 / seen})
    yield
    if seen % 20 == 0:
        tracker.log(seen, {"eval/fd": 100 / seen})
        yield
        tracker.images(seen, "grid", np.full((2, 2, 3), seen % 256, np.uint8), f"after {seen}")
        yield


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_any_kills_of_either_side_give_every_row_once_and_whole(tmp_path_factory: Any, seed: int) -> None:
    """What W&B has on disk, `kept`, lags behind what the relay sent it; a kill of the relay takes the difference."""
    chance, run_dir = random.Random(seed), RunDir(tmp_path_factory.mktemp("run"))
    kept: list[Row] = []
    sent: list[Row] = []

    def relayed(*, whole: bool = False) -> None:
        sent.extend(rows_behind(run_dir, (kept + sent)[-1].images_seen if kept or sent else -1, whole=whole))
        if chance.random() < 0.3:
            kept.extend(sent)
            sent.clear()
        if chance.random() < 0.2:
            sent.clear()  # killed

    saved = 0
    while saved < 200:
        tracker = JsonLines(run_dir)
        tracker.start({}, resume_at=saved)
        tracker.event(saved, "resume" if saved else "start", damaged=[])
        dies_at = saved + 10 * chance.randrange(1, 12)
        for seen in range(saved + 10, min(dies_at, 200) + 1, 10):
            for _ in step(tracker, seen):
                if chance.random() < 0.4:
                    relayed()
            if chance.random() < 0.3 or seen == 200:
                saved = seen
    kept.extend(sent)
    kept.extend(rows_behind(run_dir, kept[-1].images_seen if kept else -1, whole=True))
    assert [row.images_seen for row in kept] == list(range(10, 201, 10))
    for row in kept:
        numbers = {name: value for name, value in row.values.items() if not name.startswith("events/")}
        scored = row.images_seen % 20 == 0
        assert numbers == {"train/loss": 1 / row.images_seen} | ({"eval/fd": 100 / row.images_seen} if scored else {})
        assert list(row.pictures) == (["samples/grid"] if scored else [])
    launches = len(run_dir.read_lines(run_dir.events))
    assert kept[-1].values["events/start"] + kept[-1].values.get("events/resume", 0) == launches


def test_events_stand_where_they_happened(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    tracker = JsonLines(run_dir)
    for seen in (10, 20, 30):
        tracker.event(seen, "straggler")
        for _ in step(tracker, seen):
            time.sleep(0.002)
    tracker.event(30, "finished")
    counted = [row.values for row in rows_behind(run_dir, -1, whole=True)]
    assert [values["events/straggler"] for values in counted] == [1, 2, 3]
    assert ["events/finished" in values for values in counted] == [False, False, True]


@contextmanager
def following(run: Path, environment: dict[str, str], *options: str) -> Iterator[Any]:
    """A relay at work, and what it says so far."""
    said = run / "relay.txt"
    command = [sys.executable, "-m", "ldm_scale.jobs.relay", str(run), "--every", "0.1", *options]
    with open(said, "w") as out, subprocess.Popen(command, env=environment, stdout=out, stderr=out) as process:
        yield process, said.read_text


def watched(run_dir: RunDir, *images: int) -> None:
    """Scores of some checkpoints, made beside the training."""
    run_dir.watched.parent.mkdir(exist_ok=True)
    with open(run_dir.watched, "a") as file:
        for seen in images:
            line = {"time": time.time(), "images_seen": seen, "event": "evaluation", "scores": {"eval/psnr": seen}}
            file.write(json.dumps(line) + "\n")


def wait(condition: Callable[[], bool], said: Callable[[], str]) -> None:
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until, said()
        time.sleep(0.02)


@pytest.mark.slow
def test_three_fragments_become_one_run_while_the_relay_is_killed(tmp_path: Path, environment: dict[str, str]) -> None:
    run = tmp_path / "txt2img" / "first"
    environment |= {"WANDB_MODE": "offline", "WANDB__TRANSACTION_LOG_FLUSH_INTERVAL": "0.2"}
    run_dir = RunDir(run)
    storage.write_json(run_dir.config, {"tracker": PLACE, "seed": 7, "global_batch": 10})
    run_dir.write_status("running", images=0)
    train(run, 0, 80, "kill", environment, "0")
    watched(run_dir, 20, 40)
    with following(run, environment) as (process, said):
        wait(lambda: "9 rows sent, up to 70 images" in said(), said)
        train(run, 50, 120, "kill", environment, "0")  # 60 to 80 come again
        wait(lambda: "up to 110 images" in said(), said)
        watched(run_dir, 60)
        wait(lambda: said().endswith("1 rows sent, up to 110 images\n"), said)
        time.sleep(1)  # what was sent is on disk
        process.kill()
    watched(run_dir, 80)
    with following(run, environment) as (process, said):
        train(run, 100, 140, "kill", environment, "0")
        wait(lambda: "up to 130 images" in said(), said)
        process.kill()  # and this time it may be lost
    assert len(parts(run)) == 3
    watched(run_dir, *range(100, 141, 20))
    run_dir.write_status("finished", images=140)
    with following(run, environment) as (process, said):
        assert process.wait(60) == 0, said()

    assert len(parts(run / "relay")) == 3
    everything = rows(run / "relay")
    numbers = [row["_step"] for row in everything]
    assert numbers == sorted(set(numbers))
    beside = [(row["train/images_seen"], row["eval/psnr"]) for row in everything if "relay/beside" in row]
    assert beside == [(seen, seen) for seen in range(20, 141, 20)]
    held = [row for row in everything if "train/loss" in row]
    assert [row["train/images_seen"] for row in everything if "samples/table._type" in row] == [140]
    seen = [row["train/images_seen"] for row in held]
    assert seen == list(range(10, 141, 10)) == [row["_step"] for row in held]
    truth = {line["images_seen"]: line for line in run_dir.read_lines(run_dir.metrics) if "train/loss" in line}
    assert [row["train/loss"] for row in held] == [truth[images]["train/loss"] for images in seen]
    shown = [row["train/images_seen"] for row in held if "samples/grid.path" in row or "samples/grid" in row]
    assert shown == [row["train/images_seen"] for row in held if "eval/fd_random" in row] == list(range(20, 141, 20))
    summary = json.loads(inspect(parts(run / "relay")[-1], "--summary", "--json"))["summary"]
    assert summary["eval/fd_random"] == {"min": 1, "last": 101} and summary["eval/psnr"] == {"max": 140, "last": 140}
    assert len({part.name.split("-")[-1] for part in parts(run) + parts(run / "relay")}) == 1  # one id


def test_what_cannot_be_relayed_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert relay.main([str(tmp_path)]) == 2
    run_dir = RunDir(tmp_path)
    storage.write_json(run_dir.config, {"tracker": PLACE})
    run_dir.write_status("running", images=0)
    with relay._alone(run_dir):
        assert relay.main([str(tmp_path)]) == 2
    (run_dir.wandb / "run-1-abc").mkdir(parents=True)
    (run_dir.wandb / "latest-run").symlink_to("run-1-abc")
    assert relay.main([str(tmp_path)]) == 2
    (run_dir.wandb / "latest-run").unlink()
    said = capsys.readouterr().err
    assert "is no run" in said and "another relay follows" in said and "feeds W&B by itself" in said


def test_a_relay_without_a_key_says_what_to_do(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    storage.write_json(run_dir.config, {"tracker": PLACE})
    run_dir.write_status("running", images=0)
    keyless = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    ended = subprocess.run(  # a process of its own: W&B reads its environment once in each
        [sys.executable, "-m", "ldm_scale.jobs.relay", str(tmp_path), "--once"],
        env=keyless | {"HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 2 and "wandb login" in ended.stderr, ended.stderr


def test_no_alert_is_forwarded_twice(tmp_path: Path) -> None:
    run_dir, sent = RunDir(tmp_path), []

    class Online:
        offline = False

        def alert(self, title: str, text: str, level: str, wait_duration: float) -> None:
            sent.append((title.split(":")[0], text, level))

    (tmp_path / "relay").mkdir()
    old = {"time": time.time() - 3600, "alert": "save_failed", "level": "error", "text": "yesterday's"}
    run_dir.alerts.write_text(json.dumps(old) + "\n")
    for reason in ("quota", "disk"):
        JsonLines(run_dir).event(8, "save_failed", reason=reason)
        for _ in range(2):  # relays
            one = object.__new__(relay.Relay)
            one._run_dir, one._folder, one._run = run_dir, tmp_path / "relay", Online()
            one._forward_alerts()
    assert [text.split(": ")[1] for _, text, _ in sent] == ["quota", "disk"]
    assert json.loads((tmp_path / "relay" / "alerts_sent").read_text()) == 3


def test_scores_that_a_stopped_training_makes_up_for_are_sent(tmp_path: Path) -> None:
    run_dir, tracker, sent = RunDir(tmp_path), JsonLines(RunDir(tmp_path)), []

    def relayed(*, whole: bool) -> list[Any]:
        one = object.__new__(relay.Relay)
        one._run_dir, one._folder, one._cut, one._beside = run_dir, tmp_path / "relay", tmp_path / "cut.json", 0
        one._last = one.images = max((number for *_, number in sent), default=-1)
        one._global_batch, before = 10, len(sent)

        def send(images_seen: int, values: dict[str, Any], *, number: int) -> None:
            sent.append((images_seen, sorted(values), number))
            one._last = number

        one._send, one._forward_alerts = send, lambda: None  # type: ignore[method-assign]
        one.forward(whole=whole)
        return sent[before:]

    tracker.log(10, {"train/loss": 1.0})
    tracker.log(20, {"train/loss": 1.0, "val/loss": 1.0})
    tracker.event(20, "preempted")
    assert [number for *_, number in relayed(whole=True)] == [10, 20]
    tracker.event(20, "resume")
    tracker.log(20, {"eval/fd": 1.0})
    assert relayed(whole=False) == []
    tracker.images(20, "grid", np.zeros((2, 2, 3), np.uint8), "")
    tracker.log(30, {"train/loss": 1.0})
    assert relayed(whole=True) == [
        (20, ["eval/fd", "samples/grid"], 21),
        (30, ["events/preempted", "events/resume", "train/loss"], 30),
    ]
    assert relayed(whole=True) == relayed(whole=False) == []
