"""Which samples a training reads when, and when it reads a sample.

The order of the data is arithmetic (data/order.py, data/mixture.py), so neither the training nor its machines are
needed: a data set, a seed and a preset say everything, or a run directory, which knows all three. What is printed is
the order as laid down: a sample that cannot be read is replaced at run time, and named in the run's events.jsonl.

Letters: B positions asked for.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.command_line import run_tool, say
from ldm_scale.core import progress, storage
from ldm_scale.data import cache, order
from ldm_scale.data.mixture import Mixture, preset_mixture
from ldm_scale.data.order import Order, OrderPreset, preset_order
from ldm_scale.data.samples import Task
from ldm_scale.data.shards import ShardSet
from ldm_scale.data.sources import joined_id

_CHECKPOINT = re.compile(r"images_\d{12}(\.abandoned)?")
_EPOCHS = 3  # of a key, where no checkpoint says how far a run has come
_SHOWN = 12

_EXAMPLES = """\
examples:
  python -m data_tools.trace data/toy/latents --seed 0 --from 41600 --count 32
      what one process reads after 41,600 images
  python -m data_tools.trace data/laion --seed 0 --preset window --global-batch 2048 --rank 3 --world 32 --json
      what rank 3 of 32 reads first, one JSON object a line: {"position":, "key":, "shard":}
  python -m data_tools.trace --run runs/txt2img_laion/toy --key train_00002_00017
      when a run reads a sample, and which of its checkpoints have seen it
  python -m data_tools.trace data/laion data/openmoji/train --weights 0.9 0.1 --seed 0 --task text
      several sources mixed by weight

--json prints what a program reads. Exit code: 0; 1 where no sample has the key; 2 for a mistake in the arguments.
"""


@dataclass(frozen=True, slots=True)
class Samples:
    """The samples of one source by number: image shards or a latent cache."""

    source: str
    order_id: str
    names: list[str]
    """Of the shards."""
    starts: np.ndarray
    """(shards + 1,) int64: number of the first sample of each shard, then of all."""
    keys: Callable[[np.ndarray], list[str]]

    @property
    def n(self) -> int:
        return int(self.starts[-1])

    @classmethod
    def open(cls, source: str, index_dir: str | None, task: Task, selection: Sequence[str] = ()) -> "Samples":
        """Open a latent cache, or image shards of which those samples count that the task can use; and are selected."""
        found: cache.LatentCache | ShardSet
        if _is_cache(source):
            found = cache.LatentCache.open(source, index_dir).view(selection)
        else:
            found = ShardSet.open(source, index_dir, require=task.require).view(selection)
        return cls(source, found.order_id, found.names, found.starts, found.keys)

    def shards(self, ids_B: np.ndarray) -> list[str]:
        """The shard of each sample."""
        return [self.names[i] for i in (np.searchsorted(self.starts, ids_B, side="right") - 1).tolist()]

    def find(self, key: str) -> np.ndarray:
        """Numbers of the samples with that key: one, unless shards repeat keys."""
        found = []
        with progress.bar(f"looking for {key}", len(self.names), unit="shards") as bar:
            for first, last in zip(self.starts[:-1].tolist(), self.starts[1:].tolist(), strict=True):
                found += [first + i for i, one in enumerate(self.keys(np.arange(first, last))) if one == key]
                bar.advance(1)
        return np.array(found, np.int64)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What the record of a checkpoint says of the data."""

    name: str
    images_seen: int
    order_id: str
    order: Mapping[str, Any]

    @classmethod
    def of_run(cls, run: Path) -> list["Checkpoint"]:
        """The checkpoints that a run keeps, oldest first; abandoned ones have seen samples too."""
        found = []
        for folder in sorted((run / "checkpoints").glob("images_*")):
            if _CHECKPOINT.fullmatch(folder.name) and (folder / "complete.json").is_file():
                state = storage.read_json(folder / "complete.json")["state"]
                found.append(cls(folder.name, state["images_seen"], state["order_id"], state["order"]))
        return found


