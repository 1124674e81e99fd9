"""Every line of docs/operations.md, in its order, in the toy world of its exports: what a new user types, but smaller.

Lines for Slurm are asked to --print, which composes and checks the job; the tables below name the few that are not run.
"""

import multiprocessing
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from data_tools.make_toy_world import Recipe, write_world
from ldm_scale.core import storage, weights
from ldm_scale.core.run_dir import RunDir
from ldm_scale.jobs import config
from ldm_scale.tracking.goodput import LAUNCHES

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "operations.md"
SHORTER = {"total_images=40_960": "total_images=32"}
SMALL_MODEL = [
    "first_stage.channels=8", "unet.model_channels=16", "unet.norm_groups=8", "unet.head_channels=16",
    "unet.context_dim=16", "conditioning.width=16", "conditioning.layers=1", "conditioning.heads=2",
    "conditioning.head_dim=8",
]  # fmt: skip
SMALL_TRAINING = [
    *SMALL_MODEL, "evaluation.images=8", "evaluation.batch=8", "evaluation.grid=4", "sampler.steps=2", "global_batch=8",
    "micro_batch=8", "ema_half_lives=[32]", "optimizer.warmup_images=16", "every.log=8", "every.save=16",
    "every.evaluate=0", "every.sample=0",
]  # fmt: skip
SMALL = {  # what makes a job small, by the command it follows
    "precompute_latents.py": [*SMALL_MODEL, "precompute.min_psnr=0"],
    "train.py": SMALL_TRAINING,
    "ldm_scale.jobs.plan": SMALL_TRAINING,
    "ldm_scale.jobs.decoded": SMALL_MODEL,
    "launchers/slurm/submit": ["--print", "NODES=1", "GPUS_PER_NODE=0"],
    "sample.py": ["sampler.steps=2"],
}
HELP = ("launchers/burn_in", "ldm_scale.interop.compvis")  # have tests of their own
READ = (".", "make", "scp")  # these tests run in what `make setup` made; another machine's answer
OWN = ("data_tools.index",)  # starts processes that import its module again
EXITS = {"seed=7": 2}  # where the page says so
WAIT_S = 240.0


def written() -> list[str]:
    """The page's lines; one that is indented further goes on with the one before."""
    text = PAGE.read_text()
    for long, short in SHORTER.items():
        assert long in text
        text = text.replace(long, short)
    return re.findall(r"^    (\S.*(?:\n        .*)*)", text, re.MULTILINE)


LINES = [line for line in written() if not line.startswith("export ")]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like a checkout with data: shards that know where their images are from, a first stage, captions."""
    path = tmp_path_factory.mktemp("operations")
    for name in ("train.py", "precompute_latents.py", "sample.py", "launchers"):
        (path / name).symlink_to(ROOT / name)
    write_world(path / "data" / "toy", Recipe(train=48, val=8, objects=1, size=32, shard_size=8, seed=0))
    keys = []
    for file in sorted(path.glob("data/toy/train/*.parquet")):
        table = pq.read_table(file)
        urls = [f"https://a.example/{len(keys) + number}.jpg" for number in range(len(table))]
        pq.write_table(table.append_column("url", pa.array(urls)), file)
        keys += table["key"].to_pylist()
    pq.write_table(pa.table({"key": keys, "short": ["a shape"] * len(keys)}), path / "captions.parquet")
    torch.manual_seed(0)
    job = config.compose("precompute_latents", ["+experiment=txt2img_laion_2k", "scale=toy", *SMALL_MODEL])
    plain = config.to_plain(replace(job.first_stage, scale=1.0))
    weights.save(path / job.first_stage.checkpoint, {"first_stage": plain}, job.first_stage.build().state_dict())
    return path


@pytest.fixture(scope="module")
def settings(world: Path) -> dict[str, str]:
    """The environment after the page's exports: of places and sizes, the toy world's come last."""
    exports = "\n".join(line for line in written() if line.startswith("export "))
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    shown = subprocess.run(
        ["bash", "-c", f"{exports}\nenv -0"],
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    return dict(variable.split("=", 1) for variable in shown.stdout.split("\0") if "=" in variable)


@pytest.mark.slow
@pytest.mark.parametrize("line", LINES)
def test_line(line: str, world: Path, settings: dict[str, str]):
    words = ["bash", "-c", f"printf '%s\\0' {line}"]
    shown = subprocess.run(words, cwd=world, env=settings, capture_output=True, text=True, check=True)
    command = shown.stdout.split("\0")[:-1]
    name = command[2] if command[:2] == ["python", "-m"] else command[1] if command[0] == "python" else command[0]
    if name in READ:
        return
    if name == "kubectl" and not shutil.which("kubectl"):
        pytest.skip("needs kubectl")
    command = [*command[: 1 + command.index(name)], "--help"] if name in HELP else [*command, *SMALL.get(name, [])]
    expected = next((code for words, code in EXITS.items() if words in line), 0)
    if command[0] != "python" or name in OWN:
        ended = subprocess.run(command, cwd=world, env=settings, capture_output=True, text=True)
        assert ended.returncode == expected, ended.stdout + ended.stderr
        return
    said = world / "said.txt"
    process = started(command[1:], world, settings, said)
    if name == "train.py":
        run = RunDir(world / "runs" / "txt2img_laion_2k" / next(w for w in command if w.startswith("name="))[5:])
        ended_by_itself = reaches(process, run, steps=2)
        expected = expected if ended_by_itself else 75
    process.join(WAIT_S)
    assert process.exitcode == expected, said.read_text()
    if name == "train.py" and expected != 2:
        assert storage.read_json(run.status)["state"] in ("finished", "stopped", "preempted")


def started(command: Sequence[str], world: Path, settings: dict[str, str], said: Path) -> BaseProcess:
    """Start `python COMMAND` in a process that has the libraries imported: the line takes a second, not ten."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ldm_scale.jobs.train", "deepspeed", "wandb", "hydra"])
    process = context.Process(target=work, args=(command, world, settings, said))
    process.start()
    return process


def work(command: Sequence[str], world: Path, settings: dict[str, str], said: Path) -> None:
    """What `python COMMAND` does."""
    out = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.environ |= settings
    os.chdir(world)
    module, *arguments = command[1:] if command[0] == "-m" else command
    sys.argv = [module, *arguments]
    if command[0] == "-m":
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(module, run_name="__main__")


def reaches(process: BaseProcess, run: RunDir, *, steps: int) -> bool:
    """True when a training ends by itself; one that takes so many steps is told to stop, as by a time limit."""
    launches = len(launched(run))
    until = time.monotonic() + WAIT_S
    while process.is_alive():
        began = launched(run)[launches:]
        if began and len([line for line in run.read_lines(run.metrics) if line["time"] > began[0]]) >= steps:
            os.kill(process.pid or 0, signal.SIGTERM)
            process.join(WAIT_S)
            return process.exitcode != 75
        assert time.monotonic() < until
        time.sleep(0.05)
    return True


def launched(run: RunDir) -> list[float]:
    """When trainings of a run began."""
    return [line["time"] for line in run.read_lines(run.events) if line["event"] in LAUNCHES]
