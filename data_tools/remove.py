"""Take samples down: no training reads them again, and their bytes are gone from shards, caches and tables.

First the samples are listed in `.ldm/removed.jsonl` of each data set that holds them, which every training honours: it
reads another sample in their place, and keeps its order. Then the content of their members is overwritten where it
lies, rows of parquet files are emptied, and index, record and manifest are made to fit: `content_id` changes,
`order_id` does not. What was overwritten is noted in `.ldm/removals.jsonl`, so that a run that was killed is finished
by the next one. Keys stay: they number the samples.
"""

import argparse
import hashlib
import json
import mmap
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_tools.command_line import run_tool, say
from data_tools.metadata import open_shards, sample_metadata
from data_tools.trace import stream_of_run
from data_tools.verify_cache import is_cache
from ldm_scale.core import progress, storage
from ldm_scale.data.cache import MIRRORED, NPY_HEADER_BYTES, TEXT, CacheManifest, ShardRecord, done_record
from ldm_scale.data.index import IMAGE_FIELDS, scan
from ldm_scale.data.shards import SIDECARS, CorruptSample, ShardSet, ShardSummary, Sidecars, content_id
from ldm_scale.data.tar import Member, split_name, walk
from ldm_scale.data.views import REMOVED

LOG = "removals.jsonl"
"""Name of the file that says what was overwritten, in a data set's folder of sidecars."""

_KEPT_COLUMNS = ("key", "status")
_EMPTY = {"json": b"{}", "boxes.json": b"[]"}  # so that readers of the tar still parse them
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SHOWN = 12

_EXAMPLES = """\
examples:
  python -m data_tools.remove data/laion data/laion_latents --url https://a.example/b.jpg --reason "ticket 17" --dry-run
      what would be taken down; nothing is written
  python -m data_tools.remove data/laion data/laion_latents --list asked.txt --reason "ticket 17" --runs runs/*/*
      asked.txt: a URL, a sha256 or a key a line, or lines of another data set's removed.jsonl; says which checkpoints
      have seen the samples
  python -m data_tools.remove s3://bucket/laion --key 000012345 --reason ... --list-only --index-dir /scratch/index
      a source that cannot be written: trainings with data.index_dir=/scratch/index skip it

Name the image shards and every cache of them in one call: a cache knows its samples by shard and key only. A sha256 is
that of the picture in the shard, or of the download as img2dataset noted it. Jobs that are running need a restart.
Exit code: 0; 1 where something asked for was not found; 2 for a mistake in the arguments. --report writes JSON.
"""

Place = tuple[str, str]
"""Name of a shard, and a key in it."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is asked to be taken down."""

    keys: frozenset[str]
    urls: frozenset[str]
    sha256s: frozenset[str]
    places: frozenset[Place]

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> "Wanted":
        """Read the arguments and the list.

        raises  ValueError where nothing is asked for
        """
        keys, urls, places = {*arguments.key}, {*arguments.url}, set[Place]()
        sha256s = {value.lower() for value in arguments.sha256}
        for line in arguments.list.read_text().splitlines() if arguments.list else ():
            if (text := line.strip()).startswith("{"):
                entry = json.loads(text)
                places.add((entry["shard"], entry["key"]))
            elif _SHA256.fullmatch(text.lower()):
                sha256s.add(text.lower())
            elif text:
                (urls if "://" in text else keys).add(text)
        if not (keys or urls or sha256s or places):
            raise ValueError("nothing to take down: give --key, --url, --sha256 or --list")
        return cls(*map(frozenset, (keys, urls, sha256s, places)))

    @property
    def everything(self) -> set[str]:
        return {*self.keys, *self.urls, *self.sha256s, *("/".join(place) for place in self.places)}


@dataclass(slots=True)
class Found:
    """Where samples lie that were asked for."""

    places: set[Place] = field(default_factory=set)
    asked: set[str] = field(default_factory=set)
    """What of it was found."""

    def add(self, place: Place, asked: str) -> None:
        self.places.add(place)
        self.asked.add(asked)


