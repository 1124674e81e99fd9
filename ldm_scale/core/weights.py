"""A weights directory: `config.json` says what the network is, `weights.safetensors` holds it, nothing is pickled."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from ldm_scale.core import storage

_CONFIG, _TENSORS = "config.json", "weights.safetensors"
_SHOWN = 10


@dataclass(frozen=True, slots=True)
class Weights:
    """What a weights directory holds."""

    config: dict[str, Any]
    """What to build: plain values, each part with its `kind`."""
    tensors: dict[str, Tensor]


def save(directory: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write a weights directory; `config.json` last, so that a directory without it is unfinished."""
    directory.mkdir(parents=True, exist_ok=True)
    with storage.atomic_write(directory / _TENSORS) as file:
        file.write(safetensors.torch.save({name: t.detach().cpu().contiguous() for name, t in tensors.items()}))
    storage.write_json(directory / _CONFIG, {**config, "sha256": storage.sha256_file(directory / _TENSORS)})


def load(directory: Path) -> Weights:
    """Read a weights directory.

    raises  FileNotFoundError where it is absent or unfinished, ValueError where its bytes are not those written
    """
    if not (directory / _CONFIG).exists():
        raise FileNotFoundError(f"{directory} is not a weights directory: it has no {_CONFIG}")
    config = storage.read_json(directory / _CONFIG)
    written, found = config.pop("sha256"), storage.sha256_file(directory / _TENSORS)
    if written != found:
        raise ValueError(f"{directory / _TENSORS} is damaged: sha256 {found[:12]}, {written[:12]} when it was written")
    return Weights(config, safetensors.torch.load_file(directory / _TENSORS))


def load_exactly(module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Copy `tensors` into `module`, all of them and nothing else.

    raises  ValueError listing missing, unexpected and mis-shaped names, with `source` named
    """
    require_same_architecture(shapes(tensors), shapes(module.state_dict()), source)
    with torch.no_grad():
        module.load_state_dict(dict(tensors), strict=True)


def shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor, by name."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def require_same_architecture(
    held: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]], source: str
) -> None:
    """Refuse weights whose names or shapes are not those of the network that they are for.

    raises  ValueError listing missing, unexpected and mis-shaped names, with `source` named
    """
    misshaped = [
        f"{name} {held[name]}, wanted {wanted[name]}"
        for name in sorted(wanted.keys() & held.keys())
        if held[name] != wanted[name]
    ]
    lists = {
        "missing": sorted(wanted.keys() - held.keys()),
        "unexpected": sorted(held.keys() - wanted.keys()),
        "mis-shaped": misshaped,
    }
    told = [f"{len(names)} {kind}: {', '.join(names[:_SHOWN])}" for kind, names in lists.items() if names]
    if told:
        raise ValueError(f"{source} holds another architecture; " + "; ".join(told))


def digest(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over the sorted names, types, shapes and bytes of `tensors`: who these weights are."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
