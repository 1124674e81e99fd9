"""Layouts to tokens and back, tokens to context; the empty condition; refusals."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ldm_scale.conditioning.layout import (
    WHOLE,
    Box,
    Layout,
    LayoutConditioner,
    LayoutConfig,
    LayoutObject,
    LayoutTokens,
)

SHAPE: dict[str, Any] = {"width": 16, "layers": 1, "heads": 2, "head_dim": 4, "max_objects": 3, "vocab_size": 128}
SMALL = LayoutTokens(vocab_size=17, max_objects=3, crop=True)  # a grid of 4 x 4; none is 16
PAPER = LayoutTokens(vocab_size=8192, max_objects=30, crop=True)

shares = st.floats(0, 1)
boxes = st.tuples(shares, shares, shares, shares).map(
    lambda b: (min(b[0], b[2]), min(b[1], b[3]), max(b[0], b[2]), max(b[1], b[3]))
)


def toy(**changes: Any) -> LayoutConditioner:
    torch.manual_seed(0)
    return LayoutConfig(**(SHAPE | changes)).build()


def test_size_is_the_published_one_without_the_dead_head():
    with torch.device("meta"):
        conditioner = LayoutConfig().build()
    dead_head = 512 * 8192 + 8192
    assert sum(p.numel() for p in conditioner.parameters()) == 58_858_496 - dead_head
    assert conditioner.tokens.length == 92
    assert conditioner.context_dim == 512


def test_tokens_are_those_of_the_reference():
    """Points of a 4 x 4 grid are numbered row by row; a corner goes to the nearest."""
    layout = Layout([LayoutObject(2, (0.0, 0.3, 0.7, 1.0)), LayoutObject(15, WHOLE)], crop=(0.34, 0.0, 1.0, 0.49))
    assert SMALL.encode(layout) == [2, 4, 14, 15, 0, 15, 16, 16, 16, 1, 7]
    assert PAPER.encode(layout)[:3] == [2, 27 * 90, 89 * 90 + 62]
    assert PAPER.encode(layout)[6:8] == [8191, 8191]
    assert LayoutTokens(vocab_size=17, max_objects=3, crop=False).encode(layout) == SMALL.encode(layout)[:9]


@given(objects=st.lists(st.tuples(st.integers(0, 8190), boxes), max_size=30), crop=boxes)
def test_boxes_come_back_within_half_a_grid_cell(objects: list[tuple[int, Box]], crop: Box):
    back = PAPER.decode(PAPER.encode(Layout([LayoutObject(*thing) for thing in objects], crop)))
    assert [thing.class_id for thing in back.objects] == [class_id for class_id, _ in objects]
    cell = 1 / 89
    for got, want in zip(
        [*(thing.box for thing in back.objects), back.crop], [*(b for _, b in objects), crop], strict=True
    ):
        assert max(abs(g - w) for g, w in zip(got, want, strict=True)) <= cell / 2 + 1e-9


def test_of_too_many_objects_the_largest_are_told_in_their_order():
    sides = [0.3, 0.9, 0.1, 0.5, 0.2]
    layout = Layout([LayoutObject(i, (0.0, 0.0, side, side)) for i, side in enumerate(sides)])
    assert [thing.class_id for thing in SMALL.decode(SMALL.encode(layout)).objects] == [0, 1, 3]


@torch.no_grad()
def test_layouts_become_context_of_their_own():
    conditioner = toy()
    a, b = Layout([LayoutObject(3, (0.1, 0.2, 0.5, 0.6))]), Layout([])
    conditions = conditioner(conditioner.prepare([a, b]))
    assert conditions.context is not None
    assert conditions.context.shape == (2, 11, 16)
    assert conditions.concat is None
    assert conditions.vector is None
    torch.testing.assert_close(conditioner(conditioner.prepare([b])).context[0], conditions.context[1])
    assert (conditions.context[0] - conditions.context[1]).abs().max() > 1e-3


def test_no_condition_is_none_throughout_and_dropping_gives_it():
    conditioner = toy()
    null = conditioner.null_inputs(2)
    assert torch.equal(null, torch.full((2, 11), 127))
    assert conditioner.tokens.decode(null[0].tolist()) == Layout([])
    inputs = conditioner.prepare([Layout([]), Layout([])])
    assert not torch.equal(inputs, null)  # an empty picture still has a crop
    assert torch.equal(conditioner.dropped(inputs, torch.tensor([True, False])), torch.stack((null[0], inputs[1])))


@pytest.mark.parametrize(
    "box", [(0.0, 0.0, 1.1, 1.0), (-0.1, 0.0, 1.0, 1.0), (0.5, 0.0, 0.4, 1.0), (0.0, float("nan"), 1.0, 1.0)], ids=repr
)
def test_boxes_outside_the_image_are_refused(box: Box):
    with pytest.raises(ValueError, match=r"^object of class 7 has box .*must be \(left, top, right, bottom\)"):
        LayoutObject(7, box)
    with pytest.raises(ValueError, match=r"^crop has box"):
        Layout([], crop=box)


@pytest.mark.parametrize("class_id", [127, -1, 2.5, "cat"], ids=repr)
def test_classes_that_are_no_token_are_refused(class_id: Any):
    layout = Layout([LayoutObject(class_id, WHOLE)])
    with pytest.raises(ValueError, match=f"^object of class {class_id!r}; must be an integer from 0 to 126"):
        toy().prepare([layout])


def test_what_is_no_layout_is_refused():
    with pytest.raises(ValueError, match=r"'a cat' is no Layout\(objects, crop\)"):
        toy().prepare(["a cat"])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"max_objects": 0}, r"^conditioning\.max_objects=0; must be at least 1"),
        ({"vocab_size": 3}, r"^conditioning\.vocab_size=3; must be at least 4"),
        ({"embedding_std": 0.0}, r"^conditioning\.embedding_std=0\.0; must be above 0"),
        ({"dropout": -0.1}, r"^conditioning\.dropout=-0\.1"),
    ],
)
def test_impossible_configurations_are_refused(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        toy(**changes)