@dataclass(frozen=True, slots=True)
class Dataset:
    """Image shards, or the finished shards of a latent cache."""

    source: str
    shards: ShardSet
    records: Mapping[str, ShardRecord]
    """Of a cache, by shard; empty for image shards."""

    @classmethod
    def open(cls, source: str, index_dir: str | None) -> "Dataset":
        """Open a data set, indexed if need be."""
        if not is_cache(source):
            return cls(source, open_shards(source, index_dir), {})
        folder = Path(source)
        records = [ShardRecord.from_dict(storage.read_json(path)) for path in folder.glob(f"{SIDECARS}/*.done.json")]
        records.sort(key=lambda record: record.name)
        urls = [str(folder / record.name) for record in records]
        shards = ShardSet(urls, [record.summary for record in records], Sidecars(index_dir))
        return cls(source, shards, {record.name: record for record in records})

    def folders(self) -> dict[Path, dict[str, int]]:
        """The folders of sidecars that are written to, each with its shards: numbers by name."""
        folders: dict[Path, dict[str, int]] = {}
        for shard, (url, name) in enumerate(zip(self.shards.urls, self.shards.names, strict=True)):
            folders.setdefault(Path(self.shards.sidecars.writable(url)), {})[name] = shard
        return folders

    def find(self, wanted: Wanted, found: Found) -> None:
        """Look for what is wanted in every shard."""
        with progress.bar(f"searching {self.source}", len(self.shards.urls), unit="shards") as bar:
            for shard in range(len(self.shards.urls)):
                self._find_in(shard, wanted, found)
                bar.advance(1)

    def _find_in(self, shard: int, wanted: Wanted, found: Found) -> None:
        name, keys = self.shards.names[shard], set(self.shards.opened(shard).index.key_array().to_pylist())
        for key in wanted.keys & keys:
            found.add((name, key), key)
        for place in wanted.places:
            if place[0] == name and place[1] in keys:
                found.add(place, "/".join(place))
        if wanted.urls or wanted.sha256s:
            known = sample_metadata(self.shards, shard, (), ("url", "sha256"))
            for row in known.select([c for c in known.column_names if c in ("key", "url", "sha256")]).to_pylist():
                for asked in {row.get("url"), row.get("sha256")} & (wanted.urls | wanted.sha256s):
                    found.add((name, row["key"]), asked)
        if wanted.sha256s and not self.records:
            for key, asked in self._pictures(shard):
                if asked in wanted.sha256s:
                    found.add((name, key), asked)

    def _pictures(self, shard: int) -> Iterator[tuple[str, str]]:
        """Key and sha256 of every picture of a shard, but those that cannot be read."""
        ids = self.shards.shard_ids(shard)
        for i, key in enumerate(self.shards.keys(ids)):
            try:
                pictures = self.shards.read(ids[i : i + 1], IMAGE_FIELDS)[0]
            except CorruptSample:
                continue
            for data in pictures.values():
                yield key, hashlib.sha256(data).hexdigest()

    def holding(self, places: Iterable[Place]) -> dict[int, set[str]]:
        """Those of the samples that are here: keys by number of the shard."""
        by_name: dict[str, set[str]] = {}
        for name, key in places:
            by_name.setdefault(name, set()).add(key)
        here = {}
        for shard, name in enumerate(self.shards.names):
            if name in by_name:
                keys = self.shards.opened(shard).index.key_array()
                if held := by_name[name] & set(keys.to_pylist()):
                    here[shard] = held
        return here


def list_removed(dataset: Dataset, here: Mapping[int, set[str]], reason: str) -> None:
    """Write samples to the removal lists of their folders, those that are not there yet."""
    for folder, shards in dataset.folders().items():
        known = {(entry["shard"], entry["key"]) for entry in _lines(folder / REMOVED)}
        places = {(name, key) for name, shard in shards.items() for key in here.get(shard, ())} - known
        entries = [{"shard": name, "key": key, "reason": reason, "time": _now()} for name, key in sorted(places)]
        _append(folder / REMOVED, entries)


