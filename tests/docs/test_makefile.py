"""What the Makefile's targets come to, asked of make itself."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def make(*words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Type the command; what a surrounding make has set does not reach it."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(["make", *words], cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "PROCESSES= launchers/accelerate.sh"),  # the launcher counts GPUs
        (["SCALE=toy"], "PROCESSES=1 launchers/accelerate.sh"),
        (["SCALE=toy", "PROCESSES=2"], "PROCESSES=2 launchers/accelerate.sh"),
    ],
)
@pytest.mark.parametrize("target", ["train", "precompute-latents"])
def test_a_job_has_a_process_for_each_gpu_unless_it_is_a_toy(target: str, words: list[str], said: str):
    shown = make("-n", target, *words).stdout
    assert f"{said} {target.replace('-', '_')}.py +experiment=txt2img_laion" in shown


def test_help_names_every_target():
    phony = (ROOT / "Makefile").read_text().replace("\\\n", " ").partition(".PHONY: ")[2].partition("\n")[0].split()
    assert set(re.findall(r"^  \x1b\[1m(\S+)", make("help").stdout, re.MULTILINE)) == set(phony)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The Makefile in a folder of its own, set up as it believes."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copyfile(ROOT / name, tmp_path / name)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / ".ready").touch()
    return tmp_path


def test_clean_leaves_what_people_made(checkout: Path):
    kept = ["data/laion/train", "runs/txt2img_laion/first", "weights/kl_f8", ".venv/bin"]
    gone = ["data/toy/train", "data/openmoji", "runs/txt2img_laion/toy", "runs/autoencoder_kl_f4/openmoji"]
    for folder in kept + gone:
        (checkout / folder).mkdir(parents=True, exist_ok=True)
    assert make("clean", cwd=checkout).returncode == 0
    assert [folder for folder in kept + gone if (checkout / folder).exists()] == kept


def test_one_plan_of_a_sweep_that_fails_fails_the_sweep_after_all_were_shown(checkout: Path):
    python = checkout / ".venv" / "bin" / "python"
    python.write_text('#!/bin/sh\necho "$@"\ncase "$*" in *compression_f2\\ *) exit 1;; esac\n')
    python.chmod(0o755)
    said = make("compression-sweep", "ARGS=--gpus 8", cwd=checkout)
    assert said.returncode != 0
    planned = re.findall(r"compression_f(\d+) name=compression --gpus 1 --gpus 8", said.stdout)
    assert planned == ["1", "2", "4", "8", "16", "32"]


@pytest.mark.parametrize("path", ["weights/kl_f8/a.zip", "export/a", "burn_in/work/a", "samples/a.png", "latents.png"])
def test_what_commands_write_into_the_checkout_is_no_code(path: str):
    assert subprocess.run(["git", "-C", str(ROOT), "check-ignore", "--quiet", path]).returncode == 0
