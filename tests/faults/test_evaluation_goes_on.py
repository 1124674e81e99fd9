"""An evaluation that signals and kills break off goes on, on another number of processes, to the same scores."""

import multiprocessing
import shutil
import signal
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fault_runs import Launch, Toy, curve

from ldm_scale.core import storage
from ldm_scale.core.run_dir import RunDir
from ldm_scale.core.shares import ranges
from ldm_scale.jobs.kept import Kept, results
from ldm_scale.training.checkpoint_files import complete_ones, images_of

IMAGES = 41  # batches of two, and one more: no world divides them
HOW = (f"evaluation.images={IMAGES}", "evaluation.batch=2", "sampler.steps=2", "sampler.guidance=3")


def kept(folder: Path) -> dict[Path, int]:
    """The batches from the first on that are there, and when each was made."""
    files = [folder / f"{part.start:09d}.safetensors" for part in ranges(IMAGES, 2)]
    there = next((n for n, file in enumerate(files) if not file.exists()), len(files))
    return {file: file.stat().st_mtime_ns for file in files[:there]}


def broken_off(start: Callable[[], Launch], number: signal.Signals, folder: Path, batches: int) -> dict[Path, int]:
    """Start, send a signal to both ranks once that many batches are kept, and return them."""
    launch = start()
    assert launch.reaches(lambda: len(kept(folder)) >= batches), launch.said()
    launch.send(number, *((0, 1) if number is signal.SIGKILL else (1,)))
    assert launch.ended() == ([-9, -9] if number is signal.SIGKILL else [75, 75]), launch.said()
    assert batches <= len(kept(folder)) < 21
    return kept(folder)


def damaged(images: Path, folder: Path) -> Path:
    """A copy of some shards, in which one image is not what it was."""
    shutil.copytree(images, folder)
    (shard,) = folder.glob("*.tar")
    with tarfile.open(shard) as tar:
        image = next(member for member in tar if member.name.endswith(".png") and ".seg." not in member.name)
    with open(shard, "r+b") as file:
        file.seek(image.offset_data)
        file.write(bytes(40))
    return folder


@pytest.mark.slow
def test_scores_broken_off_go_on_where_they_were(toy: Toy, tmp_path: Path) -> None:
    run, logs = tmp_path / "run", tmp_path
    how = (*HOW, "total_images=24", "every.evaluate=24", "evaluation.weights=[ema,raw]", "every.save=8")
    unfinished = RunDir(run).unfinished("training")

    launch = toy.train(run, *how)  # the first evaluation is of fresh weights
    assert launch.reaches(lambda: 24 in curve(run)), launch.said()
    assert launch.reaches(lambda: len(kept(unfinished / "ema")) >= 4), launch.said()
    launch.send(signal.SIGTERM, 1)
    assert launch.ended() == [75, 75], launch.said()
    told = kept(unfinished / "ema")
    killed = broken_off(lambda: toy.train(run, *how), signal.SIGKILL, unfinished / "raw", 4)
    assert told.items() <= kept(unfinished / "ema").items() and len(kept(unfinished / "ema")) == 21
    assert images_of(complete_ones(RunDir(run).checkpoints)[0]) == 24  # saved before it was looked at

    alone = toy.train(run, *how, world=1)
    assert alone.reaches(lambda: len(kept(unfinished / "raw")) > len(killed)), alone.said()
    assert killed.items() <= kept(unfinished / "raw").items()
    alone.finish()
    assert list(curve(run, "eval/fd_random")) == [0, 24] and not unfinished.exists()

    def evaluation(world: int, *more: str) -> Launch:
        return Launch("evaluate", [f"run_dir={run}", "weights=raw", *more], world=world, log=logs / "evaluate.txt")

    def score(out: Path) -> float:
        found: float = storage.read_json(out)["scores"]["eval/fd_random"]
        return found

    evaluation(1).finish()
    (out,) = run.glob(f"evaluation/{24:012d}_raw_????????.json")
    assert score(out) == pytest.approx(curve(run, "eval/fd_random_raw")[24], rel=1e-9)
    out.unlink()
    folder = out.with_name(f"{out.stem}.unfinished") / "scores"
    told = broken_off(lambda: evaluation(2), signal.SIGTERM, folder, 4)
    evaluation(1, "sampler.guidance=1").finish()  # meanwhile, of the same weights
    (other,) = run.glob("evaluation/*.json")
    assert other != out and told.items() <= kept(folder).items()
    evaluation(1).finish()
    assert score(out) == pytest.approx(curve(run, "eval/fd_random_raw")[24], rel=1e-9) != score(other)
    assert not folder.parent.exists()

    launch = evaluation(2, f"data.images={damaged(toy.path / 'toy/val', tmp_path / 'damaged')}")
    assert None not in launch.ended() and launch.said().count("cannot be read: ") == 2  # neither waits for the other


@pytest.mark.slow
def test_a_training_told_to_stop_while_it_looks_at_held_out_images_is_preempted(toy: Toy, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    launch = toy.train(run.path, world=1)
    (process,) = multiprocessing.active_children()
    assert launch.reaches(lambda: hears(process.pid, signal.SIGTERM)), launch.said()
    launch.send(signal.SIGTERM, 0)
    assert launch.ended() == [75], launch.said()
    assert storage.read_json(run.status)["state"] == "preempted" and not run.checkpoints.exists()


def hears(pid: int | None, number: signal.Signals) -> bool:
    """Whether a process has a handler for a signal."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    (caught,) = (int(line.split()[1], 16) for line in lines if line.startswith("SigCgt"))
    return bool(caught >> (number - 1) & 1)


def test_what_was_kept_of_other_work_is_made_again(tmp_path: Path) -> None:
    made: list[int] = []

    def make(part: range) -> dict[str, torch.Tensor]:
        made.append(part.start)
        return {"numbers": torch.arange(part.start, part.stop)}

    def work(identity: dict[str, str]) -> list[int]:
        made.clear()
        done = Kept(tmp_path / "work", identity)
        known = done.numbers("known", lambda: {"begun": float(len(made)), "odd": 0.1})
        assert known == {"begun": 0.0, "odd": 0.1}
        found = list(results(ranges(7, 3), make, lambda: None, done))
        assert [result["numbers"].tolist() for _, result in found] == [[0, 1, 2], [3, 4, 5], [6]]
        return list(made)

    assert work({"weights": "one"}) == [0, 3, 6]
    assert work({"weights": "one"}) == []
    (tmp_path / "work" / "000000003.safetensors").unlink()
    assert work({"weights": "one"}) == [3, 6]
    assert work({"weights": "other"}) == [0, 3, 6]