def pending(dataset: Dataset) -> dict[Path, dict[int, dict[str, str]]]:
    """Samples that are listed but not overwritten yet: keys, with the reason, by folder and number of the shard."""
    left: dict[Path, dict[int, dict[str, str]]] = {}
    for folder, shards in dataset.folders().items():
        done = {(entry["shard"], entry["key"]) for entry in _lines(folder / LOG)}
        for entry in _lines(folder / REMOVED):
            name, key = entry["shard"], entry["key"]
            if name in shards and (name, key) not in done:
                left.setdefault(folder, {}).setdefault(shards[name], {})[key] = entry["reason"]
    return left


def overwrite(dataset: Dataset, shard: int, reasons: Mapping[str, str], log: Path) -> None:
    """Overwrite samples of one shard, given as key and reason; make index and record fit, and note it in the log."""
    url, keys = dataset.shards.urls[shard], set(reasons)
    lengths = _overwrite_members(url, keys)
    empty_rows(Path(url).with_suffix(".parquet"), keys)
    summary = _index_again(dataset.shards, shard)
    if dataset.records:
        record = replace(dataset.records[summary.name], sha256=summary.sha256)
        storage.write_json(done_record(Path(url)), asdict(record))
    sha256 = {"before": dataset.shards.summaries[shard].sha256, "after": summary.sha256}
    notes = [
        {"shard": summary.name, "key": key, "reason": reason, "time": _now(), "bytes": lengths.get(key, {})} | sha256
        for key, reason in sorted(reasons.items())
    ]
    _append(log, notes)


def _overwrite_members(tar: str, keys: set[str]) -> dict[str, dict[str, int]]:
    """Overwrite every member of these samples, whether the index knows it or not; returns bytes by key and field."""
    lengths: dict[str, dict[str, int]] = {}
    with open(tar, "r+b") as file:
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped, memoryview(mapped) as data:
            members = [(split_name(item.name), item) for item in walk(data) if isinstance(item, Member)]
        for split, member in members:
            if split is not None and split[0] in keys:
                kept = NPY_HEADER_BYTES if split[1] in ("npy", MIRRORED, TEXT) else 0
                file.seek(member.offset + kept)
                file.write(_nothing(split[1], member.length - kept))
                lengths.setdefault(split[0], {})[split[1]] = member.length
        file.flush()
        os.fsync(file.fileno())
    return lengths


def _nothing(name: str, length: int) -> bytes:
    empty = _EMPTY.get(name, b"")
    return empty.ljust(length) if 0 < len(empty) <= length else bytes(max(length, 0))


def empty_rows(path: Path, keys: set[str], *, drop: bool = False) -> None:
    """Write a parquet file again, without what it says of these samples; or, to `drop`, without their rows."""
    if not path.exists():
        return
    table = pq.read_table(path)
    if "key" not in table.column_names:
        raise ValueError(f"{path} has no column 'key', so its rows cannot be matched: empty it by hand, or delete it")
    gone = pc.is_in(table["key"].cast(pa.string()), value_set=pa.array(sorted(keys), pa.string()))
    if not pc.any(gone).as_py():
        return
    if drop:
        table = table.filter(pc.invert(gone))
    for place, name in enumerate(table.column_names if not drop else ()):
        if name not in _KEPT_COLUMNS:
            column = table[name]
            kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
            table = table.set_column(place, name, pc.if_else(gone, pa.scalar(None, kind), column.cast(kind)))
    with storage.atomic_write(path) as file:
        pq.write_table(table, file)


def _index_again(shards: ShardSet, shard: int) -> ShardSummary:
    """Index a shard of which bytes have changed, wherever an index of it lies."""
    url, index = shards.urls[shard], scan(shards.urls[shard])
    summary = ShardSummary.of(shards.names[shard], index)
    before = shards.summaries[shard]
    assert (summary.n, summary.keys_sha256) == (before.n, before.keys_sha256), f"{url}: overwriting has moved samples"
    for folder in shards.sidecars.folders(url):
        path = Path(folder) / f"{Path(url).stem}.idx"
        if path.exists():
            with storage.atomic_write(path) as file:
                file.write(index.to_bytes())
    return summary


