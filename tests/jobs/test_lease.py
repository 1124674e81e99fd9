"""One process at a time in a run directory: who lives there stays alone, and nobody waits for the dead for long.

The real thing, killed and started again: tests/faults/test_second_launch.py.
"""

import os
import time
from pathlib import Path

import pytest

from ldm_scale.core import storage
from ldm_scale.core.run_dir import RunDir
from ldm_scale.jobs import lease
from ldm_scale.jobs.claims import Claims, here
from ldm_scale.jobs.lease import Lease


class Told:
    """Whether a signal came."""

    def __init__(self, *said: bool) -> None:
        self._said = iter(said)

    def agreed(self) -> bool:
        return next(self._said, False)


def elsewhere(run_dir: RunDir) -> Path:
    """What a training on another host has there."""
    claim = run_dir.claims / "training.claim"
    there = {"host": "node7", "kernel": "its own", "pid": 41, "began": "1", "time": time.time() - 7200}
    storage.write_json(claim, {"owner": "another", **there})
    return claim


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    monkeypatch.setattr(lease, "_LOOK_S", 0.02)
    return RunDir(tmp_path / "run")


def test_a_second_one_is_refused_at_once_on_the_same_host(run_dir: RunDir) -> None:
    with Claims(run_dir.claims) as other:
        assert other.take("training")
        with Lease(run_dir, "training") as second:
            with pytest.raises(
                ValueError, match=rf"a training already: process {os.getpid()} on {here()['host']}, for 0 s"
            ):
                second.wait(Told())  # type: ignore[arg-type]
            assert not second.has_run
        with Lease(run_dir, "watch") as watch:
            assert watch.wait(Told())  # type: ignore[arg-type]
        assert other.holds("training")


def test_a_host_that_died_is_waited_for_and_one_that_lives_is_left_alone(run_dir: RunDir) -> None:
    elsewhere(run_dir)
    with Lease(run_dir, "training", stale_s=0.3) as dead:
        assert not dead.has_run and dead.wait(Told())  # type: ignore[arg-type]
    claim, beats = elsewhere(run_dir), iter(range(10**6))

    class Beating(Told):
        def agreed(self) -> bool:
            os.utime(claim, (0, next(beats)))
            return False

    with Lease(run_dir, "training", stale_s=0.3) as second:
        with pytest.raises(ValueError, match=r"process 41 on node7, for 2\.0 h"):
            second.wait(Beating())  # type: ignore[arg-type]
        assert not second.wait(Told(False, True))  # type: ignore[arg-type]
    assert claim.exists()


def test_a_first_launch_that_is_refused_leaves_no_trace(run_dir: RunDir) -> None:
    with Lease(run_dir, "training") as first:
        assert not run_dir.path.exists()
        assert first.wait(Told()) and not first.has_run  # type: ignore[arg-type]
    assert not run_dir.path.exists()
    with Lease(run_dir, "training") as again:
        assert again.wait(Told())  # type: ignore[arg-type]
        run_dir.write_status("running", images=0)
        assert again.has_run
    assert [path.name for path in run_dir.path.iterdir()] == ["status.json"]
