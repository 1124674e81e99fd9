"""`accelerate launch` by launchers/accelerate.sh, told to stop: a complete checkpoint, and no process left."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from fault_runs import Toy, curve, events, saving
from host_pair import ROOT, wait_for

from ldm_scale.core import storage
from ldm_scale.core.run_dir import RunDir
from ldm_scale.training.checkpoint_files import find, images_of

# A disk that is slow to sync: the files of a checkpoint's ranks, and no others.
SLOW_DISK = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

int fsync(int file) {
    char link[64], path[PATH_MAX] = "";
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    if (readlink(link, path, sizeof path - 1) > 0 && strstr(path, "/rank") && strstr(path, ".safetensors"))
        sleep(40);
    return ((int (*)(int))dlsym(RTLD_NEXT, "fsync"))(file);
}
"""


class Launched:
    """The launcher, with two processes of a training that would go on for long."""

    def __init__(self, toy: Toy, run: Path, log: Path, **environment: str) -> None:
        self._log, self._begun = log, len(events(run, "start", "resume"))
        overrides = toy.training(run, "total_images=1_000_000", "every.save=0", "tracker.wandb=true")
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        with open(log, "ab") as said:
            self.process = subprocess.Popen(
                ["launchers/accelerate.sh", "train.py", *overrides], cwd=ROOT, stdout=said, stderr=said,
                env={**os.environ, "PATH": path, "PROCESSES": "2", **environment},
            )  # fmt: skip
        self._run = run

    def trains(self) -> list[psutil.Process]:
        """Wait until it does; all processes under the launcher."""
        before = len(curve(self._run))
        assert wait_for(lambda: len(events(self._run, "start", "resume")) > self._begun, self.process), self.said()
        assert wait_for(lambda: len(curve(self._run)) > before + 5, self.process), self.said()
        return psutil.Process(self.process.pid).children(recursive=True)

    def said(self) -> str:
        return self._log.read_text()


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "run"
    for process in psutil.process_iter(["cmdline"]):
        if f"run_dir={tmp_path}/run" in (process.info["cmdline"] or []):
            process.kill()


def stopped(launched: Launched, run: Path, number: signal.Signals) -> int:
    """Tell the launcher to stop a training; images in the complete checkpoint that it leaves."""
    processes = launched.trains()
    launched.process.send_signal(number)
    assert launched.process.wait(180) == 1, launched.said()
    assert psutil.wait_procs(processes, timeout=10)[1] == []
    status = storage.read_json(RunDir(run).status)
    assert (status["state"], status["images"]) == ("preempted", images_of(find(RunDir(run).checkpoints)))
    assert not saving(run)
    return int(status["images"])


@pytest.mark.slow
def test_told_to_stop_it_saves_and_leaves_no_process(toy: Toy, run: Path) -> None:
    log = run.with_name("log.txt")
    images = [stopped(Launched(toy, run, log), run, number) for number in (signal.SIGUSR1, signal.SIGTERM)]
    assert images[0] < images[1]
    assert [event["images_seen"] for event in events(run, "start", "resume")] == [0, images[0]]
    assert len({folder.name.split("-")[-1] for folder in RunDir(run).wandb.glob("offline-run-*")}) == 1


@pytest.mark.slow
@pytest.mark.faults
def test_a_save_of_40_seconds_survives_and_a_launcher_without_time_for_it_is_refused(toy: Toy, run: Path) -> None:
    log, source, slow_disk = run.with_name("log.txt"), run.with_name("slow.c"), run.with_name("slow.so")
    source.write_text(SLOW_DISK)
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", slow_disk, source, "-ldl"], check=True)
    launched = Launched(toy, run, log, LD_PRELOAD=str(slow_disk))
    launched.trains()
    began = time.monotonic()
    stopped(launched, run, signal.SIGTERM)
    assert time.monotonic() - began > 40
    hasty = Launched(toy, run, log, TORCH_ELASTIC_SHUTDOWN_TIMEOUT="60")
    assert hasty.process.wait(180) != 0
    assert "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=60: the last save took 40 s" in hasty.said()
    stopped(Launched(toy, run, log), run, signal.SIGTERM)
