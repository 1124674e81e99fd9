"""Who keeps the others waiting: the rule, and two real processes of which one is slow."""

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny

from ldm_scale.training.telemetry import STEP_PARTS, Ranks, Startup


def ranks() -> Ranks:
    found = Ranks(tiny.engine_of("one_process"), straggler=0.15, straggler_intervals=3)
    found.hosts = ["a", "a", "b", "b"]
    return found


def test_a_straggler_is_told_of_once_an_episode() -> None:
    slow, fine, told = [50.0, 52.0, 51.0, 80.0], [50.0, 52.0, 51.0, 53.0], []
    who = ranks()
    for own in (slow, slow, fine, slow, slow, slow, slow, fine, slow, slow, slow):
        told.append(who.straggler(own, 100.0))
    assert [place for place, one in enumerate(told) if one is not None] == [5, 10]
    first = told[5]
    assert first is not None
    assert (first.rank, first.host, first.own_ms, first.median_ms) == (3, "b", 80, 51)
    assert first.share == pytest.approx(0.29)


def test_ranks_that_are_slow_in_turn_are_no_stragglers() -> None:
    who = ranks()
    for rank in (0, 1, 2, 3) * 3:
        own = [50.0] * 4
        own[rank] = 90.0
        assert who.straggler(own, 100.0) is None


def test_startup_adds_up_to_the_age_of_the_process() -> None:
    startup = Startup()
    startup.mark("engine")
    startup.finish()
    assert list(startup.seconds) == ["imports", "engine", "first_step"] and startup.is_over
    assert startup.launched + sum(startup.seconds.values()) == pytest.approx(startup._last)


@pytest.fixture(scope="module")
def slow_rank(tmp_path_factory: pytest.TempPathFactory, launch: Callable[..., Any]) -> Path:
    out = tmp_path_factory.mktemp("straggling")
    done = launch("straggling.py", str(out))
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "zero1", "zero2"])
def test_the_slow_rank_is_named(kind: str, slow_rank: Path) -> None:
    told = [event for event in lines(slow_rank / kind / "events.jsonl") if event["event"] == "straggler"]
    assert [(event["rank"], event["host"]) for event in told] == [(1, socket.gethostname())]
    assert told[0]["own_ms"] > 100 > told[0]["median_ms"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "zero1", "zero2"])
def test_shares_sum_to_one_and_the_fast_rank_sees_its_waiting_as_communication(kind: str, slow_rank: Path) -> None:
    for line in [line for line in lines(slow_rank / kind / "metrics.jsonl") if "train/loss" in line]:
        split = {part: line[f"perf/split_{part}"] for part in STEP_PARTS if f"perf/split_{part}" in line}
        assert sum(split.values()) == pytest.approx(1)
        assert line["perf/own_ms_min"] <= line["perf/own_ms_median"] <= line["perf/own_ms_max"] == line["perf/own_ms"]
    assert line["perf/slowest_rank"] == 1
    assert "communication" not in split if kind == "zero2" else split["communication"] > 0.6


@pytest.mark.slow
def test_the_first_step_tells_how_long_it_took_to_get_there(slow_rank: Path) -> None:
    told = [event for event in lines(slow_rank / "ddp" / "events.jsonl") if event["event"] == "startup"]
    assert [list(event)[3:] for event in told] == [["imports", "first_look", "first_step"]]
