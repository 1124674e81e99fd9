"""A little CLIP as the hub gives it: text encoder with random weights, and its tokenizer of single letters."""

import json
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

SHAPE = {"max_length": 24, "width": 16, "layers": 2, "heads": 2, "vocab_size": 514}


def write_clip(path: Path, seed: int = 1) -> list[str]:
    """Write it; returns the overrides that name it."""
    path.mkdir(exist_ok=True)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (path / "vocab.json").write_text(json.dumps({piece: number for number, piece in enumerate(pieces)}))
    (path / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer.from_pretrained(path).save_pretrained(path)
    torch.manual_seed(seed)
    model = CLIPTextModel(
        CLIPTextConfig(
            hidden_size=16, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=514,
            max_position_embeddings=24, bos_token_id=512, eos_token_id=513,
        )
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(path)
    return [f"conditioning.model={path}", *(f"conditioning.{key}={value}" for key, value in SHAPE.items())]
