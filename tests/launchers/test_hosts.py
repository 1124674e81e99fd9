"""Two hosts, real but for their hardware: one is lost, the cable between them is pulled; nothing else is."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fault_runs import Launch, Toy, curve, differing, events
from host_pair import NAMES, ROOT, HostPair, host_pair, wait_for

from data_tools.make_toy_world import Recipe, write_world
from ldm_scale.core import storage
from ldm_scale.core.run_dir import RunDir

LENGTH = ("total_images=640", "every.save=80")
TRAIN_ENDS_S = 60.0  # after it lost a host


@pytest.fixture
def hosts() -> Iterator[HostPair]:
    try:
        with host_pair() as made:
            yield made
    except OSError as error:
        pytest.skip(f"this machine makes no network namespaces: {error}")


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ("", "HOSTS is not set: name every host of the job"),
        ("localhost,no.such.host", "HOSTS: no.such.host is not known here"),
        ("198.51.100.1,198.51.100.2", "names 0 times a host with the addresses 127.0.0.1"),
        ("localhost,127.0.0.1", "names 2 times a host"),
    ],
)
def test_hosts_that_cannot_be_are_refused(named: str, said: str) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    line = [ROOT / "launchers" / "torchrun.sh", "train.py"]
    done = subprocess.run(line, env={**os.environ, "HOSTS": named, "PATH": path}, capture_output=True, text=True)
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1


class Job:
    """One command line, on both hosts."""

    def __init__(self, hosts: HostPair, logs: Path, script: str, *overrides: str) -> None:
        self._hosts, self._logs = hosts, [logs / f"{name}.txt" for name in NAMES]
        self._line = ["launchers/torchrun.sh", script, *overrides]
        self._started: list[subprocess.Popen[bytes]] = []
        for log in self._logs:
            log.touch()
        for host in (0, 1):
            self._started.append(self.start(host))

    def start(self, host: int) -> subprocess.Popen[bytes]:
        """The line on one host."""
        return self._hosts.start(host, self._logs[host], *self._line, HOSTS=",".join(NAMES), PROCESSES="1")

    def restart(self, host: int) -> None:
        self._started[host] = self.start(host)

    def reaches(self, images: int, run: Path) -> bool:
        return wait_for(lambda: images in curve(run), *self._started)

    def ended(self, within_s: float = 180.0) -> list[int]:
        """Exit statuses of the hosts; nothing is left on them."""
        codes = [process.wait(within_s) for process in self._started]
        assert [self._hosts.processes(host) for host in (0, 1)] == [[], []]
        return codes

    def said(self, host: int) -> str:
        return self._logs[host].read_text()


def training(toy: Toy, hosts: HostPair, run: Path) -> Job:
    return Job(hosts, run.parent, "train.py", *toy.training(run, *LENGTH))


@pytest.mark.slow
def test_a_training_loses_a_host_then_a_cable_for_moments(toy: Toy, hosts: HostPair, tmp_path: Path) -> None:
    run, undisturbed = tmp_path / "run", tmp_path / "undisturbed"
    job = training(toy, hosts, run)
    assert job.reaches(160, run), job.said(0)
    hosts.kill(1)
    assert job.ended(TRAIN_ENDS_S) == [1, -9]
    status = storage.read_json(RunDir(run).status)
    assert (status["state"], status["cause"]) == ("failed", "lost") and "rank 1 on host1 was lost" in status["reason"]

    job = training(toy, hosts, run)
    assert job.reaches(320, run), job.said(0)
    hosts.cable(plugged=False)
    time.sleep(3)
    assert len(curve(run)) < 80
    hosts.cable(plugged=True)
    assert job.ended() == [0, 0], job.said(0)

    toy.train(undisturbed, *LENGTH).finish()
    assert [event["event"] for event in events(run, "start", "resume", "finished")] == ["start", "resume", "finished"]
    assert curve(run) == curve(undisturbed)
    assert differing(run, undisturbed) == []


@pytest.mark.slow
@pytest.mark.faults
def test_a_cable_pulled_for_good_ends_both_hosts(toy: Toy, hosts: HostPair, tmp_path: Path) -> None:
    run, undisturbed = tmp_path / "run", tmp_path / "undisturbed"
    job = training(toy, hosts, run)
    assert job.reaches(160, run), job.said(0)
    hosts.cable(plugged=False)
    assert job.ended(TRAIN_ENDS_S) == [1, 1]
    hosts.cable(plugged=True)
    reasons = "rank 1 on host1 was lost: no sign of life for 40 s", "rank 0 was lost: it does not answer rank 1"
    assert reasons[0] in job.said(0) and reasons[1] in job.said(1)
    status = storage.read_json(RunDir(run).status)
    assert status["cause"] == "lost" and status["reason"] in reasons  # of whoever is last to see the other's silence
    job = training(toy, hosts, run)
    assert job.ended() == [0, 0], job.said(0)
    toy.train(undisturbed, *LENGTH).finish()
    assert differing(run, undisturbed) == []


def files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def claimed_by(host: int, cache: Path) -> bool:
    """Whether a host has a shard at hand."""
    return any(f'"{NAMES[host]}"' in claim.read_text() for claim in cache.rglob("*.claim"))


@pytest.mark.slow
def test_precomputing_loses_a_host_that_comes_back(toy: Toy, hosts: HostPair, tmp_path: Path) -> None:
    write_world(tmp_path / "world", Recipe(train=1200, val=8, objects=1, size=32, shard_size=100, seed=1))
    how = toy.overrides("precompute.min_psnr=0", "precompute.batch=8", f"data.images={tmp_path}/world/train")
    cache, whole = tmp_path / "cache", tmp_path / "whole"
    job = Job(hosts, tmp_path, "precompute_latents.py", *how, f"data.latents={cache}")
    assert wait_for(lambda: claimed_by(1, cache)), job.said(1)
    hosts.kill(1)
    assert claimed_by(1, cache)
    job.restart(1)
    assert job.ended() == [0, 0], job.said(0) + job.said(1)
    Launch("precompute_latents", [*how, f"data.latents={whole}"], world=1, log=tmp_path / "log.txt").finish()
    assert files(cache) == files(whole)
