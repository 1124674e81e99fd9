"""Two real processes for the engine tests: launched once, asked about by many tests."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).parent / "scripts"
STEPS = 50
sys.path.insert(0, str(SCRIPTS))

Launch = Callable[..., subprocess.CompletedProcess[str]]


def environment(**changes: str) -> dict[str, str]:
    """A plain environment: one thread, this interpreter's tools (ninja) on PATH, nothing of Accelerate's."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        kept.pop(name, None)
    path = f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}"
    return {**kept, "OMP_NUM_THREADS": "1", "PATH": path, **changes}


def launched(script: str, *arguments: str, processes: int = 2, **changes: str) -> subprocess.CompletedProcess[str]:
    """Run a script of `scripts/` as `accelerate launch` would, or plainly when processes is 0."""
    how = ["--multi_gpu", "--num_processes", str(processes), "--num_machines", "1", "--mixed_precision", "no"]
    launcher = ["-m", "accelerate.commands.launch", *how, "--main_process_port", "0"] if processes else []
    command = [sys.executable, *launcher, str(SCRIPTS / script), *arguments]
    return subprocess.run(command, env=environment(**changes), capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="session")
def launch() -> Launch:
    return launched


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The curve of one process, everything at its end, its checkpoint ten steps before; and the bfloat16 curve."""
    import tiny

    training = tiny.Training(tiny.engine_of("one_process"), tmp_path_factory.mktemp("reference"))
    losses = training.run(STEPS - 10)
    checkpoint = training.save()
    losses += training.run(9)
    last, told, _ = training.watched_step()
    losses.append(last)
    found = {
        "losses": losses,
        "norms": training.norms,
        "everything": training.everything(),
        "checkpoint": checkpoint,
        "told": told,
    }
    training.engine.close()
    training = tiny.Training(tiny.engine_of("one_process", precision="bf16"), Path("unused"))
    found["rounded"] = training.run(STEPS)
    training.engine.close()
    return found


@pytest.fixture(scope="session")
def two_processes(tmp_path_factory: pytest.TempPathFactory, reference: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    """What `scripts/matrix.py` found on two processes, and the directory it wrote to."""
    out = tmp_path_factory.mktemp("matrix")
    stop = random.randrange(1, STEPS)
    done = launched("matrix.py", str(out), str(reference["checkpoint"]), str(STEPS), str(stop))
    (out / "stderr.txt").write_text(done.stderr)
    assert done.returncode == 0, f"{out}/stderr.txt: {done.stderr[-3000:]}"
    return out, {**json.loads((out / "found.json").read_text()), "stop": stop}
