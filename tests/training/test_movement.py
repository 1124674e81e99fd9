"""What is told of the parts of a model, against whole weights before and after, on every engine."""

import math
from typing import Any

import pytest
import tiny
import torch

from ldm_scale.training.movement import Movement

PARTS = ("body", "gain", "head")
TOLERANCE = 5e-5  # relative: the direct computation subtracts nearly equal float32 weights


def test_gradients_and_updates_of_a_step_are_those_of_a_bare_one() -> None:
    """Oracle: gradients of the whole global batch in one pass, and weights subtracted; with clipping, two groups."""
    engine, model = tiny.engine_of("one_process", grad_clip=0.1), tiny.tiny()
    model(*tiny.samples(torch.arange(8))).mean().backward()
    movement = Movement(engine.masters, tiny.part_of)
    start = {name: weight.detach().double() for name, weight in model.named_parameters()}
    movement.watch(True)
    for micro in range(4):
        with engine.accumulate():
            engine.backward(engine.model(*tiny.samples(torch.arange(2 * micro, 2 * micro + 2))).mean())
            norm = engine.step(3e-3)
    squares = movement.numbers(norm)
    told = {name: math.sqrt(square) for name, square in engine.mean_over_ranks({}, squares).items()}
    pulls, moves, sizes = (dict.fromkeys(PARTS, 0.0) for _ in range(3))
    after = engine.masters.consolidated(engine.masters.tensors)
    assert after is not None
    for name, weight in model.named_parameters():
        assert weight.grad is not None
        part = tiny.part_of(name)
        pulls[part] += float(weight.grad.double().square().sum())
        moves[part] += float((after[name].double() - start[name]).square().sum())
        sizes[part] += float(after[name].double().square().sum())
    assert float(norm) > 0.1
    direct = {f"train/{part}_grad_norm": math.sqrt(pulls[part]) for part in PARTS}
    direct |= {f"train/update_{part}": math.sqrt(moves[part] / sizes[part]) for part in PARTS}
    assert told == pytest.approx(direct, rel=TOLERANCE)
    engine.close()


def test_nothing_is_told_of_a_step_that_was_not_taken() -> None:
    engine = tiny.engine_of("one_process")
    movement = Movement(engine.masters, tiny.part_of)
    for factor, expected in ((torch.nan, 0), (1.0, 2 * len(PARTS))):
        movement.watch(True)
        for _ in range(4):
            x, y = tiny.samples(torch.arange(2))
            with engine.accumulate():
                engine.backward(engine.model(x, y * factor).mean())
                norm = engine.step(3e-3)
        assert len(engine.mean_over_ranks({}, movement.numbers(norm))) == expected
    movement.watch(False)
    engine.close()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "zero1", "zero2", "zero3"])
@pytest.mark.parametrize("curve", ["curve", "rounded"])
def test_two_processes_tell_what_whole_weights_do(curve: str, kind: str, two_processes: Any) -> None:
    found = two_processes[1][curve][kind]
    told, direct = found["told"], found["direct"]
    averages = [f"train/ema_distance_{half_life}" for half_life in tiny.HALF_LIVES]
    assert sorted(direct) == sorted([*averages, *(f"train/update_{part}" for part in PARTS)])
    assert {name: told[name] for name in direct} == pytest.approx(direct, rel=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "zero1", "zero2", "zero3"])
def test_two_processes_tell_what_one_does(kind: str, two_processes: Any, reference: dict[str, Any]) -> None:
    told = two_processes[1]["curve"][kind]["told"]
    assert len(told) == 2 * len(PARTS) + len(tiny.HALF_LIVES)
    assert told == pytest.approx(reference["told"], rel=1e-4)
