"""Guards in the real loop: a sample that is no number, or a spike, under each policy."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import guarded
import numpy as np
import pytest
import tiny
import torch

from ldm_scale.core.run_dir import RunDir
from ldm_scale.training.guards import Guard, GuardConfig, Policy, Usual

BAD = list(range(32, 40, 4))  # where the micro batches begin that hold guarded.POISONED, on rank 0 of 2
NAN = {"key": f"sample{guarded.POISONED}", "value": "nan", "rank": 1}


@pytest.fixture
def engine() -> Iterator[Any]:
    found = tiny.engine_of("one_process")
    yield found
    found.close()


def trained(engine: Any, path: Path, source: Any = None, **how: Any) -> tuple[dict[str, Any], Any]:
    """Train on one process; what came out, and the run's events by name."""
    late = how.pop("late", None)
    log_every = how.pop("log_every", 8)
    run, step = guarded.training(
        engine, path, GuardConfig(**how), source or guarded.Source(), late=late, log_every=log_every
    )
    return guarded.ended(run, step), events(path)


def events(path: Path) -> Any:
    run_dir = RunDir(path)
    lines = run_dir.read_lines(run_dir.events)
    return {name: [line for line in lines if line["event"] == name] for name in ("trouble", "rollback", "unread")}


def test_usual_is_the_plain_mean_at_first_and_forgets_later() -> None:
    usual, values = Usual(), np.random.default_rng(0).normal(3, 2, 200)
    for value in values[:10]:
        usual.take(value, 10, half_life=10**9)
    np.testing.assert_allclose((usual.mean, usual.variance), (values[:10].mean(), values[:10].var()))
    for value in np.concatenate((values, np.full(60, 7.0))):
        usual.take(value, 10, half_life=30)
    assert abs(usual.mean - 7) < 1e-4 and usual.variance < 1e-4


def test_a_spike_needs_history_and_is_looked_for_only_on_request() -> None:
    usual = Usual(mean=1.0, variance=0.04, images=50)
    assert usual.limit(6, half_life=50) == pytest.approx(2.2)
    assert usual.limit(6, half_life=51) == usual.limit(0, half_life=50) == math.inf


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"max_in_a_row": 0}, "guard.max_in_a_row=0"),
        ({"spike_sigma": -1.0}, "guard.spike_sigma=-1.0"),
        ({"spike_sigma": 6.0, "policy": Policy.skip}, "guard.policy=rollback or stop"),
    ],
)
def test_impossible_values_are_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        GuardConfig(**wrong)


def test_stop_names_the_sample(engine: Any, tmp_path: Path) -> None:
    found, told = trained(engine, tmp_path)
    assert "after 32 images the loss is nan" in found["how"]
    assert f"sample{guarded.POISONED} (nan, rank 0)" in found["how"]
    assert told["trouble"][0]["samples"][0]["key"] == f"sample{guarded.POISONED}"
    assert found["images_seen"] == 40


def test_reading_late_changes_nothing(engine: Any, tmp_path: Path) -> None:
    """On a GPU numbers are read some global batches late; a rollback must end at the same weights."""
    at_once, _ = trained(engine, tmp_path / "at_once", policy=Policy.rollback, log_every=0)
    other = tiny.engine_of("one_process")
    late, told = trained(other, tmp_path / "late", policy=Policy.rollback, late=3, log_every=0)
    assert late["digest"] == at_once["digest"]
    assert told["trouble"][0]["images_seen"] == 48  # where a checkpoint was due, which is never written unjudged
    assert [line["start"] for line in told["trouble"]] == [32]
    other.close()


def test_a_spike_is_gone_back_from(engine: Any, tmp_path: Path) -> None:
    how = {"policy": Policy.rollback, "spike_sigma": 6.0, "spike_half_life": 16}
    found, told = trained(engine, tmp_path, guarded.Source(factor=30.0), **how)
    assert found["how"] == "finished"
    assert [line["start"] for line in told["trouble"]] == [32] and "is usual" in told["trouble"][0]["why"]
    assert told["trouble"][0]["samples"][0]["key"] == f"sample{guarded.POISONED}"
    assert told["rollback"][0]["passed_over"] == [32, 40]


def test_a_checkpoint_carries_what_is_usual(engine: Any, tmp_path: Path) -> None:
    run, step = guarded.training(engine, tmp_path, GuardConfig(), guarded.Source(poisoned=-1))
    guarded.ended(run, step)
    again, _ = guarded.training(engine, tmp_path, GuardConfig(), guarded.Source(poisoned=-1))
    again.watchdog.close()
    assert again.guard.state() == run.guard.state() and run.guard.state()["loss"]["images"] == guarded.TOTAL


