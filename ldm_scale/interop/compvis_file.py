"""Tensors of an original latent-diffusion checkpoint, out of its file.

Knows how the files are wrapped, what else lies in them, and how averaged weights are named; not what the tensors mean.
"""

import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

_EMA, _EMA_STATE = "model_ema.", ("decay", "num_updates")
_SHOWN = 10


class _Nothing:
    """What becomes of the few objects, not weights, that published files hold: they are dropped, and run nothing."""

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


# The state of old Lightning's callbacks, beside the weights. Unpickling makes a _Nothing of each, never the real thing.
_STAND_INS: list[Any] = [
    (_Nothing, name)
    for name in (
        "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
        "numpy.core.multiarray.scalar",
        "numpy.dtype",
        "_codecs.encode",
    )
]


def read(path: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint by its name: a .safetensors file, or a pickle that holds only tensors.

    raises  FileNotFoundError where there is none, ValueError where it is damaged, or a pickle with code in it
    """
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path}: there is no such file")
    held = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    if isinstance(held, Mapping) and isinstance(held.get("state_dict"), Mapping):
        held = held["state_dict"]
    others = [str(key) for key, value in held.items() if not isinstance(value, Tensor)] if _is_named(held) else None
    if others is None or others:
        what = "no dictionary of tensors" if others is None else f"not only tensors: {', '.join(others[:_SHOWN])}"
        raise ValueError(f"{path} holds {what}; give the checkpoint of a model, or its `state_dict`")
    return dict(held)


def _is_named(held: Any) -> bool:
    return isinstance(held, Mapping) and all(isinstance(key, str) for key in held)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(_damaged(path, error)) from error


def _read_pickle(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals(_STAND_INS):
            # Mapped, where the format allows it: the file is copied into the modules only once.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        if names := sorted(set(re.findall(r"GLOBAL ([\w.]+\w)", str(error)))):
            raise ValueError(
                f"{path} is refused: it is a pickle that names {', '.join(names)}, and reading it as a pickle would "
                "run that code. Get the weights as .safetensors, or have their owner save the `state_dict` alone"
            ) from error
        raise ValueError(_damaged(path, error)) from error
    except (RuntimeError, EOFError, KeyError, ValueError) as error:
        raise ValueError(_damaged(path, error)) from error


def _damaged(path: Path, error: Exception) -> str:
    """Torch's reason alone: what stands around it advises to read the file without the protection."""
    reason = re.search(r"WeightsUnpickler error: (.*)", str(error))
    said = reason.group(1) if reason else str(error).partition("\n")[0]
    return f"{path} is refused: it is damaged, or no checkpoint of tensors alone ({said})"


def has_averaged(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the file keeps an exponential moving average beside the weights."""
    return any(name.startswith(_EMA) for name in tensors)


def raw(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights as the optimizer left them."""
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(_EMA)}


def averaged(tensors: Mapping[str, Tensor], prefix: str, ignored: tuple[str, ...]) -> dict[str, Tensor]:
    """The weights with those below `prefix` replaced by their average; an average of nothing stays, under its name.

    An average is named after its weight, below `prefix`, without the dots. The names of the weights put them back.

    ignored  beginnings of names that need no average
    raises   ValueError where another weight below `prefix` has none: half of a model would be another
    """
    latest = raw(tensors)
    dotless = {name.removeprefix(prefix).replace(".", ""): name for name in latest if name.startswith(prefix)}
    for name, tensor in tensors.items():
        bare = name.removeprefix(_EMA)
        if name == bare or bare in _EMA_STATE:
            continue
        latest[dotless.pop(bare, name)] = tensor
    if without := sorted(name for name in dotless.values() if not name.startswith(ignored)):
        raise ValueError(
            f"{len(without)} weights have no average among `{_EMA}*`: {', '.join(without[:_SHOWN])}; load the weights "
            "without averages instead: raw=True, or --raw"
        )
    return latest