@dataclass(frozen=True, slots=True)
class Stream:
    """A training's samples in its order. One source is a mixture of one."""

    sources: list[Samples]
    mixture: Mixture
    checkpoints: list[Checkpoint]
    global_batch: int | None

    def rows(self, positions_B: np.ndarray) -> list[dict[str, Any]]:
        """Position, key and shard (and the source, where there are several) at each position."""
        source_B, sample_B = self.mixture(positions_B)
        rows: list[dict[str, Any]] = [{"position": position} for position in positions_B.tolist()]
        for number in np.unique(source_B).tolist():
            samples, here = self.sources[number], np.flatnonzero(source_B == number)
            ids = sample_B[here]
            for i, key, shard in zip(here.tolist(), samples.keys(ids), samples.shards(ids), strict=True):
                rows[i] |= {"key": key, "shard": shard}
                if len(self.sources) > 1:
                    rows[i]["source"] = samples.source
        return rows

    def readings(self, key: str) -> list[dict[str, Any]]:
        """For each sample with that key: the positions that read it, and how often each checkpoint has seen it."""
        return [
            self._readings_of(number, sample, key)
            for number, samples in enumerate(self.sources)
            for sample in samples.find(key).tolist()
        ]

    def _readings_of(self, number: int, sample: int, key: str) -> dict[str, Any]:
        samples, seen = self.sources[number], max((c.images_seen for c in self.checkpoints), default=0)
        epochs = self.mixture.counts(seen)[number] // samples.n + 1 if seen else _EPOCHS
        ids = np.array([sample])
        positions = [int(self.mixture.inverse(number, ids, epoch)[0]) for epoch in range(epochs)]
        return {
            "key": key,
            "shard": samples.shards(ids)[0],
            "source": samples.source,
            "positions": positions,
            "checkpoints": {c.name: sum(p < c.images_seen for p in positions) for c in self.checkpoints},
        }


def stream_of_run(run: Path, datasets: Sequence[str], index_dir: str | None) -> Stream:
    """The stream of a run: as its checkpoints recorded it, or as its configuration has it where there are none.

    datasets  where the data lie now, if not where the configuration says
    raises    ValueError where the data are not those that the run has read
    """
    config = storage.read_json(run / "config.json")
    data = {"mixture": {}, "source": "latents", "selection": [], **config["data"]}  # earlier versions had no such keys
    parts = [part for _, part in sorted(data["mixture"].items())] or [{**data, "weight": 1.0}]
    reads_latents = config["unet"] is not None and data["source"] == "latents"
    named = datasets or [part["latents" if reads_latents else "images"] for part in parts]
    if len(named) != len(parts):
        raise ValueError(f"{len(named)} data sets for the {len(parts)} sources of {run}: give one for each, or none")
    sources = [
        Samples.open(source, index_dir or data["index_dir"], Task[data["task"]], part["selection"])
        for source, part in zip(named, parts, strict=True)
    ]
    checkpoints = Checkpoint.of_run(run)
    if not checkpoints:
        preset, seed, weights = OrderPreset[data["order"]], config["seed"], [part["weight"] for part in parts]
        return Stream(sources, _mixture(preset, sources, weights, seed), [], config["global_batch"])
    newest = max(checkpoints, key=lambda checkpoint: checkpoint.images_seen)
    identities = {name: source.order_id for name, source in zip(sorted(data["mixture"]), sources, strict=False)}
    order_id = joined_id(identities) if data["mixture"] else sources[0].order_id
    if newest.order_id != order_id:
        raise ValueError(
            f"{run} has read samples {newest.order_id[:12]}, {' with '.join(named)} holds {order_id[:12]}: "
            "give the data set that the run was trained on"
        )
    state = newest.order
    is_one = state["algorithm"] in order.ALGORITHMS
    mixture = Mixture([Order.from_state(state)], [1.0], seed=0) if is_one else Mixture.from_state(state)
    return Stream(sources, mixture, checkpoints, config["global_batch"])


def _mixture(preset: OrderPreset, sources: Sequence[Samples], weights: Sequence[float], seed: int) -> Mixture:
    """The order of one source, which is a mixture of one, or of several."""
    if len(sources) == 1:
        return Mixture([preset_order(preset, n=sources[0].n, seed=seed)], [1.0], seed=seed)
    return preset_mixture(preset, sizes=[samples.n for samples in sources], weights=weights, seed=seed)