def renew_manifests(dataset: Dataset, shards: Mapping[str, int]) -> None:
    """Make the manifests of one folder of image shards fit their indexes.

    shards  numbers by name, of those that may have changed
    """
    some_url = dataset.shards.urls[next(iter(shards.values()))]
    for sidecars in {Sidecars(None), dataset.shards.sidecars}:
        known = sidecars.read_summaries(some_url)
        for name in known.keys() & shards.keys():
            url = dataset.shards.urls[shards[name]]
            index = sidecars.read(url, known[name].bytes)
            assert index is not None, f"{url} has a summary and no index"
            known[name] = ShardSummary.of(name, index)
        if known:
            sidecars.write_summaries(some_url, list(known.values()))


def renew_records(dataset: Dataset, renewed: Mapping[str, str]) -> None:
    """Make the records and the manifest of a cache fit its shards, and the image shards that they were made of.

    renewed  sha256 of image shards before some of their samples were overwritten -> after
    """
    folder = Path(dataset.source)
    records = []
    for name in dataset.records:
        before = ShardRecord.from_dict(storage.read_json(done_record(folder / name)))
        sha256 = before.source["sha256"]
        while sha256 in renewed:
            sha256 = renewed[sha256]
        records.append(replace(before, source=before.source | {"sha256": sha256}))
        if records[-1] != before:
            storage.write_json(done_record(folder / name), asdict(records[-1]))
    if (folder / "manifest.json").exists():
        manifest = CacheManifest.read_from(str(folder))
        held = {record.name for record in manifest.shards}
        records = [record for record in records if record.name in held]
        digest = storage.digest([manifest.fingerprint, content_id([record.summary for record in records])])
        storage.write_json(folder / "manifest.json", asdict(replace(manifest, shards=records, content_id=digest)))


def drop_captions(file: Path, keys: set[str], index_dir: str | None) -> None:
    """Drop rows of a caption overlay, and the layouts that trainings have made of it."""
    empty_rows(file, keys, drop=True)
    for folder in Sidecars(index_dir).folders(str(file)):
        for layout in Path(folder).glob(f"{file.stem}-*.captions"):
            shutil.rmtree(layout)