def test_without_a_checkpoint_there_is_no_way_back(engine: Any, tmp_path: Path) -> None:
    found, _ = trained(engine, tmp_path, guarded.Source(poisoned=3), policy=Policy.rollback)
    assert "finds no checkpoint of 0 images or fewer" in found["how"]


def test_what_is_read_late_is_heard_of_in_time(engine: Any) -> None:
    """A process that is alone need ask nobody whether to stop; of many, a launch must give all that are under way."""
    guard = Guard(GuardConfig(), engine, late=3)
    assert not guard.hear(0, None, told_to_stop=False, at_once=False).stop
    assert guard.hear(8, None, told_to_stop=True, at_once=False).stop
    assert (guard.steps_to_stop, Guard(GuardConfig(), engine, late=0).steps_to_stop) == (7, 1)


class AllBad(guarded.Source):
    def read(self, positions: np.ndarray, **how: Any) -> guarded.Batch:
        batch = super().read(positions, **how)
        batch.y[batch.positions >= 24] = torch.nan
        return batch


@pytest.mark.parametrize("policy", [Policy.skip, Policy.rollback])
def test_too_many_in_a_row_end_the_training(policy: Policy, engine: Any, tmp_path: Path) -> None:
    found, told = trained(engine, tmp_path, AllBad(), policy=policy, max_in_a_row=1)
    assert "2 in a row, guard.max_in_a_row=1" in found["how"]
    assert [line["start"] for line in told["trouble"]] == [24, 32]  # the checkpoint between holds nothing healthy


@pytest.mark.skipif(not torch.cuda.is_available(), reason="only a GPU can be waited for")
def test_no_step_waits_for_the_device(tmp_path: Path) -> None:
    engine = tiny.engine_of("one_process")
    run, step = guarded.training(engine, tmp_path, GuardConfig(), guarded.Source(poisoned=-1), log_every=0)
    numbers, batches = run.guard, run.loader.batches(0)
    for start in range(0, 64, 8):  # the first few allocate
        torch.cuda.set_sync_debug_mode("error" if start >= 32 else "default")
        micro = [next(batches) for _ in range(engine.accumulation)]
        for batch in micro:
            metrics = step(batch, 1e-3, start)
            run.guard.remember(batch.keys)
        assert numbers.hear(start, metrics, told_to_stop=False, at_once=False).troubles == []
    torch.cuda.set_sync_debug_mode("default")
    run.watchdog.close()


Found = tuple[list[dict[str, Any]], Any, Path]


def launched(launch: Any, path: Path, kind: str, policy: str, *more: str, code: int = 0, **guard: Any) -> Found:
    """Train on two processes; what came out on each, and the events."""
    done = launch("guarded.py", kind, str(path), policy, *more, GUARD=json.dumps(guard))
    assert done.returncode == code, done.stderr[-3000:]
    ranks = [json.loads(file.read_text()) for file in sorted(path.glob("found?.json"))]
    return ranks, events(path), path


@pytest.fixture(scope="module")
def skipped(launch: Any, tmp_path_factory: pytest.TempPathFactory) -> Found:
    return launched(launch, tmp_path_factory.mktemp("skip"), "ddp", "skip")


@pytest.mark.slow
def test_stop_ends_all_ranks_alike(launch: Any, tmp_path: Path) -> None:
    ranks, told, _ = launched(launch, tmp_path, "ddp", "stop")
    assert [rank["images_seen"] for rank in ranks] == [40, 40]
    assert ranks[0]["how"] == ranks[1]["how"] and f"sample{guarded.POISONED} (nan, rank 1)" in ranks[0]["how"]
    assert told["trouble"][0]["samples"][0] == NAN


@pytest.mark.slow
def test_skip_takes_no_step_on_any_rank_and_goes_on(skipped: Found) -> None:
    ranks, told, _ = skipped
    assert [(rank["how"], rank["images_seen"]) for rank in ranks] == [("finished", guarded.TOTAL)] * 2
    assert ranks[0]["digest"] == ranks[1]["digest"]
    assert [line["samples"][0] for line in told["trouble"]] == [NAN]
    assert ranks[0]["starts"] == list(range(0, guarded.TOTAL, 4))
    (unread,) = told["unread"]  # rank 0 writes down what rank 1 could not read
    assert unread["images_seen"] == 8 and unread["reasons"] == {"checksum_txt": 1}
    assert unread["samples"] == [{"key": "lost", "reason": "checksum_txt", "position": 3, "rank": 1}]


