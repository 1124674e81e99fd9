"""Two processes of one training, killed at random moments and started again: it ends as if nothing had happened."""

import random
import signal
import time
from pathlib import Path

import pytest
from fault_runs import Launch, Toy, curve, differing, events, saving

from ldm_scale.core.run_dir import RunDir
from ldm_scale.training.checkpoint_files import complete_ones, images_of

LENGTH = ("total_images=480", "every.save=16")


def kill(launch: Launch, run: Path, chance: random.Random) -> bool:
    """Kill both ranks at some moment, one a little before the other; True where a save was under way."""
    begun, left_over = len(events(run, "start", "resume")), saving(run)
    while_saving = chance.random() < 0.5
    if chance.random() < 0.9:  # else while it starts
        launch.reaches(lambda: len(events(run, "start", "resume")) > begun)
        time.sleep(chance.uniform(0, 2))
    if while_saving:
        launch.reaches(lambda: bool(saving(run) - left_over))
    time.sleep(chance.uniform(0, 0.02))
    first = chance.randrange(2)
    launch.send(signal.SIGKILL, first)
    time.sleep(chance.choice([0, 0.05]))
    launch.send(signal.SIGKILL, 1 - first)
    launch.ended()
    return bool(saving(run) - left_over)


@pytest.mark.parametrize(
    ("engine", "rounds"),
    [
        pytest.param("ddp", 3, marks=pytest.mark.slow),
        pytest.param("zero1", 30, marks=[pytest.mark.slow, pytest.mark.faults]),
    ],
)
def test_killed_and_started_again_it_ends_with_the_same_weights(
    engine: str, rounds: int, toy: Toy, tmp_path: Path
) -> None:
    undisturbed = tmp_path / "undisturbed"
    toy.train(undisturbed, *LENGTH, engine=engine).finish()
    chance, kills, during_saves, turn = random.Random(0), 0, 0, 0
    while kills < rounds:
        run, turn, finished = tmp_path / f"run{turn}", turn + 1, False
        while not finished:
            saved = [images_of(path) for path in complete_ones(RunDir(run).checkpoints)]
            begun = len(events(run, "start", "resume"))
            launch = toy.train(run, *LENGTH, engine=engine)
            if kills < rounds:
                during_saves += kill(launch, run, chance)
            finished = launch.ended() == [0, 0]
            kills += -signal.SIGKILL in launch.ended()
            assert finished or -signal.SIGKILL in launch.ended(), launch.said()
            for event in events(run, "start", "resume")[begun:]:
                assert (event["images_seen"], event["damaged"]) == (max(saved, default=0), [])
        assert differing(run, undisturbed) == []
        assert curve(run) == curve(undisturbed)
    assert during_saves >= rounds // 6, f"{during_saves} of {kills} kills hit a save: too few to tell"
