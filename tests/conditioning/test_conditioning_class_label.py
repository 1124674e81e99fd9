"""Class ids in; a token or a vector out; the null class; refusals."""

from typing import Any

import numpy as np
import pytest
import torch

from ldm_scale.conditioning.class_label import ClassConditioner, ClassLabelConfig


def toy(**changes: Any) -> ClassConditioner:
    torch.manual_seed(0)
    return ClassLabelConfig(**({"classes": 5, "width": 8} | changes)).build()


@pytest.mark.parametrize("null_class, parameters", [(True, 512_512), (False, 512_000)])
def test_sizes_are_the_published_ones(null_class: bool, parameters: int):
    conditioner = ClassLabelConfig(null_class=null_class, dropout=0.1 if null_class else 0).build()
    assert sum(p.numel() for p in conditioner.parameters()) == parameters
    assert list(conditioner.state_dict()) == ["embedding.weight"]


def test_a_class_becomes_one_token_or_one_vector():
    for give, told in (("context", "context"), ("vector", "vector")):
        conditioner = toy(give=give)
        assert (conditioner.context_dim, conditioner.concat_channels, conditioner.vector_dim) == (
            (8, 0, 0) if give == "context" else (0, 0, 8)
        )
        conditions = conditioner(conditioner.prepare([3, np.int64(0)]))
        rows = conditioner.embedding.weight[[3, 0]]
        assert torch.equal(getattr(conditions, told), rows[:, None] if give == "context" else rows)
        assert [conditions.context, conditions.concat, conditions.vector].count(None) == 2


def test_no_condition_is_the_last_row():
    conditioner = toy()
    assert torch.equal(conditioner.null_inputs(2), torch.tensor([5, 5]))
    dropped = conditioner.dropped(conditioner.prepare([0, 4, 2]), torch.tensor([False, True, False]))
    assert dropped.tolist() == [0, 5, 2]
    assert torch.equal(conditioner(dropped).context[1, 0], conditioner.embedding.weight[5])


@pytest.mark.parametrize("condition", [5, -1, 2.0, "2", None], ids=repr)
def test_what_is_no_class_is_refused(condition: Any):
    with pytest.raises(ValueError, match=f"^class {condition!r}; must be an integer from 0 to 4"):
        toy().prepare([0, condition])


def test_without_a_null_class_nothing_can_be_dropped():
    with pytest.raises(ValueError, match=r"^conditioning\.dropout=0\.1 with conditioning\.null_class=false"):
        toy(null_class=False)
    with pytest.raises(ValueError, match=r"^conditioning\.null_class=false: .*guidance"):
        toy(null_class=False, dropout=0.0).null_inputs(1)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"classes": 0}, r"^conditioning\.classes=0; must be at least 1"),
        ({"width": 0}, r"^conditioning\.width=0; must be at least 1"),
        ({"give": "concat"}, "concat"),
    ],
)
def test_impossible_configurations_are_refused(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        toy(**changes)
