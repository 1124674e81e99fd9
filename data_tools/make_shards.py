"""Any folder of captioned images -> WebDataset shards by the img2dataset convention.

Also the owner of how the tools here write a dataset: `Shard` (one tar and its sidecars), `DatasetWriter` (train and val
shards, rejected.jsonl, counts that add up). Knows nothing of models or latents.
"""

import argparse
import csv
import hashlib
import io
import json
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from rich.console import Console

from ldm_scale.core import progress, rng, storage
from ldm_scale.data.shards import ShardWriter
from ldm_scale.images.decode import UndecodableImage, decode
from ldm_scale.images.resize import resize_shorter_side

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
"""Files that count as images; everything else in a folder is left alone."""
_OURS = re.compile(r"\d{5}(\.tar|\.parquet|_stats\.json)")
_MAX_BYTES = 2**28  # of one image file
_JPEG_QUALITY = 95
_CHUNK = 256  # files handed to the threads at a time
_THREADS = 8

_EXAMPLES = """\
examples:
  python -m data_tools.make_shards photos data/photos
      photos/a/cat.jpg with its caption in photos/a/cat.txt -> data/photos/train/00000.tar, ...
  python -m data_tools.make_shards photos data/photos --table captions.csv --image-column file --caption-column text
      captions from a table (.csv, .jsonl or .parquet); its image paths are relative to the folder
  python -m data_tools.make_shards scans data/scans --max-side 512 --val-share 0.02 --shard-size 5000
      shrink images longer than 512 pixels; hold 2% of the images out in data/scans/val
"""


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


@dataclass(frozen=True, slots=True)
class Entry:
    """One image to read, or a row that names none."""

    name: str
    """How rejected.jsonl calls it."""
    image: Path | None
    caption: str | Path | None
    """The text, the file that holds it, or None where there is none."""


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

    A context manager: on an exception the shards that were open are left out, the finished ones stay.
    """

    def __init__(self, out: Path, *, shard_size: int, val_share: float) -> None:
        require_shard_size(shard_size)
        if not 0 <= val_share < 1:
            raise ValueError(f"--val-share {val_share}; must be at least 0 and less than 1")
        self.out, self.counts = out, Counts()
        self._shard_size, self._val_share = shard_size, val_share
        self._open: dict[str, Shard] = {}
        self._numbers: Counter[str] = Counter()
        self._rejections: list[dict[str, str]] = []

    def add(self, sample: Sample, *, group: str) -> None:
        """Write a sample; all of one `group` go to the same split, on every run."""
        split = "val" if rng.text_uniform(f"split/{group}") < self._val_share else "train"
        if split not in self._open:
            self._open[split] = Shard(self.out / split, self._numbers[split])
        self._open[split].add(sample)
        self.counts.written[split] += 1
        if self._open[split].count == self._shard_size:
            self._finish(split)

    def reject(self, name: str, error: Rejected) -> None:
        """Count a sample that is left out."""
        self.counts.rejected[error.reason] += 1
        self._rejections.append({"path": name, "reason": error.reason, "detail": str(error)})

    def _finish(self, split: str) -> None:
        self._open[split].close()
        del self._open[split]
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
    folders = [out / "train", out / "val"]
    ours = [path for folder in folders for path in folder.glob("*") if _OURS.fullmatch(path.name)]
    if ours and not overwrite:
        raise ValueError(f"{out} already holds shards ({ours[0]}, ...); choose another directory or add --overwrite")
    for path in ours:
        path.unlink()
    for folder in folders:
        shutil.rmtree(folder / ".ldm", ignore_errors=True)


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


def folder_entries(folder: Path) -> list[Entry]:
    """Every image below `folder`, sorted, with the .txt of the same name; and every .txt that has no image."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    images = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
    captioned = {path.with_suffix(".txt") for path in images}
    orphans = [path for path in files if path.suffix == ".txt" and path not in captioned]
    return [Entry(str(path.relative_to(folder)), path, path.with_suffix(".txt")) for path in images] + [
        Entry(str(path.relative_to(folder)), None, path) for path in orphans
    ]