def positions_of_rank(start: int, count: int, *, global_batch: int, rank: int, world: int) -> np.ndarray:
    """(count,) int64 stream positions that a rank reads, of which the first global batch begins at `start`."""
    if global_batch < 1 or global_batch % world:
        raise ValueError(f"--global-batch {global_batch} is no multiple of --world {world}: change one")
    if not 0 <= rank < world:
        raise ValueError(f"--rank {rank} in a world of {world}")
    mine = np.arange(rank, global_batch, world, dtype=np.int64)
    batches = start + global_batch * np.arange(-(-count // len(mine)))
    return (batches[:, None] + mine).ravel()[:count]


def _is_cache(source: str) -> bool:
    """True for the directory of a latent cache, and for some of its tars."""
    folders = {source.rstrip("/"), source.rpartition("/")[0] or "."}
    return any(_names_cache(f"{folder}/manifest.json") for folder in folders)


def _names_cache(manifest: str) -> bool:
    try:
        return storage.read_json(manifest)["format"] == cache.FORMAT
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Rows as aligned columns."""
    columns = list(rows[0])
    width = {name: max(len(name), *(len(str(row[name])) for row in rows)) for name in columns}
    lines = [columns, *([str(row[name]) for name in columns] for row in rows)]
    return ["  ".join(c.ljust(width[name]) for name, c in zip(columns, line, strict=True)).rstrip() for line in lines]


def _in_words(reading: Mapping[str, Any]) -> list[str]:
    positions, checkpoints = reading["positions"], reading["checkpoints"]
    shown = ", ".join(f"{position:,}" for position in positions[:_SHOWN])
    left = f" and {len(positions) - _SHOWN:,} more" if len(positions) > _SHOWN else ""
    lines = [
        f"{reading['key']} in {reading['shard']} of {reading['source']}",
        f"  read at positions {shown}{left}, once in each of epochs 0 .. {len(positions) - 1}",
    ]
    for name, times in checkpoints.items():
        lines.append(f"  {name}  " + (f"has seen it {times:,} times" if times else "has not seen it"))
    return lines


def _stream(arguments: argparse.Namespace) -> Stream:
    if arguments.run is not None:
        for name in ("seed", "preset", "task", "weights"):
            if vars(arguments)[name] is not None:
                raise ValueError(f"--{name} with --run: the run says it; leave it out")
        return stream_of_run(arguments.run, arguments.dataset, arguments.index_dir)
    if not arguments.dataset or arguments.seed is None:
        raise ValueError("give a DATASET and --seed, or --run RUN_DIR, which knows both")
    preset, task = OrderPreset[arguments.preset or "random_access"], Task[arguments.task or "text"]
    sources = [Samples.open(source, arguments.index_dir, task) for source in arguments.dataset]
    weights = arguments.weights or []
    if len(weights) != len(sources) and (weights or len(sources) > 1):
        raise ValueError(f"{len(sources)} data sets with {len(weights)} --weights; one weight a data set")
    return Stream(sources, _mixture(preset, sources, weights, arguments.seed), [], None)


def _say_readings(stream: Stream, key: str, *, as_json: bool) -> int:
    readings = stream.readings(key)
    for reading in readings:
        say(*([json.dumps(reading)] if as_json else _in_words(reading)))
    if not readings and not as_json:
        say(f"no sample of {', '.join(samples.source for samples in stream.sources)} has key {key!r}")
    return 0 if readings else 1


def _work(arguments: argparse.Namespace) -> int:
    if arguments.start < 0 or arguments.count < 1:
        raise ValueError(f"--from {arguments.start} --count {arguments.count}; at least position 0, at least 1 sample")
    stream = _stream(arguments)
    if arguments.key is not None:
        return _say_readings(stream, arguments.key, as_json=arguments.json)
    global_batch = arguments.global_batch or stream.global_batch
    if global_batch is None and arguments.world > 1:
        raise ValueError(f"--world {arguments.world} without --global-batch: ranks take turns within a global batch")
    positions = positions_of_rank(
        arguments.start,
        arguments.count,
        global_batch=global_batch or 1,
        rank=arguments.rank,
        world=arguments.world,
    )
    rows = stream.rows(positions)
    if arguments.json:
        say(*map(json.dumps, rows))
        return 0
    total = sum(samples.n for samples in stream.sources)
    say(
        *_table(rows), f"{len(rows):,} readings of {total:,} samples; next: --key {rows[0]['key']} says when it is read"
    )
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 0, 1 where no sample has the key, 2 for a mistake in the arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m data_tools.trace",
        description="Print which samples a training reads when, and when it reads a sample.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("dataset", nargs="*", help="image shards or a latent cache; several with --weights")
    parser.add_argument("--run", type=Path, help="run directory: it says data set, seed, order and checkpoints")
    parser.add_argument("--seed", type=int, help="the run's seed")
    parser.add_argument("--preset", choices=[p.name for p in OrderPreset], help="data.order (default: random_access)")
    parser.add_argument(
        "--task", choices=[task.name for task in Task], help="data.task of image shards (default: text)"
    )
    parser.add_argument("--weights", type=float, nargs="+", help="of several data sets")
    parser.add_argument("--index-dir", help="data.index_dir, for sources that are remote or read-only")
    parser.add_argument("--global-batch", type=int, help="images per optimizer step (default: the run's)")
    parser.add_argument("--rank", type=int, default=0, help="of which process (default: 0)")
    parser.add_argument("--world", type=int, default=1, help="number of processes (default: 1)")
    parser.add_argument("--from", dest="start", type=int, default=0, help="first position, in images (default: 0)")
    parser.add_argument("--count", type=int, default=10, help="samples of that rank (default: 10)")
    parser.add_argument("--key", help="say when the sample of this key is read, and by which checkpoints")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    return run_tool(_work, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
