"""The toy world as WebDataset shards: captioned scenes with class, boxes and label map, without any download.

Validation shows only captions that training never shows. The same arguments give the same bytes; a run that was cut off
is finished by running it again, and a finished world is recognised and left alone.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_tools.command_line import run_tool, say
from data_tools.dataset_writer import (
    Sample,
    Shard,
    clear,
    encode_png,
    image_facts,
    next_steps,
    require_shard_size,
    stats_file,
)
from ldm_scale.core import progress, rng, storage
from ldm_scale.images.scenes import BACKGROUNDS, JITTER_NUMBERS, Scene, all_scenes

_FORMAT = "toy-world/3"
_EXAMPLES = """\
examples:
  python -m data_tools.make_toy_world data/toy
      the demo's world: 6,000 training and 512 validation images of one thing, 32 pixels a side
  python -m data_tools.make_toy_world data/toy_pairs --objects 2 --size 64 --train 50000 --val 2000
      two things and a relation ("... left of ..."), 64 pixels a side
  python -m data_tools.make_toy_world /tmp/tiny --train 64 --val 16 --shard-size 32
      enough for a smoke test
"""


@dataclass(frozen=True, slots=True)
class Recipe:
    """All that decides the bytes of a world."""

    train: int
    val: int
    objects: int
    size: int
    shard_size: int
    seed: int
    backgrounds: list[str] = field(default_factory=lambda: list(BACKGROUNDS))
    format: str = _FORMAT

    def __post_init__(self) -> None:
        if not self.backgrounds or not set(self.backgrounds) <= set(BACKGROUNDS):
            raise ValueError(f"--backgrounds {' '.join(self.backgrounds)}; some of {' '.join(BACKGROUNDS)}")
        for name, least in (("train", 1), ("val", 0), ("size", 16)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name} {getattr(self, name)}; must be at least {least}")
        require_shard_size(self.shard_size)

    def scenes(self) -> list[Scene]:
        """Every scene of this world, each with a caption of its own."""
        return [scene for scene in all_scenes(self.objects) if scene.background in self.backgrounds]


@dataclass(frozen=True, slots=True)
class Piece:
    """One shard to be written: samples start to stop of a split."""

    split: str
    number: int
    start: int
    stop: int

    @property
    def name(self) -> str:
        return f"{self.split}/{self.number:05d}.tar"


def pieces(recipe: Recipe) -> list[Piece]:
    """The shards of a world."""
    return [
        Piece(split, number, start, min(start + recipe.shard_size, count))
        for split, count in (("train", recipe.train), ("val", recipe.val))
        for number, start in enumerate(range(0, count, recipe.shard_size))
    ]


def samples(recipe: Recipe, piece: Piece) -> Iterator[Sample]:
    """The samples of one shard. Every caption of the split comes once before any comes again."""
    scenes = [scene for scene in recipe.scenes() if scene.held_out == (piece.split == "val")]
    positions = torch.arange(piece.start, piece.stop)
    jitter = rng.uniform(recipe.seed, f"toy/{piece.split}/jitter", positions, (JITTER_NUMBERS,)).numpy()
    order: list[int] = []
    for position, numbers in zip(positions.tolist(), jitter, strict=True):
        turn, place = divmod(position, len(scenes))
        if not order or place == 0:
            order = _order(recipe.seed, piece.split, turn, len(scenes))
        yield _sample(scenes[order[place]], recipe.size, numbers)


def _order(seed: int, split: str, turn: int, count: int) -> list[int]:
    draws = rng.uniform(seed, f"toy/{split}/order", torch.arange(turn * count, (turn + 1) * count))
    return draws.argsort(stable=True).tolist()


def _sample(scene: Scene, size: int, jitter: np.ndarray) -> Sample:
    drawing, caption = scene.draw(size, jitter), scene.caption()
    image = encode_png(drawing.image)
    boxes = [{"box": [box.x0, box.y0, box.x1, box.y1], "class_id": box.class_id} for box in drawing.boxes]
    members = {
        "png": image,
        "txt": caption.encode(),
        "cls": str(scene.things[0].class_id).encode(),
        "boxes.json": json.dumps(boxes).encode(),
        "seg.png": encode_png(drawing.labels),
    }
    return Sample(members, image_facts(image, drawing.image, caption=caption, original=drawing.image))


def write_world(out: Path, recipe: Recipe, *, overwrite: bool = False) -> int:
    """Write what is missing of a world; returns how many shards were written, 0 where it was complete.

    raises  ValueError where `out` holds something else and may not be overwritten
    """
    record = out / "toy_world.json"
    finished = _finished(out, recipe, record)
    if finished is None:
        clear(out, overwrite=overwrite)
        finished = {}
    todo = [piece for piece in pieces(recipe) if piece.name not in finished]
    if not todo:
        return 0
    storage.write_json(record, {"recipe": asdict(recipe), "shards": finished})
    done = sum(piece.stop - piece.start for piece in pieces(recipe) if piece.name in finished)
    with progress.bar("toy world", recipe.train + recipe.val, done=done) as bar:
        for piece in todo:
            finished[piece.name] = _write_piece(out, recipe, piece, bar)
            storage.write_json(record, {"recipe": asdict(recipe), "shards": finished})
    return len(todo)


def _write_piece(out: Path, recipe: Recipe, piece: Piece, bar: progress.Bar) -> dict[str, Any]:
    shard = Shard(out / piece.split, piece.number)
    try:
        for sample in samples(recipe, piece):
            shard.add(sample)
            if shard.count % 100 == 0:
                bar.advance(100)
        bar.advance(shard.count % 100)
        shard.close()
    finally:
        shard.abort()
    return {
        "samples": shard.count,
        "bytes": shard.tar.stat().st_size,
        "sha256": hashlib.sha256(shard.tar.read_bytes()).hexdigest(),
    }


def _finished(out: Path, recipe: Recipe, record: Path) -> dict[str, Any] | None:
    """Whole shards of this very recipe that are already there; None where `out` holds no world of this recipe."""
    if not record.exists():
        return None
    known = storage.read_json(record)
    if known["recipe"] != asdict(recipe):
        return None
    return {name: facts for name, facts in known["shards"].items() if _is_whole(out / name, facts)}


def _is_whole(tar: Path, facts: dict[str, Any]) -> bool:
    sidecars = (tar.with_suffix(".parquet"), stats_file(tar))
    return tar.exists() and tar.stat().st_size == facts["bytes"] and all(path.exists() for path in sidecars)


def _work(arguments: argparse.Namespace) -> int:
    recipe = Recipe(
        train=arguments.train,
        val=arguments.val,
        objects=arguments.objects,
        size=arguments.size,
        shard_size=arguments.shard_size,
        seed=arguments.seed,
        backgrounds=arguments.backgrounds,
    )
    written = write_world(arguments.out, recipe, overwrite=arguments.overwrite)
    state = f"{written} shards written" if written else "already complete, left as it is"
    captions = recipe.scenes()
    held_out = sum(scene.held_out for scene in captions)
    say(
        f"toy world: {state}",
        f"  train {recipe.train:9,}  {arguments.out / 'train'}  ({len(captions) - held_out:,} captions)",
        f"  val   {recipe.val:9,}  {arguments.out / 'val'}  ({held_out:,} captions that training never shows)",
        *next_steps(arguments.out),
    )
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m data_tools.make_toy_world",
        description="Draw the toy world and write it as WebDataset shards (img2dataset convention).",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("out", type=Path, help="where train/ and val/ are written, for instance data/toy")
    parser.add_argument("--train", type=int, default=6000, help="training images (default: 6000)")
    parser.add_argument("--val", type=int, default=512, help="validation images (default: 512)")
    parser.add_argument("--objects", type=int, choices=(1, 2), default=1, help="things in a scene (default: 1)")
    parser.add_argument(
        "--backgrounds", nargs="+", default=list(BACKGROUNDS), choices=list(BACKGROUNDS), help="(default: all of them)"
    )
    parser.add_argument("--size", type=int, default=32, help="side of an image, pixels (default: 32)")
    parser.add_argument("--shard-size", type=int, default=1000, help="samples in a shard (default: 1000)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, another world (default: 0)")
    parser.add_argument("--overwrite", action="store_true", help="replace a different dataset that is in OUT")
    return run_tool(_work, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
