"""The same training started twice: the second is refused, and after a kill of the first it goes on at once."""

import signal
import time
from pathlib import Path

import pytest
from fault_runs import Toy, curve, events

from ldm_scale.core import storage
from ldm_scale.core.run_dir import RunDir
from ldm_scale.jobs.lease import STALE_S


@pytest.mark.slow
def test_two_launches_do_not_train_in_one_directory(toy: Toy, tmp_path: Path) -> None:
    run = tmp_path / "run"
    how = ("total_images=100_000", "every.save=64")
    first = toy.train(run, *how, world=1)
    assert first.reaches(lambda: len(curve(run)) > 8), first.said()
    second = toy.train(run, *how, world=2, logs=tmp_path / "second")
    assert second.ended() == [2, 2], second.said()
    assert "has a training already: process" in second.said() and "Traceback" not in second.said()
    assert storage.read_json(RunDir(run).status)["state"] == "running"
    before = len(curve(run))
    assert first.reaches(lambda: len(curve(run)) > before), first.said()

    first.send(signal.SIGKILL, 0)
    assert first.ended() == [-9]
    began = time.monotonic()
    third = toy.train(run, *how, world=1)
    assert third.reaches(lambda: bool(events(run, "resume"))), third.said()
    assert time.monotonic() - began < STALE_S / 2
    third.send(signal.SIGTERM, 0)
    assert third.ended() == [75] and not RunDir(run).claims.exists(), third.said()
