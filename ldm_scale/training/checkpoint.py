"""Checkpoints that any engine on any number of processes can read.

    checkpoints/images_{n:012d}/
      rank00000-of-00002.safetensors   flat float32 pieces named `kind:parameter:start`, this rank's share
      buffers.safetensors              persistent buffers of the module, by name
      complete.json                    written last: the run's state, shapes, versions, who holds what, sha256s

Kinds: `weight`, `exp_avg`, `exp_avg_sq` and `ema/{half_life}`. Pieces come from `training/masters.py`, where engines
differ; nothing here knows one. All ranks write to a hidden directory, which is renamed when every byte is on disk.
Random streams are functions of the data position (core/rng.py), so no generator state is kept.
"""

import hashlib
import json
import os
import platform
import re
import shutil
import struct
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ldm_scale.core import runtime, storage, weights
from ldm_scale.training.ema import EMA
from ldm_scale.training.masters import MOMENTS, Masters, Piece

log = runtime.logger(__name__)

FORMAT = 1
_COMPLETE, _BUFFERS = "complete.json", "buffers.safetensors"
_NAME = re.compile(r"images_\d{12}")
_SHOWN = 10
_WEIGHT = "weight"
_PACKAGES = ("ldm_scale", "torch", "accelerate", "deepspeed", "numpy", "safetensors")