def table_entries(folder: Path, table: Path, *, image_column: str, caption_column: str) -> list[Entry]:
    """Every row of a .csv, .jsonl or .parquet table; its image paths are relative to `folder`.

    raises  ValueError where a column is missing, naming those that are there
    """
    rows = list(_table_rows(table))
    columns = next((list(row) for row in rows if row), [])
    for column in (image_column, caption_column):
        if column not in columns:
            raise ValueError(f"{table} has no column {column!r}; it has {', '.join(map(str, columns)) or 'none'}")
    entries = []
    for number, row in enumerate(rows, start=1):
        name, caption = row.get(image_column), row.get(caption_column)
        image = folder / str(name) if name else None
        entries.append(
            Entry(str(name or f"{table.name} row {number}"), image, None if caption is None else str(caption))
        )
    return entries


def _table_rows(table: Path) -> Iterator[Mapping[str, Any]]:
    """Rows of a table; a line of a .jsonl that is no object becomes an empty row."""
    if table.suffix == ".csv":
        with open(table, newline="", encoding="utf-8-sig", errors="replace") as file:
            yield from csv.DictReader(file)
    elif table.suffix == ".jsonl":
        with open(table, encoding="utf-8", errors="replace") as file:
            yield from (_json_row(line) for line in file if line.strip())
    elif table.suffix == ".parquet":
        for batch in pq.ParquetFile(table).iter_batches():
            yield from batch.to_pylist()
    else:
        raise ValueError(f"--table {table}; must end in .csv, .jsonl or .parquet")


def _json_row(line: str) -> Mapping[str, Any]:
    try:
        row = json.loads(line)
    except ValueError:
        return {}
    return row if isinstance(row, dict) else {}


def load(entry: Entry, *, max_side: int | None) -> Sample:
    """Read and check one entry. The bytes stay as they are where readers know the format and no side is too long.

    raises  Rejected
    """
    if entry.image is None:
        raise Rejected("missing_file", f"no image for {entry.name}")
    caption = _caption(entry)
    data = _read_image(entry.image)
    try:
        original = decode(data)
    except UndecodableImage as error:
        raise Rejected(error.reason, str(error)) from error
    pixels, suffix = _shrink(original, max_side), _format(data)
    if pixels is not original or suffix is None:
        suffix = "jpg" if suffix == "jpg" else "png"
        data = _encode_jpg(pixels) if suffix == "jpg" else encode_png(pixels)
    facts = image_facts(data, pixels, caption=caption, original=original)
    return Sample({suffix: data, "txt": caption.encode()}, {**facts, "source": entry.name})


def _caption(entry: Entry) -> str:
    text = entry.caption
    if isinstance(text, Path):
        try:
            text = text.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError as error:
            raise Rejected("missing_caption", f"no {entry.caption}") from error
        except OSError as error:
            raise Rejected("unreadable", str(error)) from error
    if text is None or not text.strip():
        raise Rejected("missing_caption", "the caption is empty")
    return text.strip()


def _read_image(path: Path) -> bytes:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise Rejected("too_large", f"{path.stat().st_size} bytes, more than {_MAX_BYTES}")
        return path.read_bytes()
    except FileNotFoundError as error:
        raise Rejected("missing_file", f"no {path}") from error
    except (OSError, ValueError) as error:  # ValueError: a table's path with a zero byte in it
        raise Rejected("unreadable", str(error)) from error


def _format(data: bytes) -> str | None:
    """The field a file is stored under as it is, by its first bytes; None for other formats."""
    if data.startswith(b"\xff\xd8\xff"):
        return "jpg"
    if data.startswith(b"\x89PNG"):
        return "png"
    return "webp" if data.startswith(b"RIFF") and data[8:12] == b"WEBP" else None


