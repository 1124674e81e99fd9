"""`make wheelhouse` and what `make setup` does with it, for real, on a small project with our Makefile and pins."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BASE = Path(sys.base_prefix) / "bin" / "python3"  # no venv: that is what `make setup` starts from
PIN = "0.12.1"  # there are newer ones
PROJECT = """
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"
[project]
name = "ldm_scale"
version = "0.1.0"
dependencies = {dependencies}
[tool.setuptools]
packages = []
[project.optional-dependencies]
data = []
test = []
"""


def project(folder: Path, *dependencies: str) -> Path:
    """Our Makefile, with these dependencies instead of all, and a pin for one that these tests do not run with."""
    (folder / "launchers").mkdir(parents=True)
    for name in ("Makefile", "launchers/keep_torch.py"):
        shutil.copy(ROOT / name, folder / name)
    (folder / "pyproject.toml").write_text(PROJECT.format(dependencies=[*dependencies]))
    (folder / "constraints.txt").write_text(f"{(ROOT / 'constraints.txt').read_text()}toolz=={PIN}\n")
    return folder


def make(folder: Path, *arguments: str, expect: int = 0, **more: str) -> str:
    made = subprocess.run(
        ["make", f"PYTHON={BASE}", *arguments],
        cwd=folder, env={**os.environ, "PIP_CACHE_DIR": str(folder / "cache"), **more}, capture_output=True, text=True,
    )  # fmt: skip
    assert made.returncode == expect, made.stdout + made.stderr
    return made.stdout + made.stderr


@pytest.mark.slow
def test_a_wheelhouse_sets_up_without_an_index_keeps_the_torch_that_is_there_and_is_refused_when_damaged(
    tmp_path: Path,
):
    """The system's packages here: those that these tests run with, as a user's site-packages of the base Python."""
    wheelhouse = tmp_path / "wheelhouse"
    make(project(tmp_path / "online", "toolz>=0.11"), "wheelhouse", f"WHEELHOUSE={wheelhouse}")
    names = {line.split()[1] for line in (wheelhouse / "SHA256SUMS").read_text().splitlines()}
    assert names == {file.name for file in wheelhouse.glob("*.whl")}
    assert [name.split("-")[0] for name in sorted(names)] == ["setuptools", "toolz"]

    here = project(tmp_path / "offline", "toolz>=0.11", "torch>=2.11")
    place = tmp_path / f"lib/python{sys.version_info.major}.{sys.version_info.minor}"
    place.mkdir(parents=True)
    (place / "site-packages").symlink_to(sysconfig.get_path("purelib"))
    nowhere = {
        "PIP_INDEX_URL": "http://127.0.0.1:9/",
        "PIP_FIND_LINKS": "",
        "PYTHONUSERBASE": str(tmp_path),
        "PYTHONPATH": "",
    }
    make(here, "setup", "TORCH=system", f"WHEELHOUSE={wheelhouse}", **nowhere)
    show = "import importlib.metadata as m, importlib.util as u; print(m.version('toolz'), u.find_spec('torch').origin)"
    told = subprocess.run(
        [here / ".venv/bin/python", "-c", show], env={**os.environ, **nowhere}, capture_output=True, text=True
    )
    assert told.stdout.split() == [PIN, f"{place}/site-packages/torch/__init__.py"]
    assert not [*here.glob(".venv/lib/python*/site-packages/torch*")]

    next(wheelhouse.glob("toolz*")).write_bytes(b"cut")
    assert "toolz" in make(here, "setup", "VENV=other", f"WHEELHOUSE={wheelhouse}", expect=2)
    assert not (here / "other").exists()


@pytest.mark.slow
@pytest.mark.faults  # takes a compiler a minute or two, and an index for DeepSpeed's source
def test_prebuilt_operators_are_loaded_and_not_built_again(tmp_path: Path):
    """In an environment of its own, which sees the packages that these tests run with."""
    here = project(tmp_path / "here")
    subprocess.run([BASE, "-m", "venv", here / ".venv"], check=True)
    (packages,) = here.glob(".venv/lib/python*/site-packages")
    (packages / "these.pth").write_text(sysconfig.get_path("purelib"))
    (here / ".venv/.ready").touch()
    make(here, "prebuild-ops", PYTHONPATH="")
    load = "from deepspeed.ops.op_builder.cpu.comm import ShareMemCommBuilder as S; print(S().load().__file__)"
    built = tmp_path / "built"
    told = subprocess.run(
        [here / ".venv/bin/python", "-c", load], cwd=here, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": "", "TORCH_EXTENSIONS_DIR": str(built)},
    )  # fmt: skip
    assert told.stdout.splitlines()[-1].startswith(str(packages)), told.stderr
    assert not built.exists()


@pytest.mark.parametrize(("version", "said"), [(None, "sees no torch"), ("2.10.1", "torch 2.10.1, older than 2.11")])
def test_no_torch_or_an_old_one_is_refused(version: str | None, said: str, tmp_path: Path):
    if version is not None:
        metadata = tmp_path / f"torch-{version}.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Name: torch\nVersion: {version}\n")
    told = subprocess.run(
        [BASE, "-S", "launchers/keep_torch.py", "constraints.txt"],
        cwd=ROOT, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True,
    )  # fmt: skip
    assert (told.returncode, told.stdout) == (2, "")
    assert said in told.stderr


def test_what_belongs_to_a_torch_loses_its_pin(tmp_path: Path):
    metadata = tmp_path / "torch-2.12.0a0+1.nv.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Name: torch\nVersion: 2.12.0a0+1.nv\n")
    told = subprocess.run(
        [BASE, "-S", "launchers/keep_torch.py", "constraints.txt"],
        cwd=ROOT, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    kept = {line.split("==")[0] for line in told.stdout.splitlines()}
    assert told.stdout.startswith("torch==2.12.0a0+1.nv\n") and {"accelerate", "torchmetrics", "torch_fidelity"} <= kept
    assert not {"torchvision", "triton", "nvidia-nccl-cu13", "cuda-bindings"} & kept
