"""A little CLIP as the hub gives it: random weights, and its tokenizer of single letters."""

import json
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    PreTrainedModel,
)

SHAPE = {"max_length": 24, "width": 16, "layers": 2, "heads": 2, "vocab_size": 514}


def write_clip(path: Path, seed: int = 1) -> list[str]:
    """Write the text encoder with its tokenizer; returns the overrides that name it."""
    _write_tokenizer(path)
    torch.manual_seed(seed)
    _save_livelier(CLIPTextModel(CLIPTextConfig(**_TEXT)), path)
    return [f"conditioning.model={path}", *(f"conditioning.{key}={value}" for key, value in SHAPE.items())]


def write_whole_clip(path: Path) -> Path:
    """Write one that sees pictures too."""
    _write_tokenizer(path)
    pictures = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(pictures, CLIPTokenizer.from_pretrained(path)).save_pretrained(path)
    seeing = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 32, "patch_size": 8,
    }  # fmt: skip
    torch.manual_seed(1)
    _save_livelier(CLIPModel(CLIPConfig(text_config=_TEXT, vision_config=seeing, projection_dim=8)), path)
    return path


_TEXT = {
    "hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 514,
    "max_position_embeddings": 24, "bos_token_id": 512, "eos_token_id": 513,
}  # fmt: skip


def _write_tokenizer(path: Path) -> None:
    path.mkdir(exist_ok=True)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (path / "vocab.json").write_text(json.dumps({piece: number for number, piece in enumerate(pieces)}))
    (path / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer.from_pretrained(path).save_pretrained(path)


def _save_livelier(model: PreTrainedModel, path: Path) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(path)
