"""A disk without room under a training: it goes on, and everything is there once there is room again."""

import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from fault_runs import Launch, Toy, curve, differing, events

from ldm_scale.core.run_dir import RunDir
from ldm_scale.training.checkpoint_files import complete_ones

LENGTH = ("total_images=320", "every.save=16", "keep_last=2", "max_unsaved_minutes=2")
SIZE = 26_000_000  # three checkpoints of 7 MB and little else


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", folder], capture_output=True, text=True
    )
    if mounted.returncode != 0:
        pytest.skip(f"this machine lets nobody mount a small disk: {mounted.stderr}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def fill(file: Path) -> None:
    """Take every byte that is left."""
    with suppress(OSError), open(file, "wb", buffering=0) as ballast:
        while True:
            ballast.write(bytes(4096))


def contents(checkpoints: list[Path]) -> dict[Path, bytes]:
    return {file: file.read_bytes() for path in checkpoints for file in path.iterdir()}


def failures(launch: Launch) -> int:
    """Saves that failed, as rank 0 tells it: the disk has no room for an event."""
    return launch.said().count("[rank 0] could not save")


@pytest.mark.slow
def test_training_goes_on_without_room_and_saves_when_there_is_some(toy: Toy, tmp_path: Path, small_disk: Path) -> None:
    undisturbed, run = tmp_path / "undisturbed", small_disk / "run"
    toy.train(undisturbed, *LENGTH).finish()
    launch = toy.train(run, *LENGTH, logs=tmp_path / "logs")
    assert launch.reaches(lambda: len(complete_ones(RunDir(run).checkpoints)) == 2), launch.said()
    fill(small_disk / "ballast")
    assert launch.reaches(lambda: failures(launch) > 0), launch.said()
    saved = complete_ones(RunDir(run).checkpoints)
    found = contents(saved)
    assert launch.reaches(lambda: failures(launch) > 1), launch.said()
    assert len(saved) == 2 and contents(saved) == found
    (small_disk / "ballast").unlink()
    launch.finish()
    assert "No space left on device" in events(run, "save_failed")[0]["reason"]
    assert curve(run) == curve(undisturbed)
    assert differing(run, undisturbed) == []
