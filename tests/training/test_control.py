"""Control files in the real loop, on one process."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import guarded
import numpy as np
import pytest
import tiny

from ldm_scale.core.run_dir import RunDir
from ldm_scale.training.checkpoint_files import complete_ones, images_of
from ldm_scale.training.control import NOTHING, Control, Wish
from ldm_scale.training.guards import GuardConfig


@pytest.fixture
def engine() -> Iterator[Any]:
    found = tiny.engine_of("one_process")
    yield found
    found.close()


class Touching(guarded.Step):
    """Does something before the micro batch that begins at a position."""

    def __init__(self, engine: Any, at: dict[int, Callable[[], None]]) -> None:
        super().__init__(engine)
        self._at = at

    def __call__(self, batch: guarded.Batch, learning_rate: float, images_seen: int) -> Any:
        self._at.get(int(batch.positions[0]), lambda: None)()
        return super().__call__(batch, learning_rate, images_seen)


def trained(engine: Any, path: Path, at: dict[int, Callable[[], None]], **how: Any) -> tuple[dict[str, Any], list[int]]:
    """How a training went, and where grids were drawn."""
    drawn: list[int] = []
    run, _ = guarded.training(engine, path, GuardConfig(), guarded.Source(poisoned=-1), **how)
    run.step, run.show = Touching(engine, at), drawn.append
    found = guarded.ended(run, run.step)
    run.control.settle()
    return found, drawn


def touch(path: Path, *names: str) -> Callable[[], None]:
    def now() -> None:
        for name in names:
            (RunDir(path).control / name).touch()

    return now


def asked(path: Path) -> list[tuple[int, list[str]]]:
    lines = RunDir(path).read_lines(RunDir(path).events)
    return [(line["images_seen"], sorted(line["asked"])) for line in lines if line["event"] == "control"]


def test_save_and_sample_are_done_once_and_their_files_go(engine: Any, tmp_path: Path) -> None:
    found, drawn = trained(engine, tmp_path, {18: touch(tmp_path, "save", "sample")})
    assert (found["how"], drawn) == ("finished", [24])
    assert 24 in map(images_of, complete_ones(RunDir(tmp_path).checkpoints))  # every.save is 16
    assert asked(tmp_path) == [(24, ["sample", "save"])]
    assert list(RunDir(tmp_path).control.iterdir()) == []


def test_stop_saves_and_the_next_launch_goes_on_to_the_same_weights(engine: Any, tmp_path: Path) -> None:
    whole, _ = trained(engine, tmp_path / "whole", {})
    run, again = tmp_path / "run", tiny.engine_of("one_process")
    found, drawn = trained(again, run, {26: touch(run, "stop")})
    assert (found["how"], found["images_seen"], drawn) == ("stopped", 32, [])
    assert images_of(complete_ones(RunDir(run).checkpoints)[0]) == 32
    again.close()
    again = tiny.engine_of("one_process")
    found, _ = trained(again, run, {})
    assert (found["how"], found["digest"]) == ("finished", whole["digest"])
    again.close()


def test_wishes_are_looked_for_where_the_loop_waits_and_read_with_what_is_late(engine: Any, tmp_path: Path) -> None:
    found, _ = trained(engine, tmp_path, {2: touch(tmp_path, "stop")}, late=3, log_every=24)
    assert (found["how"], found["images_seen"]) == ("stopped", guarded.SAVE)


def test_a_stop_at_the_very_end_changes_nothing(engine: Any, tmp_path: Path) -> None:
    found, _ = trained(engine, tmp_path, {guarded.TOTAL - 2: touch(tmp_path, "stop")})
    assert found["how"] == "finished" and list(RunDir(tmp_path).control.iterdir()) == []


def test_a_file_stays_until_its_checkpoint_is_complete(tmp_path: Path) -> None:
    control, file = Control(RunDir(tmp_path)), tmp_path / "control" / "save"
    file.touch()
    assert control.wishes() == Wish.save == Control(RunDir(tmp_path)).wishes()  # another launch finds it too
    assert list(control.take_up(Wish.save)) == ["save"]
    control.done(Wish.save, 40)
    for images, stays in ((32, True), (48, False)):
        complete = tmp_path / "checkpoints" / f"images_{images:012d}" / "complete.json"
        complete.parent.mkdir(parents=True)
        complete.touch()
        assert (control.wishes(), file.exists()) == (NOTHING, stays)


def test_votes_of_a_step_do_not_mix_with_wishes(engine: Any, tmp_path: Path) -> None:
    run, _ = guarded.training(engine, tmp_path, GuardConfig(), guarded.Source(poisoned=-1))
    for told in (False, True):
        for wishes in (NOTHING, Wish.sample, Wish.save | Wish.stop):
            heard = run.guard.hear(np.random.randint(99), None, told_to_stop=told, asked=wishes, at_once=True)
            assert (heard.stop, heard.asked) == (told, wishes)
    run.watchdog.close()