Result = TypeVar("Result")


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or is not what was written. Those before it are untouched."""


class Checkpoints:
    """The checkpoints of one training. Every method but `path` is collective: all ranks call it."""

    def __init__(
        self,
        directory: Path,
        *,
        masters: Masters,
        ema: EMA,
        module: nn.Module,
        keep_last: int = 2,
        keep_every_images: int = 0,
        on_damaged: Callable[[Path, str], None] = lambda path, reason: None,
    ) -> None:
        """Name what is saved and how much of it is kept.

        module             the unwrapped module; its persistent buffers are saved beside the masters
        keep_last          newest checkpoints kept, at least 1
        keep_every_images  the first checkpoint at or after each multiple of this many images is kept too; 0 keeps none
        on_damaged         told of each damaged checkpoint that `latest` passes over, on rank 0
        """
        if keep_last < 1:
            raise ValueError(f"keep_last={keep_last}; at least 1, or the only checkpoint would be deleted")
        if keep_every_images < 0:
            raise ValueError(f"keep_every_images={keep_every_images}; at least 0; 0 keeps none besides the last")
        self._directory = Path(directory)
        self._masters, self._ema, self._module = masters, ema, module
        self._keep_last, self._keep_every = keep_last, keep_every_images
        self._on_damaged = on_damaged
        self._damaged: set[Path] = set()
        self._sound: set[Path] = set()

    def path(self, images_seen: int) -> Path:
        return self._directory / f"images_{images_seen:012d}"

    def save(self, state: dict[str, Any]) -> Path:
        """Write a checkpoint, then delete those that the policy does not keep.

        state   JSON values; `images_seen` names the checkpoint
        raises  CheckpointError on every rank when one of them could not write; earlier checkpoints stay as they are
        """
        final = self.path(state["images_seen"])
        temporary = final.with_name(f".{final.name}.tmp")
        try:
            _agreed(lambda: self._make_room(temporary), main_only=True)
            files = _agreed(lambda: self._write_share(temporary))
            _agreed(lambda: self._complete(temporary, final, files, state), main_only=True)
        except CheckpointError as error:
            if runtime.is_main():
                shutil.rmtree(temporary, ignore_errors=True)
            raise CheckpointError(f"could not save {final}: {error}") from error
        self._damaged.discard(final)
        self._sound.add(final)
        _agreed(self._prune, main_only=True)
        return final

    def latest(self) -> Path | None:
        """The newest checkpoint whose every byte is as written; None where there is none. Damaged ones are reported."""
        for path in _agreed(self._recovered, main_only=True)[0] or []:
            reason = _damage(path)
            if reason is None:
                self._sound.add(path)
                return path
            self._damaged.add(path)
            log.error("%s is damaged and passed over: %s", path, reason)
            if runtime.is_main():
                self._on_damaged(path, reason)
        return None

    def load(self, path: Path) -> dict[str, Any]:
        """Set masters, moments, averages, step count, buffers and live weights; any engine, any number of ranks.

        An average whose half-life the checkpoint does not hold starts at the checkpoint's weights.

        returns  the state that was saved
        raises   CheckpointError where it is damaged, ValueError where it holds another architecture
        """
        if path not in self._sound and (reason := _damage(path)):
            raise CheckpointError(f"{path} is damaged: {reason}")
        reader = _Reader(path)
        wanted = self._masters.shapes | weights.shapes(persistent_buffers(self._module))
        weights.require_same_architecture(reader.shapes, wanted, str(path))
        for kind, tensors in self._kinds().items():
            if kind in reader.kinds:
                reader.fill(kind, self._masters, tensors)
            else:
                log.warning("%s holds no %s: it starts at the weights", path, kind)
                reader.fill(_WEIGHT, self._masters, tensors)
        self._masters.step = reader.meta["step"]
        self._masters.push()
        with torch.no_grad():
            for name, buffer in persistent_buffers(self._module).items():
                buffer.copy_(reader.buffers()[name])
        return dict(reader.meta["state"])

    def abandon_newer(self, than: Path) -> list[Path]:
        """Rename checkpoints newer than one that training rolls back to, `*.abandoned`, so that none is resumed."""

        def rename() -> list[Path]:
            newer = [path for path in complete_ones(self._directory) if path.name > than.name]
            for path in newer:
                path.rename(path.with_name(f"{path.name}.abandoned"))
            return newer

        return _agreed(rename, main_only=True)[0] or []

    def _kinds(self) -> dict[str, Sequence[Tensor]]:
        """What is saved of each piece; every list is aligned with the masters."""
        averages = {f"ema/{half_life}": shadow for half_life, shadow in self._ema.shadows.items()}
        return {_WEIGHT: self._masters.tensors, **{key: self._masters.moments(key) for key in MOMENTS}, **averages}

    def _recovered(self) -> list[Path]:
        """Complete checkpoints, newest first; one that a kill caught between its two renames is put back."""
        for aside in self._directory.glob(".images_*.replaced"):
            final = aside.with_name(aside.name.removeprefix(".").removesuffix(".replaced"))
            if not final.exists():
                aside.rename(final)
        return complete_ones(self._directory)

    def _make_room(self, temporary: Path) -> None:
        self._recovered()
        for left_over in self._directory.glob(".images_*"):
            shutil.rmtree(left_over)
        temporary.mkdir(parents=True)

    def _write_share(self, temporary: Path) -> dict[str, Any]:
        rank, world = runtime.rank(), runtime.world()
        pieces = share(self._masters, rank, world)
        file = f"rank{rank:05d}-of-{world:05d}.safetensors"
        kinds = self._kinds()
        entries = [(f"{kind}:{piece.name}:{piece.start}", kind, piece) for kind in kinds for piece in pieces]
        contents = (self._masters.read(kinds[kind], piece) for _, kind, piece in entries)
        written = _write_floats(temporary / file, {key: piece.numel for key, _, piece in entries}, contents)
        return {"file": file, **written, "pieces": [[piece.name, piece.start, piece.numel] for piece in pieces]}

    def _complete(self, temporary: Path, final: Path, files: list[Any], state: dict[str, Any]) -> None:
        """Rank 0: buffers, `complete.json`, and the rename that makes it a checkpoint."""
        buffers = {name: b.detach().cpu().contiguous() for name, b in persistent_buffers(self._module).items()}
        with storage.atomic_write(temporary / _BUFFERS) as file:
            file.write(safetensors.torch.save(buffers))
        meta = {
            "format": FORMAT,
            "images_seen": state["images_seen"],
            "step": self._masters.step,
            "state": state,
            "versions": {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}},
            "kinds": list(self._kinds()),
            "parameters": {name: list(shape) for name, shape in self._masters.shapes.items()},
            "files": files,
            "buffers": {
                "file": _BUFFERS,
                "bytes": (temporary / _BUFFERS).stat().st_size,
                "sha256": storage.sha256_file(temporary / _BUFFERS),
            },
        }
        storage.write_json(temporary / _COMPLETE, {**meta, "digest": storage.digest(meta)})
        _sync_directory(temporary)
        if final.exists():  # the same images again, or a damaged one: moved only now that its successor is whole
            final.rename(final.with_name(f".{final.name}.replaced"))
        temporary.rename(final)
        _sync_directory(self._directory)
        shutil.rmtree(final.with_name(f".{final.name}.replaced"), ignore_errors=True)

    def _prune(self) -> None:
        complete = [path for path in complete_ones(self._directory) if path not in self._damaged]
        kept = set(complete[: self._keep_last])
        if self._keep_every:
            first_of: dict[int, Path] = {}
            for path in complete:  # newest first, so the oldest of each stretch stays in the dictionary
                first_of[_images(path) // self._keep_every] = path
            kept |= {path for stretch, path in first_of.items() if stretch > 0}
        for path in complete:
            if path not in kept:
                shutil.rmtree(path, ignore_errors=True)


def find(directory: Path, name: str = "latest") -> Path:
    """One checkpoint of a run, verified: the newest sound one for `latest`, else the one of that directory name.

    raises  FileNotFoundError where there is none, CheckpointError where the named one is damaged
    """
    complete = complete_ones(directory)
    if name == "latest":
        for path in complete:
            if (reason := _damage(path)) is None:
                return path
            log.error("%s is damaged and passed over: %s", path, reason)
        raise FileNotFoundError(f"{directory} holds no complete checkpoint")
    path = directory / name
    if path not in complete:
        there = ", ".join(found.name for found in complete[:_SHOWN]) or "none"
        raise FileNotFoundError(f"{path} is not a complete checkpoint; complete ones, newest first: {there}")
    if reason := _damage(path):
        raise CheckpointError(f"{path} is damaged: {reason}")
    return path


def read_state(path: Path) -> dict[str, Any]:
    """The saved state of a checkpoint, without its tensors."""
    return dict(storage.read_json(path / _COMPLETE)["state"])


def read_consolidated(path: Path, kind: str = _WEIGHT) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The saved state, and whole tensors by name: every parameter as `kind` has it, and every persistent buffer.

    raises  ValueError where the checkpoint does not hold that kind
    """
    reader = _Reader(path)
    if kind not in reader.kinds:
        raise ValueError(f"{path} holds no {kind!r}; it holds {', '.join(reader.kinds)}")
    return dict(reader.meta["state"]), {**reader.whole(kind), **reader.buffers()}


