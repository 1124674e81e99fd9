"""Checkpoints in the original format, made of the reference networks in compvis_reference.py."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import compvis_configs
import compvis_reference
import pytest
import torch
import yaml
from torch import Tensor, nn


@dataclass(frozen=True)
class Original:
    """A model of the original code with its two files."""

    config: Path
    checkpoint: Path
    model: Any


Make = Callable[..., Original]


def shaken(module: nn.Module, seed: int = 0) -> nn.Module:
    """Parameters that are away from any start, and keep activations of order one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            fan = max(1, parameter[0].numel()) if parameter.ndim > 1 else 25
            parameter += torch.randn(parameter.shape, generator=generator) / fan**0.5
    return module.eval()


def averages(model: Any) -> dict[str, Tensor]:
    """What the original keeps of an average: half of each weight of the U-Net, so that one can tell."""
    kept = {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7, dtype=torch.int32)}
    for name, tensor in model.model.state_dict().items():
        kept["model_ema." + name.replace(".", "")] = tensor / 2
    return kept


def write(path: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[Path, Path]:
    """The YAML file and the checkpoint, as Lightning wraps it."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.yaml").write_text(yaml.safe_dump({"model": config, "data": {"target": "main.Data"}}))
    torch.save({"state_dict": tensors, "global_step": 3, "optimizer_states": [{"state": {}}]}, path / "model.ckpt")
    return path / "config.yaml", path / "model.ckpt"


@pytest.fixture
def original(tmp_path: Path) -> Make:
    """`original(name)`: one of compvis_configs.SMALL, or a configuration, on disk and as a module."""

    def make(what: str | dict[str, Any], *, averaged: bool = False) -> Original:
        config = compvis_configs.small(what) if isinstance(what, str) else what
        condition = config["params"].get("cond_stage_config")
        if isinstance(condition, dict) and condition["target"].endswith("FrozenCLIPEmbedder"):
            condition["params"]["version"] = str(clip_directory(tmp_path / "clip"))
        torch.manual_seed(0)
        model = shaken(compvis_reference.instantiate(config))
        tensors = model.state_dict() | (averages(model) if averaged else {})
        return Original(*write(tmp_path / "original", config, tensors), model)

    return make


def clip_directory(path: Path) -> Path:
    """A little CLIP text encoder's shape, as transformers saves it."""
    path.mkdir(exist_ok=True)
    shape = {
        "model_type": "clip_text_model", "hidden_size": 24, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 3, "vocab_size": 50, "max_position_embeddings": 8, "hidden_act": "quick_gelu",
        "bos_token_id": 48, "eos_token_id": 49,
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(shape))
    return path
