"""CLIP's text encoder against transformers used directly; frozen; files found or explained."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import BertConfig, BertModel, CLIPConfig, CLIPModel, CLIPTextModel, CLIPTokenizer

from ldm_scale.conditioning.clip_text import ClipTextConditioner, ClipTextConfig

CAPTIONS = ["A red circle", "", "a red circle " * 9]
SHAPE: dict[str, Any] = {"width": 16, "layers": 2, "heads": 2, "max_length": 12, "vocab_size": 516}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory as the hub's: CLIP whole, both encoders, and its tokenizer; small, with random weights."""
    path = tmp_path_factory.mktemp("clip")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*letters, *(letter + "</w>" for letter in letters), "re", "red</w>", "<|startoftext|>", "<|endoftext|>"]
    (path / "vocab.json").write_text(json.dumps({piece: number for number, piece in enumerate(pieces)}))
    (path / "merges.txt").write_text("#version: 0.2\nr e\nre d</w>\n")
    CLIPTokenizer.from_pretrained(path).save_pretrained(path)
    torch.manual_seed(1)
    text = {
        "hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 516,
        "max_position_embeddings": 12, "bos_token_id": 514, "eos_token_id": 515,
    }  # fmt: skip
    vision = {
        "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "image_size": 8,
        "patch_size": 4,
    }  # fmt: skip
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(path)
    return path


def toy(model: Path | str, **changes: Any) -> ClipTextConditioner:
    torch.manual_seed(0)
    return ClipTextConfig(**(SHAPE | {"model": str(model)} | changes)).build()


def test_defaults_are_vit_l_14_and_need_no_files():
    with torch.device("meta"):
        conditioner = ClipTextConfig().build()
    assert sum(p.numel() for p in conditioner.parameters()) == 123_060_480
    assert conditioner.context_dim == 768


@torch.no_grad()
def test_equals_transformers(saved: Path):
    conditioner = toy(saved)
    before = conditioner.transformer.final_layer_norm.weight.clone()
    conditioner.load_pretrained()
    assert not torch.equal(conditioner.transformer.final_layer_norm.weight, before)
    theirs, tokenizer = CLIPTextModel.from_pretrained(saved).eval(), CLIPTokenizer.from_pretrained(saved)
    ids = tokenizer(CAPTIONS, padding="max_length", truncation=True, max_length=12, return_tensors="pt")["input_ids"]
    assert torch.equal(conditioner.prepare(CAPTIONS), ids)
    assert ids[0].tolist() == [514, 64 + 256, 513, *ids[0, 3:9].tolist(), 515, 515, 515]  # padded with the last token
    want = theirs(input_ids=ids).last_hidden_state
    conditions = conditioner(conditioner.prepare(CAPTIONS))
    assert conditions.context is not None
    assert conditions.context.shape == (3, 12, conditioner.context_dim)
    assert want.abs().max() > 0.5
    assert (conditions.context - want).abs().max() <= 1e-6 * want.abs().max()
    assert (conditions.concat, conditions.vector) == (None, None)


def test_no_condition_is_the_empty_caption(saved: Path):
    conditioner = toy(saved)
    null = conditioner.null_inputs(2)
    assert torch.equal(null, conditioner.prepare(["", ""]))
    dropped = conditioner.dropped(conditioner.prepare(CAPTIONS[:2]), torch.tensor([True, False]))
    assert torch.equal(dropped, null)


def test_it_never_trains():
    conditioner = toy("unused").train()
    assert not any(module.training for module in conditioner.modules())
    assert not any(parameter.requires_grad for parameter in conditioner.parameters())
    assert not torch.nn.ModuleDict({"inside": conditioner}).train()["inside"].transformer.training


def test_missing_files_are_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def offline(*args: object, **kwargs: object) -> None:
        raise OSError("We couldn't connect to 'https://huggingface.co'")

    explained = r"conditioning\.model='{}' is no directory .*make fetch-weights"
    with pytest.raises(FileNotFoundError, match="^no weights of CLIP: " + explained.format(tmp_path)):
        toy(tmp_path).load_pretrained()
    monkeypatch.setattr(CLIPTextModel, "from_pretrained", offline)
    monkeypatch.setattr(CLIPTokenizer, "from_pretrained", offline)
    with pytest.raises(FileNotFoundError, match="^no weights of CLIP: " + explained.format("openai/clip")):
        toy("openai/clip").load_pretrained()
    with pytest.raises(FileNotFoundError, match="^no tokenizer of CLIP: " + explained.format("openai/clip")):
        toy("openai/clip").prepare(["a cat"])


def test_files_of_another_network_are_refused(saved: Path, tmp_path: Path):
    with pytest.raises(
        ValueError, match=r"conditioning\.model=.* another architecture; .* missing: encoder\.layers\.2"
    ):
        toy(saved, layers=3).load_pretrained()
    with pytest.raises(ValueError, match=r"conditioning\.vocab_size=600, but the tokenizer .* has 516 tokens"):
        toy(saved, vocab_size=600).load_tokenizer()
    with pytest.raises(ValueError, match=r"has 2 tokens: it is not CLIP's, or not all there; .*make fetch-weights"):
        toy(tmp_path).load_tokenizer()  # transformers makes an empty tokenizer of an empty directory
    bert = BertConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8)
    BertModel(bert).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"another network than CLIP's text encoder: it lacks \d+ tensors"):
        toy(tmp_path).load_pretrained()


def test_what_is_no_caption_is_refused(saved: Path):
    with pytest.raises(ValueError, match=r"^condition 3 is no caption"):
        toy(saved).prepare(["a cat", 3])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model": ""}, r"^conditioning\.model is empty"),
        ({"layers": 0}, r"^conditioning\.layers=0; must be at least 1"),
        ({"heads": 3}, r"^conditioning\.heads=3; must divide conditioning\.width=16"),
        ({"max_length": 2}, r"^conditioning\.max_length=2; must be at least 3"),
    ],
)
def test_impossible_configurations_are_refused(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        ClipTextConfig(**(SHAPE | changes))


@pytest.mark.slow
def test_compiles_without_graph_breaks():
    conditioner, ids = toy("unused"), torch.arange(24).reshape(2, 12)
    compiled = torch.compile(lambda ids_BL: conditioner(ids_BL).context, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids), conditioner(ids).context)
