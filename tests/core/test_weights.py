import json
from pathlib import Path

import pytest
import torch
from torch import nn

from ldm_scale.core import weights


def saved(path: Path) -> dict[str, torch.Tensor]:
    tensors = {"a.weight": torch.randn(3, 2), "b": torch.arange(4)}
    weights.save(path, {"first_stage": {"schema": "x"}}, tensors)
    return tensors


def test_a_directory_reads_back_as_written(tmp_path: Path) -> None:
    tensors = saved(tmp_path)
    held = weights.load(tmp_path)
    assert held.config == {"first_stage": {"schema": "x"}}
    assert held.tensors.keys() == tensors.keys()
    assert all(torch.equal(held.tensors[name], tensors[name]) for name in tensors)


def test_an_unfinished_or_damaged_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        weights.load(tmp_path)
    saved(tmp_path)
    file = tmp_path / "weights.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    with pytest.raises(ValueError, match="damaged"):
        weights.load(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert len(config["sha256"]) == 64


def test_another_architecture_is_refused_by_name() -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    tensors = dict(module.state_dict())
    weights.load_exactly(module, tensors, "here")
    del tensors["1.bias"]
    tensors["2.bias"] = torch.zeros(1)
    tensors["0.weight"] = torch.zeros(2, 2)
    with pytest.raises(ValueError, match="here holds another architecture") as caught:
        weights.load_exactly(module, tensors, "here")
    assert "1 missing: 1.bias" in str(caught.value)
    assert "1 unexpected: 2.bias" in str(caught.value)
    assert "0.weight (2, 2), wanted (3, 2)" in str(caught.value)


def test_digest_sees_names_types_shapes_and_bytes() -> None:
    base = {"a": torch.zeros(2, 3)}
    others = [
        {"b": torch.zeros(2, 3)},
        {"a": torch.zeros(3, 2)},
        {"a": torch.zeros(2, 3).half()},
        {"a": torch.ones(2, 3)},
    ]
    digests = {weights.digest(tensors) for tensors in [base, *others]}
    assert len(digests) == 5
    assert weights.digest({"a": torch.zeros(2, 3)}) == weights.digest(base)