def seen_by(runs: Sequence[Path], places: set[Place], index_dir: str | None) -> dict[str, Any]:
    """For each run: the positions that read each sample, and how often each checkpoint has seen it; or why not."""
    said: dict[str, Any] = {}
    for run in runs:
        try:
            stream = stream_of_run(run, (), index_dir)
            said[str(run)] = [
                reading
                for key in sorted({key for _, key in places})
                for reading in stream.readings(key)
                if (reading["shard"], key) in places
            ]
        except (ValueError, OSError, KeyError) as error:
            said[str(run)] = f"cannot be told: {error}"
    return said


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _append(path: Path, entries: Sequence[Mapping[str, Any]]) -> None:
    """Add lines, all or none."""
    before = path.read_bytes() if path.exists() else b""
    if entries:
        with storage.atomic_write(path) as file:
            file.write(before + "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries).encode())


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _require_writable(datasets: Sequence[Dataset]) -> None:
    for url in (url for dataset in datasets for url in dataset.shards.urls):
        if storage.is_remote(url) or not os.access(url, os.W_OK):
            raise ValueError(
                f"{url} cannot be overwritten from here: take the samples out with --list-only (and --index-dir), and "
                "have the shards written again without them where they are kept"
            )


def take_down(datasets: Sequence[Dataset]) -> int:
    """Overwrite all that is listed and not overwritten yet; returns how many samples, counted in each data set."""
    count, renewed = 0, dict[str, str]()
    for dataset in sorted(datasets, key=lambda dataset: bool(dataset.records)):  # caches last: they name image shards
        left = pending(dataset)
        with progress.bar(f"overwriting {dataset.source}", sum(map(len, left.values())), unit="shards") as bar:
            for folder, shards in left.items():
                for shard, reasons in shards.items():
                    overwrite(dataset, shard, reasons, folder / LOG)
                    count += len(reasons)
                    bar.advance(1)
        if dataset.records:
            renew_records(dataset, renewed)
            continue
        for folder, numbers in dataset.folders().items():
            noted = _lines(folder / LOG)
            renewed |= {entry["before"]: entry["after"] for entry in noted if entry["before"] != entry["after"]}
            if changed := numbers.keys() & {entry["shard"] for entry in noted}:
                renew_manifests(dataset, {name: numbers[name] for name in changed})
    return count


def _work(arguments: argparse.Namespace) -> int:
    wanted = Wanted.of(arguments)
    writes = not (arguments.list_only or arguments.dry_run)
    datasets = _opened(arguments)
    if writes:
        _require_writable(datasets)
        if take_down(datasets):  # what an earlier call listed; until then its checksums may not hold
            datasets = _opened(arguments)
    found = Found()
    for dataset in datasets:
        dataset.find(wanted, found)
    here = [(dataset, dataset.holding(found.places)) for dataset in datasets]
    seen = seen_by(arguments.runs, found.places, arguments.index_dir)
    if not arguments.dry_run:
        for dataset, keys in here:
            list_removed(dataset, keys, arguments.reason)
        for file in arguments.captions:
            drop_captions(file, {key for _, key in found.places}, arguments.index_dir)
    report = {
        "found": sorted("/".join(place) for place in found.places),
        "not_found": sorted(wanted.everything - found.asked),
        "held_by": {dataset.source: sum(map(len, keys.values())) for dataset, keys in here},
        "overwritten": take_down(datasets) if writes else 0,
        "dry_run": arguments.dry_run,
        "runs": seen,
    }
    if arguments.report:
        storage.write_json(arguments.report, report)
    say(*_summary(report, arguments))
    return 1 if report["not_found"] else 0


def _opened(arguments: argparse.Namespace) -> list[Dataset]:
    return [Dataset.open(source, arguments.index_dir) for source in arguments.dataset]


def _summary(report: Mapping[str, Any], arguments: argparse.Namespace) -> list[str]:
    found, missing = report["found"], report["not_found"]
    lines = [f"{len(found):,} samples found", *(f"  {place}" for place in found[:_SHOWN])]
    lines += [f"  not found: {asked}" for asked in missing[:_SHOWN]]
    lines += [f"  {count:,} in {source}" for source, count in report["held_by"].items()]
    for run, readings in report["runs"].items():
        lines += [f"{run}: {readings}"] if isinstance(readings, str) else [f"{run}:", *_seen(readings)]
    if report["dry_run"]:
        return [*lines, "nothing was written; next: the same command without --dry-run"]
    lines.append(f"{report['overwritten']:,} overwritten; listed in .ldm/{REMOVED}, noted in .ldm/{LOG}")
    check = f"python -m data_tools.verify {arguments.dataset[0]} --level hash"
    return [*lines, f"next: restart the jobs that read these data (they go on where they are); {check}"]


def _seen(readings: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = []
    for reading in readings[:_SHOWN]:
        times = {name: count for name, count in reading["checkpoints"].items() if count}
        told = ", ".join(f"{name} {count:,} times" for name, count in times.items()) or "by no checkpoint"
        lines.append(f"  {reading['shard']}/{reading['key']} seen {told}")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m data_tools.remove",
        description="Take samples down: trainings read others in their place, and their bytes are overwritten.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("dataset", nargs="+", help="image shards and latent caches that may hold the samples")
    parser.add_argument("--key", nargs="+", default=[], help="keys of samples")
    parser.add_argument("--url", nargs="+", default=[], help="where they were downloaded from")
    parser.add_argument("--sha256", nargs="+", default=[], help="of their pictures")
    parser.add_argument("--list", type=Path, help="a file of any of these, one a line")
    parser.add_argument("--reason", required=True, help="why; noted beside each sample")
    parser.add_argument("--captions", type=Path, nargs="+", default=[], help="caption overlays to drop their rows from")
    parser.add_argument(
        "--runs", type=Path, nargs="+", default=[], help="run directories: say which checkpoints saw them"
    )
    parser.add_argument("--index-dir", help="data.index_dir of the jobs that read these data")
    parser.add_argument("--list-only", action="store_true", help="list them, and leave their bytes alone")
    parser.add_argument("--dry-run", action="store_true", help="say what is found, and write nothing")
    parser.add_argument("--report", type=Path, help="write a JSON report here")
    return run_tool(_work, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
