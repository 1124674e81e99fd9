"""What `launchers/slurm/submit` would send, and what it refuses: nothing here needs a Slurm."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from slurm_cluster import finished_pieces

from ldm_scale.core import storage
from ldm_scale.jobs import config

ROOT = Path(__file__).parents[2]
TOY = ("+experiment=txt2img_laion", "scale=toy", "engine=ddp", "micro_batch=8", "GPUS_PER_NODE=0")
Typed = Callable[..., tuple[str, str]]


def submit(*arguments: str, cwd: Path, root: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """Type the command in `cwd`, where no Slurm is found."""
    programs = cwd.parent / "programs"
    if not programs.exists():
        programs.mkdir()
        for folder in ("/usr/bin", "/bin"):
            for file in Path(folder).iterdir():
                if file.name != "sbatch" and not (programs / file.name).exists():
                    (programs / file.name).symlink_to(file)
    return subprocess.run(
        [root / "launchers/slurm/submit", *arguments], cwd=cwd, capture_output=True, text=True,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{programs}", **environment},
    )  # fmt: skip


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Typed:
    """The command in this process, which has everything imported: what it prints, and what it says of errors."""
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "120")
    monkeypatch.syspath_prepend(str(ROOT / "launchers/slurm"))
    monkeypatch.chdir(tmp_path)
    import submit as program

    def typed(*arguments: str) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", ["submit", *arguments])
        program.main()
        out, err = capsys.readouterr()
        return out, err

    return typed


def options(script: str) -> set[str]:
    return {line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH ")}


@pytest.mark.slow
def test_a_sweep_is_one_array_job_under_one_group(tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_text("# burn-in of today\nn7   # slow\n\nn9\n")
    said = submit(
        "train", "+experiment=txt2img_laion", "name=lr", "global_batch=640", "micro_batch=40", "NODES=2",
        "TIME=24:00:00", "GRACE=300", "seed=1,2", "optimizer.learning_rate=1e-4,5e-5", "--partition=gpu",
        "--exclude=n[1-2]", "--print",
        cwd=tmp_path, LDM_EXCLUDE="bad.txt",
    )  # fmt: skip
    assert said.returncode == 0, said.stderr
    assert options(said.stdout) >= {
        "--nodes=2", "--ntasks-per-node=8", "--gpus-per-node=8", "--time=24:00:00", "--signal=B:USR1@300", "--requeue",
        "--array=0-3", "'--exclude=n[1-2],n7,n9'", "--partition=gpu", "--job-name=train:runs/txt2img_laion/lr",
    }  # fmt: skip
    first = tmp_path / "runs/txt2img_laion/lr/seed-1_learning_rate-0.0001"
    assert f"run_dir={first} tracker.group=lr" in said.stdout
    assert said.stdout.count("tracker.group=lr") == 4
    assert list(tmp_path.iterdir()) == [tmp_path / "bad.txt"]  # nothing was done
    subprocess.run(["bash", "-n"], input=said.stdout, text=True, check=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("asked", "home"),
    [
        (["watch=runs/txt2img_laion/lr"], "runs/txt2img_laion/lr"),
        (["write_reference=stats/val.safetensors", "data.images=SHARDS", "data.size=256"], "stats"),
    ],
)
def test_an_evaluation_that_has_no_run_directory_lies_beside_what_it_is_about(
    typed: Typed, asked: list[str], home: str
) -> None:
    script, _ = typed("evaluate", *asked, "GPUS_PER_NODE=0", "--print")
    assert f"--job-name=evaluate:{home}" in options(script)


@pytest.mark.slow
def test_progress_is_more_finished_pieces(typed: Typed, tmp_path: Path) -> None:
    """And nothing else that is written meanwhile; none is asked of what may wait."""
    run = tmp_path / "run"
    (run / "evaluation").mkdir(parents=True)
    kept = "evaluation/training.unfinished/ema/000000016.safetensors"
    for asked, pieces in (
        (["train", *TOY, f"run_dir={run}"], ["checkpoints/images_000000000008/complete.json", kept]),
        (["evaluate", f"run_dir={run}"], [kept.replace("training", "000000000008_ema"), "evaluation/8_ema.json"]),
        (["evaluate", f"write_reference={run}/r.safetensors", "data.images=A", "data.size=8"],
         ["r.safetensors.unfinished/000000000.safetensors"]),
        (["sample", f"run_dir={run}", "count=1"], ["samples/1.png"]),
    ):  # fmt: skip
        script, _ = typed(*asked, "--print")
        before = finished_pieces(script)
        for piece in pieces:
            (run / piece).parent.mkdir(parents=True, exist_ok=True)
            for name in (f".{Path(piece).name}.1.2.tmp", "rank00000-of-00001.safetensors"):
                (run / piece).with_name(name).touch()
            assert finished_pieces(script) == before, piece
            (run / piece).touch()
            assert finished_pieces(script) != before, piece
            before = finished_pieces(script)
    watch, _ = typed("evaluate", f"watch={run}", "--print")
    assert "PIECE=''" in watch and "--signal=B:USR1@120" in options(watch)


@pytest.mark.slow
def test_the_lines_of_the_guides_can_be_submitted(typed: Typed, tmp_path: Path) -> None:
    """But for what SHARDS, CACHE and others stand for."""
    guides = "".join((ROOT / guide).read_text() for guide in ("README.md", "launchers/README.md"))
    lines = re.findall(r"^    launchers/slurm/submit (.*)", guides, re.MULTILINE)
    assert len(lines) == 4
    for line in lines:
        script, said = typed(*line.split(), "--print")
        assert "#SBATCH --nodes=" in script and "is not set" not in said, line
    assert list(tmp_path.iterdir()) == []


REFUSED = {
    "dream +experiment=txt2img_laion": "dream is no job: train, precompute, sample, evaluate",
    "train +experiment=txt2img_laion name=a NODE=2": "unknown key NODE. Known here: NODES",
    "train +experiment=txt2img_laion name=a NODES=two": "NODES=two; a whole number, at least 1",
    "train +experiment=txt2img_laion name=a --partition gpu": "gpu is no key=value; options of sbatch",
    "train +experiment=txt2img_laion name=a optimiser.decay=1": "unknown key optimiser; did you mean optimizer?",
    "train +experiment=txt2img_laion scale=toy NODES=2 GPUS_PER_NODE=0": "engine=ddp or engine=zero1, or NODES=1",
    "train +experiment=class_imagenet name=a": "conditioning=class_label cannot be trained yet",
    "train +experiment=txt2img_laion name=a NODES=3": "global_batch=680 does not divide",
    "train +experiment=txt2img_laion_2k name=a data.validation=null": "held-out images: data.validation is not set",
}


@pytest.mark.slow
def test_what_the_job_would_refuse_is_refused_at_once(
    typed: Typed, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for line, said in REFUSED.items():
        with pytest.raises(SystemExit) as left:
            config.or_exit(lambda line=line: typed(*line.split()))
        assert left.value.code == 2
        assert said in capsys.readouterr().err, line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_copy_is_the_code_as_it_stands(tmp_path: Path) -> None:
    """Changed and new files are in it, ignored and deleted ones are not; without Slurm nothing stays behind."""
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    shutil.copytree(ROOT / "launchers", clone / "launchers", dirs_exist_ok=True)
    (clone / "conf/experiment/mine.yaml").write_text("# @package _global_\n")
    (clone / "runs").mkdir()
    (clone / "runs/ignored.txt").touch()
    (clone / "evaluate.py").unlink()
    said = submit("train", *TOY, "--dependency=afterok:7", cwd=clone, root=clone)
    assert said.returncode == 2
    assert "no sbatch here: submit on a host of the cluster, or look with --print" in said.stderr
    assert list((clone / "runs").iterdir()) == [clone / "runs/ignored.txt"]

    code = "import pathlib, submit; submit.copy_code(pathlib.Path('copy'))"
    subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{clone}/launchers/slurm:{clone}"},
        check=True,
    )
    copy = tmp_path / "copy"
    assert (copy / "train.py").exists() and (copy / "conf/experiment/mine.yaml").exists()
    assert not (copy / "evaluate.py").exists() and not (copy / "runs").exists()
    noted = storage.read_json(copy / "snapshot.json")
    assert (
        noted["dirty"] and " D evaluate.py" in noted["changed"] and "?? conf/experiment/mine.yaml" in noted["changed"]
    )

    (clone / "large.bin").write_bytes(bytes(10_000_001))
    said = submit("train", *TOY, "--dependency=afterok:7", cwd=clone, root=clone)
    assert said.returncode == 2 and "too large to be copied as code: large.bin. Name them in .gitignore" in said.stderr
