"""How the tools here write a dataset by the img2dataset convention: train and val shards, rejected.jsonl, report.json.

`Shard` is one tar and its sidecars; `DatasetWriter` splits samples, fills shards and counts, and can go on where a run
was cut off. Knows nothing of where samples come from.
"""

import hashlib
import io
import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from data_tools.command_line import precompute_command
from ldm_scale.core import rng, storage
from ldm_scale.data.shards import ShardWriter

_OURS = re.compile(r"\d{5}(\.tar|\.parquet|_stats\.json)")
_SPLITS = ("train", "val")
_UNFINISHED = ".unfinished"
_REPORT = "report.json"


class Rejected(Exception):
    """A sample that cannot be written; `reason` goes into rejected.jsonl."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(detail or reason)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Sample:
    """One sample before it has a key."""

    members: Mapping[str, bytes]
    """Field (`png`, `txt`, ...) to bytes; the json is added when it is written."""
    facts: Mapping[str, Any]
    """What the json and the parquet say of it, beside its key."""


@dataclass(slots=True)
class Counts:
    """read = written + rejected, always."""

    written: Counter[str] = field(default_factory=Counter)
    """By split."""
    rejected: Counter[str] = field(default_factory=Counter)
    """By reason."""

    @property
    def read(self) -> int:
        return self.written.total() + self.rejected.total()


class Shard:
    """`{number}.tar` with its `.parquet` and `_stats.json`, under `folder`; keys are `{folder name}_{number}_{index}`.

    The stats are written last: they mark a finished shard, as img2dataset does. Their times are zero, so that equal
    samples give equal bytes.
    """

    def __init__(self, folder: Path, number: int) -> None:
        self.tar = folder / f"{number:05d}.tar"
        self._prefix = f"{folder.name}_{number:05d}"
        self._writer = ShardWriter(self.tar)
        self._rows: list[dict[str, Any]] = []

    @property
    def count(self) -> int:
        return len(self._rows)

    def add(self, sample: Sample) -> None:
        key = f"{self._prefix}_{self.count:05d}"
        row = {**sample.facts, "key": key, "status": "success", "error_message": None}
        self._writer.add(key, {**sample.members, "json": json.dumps(row, ensure_ascii=False).encode()})
        self._rows.append(row)

    def close(self) -> None:
        self._writer.close()
        with storage.atomic_write(self.tar.with_suffix(".parquet")) as file:
            pq.write_table(pa.Table.from_pylist(self._rows), file)
        stats = {
            "count": self.count,
            "successes": self.count,
            "failed_to_download": 0,
            "failed_to_resize": 0,
            "duration": 0.0,
            "start_time": 0.0,
            "end_time": 0.0,
            "status_dict": {"success": self.count},
        }
        storage.write_json(stats_file(self.tar), stats)

    def abort(self) -> None:
        self._writer.abort()


class DatasetWriter:
    """Writes samples into `{out}/train` and `{out}/val`, and what was rejected into `{out}/rejected.jsonl`.

    A context manager: on an exception the shards that were open are left out, the finished ones stay, and a writer
    `begin` with an equal recipe goes on after them, provided that it is given the same samples in the same order.
    """

    def __init__(self, out: Path, *, shard_size: int, val_share: float) -> None:
        require_shard_size(shard_size)
        if not 0 <= val_share < 1:
            raise ValueError(f"--val-share {val_share}; must be at least 0 and less than 1")
        self.out, self.counts = out, Counts()
        self._shard_size, self._val_share = shard_size, val_share
        self._open: dict[str, Shard] = {}
        self._places: dict[str, list[int]] = {split: [] for split in _SPLITS}
        self._numbers: Counter[str] = Counter()
        self._rejections: list[dict[str, str]] = []

    def begin(self, recipe: Mapping[str, Any], *, overwrite: bool) -> set[int]:
        """Make `out` ready, and return the places of the samples that lie in shards finished by a run cut off.

        recipe  all that decides the samples and their order, JSON values
        raises  ValueError where shards of something else are in the way and may not be overwritten
        """
        record = self.out / _UNFINISHED / "recipe.json"
        if overwrite or not record.exists():
            clear(self.out, overwrite=overwrite)
            storage.write_json(record, recipe)
        elif differing := _differing(recipe, storage.read_json(record)):
            raise ValueError(
                f"{self.out} holds the beginning of another dataset: {differing}; repeat that command to finish it, "
                "or choose another directory or add --overwrite"
            )
        for leftover in (file for split in _SPLITS for file in (self.out / split).glob(".*.tmp")):
            leftover.unlink()
        done = [np.load(file) for split in _SPLITS for file in self._finished(split)]
        return set(np.concatenate(done).tolist()) if done else set()

    def _finished(self, split: str) -> Iterator[Path]:
        """Records of a split's finished shards, counted as they are passed."""
        while (file := self._record(split)).exists():
            self._numbers[split] += 1
            self.counts.written[split] += len(np.load(file))
            yield file

    def _record(self, split: str) -> Path:
        return self.out / _UNFINISHED / f"{split}_{self._numbers[split]:05d}.npy"

    def add(self, sample: Sample, *, group: str, place: int) -> None:
        """Write a sample; all of one `group` go to the same split, on every run. `place` is its number in the input."""
        split = "val" if rng.text_uniform(f"split/{group}") < self._val_share else "train"
        if split not in self._open:
            self._open[split] = Shard(self.out / split, self._numbers[split])
        self._open[split].add(sample)
        self._places[split].append(place)
        self.counts.written[split] += 1
        if self._open[split].count == self._shard_size:
            self._finish(split)

    def reject(self, name: str, error: Rejected) -> None:
        """Count a sample that is left out."""
        self.counts.rejected[error.reason] += 1
        self._rejections.append({"path": name, "reason": error.reason, "detail": str(error)})

    def _finish(self, split: str) -> None:
        self._open[split].close()
        with storage.atomic_write(self._record(split)) as file:
            np.save(file, np.array(self._places[split], np.int64))
        del self._open[split]
        self._places[split] = []
        self._numbers[split] += 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is not None:
            for shard in self._open.values():
                shard.abort()
            return
        for split in list(self._open):
            self._finish(split)
        with storage.atomic_write(self.out / "rejected.jsonl") as file:
            for rejection in self._rejections:
                file.write(json.dumps(rejection, ensure_ascii=False).encode() + b"\n")
        shutil.rmtree(self.out / _UNFINISHED, ignore_errors=True)


