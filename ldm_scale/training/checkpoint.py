"""The checkpoints of one training: when they are written, which are kept, what a resume takes.

Their files: training/checkpoint_files.py; how they are written: training/checkpoint_writer.py. Pieces come from
`training/masters.py`, where engines differ; nothing here knows one.
"""

import copy
import json
import math
import platform
import secrets
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from ldm_scale.core import runtime, storage, weights
from ldm_scale.training.checkpoint_files import (
    COMPLETE,
    FORMAT,
    HELD,
    WEIGHT,
    CheckpointError,
    Reader,
    agreed,
    complete_ones,
    damage,
    images_of,
)
from ldm_scale.training.checkpoint_writer import LOOK_S, Save, Snapshot
from ldm_scale.training.ema import EMA
from ldm_scale.training.masters import MOMENTS, Masters, share

log = runtime.logger(__name__)

_SHOWN = 10
_TRIES = 10  # within `max_unsaved_minutes`
_LEAVE_S = 20.0  # that `close` lets a save go on: less than the minute after which a job must have ended
_PACKAGES = ("ldm_scale", "torch", "accelerate", "deepspeed", "numpy", "safetensors")


class Checkpoints:
    """The checkpoints of one training. Every method but `path`, `release`, `close` and `numbers` is collective."""

    def __init__(
        self,
        directory: Path,
        *,
        masters: Masters,
        ema: EMA,
        module: nn.Module,
        companions: Mapping[str, Masters] = MappingProxyType({}),
        keep_last: int = 2,
        keep_every_images: int = 0,
        max_unsaved_minutes: float = 60.0,
        on_damaged: Callable[[Path, str], None] = lambda path, reason: None,
        on_failed: Callable[[Path, str], None] = lambda path, reason: None,
    ) -> None:
        """Name what is saved and how much of it is kept.

        module               the unwrapped module; its persistent buffers are saved beside the masters
        companions           masters of what learns beside it, by name
        keep_last            newest checkpoints kept, at least 1
        keep_every_images    the first checkpoint at or after each multiple of this many images is kept too; 0: none
        max_unsaved_minutes  how long saves may fail before that is an error; 0 makes the first one an error
        on_damaged           told of each damaged checkpoint that `latest` passes over, on rank 0
        on_failed            told of each save that failed, on rank 0
        """
        if keep_last < 1:
            raise ValueError(f"keep_last={keep_last}; at least 1, or the only checkpoint would be deleted")
        if keep_every_images < 0:
            raise ValueError(f"keep_every_images={keep_every_images}; at least 0; 0 keeps none besides the last")
        if max_unsaved_minutes < 0:
            raise ValueError(f"max_unsaved_minutes={max_unsaved_minutes}; at least 0; 0 ends at the first failed save")
        self._directory = Path(directory)
        self._masters, self._ema, self._module, self._companions = masters, ema, module, companions
        self._keep_last, self._keep_every = keep_last, keep_every_images
        self._patience_s = 60 * max_unsaved_minutes
        self._on_damaged, self._on_failed = on_damaged, on_failed
        self._saving: Save | None = None
        self._state: dict[str, Any] = {}
        self._stop_s = 0.0
        self._host: Tensor | None = None
        self._held, self._held_since = 0, time.monotonic()
        self._save_s: float | None = None
        self._failing_since: float | None = None
        self._tried = 0.0
        self._damaged: set[Path] = set()
        self._sound: set[Path] = set()

    def path(self, images_seen: int) -> Path:
        return self._directory / f"images_{images_seen:012d}"

    def save(self, state: dict[str, Any], *, stop_s: float = 0.0) -> Path:
        """Copy what is saved to host memory, and write it in the background; then delete what the policy does not keep.

        One save at a time: waits for the one before it. One that fails leaves every checkpoint as it is, is told to
        `on_failed`, and asks for the next one by `poll`.

        state    JSON values; `images_seen` names the checkpoint
        stop_s   seconds that pass between a signal and the last save
        returns  where it will be
        raises   CheckpointError on every rank where saves have failed for `max_unsaved_minutes`
        """
        self._settle(wait=True)
        self._state, self._stop_s = copy.deepcopy(state), stop_s
        self._begin()
        return self.path(state["images_seen"])

    def poll(self) -> bool:
        """Learn how the save under way ended, if it has. True where the last one failed, and it is time for the next.

        raises  CheckpointError as `save` does
        """
        self._settle(wait=False)
        if self._saving is not None or self._failing_since is None:
            return False
        return runtime.gathered(time.monotonic() - self._tried >= self._patience_s / _TRIES)[0]

    def drain(self) -> None:
        """Wait until the last save is on disk; where it fails, write the same again until it is.

        raises  CheckpointError as `save` does
        """
        self._settle(wait=True)
        while self._failing_since is not None:
            time.sleep(self._patience_s / _TRIES)
            self._begin()
            self._settle(wait=True)

    def release(self) -> None:
        """Give back the host memory that saves took, which the process would else keep page-locked; after `drain`."""
        assert self._saving is None, "it reads that memory"
        if self._host is not None and torch.cuda.is_available() and self._host.numel():
            torch.cuda.check_error(int(torch.cuda.cudart().cudaHostUnregister(self._host.data_ptr())))
        self._host = None

    def close(self) -> None:
        """Let go, whatever other ranks do: a save under way has a few seconds left, and ends with the process."""
        if self._saving is not None:
            self._saving.join(_LEAVE_S)

    def numbers(self, images_seen: int) -> dict[str, float]:
        """For rank 0's log line: how long the last save took, the room on its disk, and what a crash now would cost.

        The last is counted from the weights that were saved or loaded last; where there are none, from the beginning.
        """
        told = {} if self._save_s is None else {"perf/save_s": self._save_s}
        with suppress(OSError):
            told["perf/disk_free_gb"] = shutil.disk_usage(self._directory.parent).free / 1e9
        return {
            **told,
            "perf/unsaved_images": float(images_seen - self._held),
            "perf/unsaved_minutes": (time.monotonic() - self._held_since) / 60,
        }

    def latest(self) -> Path | None:
        """The newest checkpoint whose every byte is as written; None where there is none. Damaged ones are reported."""
        self._settle(wait=True)
        for path in agreed(self._recovered, main_only=True)[0] or []:
            reason = damage(path)
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

        An average whose half-life the checkpoint does not hold starts at the checkpoint's weights; a companion that it
        does not hold stays as it is.

        returns  the state that was saved
        raises   CheckpointError where it is damaged, ValueError where it holds another architecture
        """
        if path not in self._sound and (reason := damage(path)):
            raise CheckpointError(f"{path} is damaged: {reason}")
        reader = Reader(path)
        wanted = self._masters.shapes | weights.shapes(persistent_buffers(self._module))
        weights.require_same_architecture(reader.shapes, wanted, str(path))
        for kind, tensors in {**_kinds_of(self._masters), **self._averages()}.items():
            if kind in reader.kinds:
                reader.fill(kind, self._masters, tensors)
            else:
                log.warning("%s holds no %s: it starts at the weights", path, kind)
                reader.fill(WEIGHT, self._masters, tensors)
        self._masters.step = reader.meta["step"]
        self._masters.push()
        for name, masters in self._companions.items():
            self._load_companion(name, masters, reader)
        with torch.no_grad():
            for name, buffer in persistent_buffers(self._module).items():
                buffer.copy_(reader.buffers()[name])
        self._held, self._held_since = reader.meta["images_seen"], time.monotonic()
        return dict(reader.meta["state"])

    def _load_companion(self, name: str, masters: Masters, reader: Reader) -> None:
        if name not in reader.companions:
            log.warning("%s holds no %s: it starts anew", reader.path, name)
            return
        held = reader.companions[name]
        shapes = {key: tuple(shape) for key, shape in held["parameters"].items()}
        weights.require_same_architecture(shapes, masters.shapes, f"{reader.path}, {name}")
        for kind, tensors in _kinds_of(masters, f"{name}/").items():
            reader.fill(kind, masters, tensors)
        masters.step = held["step"]

    def abandon_newer(self, than: Path) -> list[Path]:
        """Rename checkpoints newer than one that training rolls back to, `*.abandoned`, so that none is resumed.

        Those of the rollback before are deleted: each is a whole checkpoint.
        """

        def rename() -> list[Path]:
            newer = [path for path in complete_ones(self._directory) if path.name > than.name]
            for before in self._directory.glob("images_*.abandoned") if newer else ():
                _delete(before)
            for path in newer:
                path.rename(path.with_name(f"{path.name}.abandoned"))
            return newer

        self._settle(wait=True)  # one more that is newer, perhaps
        return agreed(rename, main_only=True)[0] or []

    def _averages(self) -> dict[str, list[Tensor]]:
        return {f"ema/{half_life}": shadow for half_life, shadow in self._ema.shadows.items()}

    def _saved(self) -> list[tuple[Masters, dict[str, list[Tensor]]]]:
        """Whose pieces are saved, and what of each; every list is aligned with the masters before it."""
        own = self._masters, {**_kinds_of(self._masters), **self._averages()}
        return [own, *((masters, _kinds_of(masters, f"{name}/")) for name, masters in self._companions.items())]

    def _recovered(self) -> list[Path]:
        """Complete checkpoints, newest first; one that a kill caught between its two renames is put back."""
        for aside in self._directory.glob(".images_*.replaced"):
            final = aside.with_name(aside.name.removeprefix(".").removesuffix(".replaced"))
            if not final.exists():
                aside.rename(final)
        return complete_ones(self._directory)

    def _begin(self) -> None:
        """Copy and start to write; a failure counts as one of the save."""
        final, self._tried = self.path(self._state["images_seen"]), time.monotonic()
        try:
            temporary = agreed(lambda: self._make_room(final), main_only=True)[0]
        except CheckpointError as error:
            self._failed(final, str(error))
        else:
            self._saving = Save(self._snapshot(), temporary, final, self._prune)

    def _settle(self, *, wait: bool) -> None:
        """Learn, all ranks alike, how the save under way ended; without `wait` only if it has."""
        while (saving := self._saving) is not None:
            outcomes = runtime.gathered(saving.outcome)
            if failures := [outcome for outcome in outcomes if outcome]:
                self._saving = None
                self._take_back(saving)
                self._failed(saving.final, "; ".join(failures[:_SHOWN]))
            elif outcomes[0] is not None:  # rank 0 is done when all are
                self._saving = self._failing_since = None
                self._held, self._held_since, self._save_s = images_of(saving.final), saving.began, saving.seconds
                if shortage := _grace_lacking(saving.seconds, self._stop_s):
                    log.warning("%s. The next launch is refused", shortage)
                self._damaged.discard(saving.final)
                self._sound.add(saving.final)
            elif wait:
                time.sleep(LOOK_S)
            else:
                return

    def _take_back(self, saving: Save) -> None:
        saving.cancel()
        runtime.gathered(None)  # nobody writes any more
        if runtime.is_main():
            shutil.rmtree(saving.temporary, ignore_errors=True)
            with suppress(OSError):  # as after a save that succeeded
                self._prune()

    def _failed(self, final: Path, reason: str) -> None:
        if self._failing_since is None:
            self._failing_since = self._tried
        log.error("could not save %s: %s", final, reason)
        if runtime.is_main():
            self._on_failed(final, reason)
        seconds = time.monotonic() - self._failing_since
        if runtime.gathered(seconds >= self._patience_s)[0]:  # rank 0's clock counts
            raise CheckpointError(
                f"could not save {final}: {reason}. No save succeeded for max_unsaved_minutes="
                f"{self._patience_s / 60:g}; what was complete is as it was, and the same command goes on from there"
            )

    def _make_room(self, final: Path) -> Path:
        """An empty directory that no earlier process knows; what those left over is deleted."""
        self._recovered()
        for left_over in self._directory.glob(".images_*"):
            shutil.rmtree(left_over)
        temporary = final.with_name(f".{final.name}.{secrets.token_hex(4)}.tmp")
        temporary.mkdir(parents=True)
        return temporary

    def _snapshot(self) -> Snapshot:
        """What is saved, as it is now, in host memory."""
        began = time.monotonic()
        saved = [(m, kinds, share(m, runtime.rank(), runtime.world())) for m, kinds in self._saved()]
        entries = [
            (f"{kind}:{piece.name}:{piece.start}", masters, tensors, piece)
            for masters, kinds, pieces in saved
            for kind, tensors in kinds.items()
            for piece in pieces
        ]
        floats = self._host_memory(sum(piece.numel for *_, piece in entries))
        begin = 0
        for _, masters, tensors, piece in entries:
            floats[begin : begin + piece.numel].copy_(masters.read(tensors, piece), non_blocking=True)
            begin += piece.numel
        buffers = {name: b.detach().to("cpu", copy=True) for name, b in persistent_buffers(self._module).items()}
        meta = {
            "format": FORMAT,
            "images_seen": self._state["images_seen"],
            "step": self._masters.step,
            "state": self._state,
            "stop_s": self._stop_s,
            "versions": {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}},
            "kinds": [kind for _, kinds, _ in saved for kind in kinds],
            "parameters": {name: list(shape) for name, shape in self._masters.shapes.items()},
            "companions": {
                name: {"step": masters.step, "parameters": {key: list(shape) for key, shape in masters.shapes.items()}}
                for name, masters in self._companions.items()
            },
        }
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        held = [[piece.name, piece.start, piece.numel] for *_, pieces in saved for piece in pieces]
        return Snapshot(began, {key: piece.numel for key, *_, piece in entries}, floats, held, buffers, meta)

    def _host_memory(self, numel: int) -> Tensor:
        """The same floats at every save; page-locked where a GPU copies to them.

        Torch's own pinned allocator would round tens of gigabytes up to a power of two.
        """
        if self._host is None:
            self._host = torch.empty(numel)
            if torch.cuda.is_available() and numel:
                torch.cuda.check_error(
                    int(torch.cuda.cudart().cudaHostRegister(self._host.data_ptr(), self._host.nbytes, 0))
                )
        return self._host

    def _prune(self) -> None:
        """Rank 0: delete what the policy does not keep; a damaged one counts as none, and stays."""
        complete = [path for path in complete_ones(self._directory) if path not in self._damaged]
        kept = set(complete[: self._keep_last]) | {path for path in complete if (path / HELD).exists()}
        if self._keep_every:
            first_of: dict[int, Path] = {}
            for path in complete:  # newest first, so the oldest of each stretch stays in the dictionary
                first_of[images_of(path) // self._keep_every] = path
            kept |= {path for stretch, path in first_of.items() if stretch > 0}
        for path in complete:
            if path not in kept:
                _delete(path)


def _delete(path: Path) -> None:
    """A kill leaves no half of it; what is left of it goes with the next save."""
    hidden = path.with_name(f".{path.name}.{secrets.token_hex(4)}.pruned")
    path.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def require_grace(directory: Path) -> None:
    """Refuse a launcher that would kill a stopped training in its last save, judging by the newest checkpoint.

    raises  ValueError naming what was given and what is needed
    """
    for path in complete_ones(directory)[:1]:
        with suppress(OSError, json.JSONDecodeError):  # damaged: `latest` passes over it, and says so
            meta = storage.read_json(path / COMPLETE)
            if shortage := _grace_lacking(meta.get("save_s", 0.0), meta.get("stop_s", 0.0)):
                raise ValueError(shortage)


def _grace_lacking(save_s: float, stop_s: float) -> str:
    """What to change where there is no time to stop, and for two saves, one under way and the last; else empty."""
    grace, wanted = runtime.grace_s(), math.ceil(2 * save_s + stop_s)
    if wanted <= grace:
        return ""
    return (
        f"TORCH_ELASTIC_SHUTDOWN_TIMEOUT={grace:g}: the last save took {save_s:.0f} s, and a training that is told to "
        f"stop may have two to finish, after steps of {stop_s:.0f} s: launch with {wanted} seconds or more, or by "
        "launchers/*.sh, which give 120"
    )


def _kinds_of(masters: Masters, prefix: str = "") -> dict[str, list[Tensor]]:
    """What every learner has of each piece: weights and moments, aligned with its masters."""
    return {f"{prefix}{WEIGHT}": masters.tensors, **{f"{prefix}{key}": masters.moments(key) for key in MOMENTS}}


def persistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Buffers that belong to a module's state, by name."""
    saved = module.state_dict().keys()
    return {name: buffer for name, buffer in module.named_buffers() if name in saved}
