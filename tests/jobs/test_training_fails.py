"""However a training ends badly, status, events and alerts say so, once."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from ldm_scale.core.run_dir import RunDir
from ldm_scale.jobs import config, train
from ldm_scale.jobs.lease import Lease
from ldm_scale.jobs.schemas.train import TrainJob
from ldm_scale.training.telemetry import Startup


def told(run_dir: RunDir) -> list[tuple[str, str]]:
    """The status, then events and alerts."""
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
        train._ended(job, run_dir, Lease(run_dir, "training"), train.Silent(), "rank 0 was lost", Startup())
    assert told(run_dir) == [("failed", "rank 0 was lost"), ("failed", ""), ("failed", "")]


LOST = "rank 1 on n2 was lost: no sign of life for 6 s"


@pytest.mark.parametrize(
    ("error", "note", "cause"),
    [
        (RuntimeError("Connection closed by peer"), LOST, "lost"),
        (RuntimeError("Connection closed by peer"), "rank 1 on n2: AcceleratorError: CUDA error: ECC", "lost"),
        (torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered"), "", "lost"),
        (RuntimeError("Connection closed by peer"), f"rank 1 on n2: ValueError: {LOST}", "error"),
        (torch.OutOfMemoryError("CUDA out of memory"), "", "error"),
    ],
)
def test_what_is_lost_is_told_apart_from_errors(error: Exception, note: str, cause: str, tmp_path: Path) -> None:
    """A launcher starts the one again, the other not."""
    RunDir(tmp_path).write_status("running", images=0)
    if note:
        error.add_note(note)
    with pytest.raises(type(error)), kept(RunDir(tmp_path), train.Silent(), Startup()):
        raise error
    assert json.loads(RunDir(tmp_path).status.read_text())["cause"] == cause
