"""A training that feeds W&B offline, in a process of its own; and what its files hold, read by `wandb leet inspect`."""

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

WANDB = str(Path(sys.executable).with_name("wandb"))

TRAIN = """
import logging, os, signal, sys, time
from pathlib import Path
import numpy as np
from ldm_scale.core.run_dir import RunDir
from ldm_scale.tracking.artifacts import Artifacts
from ldm_scale.tracking.tracker import TrackerConfig

logging.basicConfig(level=logging.INFO, stream=sys.stderr)
path, start, stop, end = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
artifacts = Artifacts(os.environ.get("ARTIFACTS", "none"))
tracker = TrackerConfig(project="trial", tags=["a"], artifacts=artifacts).build(RunDir(path))
told = {"guidance": 3.0, "weights": "ema/32"}
cells = [((0, 0, 4, 8), {"prompt": "left", **told}), ((4, 2, 4, 6), {"prompt": "right", **told})]
began = time.perf_counter()
tracker.start({"unet": {"channels": 64}, "seed": 7}, resume_at=start)
print("start took", time.perf_counter() - began)
for seen in range(start + 10, stop + 1, 10):
    tracker.log(seen, {"train/loss": 1 / seen, "train/lr": 1e-4})
    if seen % 20 == 0:
        tracker.log(seen, {"eval/fd_random": 1 + abs(seen - 40)})
        grid = np.full((8, 8, 3), seen, np.uint8)
        grid[2:, 4:] += 100
        tracker.images(seen, "samples/grid", grid, f"after {seen}", cells)
tracker.event(stop, "checkpoint")
if end == "kill":
    time.sleep(float(sys.argv[5]))
    os.kill(os.getpid(), signal.SIGKILL)
tracker.finish(end)
"""


def clean_environment(tmp_path: Path) -> dict[str, str]:
    """No key, no foreign W&B settings."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB") and name != "NETRC"}
    proxies = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
    kept = {name: value for name, value in kept.items() if name.lower() not in proxies}
    home = tmp_path / "home"
    home.mkdir()
    return {**kept, "HOME": str(home), "OMP_NUM_THREADS": "1", "WANDB_ERROR_REPORTING": "false"}


def train(run: Path, start: int, stop: int, end: str, environment: dict[str, str], *more: str) -> str:
    command = [sys.executable, "-c", TRAIN, str(run), str(start), str(stop), end, *more]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == (-signal.SIGKILL if end == "kill" else 0), done.stderr
    return done.stdout + done.stderr


def parts(run: Path) -> list[Path]:
    """Its folders, one for each process."""
    return sorted((run / "wandb").glob("offline-run-*"))


def inspect(part: Path, *options: str) -> str:
    return subprocess.run([WANDB, "leet", "inspect", *options, str(part)], capture_output=True, text=True).stdout


def rows(run: Path) -> list[dict[str, object]]:
    """Every history row in the run's .wandb files, in order."""
    records = [json.loads(line) for part in parts(run) for line in inspect(part, "--json").splitlines()]
    return [record["history"]["item"] for record in records if record["type"] == "history"]


def points(rows: list[dict[str, object]]) -> Counter[tuple[str, object]]:
    """How often each (name, images_seen) was logged; a picture's row has several fields, `name.path` and others."""
    logged = [{name.split(".")[0] for name in row if not name.startswith("_")} for row in rows]
    return Counter((name, row["train/images_seen"]) for row, names in zip(rows, logged, strict=True) for name in names)
