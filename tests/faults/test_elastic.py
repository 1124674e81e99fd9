"""One run, stopped again and again, that goes on with another engine on another number of processes."""

import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from fault_runs import Toy, curve, events, everything

from ldm_scale.core import storage
from ldm_scale.core.run_dir import RunDir
from ldm_scale.training.checkpoint_files import find

SHORT = [("ddp", 2), ("zero1", 1), ("zero3", 2), ("ddp", 1)]
# From every world of 1, 2 and 4 to every one, once, by all three engines in turn.
LONG = list(zip(("ddp", "zero1", "zero2") * 4, (1, 1, 2, 2, 4, 4, 1, 4, 2, 1), strict=False))


@pytest.mark.parametrize(
    ("chain", "images"),
    [
        pytest.param(SHORT, 240, marks=pytest.mark.slow, id="short"),
        pytest.param(LONG, 960, marks=[pytest.mark.slow, pytest.mark.faults], id="long"),
    ],
)
def test_other_worlds_and_engines_go_on_with_the_same_run(
    chain: list[tuple[str, int]], images: int, toy: Toy, tmp_path: Path
) -> None:
    run, undisturbed = tmp_path / "run", tmp_path / "undisturbed"
    alone = toy.train(undisturbed, f"total_images={images}")
    alone.finish()
    read: list[str] = []
    for turn, (engine, world) in enumerate(chain):
        launch = toy.train(run, f"total_images={images}", "tracker.wandb=true", engine=engine, world=world)
        is_last, before = turn == len(chain) - 1, len(curve(run))
        if not is_last:
            assert launch.reaches(lambda: len(curve(run)) > before), launch.said()  # noqa: B023
            launch.send(signal.SIGTERM, world - 1)
        assert launch.ended() == [0 if is_last else 75] * world, launch.said()
        read += launch.keys()
    assert read == alone.keys()
    assert [event["world"] for event in events(run, "start", "resume")] == [world for _, world in chain]
    assert curve(run).keys() == curve(undisturbed).keys()
    np.testing.assert_allclose(list(curve(run).values()), list(curve(undisturbed).values()), rtol=1e-4)
    assert storage.read_json(find(RunDir(run).checkpoints) / "complete.json")["step"] == images // 8
    ours, theirs = everything(run), everything(undisturbed)
    for name, wanted in theirs.items():
        torch.testing.assert_close(ours[name], wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()), msg=name)
    shown = {folder.name.split("-")[-1] for folder in RunDir(run).wandb.glob("offline-run-*")}
    assert shown == {(run / "wandb_id").read_text().strip()}
