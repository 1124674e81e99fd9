"""Any folder of images -> WebDataset shards by the img2dataset convention: captions, classes, boxes, label maps.

Captions come from .txt files or a table; `annotations.py` brings the rest. Knows nothing of models or latents.
"""

import argparse
import csv
import io
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from data_tools.annotations import Annotation, Classes, CocoBoxes, FolderClasses, LabelMaps, OpenImagesBoxes
from data_tools.command_line import run_tool, say
from data_tools.dataset_writer import (
    Counts,
    DatasetWriter,
    Rejected,
    Sample,
    encode_png,
    image_facts,
    summary,
    write_report,
)
from ldm_scale.core import progress, storage
from ldm_scale.images.decode import UndecodableImage, decode
from ldm_scale.images.resize import resize_shorter_side

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
"""Files that count as images; everything else in a folder is left alone."""
_MAX_BYTES = 2**28  # of one image file
_JPEG_QUALITY = 95
_CHUNK = 256  # files handed to the threads at a time
_THREADS = 8
_FREE = ("out", "overwrite", "report")  # arguments that do not decide what is written

_EXAMPLES = """\
examples:
  python -m data_tools.make_shards photos data/photos
      photos/a/cat.jpg with its caption in photos/a/cat.txt -> data/photos/train/00000.tar, ...
  python -m data_tools.make_shards photos data/photos --table captions.csv --image-column file --caption-column text
      captions from a table (.csv, .jsonl or .parquet); its image paths are relative to the folder
  python -m data_tools.make_shards scans data/scans --max-side 512 --val-share 0.02 --shard-size 5000
      shrink images longer than 512 pixels; hold 2% of the images out in data/scans/val
  python -m data_tools.make_shards imagenet/train data/imagenet --classes --val-share 0
  python -m data_tools.make_shards imagenet/val data/imagenet_val --classes --class-ids data/imagenet/classes.json
      imagenet/train/n01440764/x.jpg is of class n01440764; the second call gives classes the numbers of the first
  python -m data_tools.make_shards coco/train2017 data/coco --coco coco/annotations/instances_train2017.json
  python -m data_tools.make_shards openimages/train data/openimages --open-images oidv6-train-annotations-bbox.csv \\
      --class-names class-descriptions-boxable.csv
      boxes for layout-to-image
  python -m data_tools.make_shards ade20k/images data/ade20k --maps ade20k/annotations
      images/a/1.jpg with the label map annotations/a/1.png, for segmentation-to-image

Kinds may be combined. With a class, boxes or a map a caption may be missing. Run again after a stop, finished shards
are kept. Beside train/ and val/ in OUT: rejected.jsonl, classes.json, and the report unless --report says where.
Exit code: 1 where nothing was written, 2 for a mistake in the arguments.
"""


@dataclass(frozen=True, slots=True)
class Entry:
    """One image to read, or a row that names none."""

    name: str
    """How rejected.jsonl calls it."""
    image: Path | None
    caption: str | Path | None
    """The text, the file that holds it, or None where there is none."""


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


def load(entry: Entry, *, max_side: int | None, annotations: Sequence[Annotation] = ()) -> Sample:
    """Read and check one entry. The bytes stay as they are where readers know the format and no side is too long.

    raises  Rejected
    """
    if entry.image is None:
        raise Rejected("missing_file", f"no image for {entry.name}")
    caption = _caption(entry, required=not annotations)
    data = _read_image(entry.image)
    try:
        original = decode(data)
    except UndecodableImage as error:
        raise Rejected(error.reason, str(error)) from error
    pixels, suffix = _shrink(original, max_side), _format(data)
    if pixels is not original or suffix is None:
        suffix = "jpg" if suffix == "jpg" else "png"
        data = _encode_jpg(pixels) if suffix == "jpg" else encode_png(pixels)
    members = {suffix: data} | ({"txt": caption.encode()} if caption else {})
    facts = {**image_facts(data, pixels, caption=caption, original=original), "source": entry.name}
    for annotation in annotations:
        found = annotation.of(entry.name, original, (pixels.shape[1], pixels.shape[0]))
        members |= found.members
        facts |= found.facts
    return Sample(members, facts)


def _caption(entry: Entry, *, required: bool) -> str:
    """The caption without space around it; empty where there is none and none is required."""
    text = entry.caption
    try:
        if isinstance(text, Path):
            text = text.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        text = None
    except OSError as error:
        raise Rejected("unreadable", str(error)) from error
    caption = (text or "").strip()
    if required and not caption:
        raise Rejected("missing_caption", f"no caption, or an empty one, for {entry.name}")
    return caption


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


def write_entries(
    entries: Sequence[Entry],
    writer: DatasetWriter,
    *,
    max_side: int | None,
    annotations: Sequence[Annotation] = (),
    done: frozenset[int] = frozenset(),
) -> Counts:
    """Load every entry with a few threads and write it, in order; equal images fall into the same split.

    done  places of entries that an earlier run has written
    """

    def attempt(place: int) -> Sample | Rejected:
        try:
            return load(entries[place], max_side=max_side, annotations=annotations)
        except Rejected as error:
            return error

    todo = [place for place in range(len(entries)) if place not in done]
    with (
        writer,
        ThreadPoolExecutor(_THREADS) as pool,
        progress.bar("shards", len(entries), done=len(entries) - len(todo)) as bar,
    ):
        for start in range(0, len(todo), _CHUNK):
            chunk = todo[start : start + _CHUNK]
            for place, result in zip(chunk, pool.map(attempt, chunk), strict=True):
                if isinstance(result, Rejected):
                    writer.reject(entries[place].name, result)
                else:
                    writer.add(result, group=result.facts["sha256"], place=place)
            bar.advance(len(chunk), f"{writer.counts.rejected.total():,} rejected")
    return writer.counts