def share(masters: Masters, rank: int, world: int) -> list[Piece]:
    """The pieces that `rank` writes: its own, or where all ranks hold all, its stretch of them laid end to end."""
    if not masters.replicated:
        return masters.pieces
    total = sum(piece.numel for piece in masters.pieces)
    first, last = total * rank // world, total * (rank + 1) // world
    mine, begin = [], 0
    for p in masters.pieces:
        low, high = max(first - begin, 0), min(last - begin, p.numel)
        if low < high:
            mine.append(Piece(p.name, p.shape, p.start + low, high - low, p.master, p.offset + low))
        begin += p.numel
    return mine


def persistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Buffers that belong to a module's state, by name."""
    saved = module.state_dict().keys()
    return {name: buffer for name, buffer in module.named_buffers() if name in saved}


class _Reader:
    """One complete checkpoint, read piece by piece."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.meta: dict[str, Any] = storage.read_json(path / _COMPLETE)
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
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every parameter and buffer."""
        parameters = {name: tuple(shape) for name, shape in self.meta["parameters"].items()}
        return parameters | weights.shapes(self.buffers())

    def whole(self, kind: str) -> dict[str, Tensor]:
        shapes: dict[str, list[int]] = self.meta["parameters"]
        return {
            name: self._range(kind, name, 0, torch.Size(shape).numel()).view(shape) for name, shape in shapes.items()
        }

    def buffers(self) -> dict[str, Tensor]:
        return safetensors.torch.load_file(self._path / _BUFFERS)

    def _range(self, kind: str, name: str, begin: int, numel: int) -> Tensor:
        """Elements [begin, begin + numel) of one parameter, from whichever files hold them."""
        values, filled = torch.empty(numel), 0
        for start, length, file in self._where[name]:
            low, high = max(start, begin), min(start + length, begin + numel)
            if low < high:
                part = self._file(file).get_slice(f"{kind}:{name}:{start}")[low - start : high - start]
                values[low - begin : high - begin] = part
                filled += high - low
        assert filled == numel, f"{self._path}: {kind} {name} has {filled} of {numel} elements at {begin}"
        return values

    def _file(self, name: str) -> Any:
        if name not in self._open:
            self._open[name] = safe_open(self._path / name, "pt")
        return self._open[name]


