"""The recipes of images. No engine runs here: they are linted and compared, and their set-up runs in another folder."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "launchers" / "containers"
DOCKERFILE = FOLDER / "Dockerfile"


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions in order, with what follows each."""
    text = re.sub(r"\s*\\\n\s*", " ", DOCKERFILE.read_text())
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in lines]


def section(name: str) -> list[str]:
    """The lines of one section of the Apptainer recipe."""
    found = re.search(rf"^%{name}\n((?:    .*\n?)+)", (FOLDER / "ldm_scale.def").read_text(), re.MULTILINE)
    assert found is not None
    return [line.strip() for line in found[1].splitlines()]


def test_hadolint_finds_nothing():
    found = subprocess.run(
        ["hadolint", str(DOCKERFILE)], env=os.environ | {"PATH": path()}, capture_output=True, text=True
    )
    assert (found.returncode, found.stdout) == (0, "")


def path() -> str:
    return f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


def test_both_recipes_are_made_of_the_same():
    told = instructions()
    header = dict(line.split(": ") for line in (FOLDER / "ldm_scale.def").read_text().splitlines() if ": " in line[:12])
    assert header == {"Bootstrap": "docker", "From": next(rest for name, rest in told if name == "FROM")}
    copied = next(rest.split()[:-1] for name, rest in told if name == "COPY")
    assert section("files") == [f"{name} /opt/ldm_scale/{name}" for name in copied]
    ran = [rest for name, rest in told if name == "RUN"]
    assert section("post") == [ran[0], "cd /opt/ldm_scale", ran[1]]


def test_the_context_holds_what_jobs_need_and_nothing_else():
    lines = (FOLDER / "Dockerfile.dockerignore").read_text().splitlines()
    wanted = {line[1:] for line in lines if line.startswith("!")}
    assert "*" in lines and all([*ROOT.glob(name)] for name in wanted)
    copied = {name for kind, rest in instructions() if kind == "COPY" for name in rest.split()[:-1]}
    assert copied - {"."} <= wanted
    assert {"*.py", "conf", "launchers", "ldm_scale"} <= wanted and not {".git", ".", "runs", "data"} & wanted


@pytest.mark.parametrize(("commit", "dirty"), [("0123abc", False), ("0123abc-dirty", True)])
def test_an_image_knows_its_commit_or_is_not_built(commit: str, dirty: bool, tmp_path: Path):
    (run,) = (rest for kind, rest in instructions() if kind == "RUN" and "snapshot.json" in rest)
    subprocess.run(["sh", "-c", run], cwd=tmp_path, env={"COMMIT": commit}, check=True)
    assert json.loads((tmp_path / "snapshot.json").read_text()) == {"commit": "0123abc", "dirty": dirty}
    refused = subprocess.run(["sh", "-c", run], cwd=tmp_path, env={}, capture_output=True, text=True)
    assert refused.returncode and "--build-arg COMMIT=" in refused.stderr


@pytest.mark.slow
def test_the_set_up_of_the_image_runs_on_what_is_copied_before_it(tmp_path: Path):
    """But for the dependencies, which are gigabytes. It leaves no code of its own: that comes last, or lies outside."""
    told = instructions()
    for name in next(rest.split()[:-1] for kind, rest in told if kind == "COPY"):
        shutil.copy(ROOT / name, tmp_path / name)
    python = f"PYTHON={Path(sys.base_prefix) / 'bin' / 'python3'}"
    set_up = shlex.split(next(rest for kind, rest in told if kind == "RUN" and rest.startswith("make")))
    subprocess.run(
        [*set_up, python], cwd=tmp_path, env={**os.environ, "PIP_NO_DEPS": "1", "PYTHONPATH": ""}, check=True
    )
    show = "import importlib.metadata, sys; print(importlib.metadata.version('ldm_scale'), *sys.path)"
    found = subprocess.run(
        [tmp_path / ".venv/bin/python", "-c", show],
        cwd="/", env={"PATH": path()}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert found.stdout.startswith("0.1.0") and str(tmp_path) + " " not in found.stdout
