"""A checkpoint as files, which any engine on any number of processes can read.

    checkpoints/images_{n:012d}/
      rank00000-of-00002.safetensors   flat float32 pieces named `kind:parameter:start`, this rank's share
      buffers.safetensors              persistent buffers of the module, by name
      complete.json                    written last: the run's state, shapes, versions, who holds what, sha256s

Kinds: `weight`, `exp_avg`, `exp_avg_sq` and `ema/{half_life}`; `NAME/weight` and so on of what learns beside the module
(a discriminator), whose parameters are named `NAME.parameter` and which no export reads. Pieces come from
`training/masters.py`, where engines differ; nothing here knows one. Random streams are functions of the data position
(core/rng.py), so no generator state is kept.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ldm_scale.core import runtime, storage, weights
from ldm_scale.training.masters import Masters

log = runtime.logger(__name__)

FORMAT = 1
COMPLETE, BUFFERS, WEIGHT = "complete.json", "buffers.safetensors", "weight"
HELD = "held"
"""A file beside these, put there by who reads a checkpoint for long: the policy deletes none that has it."""
_NAME = re.compile(r"images_\d{12}")
_SHOWN = 10

Result = TypeVar("Result")


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or is not what was written. Those before it are untouched."""


def images_of(path: Path) -> int:
    """Images seen by the training at a checkpoint, by the name of its directory."""
    return int(path.name.removeprefix("images_"))


def complete_ones(directory: Path) -> list[Path]:
    """Directories with a `complete.json`, newest first."""
    if not directory.is_dir():
        return []
    names = sorted((path for path in directory.iterdir() if _NAME.fullmatch(path.name)), reverse=True)
    return [path for path in names if (path / COMPLETE).is_file()]


def find(directory: Path, name: str = "latest") -> Path:
    """One checkpoint of a run, verified: the newest sound one for `latest`, else the one of that directory name.

    raises  FileNotFoundError where there is none, CheckpointError where the named one is damaged
    """
    complete = complete_ones(directory)
    if name == "latest":
        for path in complete:
            if (reason := damage(path)) is None:
                return path
            log.error("%s is damaged and passed over: %s", path, reason)
        raise FileNotFoundError(f"{directory} holds no complete checkpoint")
    path = directory / name
    if path not in complete:
        there = ", ".join(found.name for found in complete[:_SHOWN]) or "none"
        raise FileNotFoundError(f"{path} is not a complete checkpoint; complete ones, newest first: {there}")
    if reason := damage(path):
        raise CheckpointError(f"{path} is damaged: {reason}")
    return path


def read_state(path: Path) -> dict[str, Any]:
    """The saved state of a checkpoint, without its tensors."""
    return dict(storage.read_json(path / COMPLETE)["state"])


def read_consolidated(path: Path, kind: str = WEIGHT) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The saved state, and whole tensors by name: every parameter as `kind` has it, and every persistent buffer.

    raises  ValueError where the checkpoint does not hold that kind
    """
    reader = Reader(path)
    return dict(reader.meta["state"]), reader.whole(kind)


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, None if nothing. Ranks of a process group share the files out and agree."""
    try:
        meta = storage.read_json(path / COMPLETE)
        files = [*meta["files"], meta["buffers"]] if meta.pop("digest") == storage.digest(meta) else None
    except (OSError, ValueError, KeyError) as error:
        files, reason = None, f"{COMPLETE}: {error}"
    else:
        reason = f"{COMPLETE} is not as written"
    if files is not None:
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        mine = (_file_damage(path, entry) for entry in files[rank::world])
        reason = next((found for found in mine if found), "")
    return next((found for found in runtime.gathered(reason) if found), None)


def _file_damage(path: Path, entry: dict[str, Any]) -> str:
    file = path / entry["file"]
    try:
        if file.stat().st_size != entry["bytes"]:
            return f"{file.name} has {file.stat().st_size} bytes, {entry['bytes']} were written"
        if storage.sha256_file(file) != entry["sha256"]:
            return f"{file.name} is not as written"
    except OSError as error:
        return f"{file.name}: {error.strerror}"
    return ""


class Reader:
    """One complete checkpoint, read piece by piece."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.meta: dict[str, Any] = storage.read_json(path / COMPLETE)
        if self.meta["format"] != FORMAT:
            raise ValueError(f"{path} has checkpoint format {self.meta['format']}; this version reads {FORMAT}")
        self.kinds: list[str] = self.meta["kinds"]
        self._open: dict[str, Any] = {}
        self._where: dict[str, list[tuple[int, int, str]]] = {}
        for entry in self.meta["files"]:
            for name, start, numel in entry["pieces"]:
                self._where.setdefault(name, []).append((start, numel, entry["file"]))

    def fill(self, kind: str, masters: Masters, tensors: Sequence[Tensor]) -> None:
        for piece in masters.pieces:
            masters.write(tensors, piece, self._range(kind, piece.name, piece.start, piece.numel))

    @property
    def companions(self) -> dict[str, Any]:
        """Step and shapes of what learned beside the module, by name; checkpoints once said nothing of it."""
        return dict(self.meta["companions"]) if "companions" in self.meta else {}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every parameter and buffer of the module."""
        parameters = {name: tuple(shape) for name, shape in self.meta["parameters"].items()}
        return parameters | weights.shapes(self.buffers())

    def whole(self, kind: str) -> dict[str, Tensor]:
        """Every parameter as `kind` has it, and every persistent buffer.

        raises  ValueError where the checkpoint does not hold that kind
        """
        if kind not in self.kinds:
            raise ValueError(f"{self.path} holds no {kind!r}; it holds {', '.join(self.kinds)}")
        shapes: dict[str, list[int]] = self.meta["parameters"]
        parameters = {
            name: self._range(kind, name, 0, torch.Size(shape).numel()).view(shape) for name, shape in shapes.items()
        }
        return {**parameters, **self.buffers()}

    def buffers(self) -> dict[str, Tensor]:
        return safetensors.torch.load_file(self.path / BUFFERS)

    def _range(self, kind: str, name: str, begin: int, numel: int) -> Tensor:
        """Elements [begin, begin + numel) of one parameter, from whichever files hold them."""
        values, filled = torch.empty(numel), 0
        for start, length, file in self._where[name]:
            low, high = max(start, begin), min(start + length, begin + numel)
            if low < high:
                part = self._file(file).get_slice(f"{kind}:{name}:{start}")[low - start : high - start]
                values[low - begin : high - begin] = part
                filled += high - low
        assert filled == numel, f"{self.path}: {kind} {name} has {filled} of {numel} elements at {begin}"
        return values

    def _file(self, name: str) -> Any:
        if name not in self._open:
            self._open[name] = safe_open(self.path / name, "pt")
        return self._open[name]


def agreed(work: Callable[[], Result], *, main_only: bool = False) -> list[Any]:
    """Do `work` on every rank, or on rank 0; all results by rank, or CheckpointError everywhere if one rank failed."""
    result, failure = None, ""
    try:
        result = work() if runtime.is_main() or not main_only else None
    except (OSError, SafetensorError) as error:
        failure = f"rank {runtime.rank()}: {error}"
    outcomes = runtime.gathered((result, failure))
    if failures := [message for _, message in outcomes if message]:
        raise CheckpointError("; ".join(failures[:_SHOWN]))
    return [outcome for outcome, _ in outcomes]