def _annotations(arguments: argparse.Namespace) -> list[Annotation]:
    classes = Classes.read(arguments.class_ids) if arguments.class_ids else None
    found: list[Annotation] = []
    if arguments.classes:
        found.append(FolderClasses(arguments.folder, classes))
    if arguments.coco:
        found.append(CocoBoxes(arguments.coco, classes))
    if arguments.open_images:
        found.append(OpenImagesBoxes(arguments.open_images, arguments.class_names, classes))
    if arguments.maps:
        found.append(LabelMaps(arguments.maps))
    if sum(one.classes is not None for one in found) > 1:
        raise ValueError("--classes, --coco and --open-images each number classes; choose one of them")
    return found


def _entries(arguments: argparse.Namespace) -> list[Entry]:
    if arguments.table is None:
        return folder_entries(arguments.folder)
    return table_entries(
        arguments.folder, arguments.table, image_column=arguments.image_column, caption_column=arguments.caption_column
    )


def _check(arguments: argparse.Namespace) -> None:
    folder, maps = arguments.folder, arguments.maps
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no directory; give the folder that holds the images")
    if arguments.max_side is not None and arguments.max_side < 1:
        raise ValueError(f"--max-side {arguments.max_side}; must be at least 1 pixel")
    if maps is not None and maps.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"--maps {maps} lies in {folder}, so its files would be taken for images; move it out")
    if arguments.class_names and not arguments.open_images:
        raise ValueError("--class-names belongs to --open-images; COCO's file and folders name their classes")


def _labels_seen(out: Path) -> list[int]:
    """Every label that occurs in a label map."""
    tables = (pq.read_table(path, columns=["labels"]) for path in sorted(out.glob("*/*.parquet")))
    return sorted(
        {label for table in tables for label in table["labels"].combine_chunks().flatten().unique().to_pylist()}
    )


def _work(arguments: argparse.Namespace) -> int:
    _check(arguments)
    out: Path = arguments.out
    writer = DatasetWriter(out, shard_size=arguments.shard_size, val_share=arguments.val_share)
    annotations, entries = _annotations(arguments), _entries(arguments)
    recipe = {name: str(value) for name, value in vars(arguments).items() if name not in _FREE}
    recipe |= {"files": storage.digest([entry.name for entry in entries])}
    done = writer.begin(recipe, overwrite=arguments.overwrite)
    facts: dict[str, Any] = {}
    for annotation in annotations:
        if annotation.classes is not None:
            storage.write_json(out / "classes.json", annotation.classes.to_json())
            facts |= {"classes": len(annotation.classes.names), "left_out": dict(+annotation.left_out)}
            say(f"{facts['classes']:,} classes, named in {out / 'classes.json'}")
            say(*(f"  left out {n:,} boxes: {reason}" for reason, n in facts["left_out"].items()))
    counts = write_entries(entries, writer, max_side=arguments.max_side, annotations=annotations, done=frozenset(done))
    if arguments.maps and counts.written:
        facts |= {"labels": _labels_seen(out)}
        say(f"labels in the maps: {', '.join(map(str, facts['labels']))}")
    report = write_report(out, counts, facts, arguments.report)
    say(f"report: {report}", *summary(out, counts))
    if not counts.written:
        say(f"nothing was written: {arguments.folder} gave no usable image")
        return 1
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 0, 1 where nothing was written, 2 for a mistake in the arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m data_tools.make_shards",
        description="Write a folder of images and what is known of them as WebDataset shards (img2dataset convention).",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="the images, in subfolders or not")
    parser.add_argument("out", type=Path, help="where train/ and val/ are written")
    parser.add_argument("--table", type=Path, help="captions from a .csv, .jsonl or .parquet instead of .txt files")
    parser.add_argument("--image-column", default="image", help="column of image paths (default: image)")
    parser.add_argument("--caption-column", default="caption", help="column of captions (default: caption)")
    parser.add_argument("--classes", action="store_true", help="an image's class is the first folder of its path")
    parser.add_argument("--coco", type=Path, metavar="JSON", help="boxes from a COCO instances file")
    parser.add_argument("--open-images", type=Path, metavar="CSV", help="boxes from an Open Images box file")
    parser.add_argument("--class-names", type=Path, metavar="CSV", help="Open Images' class descriptions")
    parser.add_argument("--class-ids", type=Path, metavar="JSON", help="number classes as this classes.json does")
    parser.add_argument("--maps", type=Path, metavar="FOLDER", help="label maps: PNG files under the images' names")
    parser.add_argument("--shard-size", type=int, default=10_000, help="samples in a shard (default: 10000)")
    parser.add_argument("--val-share", type=float, default=0.05, help="share held out, by hash (default: 0.05)")
    parser.add_argument("--max-side", type=int, help="shrink longer images to this many pixels (default: keep)")
    parser.add_argument("--overwrite", action="store_true", help="replace the shards that are in OUT")
    parser.add_argument("--report", type=Path, help="where the JSON report goes (default: OUT/report.json)")
    return run_tool(_work, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