def _shrink(pixels: np.ndarray, max_side: int | None) -> np.ndarray:
    longer, shorter = max(pixels.shape[:2]), min(pixels.shape[:2])
    if max_side is None or longer <= max_side:
        return pixels
    resized = resize_shorter_side(pixels, max(round(shorter * max_side / longer), 1))
    return resized[:max_side, :max_side]  # rounding may leave a pixel more


def _encode_jpg(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "jpeg", quality=_JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()


def write_entries(entries: Sequence[Entry], writer: DatasetWriter, *, max_side: int | None) -> Counts:
    """Load every entry with a few threads and write it, in order; equal images fall into the same split."""

    def attempt(entry: Entry) -> Sample | Rejected:
        try:
            return load(entry, max_side=max_side)
        except Rejected as error:
            return error

    with writer, ThreadPoolExecutor(_THREADS) as pool, progress.bar("shards", len(entries)) as bar:
        for start in range(0, len(entries), _CHUNK):
            chunk = entries[start : start + _CHUNK]
            for entry, result in zip(chunk, pool.map(attempt, chunk), strict=True):
                if isinstance(result, Rejected):
                    writer.reject(entry.name, result)
                else:
                    writer.add(result, group=result.facts["sha256"])
            bar.advance(len(chunk), f"{writer.counts.rejected.total():,} rejected")
    return writer.counts


def say(*lines: str) -> None:
    """Write lines to standard output as they are."""
    console = Console(soft_wrap=True, highlight=False, markup=False, emoji=False)
    for line in lines:
        console.print(line)


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
    return [f"next: python precompute_latents.py +experiment=NAME data.images={out / 'train'}"]


def run_tool(work: Callable[[argparse.Namespace], int], arguments: argparse.Namespace) -> int:
    """Call a tool's work; a mistake that the user can mend is one line and exit code 2."""
    try:
        return work(arguments)
    except (ValueError, OSError) as error:
        Console(stderr=True, soft_wrap=True, highlight=False, markup=False).print(f"error: {error}")
        return 2


def _work(arguments: argparse.Namespace) -> int:
    if not arguments.folder.is_dir():
        raise FileNotFoundError(f"{arguments.folder} is no directory; give the folder that holds the images")
    if arguments.max_side is not None and arguments.max_side < 1:
        raise ValueError(f"--max-side {arguments.max_side}; must be at least 1 pixel")
    writer = DatasetWriter(arguments.out, shard_size=arguments.shard_size, val_share=arguments.val_share)
    if arguments.table is None:
        entries = folder_entries(arguments.folder)
    else:
        entries = table_entries(
            arguments.folder,
            arguments.table,
            image_column=arguments.image_column,
            caption_column=arguments.caption_column,
        )
    clear(arguments.out, overwrite=arguments.overwrite)
    counts = write_entries(entries, writer, max_side=arguments.max_side)
    say(*summary(arguments.out, counts))
    if not counts.written:
        say(f"nothing was written: {arguments.folder} gave no usable image with a caption")
        return 1
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 0, 1 where nothing was written, 2 for a mistake in the arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m data_tools.make_shards",
        description="Write a folder of captioned images as WebDataset shards (img2dataset convention).",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="the images, in subfolders or not")
    parser.add_argument("out", type=Path, help="where train/ and val/ are written")
    parser.add_argument("--table", type=Path, help="captions from a .csv, .jsonl or .parquet instead of .txt files")
    parser.add_argument("--image-column", default="image", help="column of image paths (default: image)")
    parser.add_argument("--caption-column", default="caption", help="column of captions (default: caption)")
    parser.add_argument("--shard-size", type=int, default=10_000, help="samples in a shard (default: 10000)")
    parser.add_argument("--val-share", type=float, default=0.05, help="share held out, by hash (default: 0.05)")
    parser.add_argument("--max-side", type=int, help="shrink longer images to this many pixels (default: keep)")
    parser.add_argument("--overwrite", action="store_true", help="replace the shards that are in OUT")
    return run_tool(_work, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