@pytest.mark.slow
def test_rollback_ends_where_skip_does(launch: Any, skipped: Found, tmp_path: Path) -> None:
    """The same global batch is left out, once before its step and once on the way back, by a longer way."""
    ranks, told, path = launched(launch, tmp_path, "ddp", "rollback", rollback_images=8)
    assert {rank["digest"] for rank in ranks} == {skipped[0][0]["digest"]}
    assert told["rollback"][0]["abandoned"] == ["images_000000000032"]
    again = [0, *range(4, 40, 4), *range(16, 32, 4), *range(40, guarded.TOTAL, 4)]
    assert ranks[0]["starts"] == again
    run_dir = RunDir(path)
    logged = [line["images_seen"] for line in run_dir.read_lines(run_dir.metrics) if "train/loss" in line]
    assert logged == [images for images in range(8, guarded.TOTAL + 1, 8) if images != 40]


@pytest.mark.slow
def test_after_a_rollback_a_kill_and_a_relaunch_the_abandoned_branch_is_not_taken(
    launch: Any, skipped: Found, tmp_path: Path
) -> None:
    launched(launch, tmp_path, "ddp", "rollback", "kill", code=1, rollback_images=8)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "images_000000000016",
        "images_000000000032.abandoned",
    ]
    ranks, told, _ = launched(launch, tmp_path, "ddp", "rollback", rollback_images=8)
    assert ranks[0]["starts"] == [*range(16, 32, 4), *range(40, guarded.TOTAL, 4)]
    assert len(told["trouble"]) == 1
    assert {rank["digest"] for rank in ranks} == {skipped[0][0]["digest"]}


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_zero_does_the_same(policy: str, launch: Any, tmp_path: Path) -> None:
    ranks, told, _ = launched(launch, tmp_path, "zero1", policy)
    assert [(rank["how"], rank["images_seen"]) for rank in ranks] == [("finished", guarded.TOTAL)] * 2
    assert [line["samples"][0] for line in told["trouble"]] == [NAN]
    skipped_too = [0, *range(4, 32, 4), *range(40, guarded.TOTAL, 4)]
    assert [start for start in ranks[0]["starts"] if start not in BAD] == skipped_too


def lines(path: Path) -> list[dict[str, Any]]:
    run_dir = RunDir(path)
    return [line for line in run_dir.read_lines(run_dir.metrics) if "train/loss" in line]


def test_the_share_of_clipped_steps_is_of_all_since_the_last_line(engine: Any, tmp_path: Path) -> None:
    """Every step's norm is in one run's lines; the same steps, told of in pairs, in another's."""
    clip = engine.grad_clip = 1.8  # about half of the steps are above it
    trained(engine, tmp_path / "each", guarded.Source(factor=1.0))
    other = tiny.engine_of("one_process", grad_clip=clip)
    trained(other, tmp_path / "pairs", guarded.Source(factor=1.0), log_every=16)
    other.close()
    flags = [line["train/grad_norm"] > clip for line in lines(tmp_path / "each")]
    assert [line["train/clipped"] for line in lines(tmp_path / "each")] == flags
    pairs = [sum(pair) / 2 for pair in zip(flags[::2], flags[1::2], strict=True)]
    assert [line["train/clipped"] for line in lines(tmp_path / "pairs")] == pairs
    assert 0.5 in pairs


def test_clipped_steps_are_carried_over_a_resume_and_untold_where_nothing_clips(engine: Any) -> None:
    def took(guard: Guard, *norms: float) -> None:
        for norm in norms:
            metrics = {"train/loss": torch.tensor(1.0), "train/grad_norm": torch.tensor(norm)}
            guard.hear(0, metrics, told_to_stop=False, at_once=True)

    first, second = Guard(GuardConfig(), engine), Guard(GuardConfig(), engine)
    took(first, 0.4, 0.6, 0.7)
    second.resume({"guard": json.loads(json.dumps(first.state()))})
    took(second, 0.4)
    assert second.clipped() == {"train/clipped": 0.5}
    second.resume({"guard": {"loss": {}, "gradient norm": {}}})  # from before they were counted
    assert second.clipped() == {"train/clipped": 0.0}
    engine.grad_clip = 0.0
    assert second.clipped() == {}
