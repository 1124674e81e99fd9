"""Writing a checkpoint beside training.

Training stands still while each rank copies its share to host memory, no longer. A thread of each rank then writes the
share to a hidden directory, syncs it, and last of all leaves `rank*.json` with its digest beside it. Rank 0's thread
waits for these files, writes `complete.json` and renames the directory. So threads agree through the file system and
never by a collective, which would not be safe beside training's own; and a checkpoint is complete as soon as its bytes
are on disk, however long the main threads are busy. These learn by a collective, at the next `poll`, `save` or `drain`,
how it ended: a rank whose disk is full need not be able to write anything to be heard.
"""

import hashlib
import json
import os
import shutil
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from ldm_scale.core import runtime, storage
from ldm_scale.training.checkpoint_files import BUFFERS, COMPLETE

LOOK_S = 0.05  # between two looks at what other ranks have done
_CHUNK = 1 << 24  # bytes written at once: what a save that is given up still does


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What one rank saves, at one moment."""

    began: float
    """That moment, by the monotonic clock."""
    sizes: dict[str, int]
    """Elements of each entry of the file, in its order."""
    floats: Tensor
    """All entries end to end."""
    pieces: list[list[Any]]
    """`[name, start, numel]` of what this rank holds."""
    buffers: dict[str, Tensor]
    meta: dict[str, Any]
    """`complete.json`, but for what is known only when files are written."""


class Save(threading.Thread):
    """One save under way: a rank's share, and on rank 0 what makes a checkpoint of all shares."""

    def __init__(self, snapshot: Snapshot, temporary: Path, final: Path, prune: Callable[[], None]) -> None:
        super().__init__(name="save", daemon=True)  # a rank that is lost must not keep rank 0 alive
        self.temporary, self.final, self.began = temporary, final, snapshot.began
        self.outcome: str | None = None
        """None while under way, empty when this rank is done, else what failed."""
        self.seconds = 0.0
        """How long it took, on rank 0 and in the end."""
        self._snapshot, self._prune = snapshot, prune
        self._rank, self._world = runtime.rank(), runtime.world()
        self._cancelled = threading.Event()
        self.start()

    def cancel(self) -> None:
        """Stop writing; what was written stays."""
        self._cancelled.set()
        self.join()

    def run(self) -> None:
        try:
            self._write_share()
            if self._rank == 0:
                self._complete(self._shares())
            self.outcome = ""
        except Exception as error:  # told to the main thread, whatever it is
            self.outcome = f"rank {self._rank}: {error}"

    def _write_share(self) -> None:
        file = self.temporary / f"rank{self._rank:05d}-of-{self._world:05d}.safetensors"
        try:
            written = _write_floats(file, self._snapshot.sizes, self._snapshot.floats, self._cancelled)
        except OSError:
            with suppress(OSError):
                file.unlink()  # a full disk ends more than a save: metrics are written too
            raise
        said = {"file": file.name, **written, "pieces": self._snapshot.pieces}
        storage.write_json(_beside(self.temporary, self._rank), said)

    def _shares(self) -> list[Any]:
        """Rank 0: what each rank says of its share, as soon as all have."""
        said = [_beside(self.temporary, rank) for rank in range(self._world)]
        while {path.name for path in said} - {path.name for path in self.temporary.iterdir()}:
            if self._cancelled.wait(LOOK_S):
                raise InterruptedError("given up before all ranks had written")
        files = [storage.read_json(path) for path in said]
        for path in said:
            path.unlink()
        return files

    def _complete(self, files: list[Any]) -> None:
        """Rank 0: buffers, `complete.json`, and the rename that makes it a checkpoint."""
        with storage.atomic_write(self.temporary / BUFFERS) as file:
            file.write(safetensors.torch.save(self._snapshot.buffers))
        buffers = {
            "file": BUFFERS,
            "bytes": (self.temporary / BUFFERS).stat().st_size,
            "sha256": storage.sha256_file(self.temporary / BUFFERS),
        }
        self.seconds = time.monotonic() - self._snapshot.began
        meta = {**self._snapshot.meta, "files": files, "buffers": buffers, "save_s": self.seconds}
        storage.write_json(self.temporary / COMPLETE, {**meta, "digest": storage.digest(meta)})
        _sync_directory(self.temporary)
        aside = self.final.with_name(f".{self.final.name}.replaced")
        if self.final.exists():  # the same images again, or a damaged one: moved only now that its successor is whole
            self.final.rename(aside)
        self.temporary.rename(self.final)
        _sync_directory(self.final.parent)
        shutil.rmtree(aside, ignore_errors=True)
        with suppress(OSError):  # a checkpoint too many is no failed save
            self._prune()


def _beside(directory: Path, rank: int) -> Path:
    """What a rank says of its share, when that is on disk."""
    return directory / f"rank{rank:05d}.json"


def _write_floats(path: Path, sizes: dict[str, int], floats: Tensor, cancelled: threading.Event) -> dict[str, Any]:
    """Write float32 vectors that lie end to end as a safetensors file; synced. Returns its size and sha256.

    Other threads may run: Python's lock is free while a chunk is written or hashed.
    """
    header, begin = {}, 0
    for key, numel in sizes.items():
        header[key] = {"dtype": "F32", "shape": [numel], "data_offsets": [begin, begin + 4 * numel]}
        begin += 4 * numel
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    prefix = struct.pack("<Q", len(text)) + text
    total, content = hashlib.sha256(prefix), floats.numpy().data.cast("B")
    with open(path, "wb") as file:
        file.write(prefix)
        for start in range(0, len(content), _CHUNK):
            if cancelled.is_set():
                raise InterruptedError("given up, since another rank could not write")
            chunk = content[start : start + _CHUNK]
            file.write(chunk)
            total.update(chunk)
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
