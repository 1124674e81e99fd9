"""30,000 pictures of MS-COCO's val2014, a caption each, as WebDataset shards: what text-to-image models are scored on.

The rule behind published lists (DM-GAN's `uid_caption.csv` among them): pictures at random without replacement, and of
each one of its captions at random. Here both draws are hashes of ids and a seed, so they depend on neither the order of
the annotations nor a library; `--list` takes a published list instead. Pictures are stored as they are: crop and size
are the loader's business. Downloads nothing.
"""

import argparse
import csv
import io
import re
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data_tools.command_line import run_tool, say
from data_tools.dataset_writer import Rejected, Sample, Shard, require_shard_size
from data_tools.make_shards import Entry, load
from ldm_scale.core import progress, rng, storage

_THREADS = 8
_ID_COLUMNS, _CAPTION_COLUMNS = ("image_id", "uid", "file_name"), ("caption", "text")
_ID = re.compile(r"(?:COCO_val2014_)?0*(\d+)(?:_mscoco_\d+|\.jpg)?")  # 42, 42_mscoco_3, COCO_val2014_000000000042.jpg

_EXAMPLES = """\
examples:
  python -m data_tools.coco30k annotations/captions_val2014.json val2014 data/coco30k
      30,000 pictures and captions by seed 0
  python -m data_tools.coco30k annotations/captions_val2014.json val2014 data/coco30k --list uid_caption.csv
      exactly a published list: columns image_id, uid or file_name, and caption or text (.csv, or .tsv with tabs)

Beside the shards: prompts.csv (key, image_id, caption), and report.json with the sha256 of what was read and written.
Then: data.validation=data/coco30k in training, and `python evaluate.py run_dir=RUN evaluation.images=30000` at the end.
"""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A picture with one of its captions."""

    image_id: int
    caption: str


def draw(captions: Sequence[dict[str, Any]], count: int, seed: int) -> list[Prompt]:
    """`count` pictures, and for each one of its captions, in random order.

    captions  `annotations` of a COCO captions file: dicts of id, image_id, caption
    raises    ValueError where there are fewer pictures
    """

    def rank(kind: str, number: int) -> tuple[float, int]:
        return rng.text_uniform(f"coco30k/{seed}/{kind}/{number}"), number

    chosen: dict[int, dict[str, Any]] = {}
    for one in captions:
        known = chosen.get(one["image_id"])
        if known is None or rank("caption", one["id"]) < rank("caption", known["id"]):
            chosen[one["image_id"]] = one
    if len(chosen) < count:
        raise ValueError(f"--count {count}: the annotations know {len(chosen)} pictures")
    order = sorted(chosen, key=lambda image_id: rank("image", image_id))
    return [Prompt(image_id, chosen[image_id]["caption"].strip()) for image_id in order[:count]]


def read_list(path: Path) -> list[Prompt]:
    """A published list, in its order.

    raises  ValueError for a column that is missing, and for an id that is none
    """
    with open(path, newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",")
        columns = rows.fieldnames or []
        names = [next((one for one in known if one in columns), None) for known in (_ID_COLUMNS, _CAPTION_COLUMNS)]
        if None in names:
            raise ValueError(
                f"--list {path} has the columns {', '.join(columns)}; it needs one of {', '.join(_ID_COLUMNS)}, and "
                f"one of {', '.join(_CAPTION_COLUMNS)}"
            )
        return [Prompt(_image_id(row[str(names[0])], path), row[str(names[1])].strip()) for row in rows]


def _image_id(text: str, path: Path) -> int:
    match = _ID.fullmatch(Path(text).name)
    if match is None:
        raise ValueError(f"--list {path}: {text!r} names no picture of val2014")
    return int(match[1])


def _load(entries: Sequence[Entry]) -> Iterator[Sample]:
    """Each entry read and decoded, in order. A set that lacks one is another set.

    raises  ValueError naming the file
    """

    def attempt(entry: Entry) -> Sample:
        try:
            return load(entry, max_side=None)
        except Rejected as error:
            raise ValueError(f"{entry.image} cannot be used ({error.reason}: {error}); fetch it anew") from error

    with ThreadPoolExecutor(_THREADS) as pool:
        for start in range(0, len(entries), 4 * _THREADS):
            yield from pool.map(attempt, entries[start : start + 4 * _THREADS])


def _write(prompts: Sequence[Prompt], folder: Path, names: dict[int, str], out: Path, shard_size: int) -> list[Path]:
    """All shards; none of the last one where a picture cannot be used. Returns the tars."""
    entries = [Entry(names[one.image_id], folder / names[one.image_id], one.caption) for one in prompts]
    absent = [entry.name for entry in entries if entry.image is not None and not entry.image.exists()]
    if absent:
        raise FileNotFoundError(f"{folder} lacks {len(absent):,} of {len(entries):,} pictures, {absent[0]} among them")
    tars, shard = [], Shard(out, 0)
    try:
        with progress.bar("coco30k", len(entries)) as bar:
            for prompt, sample in zip(prompts, _load(entries), strict=True):
                if shard.count == shard_size:
                    shard.close()
                    tars.append(shard.tar)
                    shard = Shard(out, len(tars))
                shard.add(replace(sample, facts={**sample.facts, "image_id": prompt.image_id}))
                bar.advance(1)
    except BaseException:
        shard.abort()
        raise
    shard.close()
    return [*tars, shard.tar]


def _write_prompts(prompts: Sequence[Prompt], out: Path, shard_size: int) -> Path:
    table = io.StringIO()
    rows = csv.writer(table, lineterminator="\n")
    rows.writerow(("key", "image_id", "caption"))
    for place, one in enumerate(prompts):
        shard, index = divmod(place, shard_size)
        rows.writerow((f"{out.name}_{shard:05d}_{index:05d}", one.image_id, one.caption))
    with storage.atomic_write(out / "prompts.csv") as file:
        file.write(table.getvalue().encode())
    return out / "prompts.csv"


def _work(arguments: argparse.Namespace) -> int:
    require_shard_size(arguments.shard_size)
    out: Path = arguments.out
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} is not empty; empty it, or name a new directory")
    known = storage.read_json(arguments.captions)
    names = {image["id"]: str(image["file_name"]) for image in known["images"]}
    if arguments.list is None:
        prompts = draw(known["annotations"], arguments.count, arguments.seed)
        rule: dict[str, Any] = {"rule": "drawn", "seed": arguments.seed}
    else:
        prompts = read_list(arguments.list)
        rule = {"rule": "list", "list": arguments.list.name, "list_sha256": storage.sha256_file(arguments.list)}
        if unknown := [one.image_id for one in prompts if one.image_id not in names]:
            raise ValueError(f"--list {arguments.list}: {arguments.captions} knows no picture {unknown[0]}")
    tars = _write(prompts, arguments.images, names, out, arguments.shard_size)
    table = _write_prompts(prompts, out, arguments.shard_size)
    digests = {file.name: storage.sha256_file(file) for file in (table, *tars)}
    report = {
        "images": len(prompts), **rule, "captions": arguments.captions.name,
        "captions_sha256": storage.sha256_file(arguments.captions), "sha256": digests,
    }  # fmt: skip
    storage.write_json(out / "report.json", report)
    say(f"{len(prompts):,} pictures, a caption each, in {out}", f"prompts.csv: sha256 {digests[table.name]}")
    say(f"next: python evaluate.py run_dir=RUN data.images={out} evaluation.images={len(prompts)}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 0, or 2 for a mistake in the arguments or files."""
    parser = argparse.ArgumentParser(
        prog="python -m data_tools.coco30k",
        description="Write the MS-COCO prompts and pictures that text-to-image models are scored on.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("captions", type=Path, help="captions_val2014.json")
    parser.add_argument("images", type=Path, help="the folder val2014 of pictures")
    parser.add_argument("out", type=Path, help="a new directory for the shards")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--list", type=Path, metavar="FILE", help="a published list instead of a draw")
    which.add_argument("--seed", type=int, default=0, help="of the draw (default: 0)")
    parser.add_argument("--count", type=int, default=30_000, help="pictures drawn (default: 30000)")
    parser.add_argument("--shard-size", type=int, default=10_000, help="samples in a shard (default: 10000)")
    return run_tool(_work, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
