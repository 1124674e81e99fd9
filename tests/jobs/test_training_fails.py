"""However a training ends badly, status, events and alerts say so, once."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ldm_scale.core.run_dir import RunDir
from ldm_scale.jobs import config, train
from ldm_scale.jobs.lease import Lease
from ldm_scale.jobs.schemas.train import TrainJob
from ldm_scale.training.telemetry import Startup


def told(run_dir: RunDir) -> list[tuple[str, str]]:
    status = json.loads(run_dir.status.read_text())
    lines = [line["event"] for line in run_dir.read_lines(run_dir.events)]
    lines += [line["alert"] for line in run_dir.read_lines(run_dir.alerts)]
    return [(status["state"], status["reason"]), *((line, "") for line in lines)]


def a_job(path: Path) -> TrainJob:
    overrides = ["+experiment=autoencoder_kl_f4", "scale=toy", f"run_dir={path}", "tracker.wandb=false"]
    return config.compose("train", overrides)


@contextmanager
def kept(run_dir: RunDir, tracker: train.Tracker, startup: Startup) -> Iterator[None]:
    with Lease(run_dir, "training") as lease, train._status_kept(run_dir, lease, tracker, startup):
        yield


def test_an_error(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    tracker = a_job(tmp_path).tracker.build(run_dir)
    for _ in range(2):  # without a run, of which no trace is left, and with one
        with pytest.raises(OSError), kept(run_dir, tracker, Startup()):
            raise OSError("gone")
        if not tmp_path.exists():
            run_dir.write_status("running", images=0)
    assert told(run_dir) == [("failed", "OSError: gone"), ("failed", ""), ("failed", "")]


def test_an_error_under_way_is_no_refusal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir, startup = RunDir(tmp_path), Startup()
    startup.finish()
    run_dir.write_status("running", images=0)
    with pytest.raises(SystemExit) as ended, kept(run_dir, train.Silent(), startup):
        raise ValueError("gone")
    assert ended.value.code == 1 and "Traceback" in capsys.readouterr().err
    assert told(run_dir) == [("failed", "ValueError: gone")]


def test_the_watchdog_where_rank_0_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir, job = RunDir(tmp_path), a_job(tmp_path)
    monkeypatch.setenv("RANK", "5")
    for _ in range(3):  # of 511 ranks
        train._ended(job, run_dir, Lease(run_dir, "training"), train.Silent(), "rank 0 was lost")
    assert told(run_dir) == [("failed", "rank 0 was lost"), ("failed", ""), ("failed", "")]
