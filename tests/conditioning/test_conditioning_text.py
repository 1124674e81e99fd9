"""The text conditioner: captions in, context out; the empty condition; refusals."""

import copy
from typing import Any

import pytest
import torch

from ldm_scale.conditioning.text import TextConditioner, TextTransformerConfig
from ldm_scale.conditioning.tokenizer import train_wordpiece

CAPTIONS = ["a red circle", "a blue square", "a green circle"]
SHAPE: dict[str, Any] = {"width": 16, "layers": 2, "heads": 2, "head_dim": 4, "max_length": 8, "vocab_size": 64}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "tokenizer.json"
    train_wordpiece(CAPTIONS, 64, path)
    return str(path)


@pytest.fixture
def conditioner(tokenizer: str) -> TextConditioner:
    torch.manual_seed(0)
    return TextTransformerConfig(**SHAPE, tokenizer=tokenizer).build()


def test_defaults_are_the_big_models_and_need_no_tokenizer():
    with torch.device("meta"):
        conditioner = TextTransformerConfig().build()
    assert sum(p.numel() for p in conditioner.parameters()) == 542_895_360
    assert conditioner.context_dim == 1280


@torch.no_grad()
def test_captions_become_context_of_their_own(conditioner: TextConditioner):
    conditions = conditioner(conditioner.prepare(CAPTIONS))
    assert conditions.context is not None
    assert conditions.context.shape == (3, 8, conditioner.context_dim)
    assert conditions.concat is None
    assert conditions.vector is None
    alone = conditioner(conditioner.prepare(CAPTIONS[1:2])).context
    torch.testing.assert_close(alone[0], conditions.context[1])
    assert (conditions.context[0] - conditions.context[1]).abs().max() > 1e-3


def test_no_condition_is_the_empty_caption(conditioner: TextConditioner):
    null = conditioner.null_inputs(4)
    assert null.shape == (4, 8)
    assert torch.equal(null, conditioner.prepare(["", " ", "", ""]))


def test_dropping_replaces_the_rows_asked_for(conditioner: TextConditioner):
    inputs = conditioner.prepare(CAPTIONS)
    out = conditioner.dropped(inputs, torch.tensor([True, False, True]))
    assert out.dtype == inputs.dtype
    assert torch.equal(out[1], inputs[1])
    assert torch.equal(out[[0, 2]], conditioner.null_inputs(2))
    assert torch.equal(inputs, conditioner.prepare(CAPTIONS))


def test_only_weights_are_saved_and_copies_work(conditioner: TextConditioner):
    conditioner.load_tokenizer()
    assert all(name.startswith("transformer.model.") for name in conditioner.state_dict())
    copied = copy.deepcopy(conditioner)
    assert torch.equal(copied.prepare(CAPTIONS), conditioner.prepare(CAPTIONS))


def test_what_is_no_caption_is_refused(conditioner: TextConditioner):
    with pytest.raises(ValueError, match=r"^condition 3 is no caption"):
        conditioner.prepare(["a red circle", 3])


def test_a_tokenizer_of_another_size_is_refused(tokenizer: str):
    conditioner = TextTransformerConfig(**(SHAPE | {"vocab_size": 65}), tokenizer=tokenizer).build()
    with pytest.raises(ValueError, match=r"conditioning\.vocab_size=65, but conditioning\.tokenizer=.* has 64 tokens"):
        conditioner.load_tokenizer()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"width": 0}, r"^conditioning\.width=0; must be at least 1"),
        ({"embedding_std": 0.0}, r"^conditioning\.embedding_std=0\.0; must be above 0"),
        ({"max_length": 2}, r"^conditioning\.max_length=2; must be at least 3"),
        ({"dropout": 1.5}, r"^conditioning\.dropout=1\.5; must be a probability"),
        ({"tokenizer": ""}, r"^conditioning\.tokenizer is empty"),
    ],
)
def test_impossible_configurations_are_refused(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        TextTransformerConfig(**(SHAPE | changes))
