"""Real processes on one cache, killed at random moments: what they leave is what one undisturbed process makes."""

import io
import multiprocessing
import os
import random
import signal
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ldm_scale.core import storage, weights
from ldm_scale.data.shards import ShardWriter
from ldm_scale.jobs import config, precompute
from ldm_scale.jobs.schemas.precompute import PrecomputeJob

ROUNDS = 20
SHARDS, IMAGES = 24, 10


def work(shards: str, folder: str) -> None:
    """What each process does: the job, with the cache and the indexes in `folder`, and what it says beside it."""
    said = os.open(log_of(folder), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(said, 1)
    os.dup2(said, 2)
    torch.set_num_threads(1)
    precompute.run(job(shards, f"data.latents={folder}/latents", f"data.index_dir={folder}/index"))


def log_of(folder: str | Path) -> Path:
    return Path(f"{folder}.log")


def job(shards: str, *overrides: str) -> PrecomputeJob:
    composed: PrecomputeJob = config.compose(
        "precompute_latents",
        [
            "+experiment=autoencoder_kl_f4", "scale=toy", "first_stage.channels=16",
            f"first_stage.checkpoint={shards}/kl", f"data.images={shards}/images", "data.threads=1",
            "data.max_bad_share=1", "precompute.batch=4", "precompute.audit=2", "precompute.min_psnr=0", *overrides,
        ],
    )  # fmt: skip
    return composed


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of noise with one broken image each, and a first stage of random weights."""
    folder = tmp_path_factory.mktemp("killed")
    draw = np.random.default_rng(0)
    for shard in range(SHARDS):
        with ShardWriter(folder / "images" / f"{shard:05d}.tar") as writer:
            for i in range(IMAGES):
                file = io.BytesIO()
                Image.fromarray(draw.integers(0, 256, (32, 32, 3), np.uint8)).save(file, "PNG")
                writer.add(f"{shard:05d}{i:04d}", {"png": file.getvalue() if i else b"broken", "txt": b"a caption"})
    torch.manual_seed(0)
    network = job(str(folder)).first_stage.build()
    weights.save(folder / "kl", {"first_stage": {}}, network.state_dict())
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def start(shards: Path, folder: Path) -> BaseProcess:
    """A process with everything imported already, so that it is killed at work and not at its imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ldm_scale.jobs.precompute", "torch._dynamo"])  # which meta tensors need
    process = context.Process(target=work, args=(str(shards), str(folder)))
    process.start()
    return process


def finish(process: BaseProcess) -> int | None:
    process.join(120)
    return process.exitcode


@pytest.mark.slow
def test_three_of_which_one_is_killed_leave_what_one_makes(shards: Path, tmp_path: Path) -> None:
    began = time.monotonic()
    assert finish(start(shards, tmp_path / "alone")) == 0
    took = time.monotonic() - began
    wanted = files(tmp_path / "alone")
    chance = random.Random(0)
    killed_at_work = 0
    for turn in range(ROUNDS):
        folder = tmp_path / f"round{turn}"
        processes = [start(shards, folder) for _ in range(3)]
        time.sleep(chance.uniform(0, took))
        victim = processes.pop(chance.randrange(3))
        if victim.pid is not None and victim.is_alive():
            os.kill(victim.pid, signal.SIGKILL)
        killed_at_work += finish(victim) == -signal.SIGKILL and not (folder / "latents" / "manifest.json").exists()
        assert [finish(process) for process in processes] == [0, 0], f"round {turn}: {log_of(folder).read_text()}"
        found = files(folder)
        assert [name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)] == [], turn
    manifest = storage.read_json(tmp_path / "round0" / "latents" / "manifest.json")
    assert manifest["read"] == manifest["n"] + sum(manifest["rejected"].values()) == SHARDS * IMAGES
    assert manifest["rejected"] == {"unreadable": SHARDS}
    assert killed_at_work >= ROUNDS // 4, f"{killed_at_work} of {ROUNDS} were killed before the end: too few to tell"


@pytest.mark.slow
def test_accelerate_launch_shares_the_work_among_processes(world: Any, tmp_path: Path) -> None:
    launch = [str(Path(sys.executable).parent / "accelerate"), "launch", "--multi_gpu", "--num_processes", "2"]
    flags = ["--num_machines", "1", "--mixed_precision", "no", "--main_process_port", "0"]
    overrides = [f"data.latents={tmp_path}/latents", "precompute.min_psnr=0"]
    command = world.text_to_image(*overrides, script="precompute_latents.py")
    said = world.run([*launch, *flags, *command[1:]])
    assert said.count("next        accelerate launch train.py") == 1
    alone = {name: data for name, data in files(world.path / "latents").items() if "precompute.json" not in name}
    assert {name: data for name, data in files(tmp_path / "latents").items() if name in alone} == alone


@pytest.mark.slow
def test_sigterm_gives_everything_back_and_the_next_process_goes_on(shards: Path, tmp_path: Path) -> None:
    process = start(shards, tmp_path / "stopped")
    records = tmp_path / "stopped" / "latents" / ".ldm"
    while not list(records.glob("*.done.json")):
        assert process.is_alive()
        time.sleep(0.01)
    process.terminate()
    assert finish(process) == 75
    left = files(tmp_path / "stopped" / "latents")
    assert not [name for name in left if "staging" in name or name == "manifest.json"]
    assert finish(start(shards, tmp_path / "stopped")) == 0
    assert finish(start(shards, tmp_path / "alone")) == 0
    assert files(tmp_path / "stopped") == files(tmp_path / "alone")