def _images(path: Path) -> int:
    return int(path.name.removeprefix("images_"))


def complete_ones(directory: Path) -> list[Path]:
    """Directories with a `complete.json`, newest first."""
    if not directory.is_dir():
        return []
    names = sorted((path for path in directory.iterdir() if _NAME.fullmatch(path.name)), reverse=True)
    return [path for path in names if (path / _COMPLETE).is_file()]


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, None if nothing. Ranks of a process group share the files out and agree."""
    try:
        meta = storage.read_json(path / _COMPLETE)
        files = [*meta["files"], meta["buffers"]] if meta.pop("digest") == storage.digest(meta) else None
    except (OSError, ValueError, KeyError) as error:
        files, reason = None, f"{_COMPLETE}: {error}"
    else:
        reason = f"{_COMPLETE} is not as written"
    if files is not None:
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        mine = (_file_damage(path, entry) for entry in files[rank::world])
        reason = next((found for found in mine if found), "")
    return next((found for found in _gathered(reason) if found), None)


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


def _write_floats(path: Path, sizes: dict[str, int], contents: Iterator[Tensor]) -> dict[str, Any]:
    """Stream float32 vectors to a safetensors file, one in memory at a time; synced. Returns its size and sha256."""
    header, begin = {}, 0
    for key, numel in sizes.items():
        header[key] = {"dtype": "F32", "shape": [numel], "data_offsets": [begin, begin + 4 * numel]}
        begin += 4 * numel
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    total = hashlib.sha256()
    with open(path, "wb") as file:
        for prefix in (struct.pack("<Q", len(text)), text):
            file.write(prefix)
            total.update(prefix)
        for values in contents:
            bytes_ = values.to("cpu", torch.float32).contiguous().numpy().tobytes()
            file.write(bytes_)
            total.update(bytes_)
        file.flush()
        os.fsync(file.fileno())
        size = file.tell()
    return {"bytes": size, "sha256": total.hexdigest()}


def _sync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _gathered(value: Result) -> list[Result]:
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _agreed(work: Callable[[], Result], *, main_only: bool = False) -> list[Any]:
    """Do `work` on every rank, or on rank 0; all results by rank, or CheckpointError everywhere if one rank failed."""
    result, failure = None, ""
    try:
        result = work() if runtime.is_main() or not main_only else None
    except (OSError, SafetensorError) as error:
        failure = f"rank {runtime.rank()}: {error}"
    outcomes = _gathered((result, failure))
    if failures := [message for _, message in outcomes if message]:
        raise CheckpointError("; ".join(failures[:_SHOWN]))
    return [outcome for outcome, _ in outcomes]
