"""Shards of uneven or awkward size, or a selection of them, written again as even ones.

Keys and members stay byte for byte, also members that the index does not know; so do the rows of the `.parquet` files.
Samples go in the order of shards and keys, so equal input gives equal tars. read = written + left out, always. A run
that was cut off is finished by running it again.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash

from data_tools.command_line import run_tool, say
from data_tools.dataset_writer import stats_file
from data_tools.dedup import Rule, equal_samples
from data_tools.metadata import local_file, open_shards, require_known_shards, selected_ids
from data_tools.shard_checks import mapped
from ldm_scale.core import progress, storage
from ldm_scale.data.shards import SIDECARS, CorruptSample, ShardSet, ShardWriter
from ldm_scale.data.tar import Member, split_name, walk
from ldm_scale.data.views import Selection

_FORMAT = "reshard/1"
_EXAMPLES = """\
examples:
  python -m data_tools.reshard data/photos data/even --shard-size 10000
      data/even/00000.tar, ... each with as many samples as the next, give or take one, and 10000 at most
  python -m data_tools.reshard 's3://bucket/laion/{00000..00099}.tar' data/part --selection selection.parquet
      only the samples of a selection; remote shards are fetched one at a time

The report lies in OUT/.ldm/reshard.json unless --report says where. Memory: 27 bytes a sample, to see that no key is
there twice, and the headers of one shard. Exit code: 1 where a damaged sample was left out, 2 for a mistake.
"""


@dataclass(frozen=True, slots=True)
class Recipe:
    """All that decides the bytes of the new shards."""

    source: str
    order_id: str
    content_id: str
    selection: str | None
    """Digest of the selection."""
    shard_size: int
    format: str = _FORMAT


class SourceShard:
    """One source tar with every member of its samples, known to the index or not. Close it after use."""

    def __init__(self, shards: ShardSet, shard: int, selection: Selection | None) -> None:
        self.url = shards.urls[shard]
        self._opened, self._first = shards.opened(shard), int(shards.starts[shard])
        ids = selected_ids(shards, shard, selection)
        keys = shards.keys(ids)
        self._samples = sorted(zip(keys, ids.tolist(), strict=True))
        self._stack = ExitStack()
        self._data = self._stack.enter_context(mapped(self._stack.enter_context(local_file(self.url))))

    def close(self) -> None:
        self._stack.close()

    def samples(self, start: int, stop: int) -> Iterator[tuple[str, dict[str, bytes] | CorruptSample]]:
        """Key and members of some samples in the order of keys, or what is wrong with them."""
        for key, sample_id in self._samples[start:stop]:
            try:
                yield key, self._members(key, self._opened.row(sample_id - self._first))
            except CorruptSample as error:
                yield key, error

    def _members(self, key: str, row: int) -> dict[str, bytes]:
        """Members in the tar's order; those that the index knows are the indexed ones.

        raises  CorruptSample
        """
        index, found = self._opened.index, {}
        for field, member in self._layout.get(key, {}).items():
            data = bytes(self._data[member.offset : member.offset + member.length])
            if (column := index.column.get(field)) is not None:
                self._opened.verify(row, column, data)
            found[field] = data
        indexed = {field for field, column in index.column.items() if index.offsets[row, column]}
        if lost := sorted(indexed - found.keys()):
            raise CorruptSample(key, f"lost_{lost[0]}", self.url)
        return found

    @cached_property
    def _layout(self) -> dict[str, dict[str, Member]]:
        """Members by key and field; of two with one name the first counts, as in the index."""
        layout: dict[str, dict[str, Member]] = {}
        for item in walk(self._data):
            split = split_name(item.name) if isinstance(item, Member) else None
            if isinstance(item, Member) and split is not None:
                layout.setdefault(split[0], {}).setdefault(split[1], item)
        return layout

    def rows(self, keys: list[str]) -> pa.Table:
        """What the shard's parquet file says of some samples, in this order; keys alone where there is none."""
        table = self._table
        if table is None:
            return pa.table({"key": pa.array(keys, pa.string())})
        places = pc.index_in(pa.array(keys, pa.string()), value_set=table["key"].cast(pa.string()).combine_chunks())
        taken = table.take(places)
        return taken.set_column(taken.schema.get_field_index("key"), "key", pa.array(keys, pa.string()))

    @cached_property
    def _table(self) -> pa.Table | None:
        url = self.url.removesuffix(".tar") + ".parquet"
        if not storage.exists(url):
            return None
        with storage.open_read(url) as file:
            table = pq.ParquetFile(file).read()
        return table if "key" in table.column_names else None


