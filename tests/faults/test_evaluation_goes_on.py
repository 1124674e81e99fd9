"""An evaluation that signals and kills break off goes on, on another number of processes, to the same scores."""

import signal
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

    asked = [f"run_dir={run}", "evaluation.features=random", "evaluation.scores=[frechet]", "weights=raw", *HOW]
    out = run / "evaluation" / f"{24:012d}_raw.json"

    def evaluation(world: int) -> Launch:
        return Launch("evaluate", asked, world=world, log=logs / "evaluate.txt")

    folder = out.with_name(f"{out.stem}.unfinished") / "scores"
    told = broken_off(lambda: evaluation(2), signal.SIGTERM, folder, 4)
    for _ in ("goes on", "undisturbed"):
        evaluation(1).finish()
        scores = storage.read_json(out)["scores"]
        assert scores["eval/fd_random"] == pytest.approx(curve(run, "eval/fd_random_raw")[24], rel=1e-9)
        assert not folder.parent.exists()


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
