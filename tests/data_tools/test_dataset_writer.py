import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from data_tools.dataset_writer import DatasetWriter, Rejected, Sample
from data_tools.make_shards import main


def sample(number: int) -> Sample:
    return Sample({"txt": f"words {number}".encode()}, {"caption": f"words {number}"})


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def write(out, places, *, stop_at=None):
    """Writes by the rule that every seventh sample is rejected."""
    writer = DatasetWriter(out, shard_size=4, val_share=0.3)
    done = writer.begin({"samples": len(places)}, overwrite=False)
    with writer:
        for place in places:
            if place == stop_at:
                raise KeyboardInterrupt
            if place in done:
                continue
            if place % 7 == 6:
                writer.reject(str(place), Rejected("seventh"))
            else:
                writer.add(sample(place), group=str(place), place=place)
    return writer.counts, done


def test_an_exception_leaves_finished_shards_and_nothing_else(tmp_path):
    with pytest.raises(RuntimeError), DatasetWriter(tmp_path, shard_size=2, val_share=0) as writer:
        for place in range(3):
            writer.add(sample(place), group="g", place=place)
        raise RuntimeError
    assert sorted(path.name for path in (tmp_path / "train").iterdir()) == [
        "00000.parquet", "00000.tar", "00000_stats.json"
    ]  # fmt: skip


@pytest.mark.parametrize("stop_at", [1, 20, 45, 59])
def test_a_run_cut_off_is_finished_as_if_nothing_had_happened(tmp_path, stop_at):
    whole, _ = write(tmp_path / "whole", range(60))
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "cut", range(60), stop_at=stop_at)
    counts, done = write(tmp_path / "cut", range(60))
    assert counts == whole and whole.read == 60
    assert files(tmp_path / "cut") == files(tmp_path / "whole")
    assert bool(done) == (stop_at > 10)


def test_the_beginning_of_another_dataset_is_not_continued(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, range(60), stop_at=30)
    with pytest.raises(ValueError, match="samples 50, was 60"):
        write(tmp_path, range(50))
    counts = DatasetWriter(tmp_path, shard_size=4, val_share=0.3)
    assert counts.begin({"samples": 50}, overwrite=True) == set()
    assert not list(tmp_path.rglob("*.tar"))


@pytest.mark.slow
def test_killed_and_run_again_gives_the_same_bytes(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    noise = np.random.default_rng(0)
    for number in range(240):
        Image.fromarray(noise.integers(0, 256, (96, 96, 3), np.uint8)).save(folder / f"{number:03d}.png")
        (folder / f"{number:03d}.txt").write_text(f"noise {number}")
    arguments = ["--shard-size", "8", "--max-side", "95"]
    assert main([str(folder), str(tmp_path / "whole"), *arguments]) == 0
    command = [sys.executable, "-m", "data_tools.make_shards", str(folder), str(tmp_path / "cut"), *arguments]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while len(list(tmp_path.glob("cut/train/*_stats.json"))) < 3 and process.poll() is None:
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "cut/rejected.jsonl").exists()
    assert main([str(folder), str(tmp_path / "cut"), *arguments]) == 0
    assert files(tmp_path / "cut") == files(tmp_path / "whole")