def _differing(recipe: Mapping[str, Any], known: Mapping[str, Any]) -> str:
    """`name 1, was 2` for what is not as it was; empty where all is."""
    names = [name for name in {**known, **recipe} if recipe.get(name) != known.get(name)]
    return ", ".join(f"{name} {recipe.get(name)}, was {known.get(name)}" for name in names)


def require_shard_size(shard_size: int) -> None:
    """Keys have five digits for the place in a shard."""
    if not 1 <= shard_size <= 100_000:
        raise ValueError(f"--shard-size {shard_size}; must be 1 to 100000")


def stats_file(tar: Path) -> Path:
    """The sidecar that marks a shard as finished."""
    return tar.with_name(f"{tar.stem}_stats.json")


def clear(out: Path, *, overwrite: bool) -> None:
    """Make `out` ready for a new dataset; only files that these tools write are ever removed.

    raises  ValueError where shards are in the way and may not be overwritten
    """
    folders = [out / split for split in _SPLITS]
    ours = [path for folder in folders for path in folder.glob("*") if _OURS.fullmatch(path.name)]
    if ours and not overwrite:
        raise ValueError(f"{out} already holds shards ({ours[0]}, ...); choose another directory or add --overwrite")
    for path in ours:
        path.unlink()
    for folder in folders:
        shutil.rmtree(folder / ".ldm", ignore_errors=True)
    shutil.rmtree(out / _UNFINISHED, ignore_errors=True)


def image_facts(stored: bytes, pixels: np.ndarray, *, caption: str, original: np.ndarray) -> dict[str, Any]:
    """What img2dataset's json says of an image: sizes in pixels, caption, sha256 of the stored bytes."""
    return {
        "caption": caption,
        "width": pixels.shape[1],
        "height": pixels.shape[0],
        "original_width": original.shape[1],
        "original_height": original.shape[0],
        "sha256": hashlib.sha256(stored).hexdigest(),
    }


def encode_png(pixels: np.ndarray) -> bytes:
    """(H, W, 3) or (H, W) uint8 to PNG."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


def write_report(out: Path, counts: Counts, facts: Mapping[str, Any], file: Path | None = None) -> Path:
    """Write the counts and further JSON values to `file`, or to `{out}/report.json`; returns where that is."""
    target = file or out / _REPORT
    report = {"read": counts.read, "written": dict(counts.written), "rejected": dict(counts.rejected), **facts}
    storage.write_json(target, report)
    return target


def summary(out: Path, counts: Counts) -> list[str]:
    """What was read, written and rejected, where it lies, and what to type next."""
    lines = [f"read {counts.read:,} = written {counts.written.total():,} + rejected {counts.rejected.total():,}"]
    lines += [f"  {split:5s} {counts.written[split]:9,}  {out / split}" for split in sorted(counts.written)]
    lines += [f"  rejected {n:,} {reason}" for reason, n in counts.rejected.most_common()]
    if counts.rejected:
        lines.append(f"  each by name in {out / 'rejected.jsonl'}")
    return lines + next_steps(out) if counts.written else lines


def next_steps(out: Path) -> list[str]:
    """The command that uses a finished dataset."""
    return [f"next: {precompute_command(str(out / 'train'))}"]