class Reshard:
    """The new shards of one recipe: which samples go where, and the writing of each.

    Position i of the samples, by shard and key, lies in the shard whose span holds it.
    """

    def __init__(self, shards: ShardSet, out: Path, recipe: Recipe, selection: Selection | None) -> None:
        self.shards, self.out, self.recipe, self.selection = shards, out, recipe, selection
        counts = shards.counts if selection is None else [selection.counts.get(name, 0) for name in shards.names]
        self._starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self.total = int(self._starts[-1])
        self.count = -(-self.total // recipe.shard_size)
        self._open: tuple[int, SourceShard] | None = None

    def run(self) -> list[dict[str, Any]]:
        """Write what is not there yet; returns the record of every shard."""
        records = []
        with progress.bar("reshard", self.total, unit="samples") as bar:
            for number in range(self.count):
                records.append(self._finished(number) or self._write(number))
                start, stop = self._span(number)
                bar.advance(stop - start, f"{number + 1}/{self.count} shards")
        self.close()
        return records

    def close(self) -> None:
        """Let go of the source that is in use."""
        if self._open is not None:
            self._open[1].close()
            self._open = None

    def tar(self, number: int) -> Path:
        """The path of a new shard."""
        return self.out / f"{number:0{max(5, len(str(self.count - 1)))}d}.tar"

    def _record(self, number: int) -> Path:
        return self.out / SIDECARS / f"{self.tar(number).stem}.reshard.json"

    def _span(self, number: int) -> tuple[int, int]:
        return number * self.total // self.count, (number + 1) * self.total // self.count

    def _finished(self, number: int) -> dict[str, Any] | None:
        """The record of a shard that an earlier run has written, if its tar still has its size."""
        try:
            record = storage.read_json(self._record(number))
            return record if self.tar(number).stat().st_size == record["bytes"] else None
        except FileNotFoundError:
            return None

    def _write(self, number: int) -> dict[str, Any]:
        """Tar, parquet, stats, then the record that says the shard is done."""
        self._record(number).unlink(missing_ok=True)
        tables: list[pa.Table] = []
        rejected: list[list[str]] = []
        with ShardWriter(self.tar(number)) as writer:
            for source, start, stop in self._pieces(number):
                written = []
                for key, members in source.samples(start, stop):
                    if isinstance(members, CorruptSample):
                        rejected.append([members.reason, f"{source.url} {key}"])
                    else:
                        writer.add(key, members)
                        written.append(key)
                tables.append(source.rows(written))
        if any(len(table.column_names) > 1 for table in tables):
            with storage.atomic_write(self.tar(number).with_suffix(".parquet")) as file:
                pq.write_table(_joined(tables, self.tar(number)), file)
        storage.write_json(stats_file(self.tar(number)), _stats(writer.count))
        record = {"written": writer.count, "bytes": self.tar(number).stat().st_size, "rejected": rejected}
        storage.write_json(self._record(number), record)
        return record

    def _pieces(self, number: int) -> Iterator[tuple[SourceShard, int, int]]:
        """What a new shard takes from each source: places from .. to among its samples."""
        start, stop = self._span(number)
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        last = int(np.searchsorted(self._starts, stop, side="left"))
        for shard in range(first, last):
            low, high = int(self._starts[shard]), int(self._starts[shard + 1])
            if low < high:
                yield self._source(shard), max(start, low) - low, min(stop, high) - low

    def _source(self, shard: int) -> SourceShard:
        """A source; only the last one stays open, since they are asked for in order."""
        if self._open is None or self._open[0] != shard:
            self.close()
            self._open = shard, SourceShard(self.shards, shard, self.selection)
        return self._open[1]


def _joined(tables: Sequence[pa.Table], tar: Path) -> pa.Table:
    try:
        return pa.concat_tables(tables, promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise ValueError(f"{tar}: the parquet files of its sources have columns of different types: {error}") from error


def _stats(count: int) -> dict[str, Any]:
    """img2dataset's sidecar, whose times are zero so that equal samples give equal bytes."""
    return {
        "count": count,
        "successes": count,
        "failed_to_download": 0,
        "failed_to_resize": 0,
        "duration": 0.0,
        "start_time": 0.0,
        "end_time": 0.0,
        "status_dict": {"success": count},
    }


def _require_unique_keys(shards: ShardSet, selection: Selection | None) -> None:
    """Refuse keys that occur twice: two samples of one key may come to lie in one shard."""
    among = np.zeros(shards.n, bool)
    for shard in range(len(shards.names)):
        among[selected_ids(shards, shard, selection)] = True
    keys = Rule(
        hashes=lambda shards, shard: np.array(
            [xxhash.xxh3_64_intdigest(key.encode()) for key in shards.keys(shards.shard_ids(shard))], np.uint64
        ),
        proofs=lambda shards, ids: [key.encode() for key in shards.keys(ids)],
    )
    for group in equal_samples(shards, keys, among, "keys"):
        places = ", ".join(shards.names[shard] for shard in shards.locate(group)[0].tolist())
        raise ValueError(
            f"key {shards.keys(group[:1])[0]!r} occurs in {places}; keys must be unique: reshard these apart"
        )


def _begin(out: Path, recipe: Recipe) -> None:
    """Say in OUT what is written there.

    raises  ValueError where something else is there
    """
    told = out / SIDECARS / "reshard.json"
    known = storage.read_json(told)["recipe"] if told.exists() else None
    if known is None and (tars := sorted(out.glob("*.tar"))):
        raise ValueError(f"{out} already holds shards ({tars[0].name}, ...); choose another directory")
    if known not in (None, asdict(recipe)):
        raise ValueError(f"{out} holds the shards of another recipe ({known}); choose another directory")
    if known is None:
        storage.write_json(told, {"recipe": asdict(recipe), "finished": False})


def reshard(
    source: str, out: Path, shard_size: int, *, index_dir: str | None = None, within: Path | None = None
) -> dict[str, Any]:
    """Write the new shards; returns the report."""
    if shard_size < 1:
        raise ValueError(f"--shard-size {shard_size}; must be at least 1")
    shards = open_shards(source, index_dir)
    selection = Selection.read(within) if within else None
    require_known_shards(shards, selection)
    recipe = Recipe(source, shards.order_id, shards.content_id, selection.digest if selection else None, shard_size)
    _begin(out, recipe)
    _require_unique_keys(shards, selection)
    work = Reshard(shards, out, recipe, selection)
    records = work.run()
    rejected = [entry for record in records for entry in record["rejected"]]
    left_out = Counter(shards.rejected) + Counter(reason for reason, _ in rejected)
    left_out["not_selected"] = shards.n - work.total
    report = {
        "recipe": asdict(recipe),
        "finished": True,
        "read": shards.n + sum(shards.rejected.values()),
        "written": sum(record["written"] for record in records),
        "left_out": dict(+left_out),
        "damaged": rejected,
        "shards": {work.tar(number).name: record["written"] for number, record in enumerate(records)},
    }
    storage.write_json(out / SIDECARS / "reshard.json", report)
    return report


def _work(arguments: argparse.Namespace) -> int:
    out: Path = arguments.out
    report = reshard(
        arguments.source, out, arguments.shard_size, index_dir=arguments.index_dir, within=arguments.selection
    )
    if arguments.report:
        storage.write_json(arguments.report, report)
    sizes = report["shards"].values()
    lines = [f"read {report['read']:,} = written {report['written']:,} + left out {sum(report['left_out'].values()):,}"]
    lines += [f"  left out {n:9,}  {reason}" for reason, n in Counter(report["left_out"]).most_common()]
    lines += [f"  {reason} {name}" for reason, name in report["damaged"][:10]]
    lines.append(f"  {len(sizes):,} shards of {min(sizes, default=0):,} to {max(sizes, default=0):,} samples  {out}")
    lines.append(f"report: {arguments.report or out / SIDECARS / 'reshard.json'}")
    say(*lines, f"next: python -m data_tools.verify {out}")
    return 1 if report["damaged"] else 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m data_tools.reshard",
        description="Write shards again with even sizes, keys and members unchanged.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", help="shards (directory, brace range, glob, list, URL)")
    parser.add_argument("out", type=Path, help="an empty directory, or one that an earlier run did not finish")
    parser.add_argument("--shard-size", type=int, default=10_000, help="samples in a shard, at most (default: 10000)")
    parser.add_argument("--selection", type=Path, help="only these samples")
    parser.add_argument("--index-dir", help="where indexes go if the shards' folder cannot be written")
    parser.add_argument("--report", type=Path, help="a further place for the JSON report")
    return run_tool(_work, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
