"""Samples chosen by what is known of them: size, aspect, similarity, safety, aesthetics, licence, language.

Shards give a selection, and no tar is rewritten; metadata before its download (LAION's parquet files) gives the same
files with fewer rows. read = kept + dropped, and each dropped sample counts under the first condition it fails.
"""

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_tools.command_line import precompute_command, run_tool, say
from data_tools.metadata import (
    ALIASES,
    columns_for,
    numbers,
    open_shards,
    require_known_shards,
    sample_metadata,
    selected_ids,
)
from ldm_scale.core import progress, storage
from ldm_scale.data.views import Selection, write_selection

_UNKNOWN = ("", "?", "unknown", "none")
_IDENTITIES = ("url", "sha256", "md5", "hash", "key")
_MADE_BY = b"ldm_scale.filter"
_LAION_MARKS = ("url", "similarity", "punsafe", "nsfw")
_RE_LAION = re.compile(r"re-?laion", re.IGNORECASE)
_ROWS = 1 << 16

_EXAMPLES = f"""\
examples:
  python -m data_tools.filter data/laion selection.parquet --min-side 256 --max-aspect 2 --max-pwatermark 0.8
      shards -> selection.parquet, for data.selection=[selection.parquet]
  python -m data_tools.filter data/laion art.parquet --min-aesthetic 6 --max-punsafe 0.5 --drop-missing
      samples of which a value is missing go, too
  python -m data_tools.filter 'laion/part-*.parquet' filtered --min-side 512 --licence known --removal-list removed.txt
      metadata before data_tools.download -> filtered/part-*.parquet; run again after a stop, finished files are kept

columns by any case of these names:
{chr(10).join(f"  {name:11s} {', '.join(ALIASES[name])}" for name in ALIASES)}
The report lies beside the result (selection.parquet.json, filtered/filter.json) unless --report says where.
Memory for shards: about 100 bytes for each sample that is kept. Exit code: 1 where nothing is kept, 2 for a mistake.
"""


@dataclass(frozen=True, slots=True)
class Condition:
    """One thing asked of every sample."""

    name: str
    """As it is counted: `min_side`."""
    value: Any
    columns: tuple[str, ...]
    judge: Callable[[pa.Table], tuple[np.ndarray, np.ndarray]]
    """Table -> (what passes, where the value is missing)."""


@dataclass(slots=True)
class Counts:
    """read = kept + dropped, always."""

    read: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    """By the first condition that failed, or `missing_{condition}`."""
    kept_though_missing: Counter[str] = field(default_factory=Counter)
    """By condition that could not be asked."""

    def add(self, other: "Counts") -> None:
        self.read += other.read
        self.kept += other.kept
        self.dropped.update(other.dropped)
        self.kept_though_missing.update(other.kept_though_missing)

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "read": self.read,
            "kept": self.kept,
            "dropped": dict(self.dropped),
            "kept_though_missing": dict(self.kept_though_missing),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Counts":
        """The inverse of `to_dict`."""
        dropped, missing = Counter(values["dropped"]), Counter(values["kept_though_missing"])
        return cls(values["read"], values["kept"], dropped, missing)


@dataclass(frozen=True, slots=True)
class Filter:
    """All that decides which samples stay."""

    conditions: tuple[Condition, ...]
    missing: str
    """What becomes of samples whose value is missing: refuse, keep or drop."""
    removed: pa.Array
    """URLs, keys or hashes to leave out whatever the conditions say; sorted."""

    @property
    def how(self) -> dict[str, Any]:
        """JSON values that a result carries."""
        conditions = {condition.name: condition.value for condition in self.conditions}
        removed = storage.digest(self.removed.to_pylist()) if len(self.removed) else None
        return {"tool": "filter", "conditions": conditions, "missing": self.missing, "removal_list_sha256": removed}

    @property
    def required(self) -> list[str]:
        """Columns without which nothing can be said."""
        return self._asked if self.missing == "refuse" else []

    @property
    def optional(self) -> list[str]:
        """Columns that are used where they are there."""
        return [*self._asked, *_IDENTITIES] if len(self.removed) else self._asked

    @property
    def _asked(self) -> list[str]:
        return list(dict.fromkeys(column for condition in self.conditions for column in condition.columns))

    def __call__(self, table: pa.Table, where: str) -> tuple[np.ndarray, Counts]:
        """Which rows stay, (N,) bool, and why the others do not.

        table   columns under our names
        raises  ValueError where a value is missing and nothing was said about that
        """
        keep, counts = np.ones(len(table), bool), Counts(read=len(table))
        if len(self.removed):
            keep = ~self._is_removed(table, where)
            counts.dropped["removal_list"] = int((~keep).sum())
        for condition in self.conditions:
            passes, missing = condition.judge(table)
            absent = int((missing & keep).sum())
            if absent and self.missing == "refuse":
                raise ValueError(
                    f"{where}: {condition.name} cannot be asked of {absent:,} of {len(table):,} samples, whose "
                    f"{' or '.join(condition.columns)} is missing; add --keep-missing or --drop-missing"
                )
            counts.dropped[condition.name] += int((keep & ~passes & ~missing).sum())
            if self.missing == "keep":
                counts.kept_though_missing[condition.name] += absent
                keep &= passes | missing
            else:
                counts.dropped[f"missing_{condition.name}"] += absent
                keep &= passes & ~missing
        counts.kept = int(keep.sum())
        counts.dropped, counts.kept_though_missing = +counts.dropped, +counts.kept_though_missing
        return keep, counts

    def _is_removed(self, table: pa.Table, where: str) -> np.ndarray:
        columns = [name for name in _IDENTITIES if name in table.column_names]
        if not columns:
            raise ValueError(f"{where}: --removal-list needs one of the columns {', '.join(_IDENTITIES)}")
        hits = [pc.is_in(pc.cast(table[name], pa.string()), value_set=self.removed) for name in columns]
        return np.logical_or.reduce([hit.to_numpy() for hit in hits])


def _measured(name: str, value: float, columns: tuple[str, ...], test: Callable[..., np.ndarray]) -> Condition:
    """A condition on numbers; NaN counts as missing."""

    def judge(table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
        values = [numbers(_column(table, column), column) for column in columns]
        with np.errstate(invalid="ignore", divide="ignore"):
            return test(*values), np.logical_or.reduce([np.isnan(one) for one in values])

    return Condition(name, value, columns, judge)


def _listed(name: str, patterns: Sequence[str]) -> Condition:
    """A condition on words: one of the patterns, in any case."""

    def judge(table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
        words = pc.cast(_column(table, name), pa.string())
        known = pc.unique(words).drop_null()
        allowed = [word for word in known.to_pylist() if any(_matches(word, pattern) for pattern in patterns)]
        passes = pc.is_in(words, value_set=pa.array(allowed, pa.string()))
        return passes.to_numpy(), pc.is_null(words).to_numpy()

    return Condition(name, list(patterns), (name,), judge)


def _matches(word: str, pattern: str) -> bool:
    word = word.strip().casefold()
    return word not in _UNKNOWN if pattern == "known" else fnmatchcase(word, pattern.casefold())


def _column(table: pa.Table, name: str) -> pa.ChunkedArray:
    return table[name] if name in table.column_names else pa.chunked_array([pa.nulls(len(table))])


def filter_from(arguments: argparse.Namespace) -> Filter:
    """What the command line asks for.

    raises  ValueError where it asks for nothing
    """
    sides = ("width", "height")
    measured = (
        ("min_side", sides, lambda limit, width, height: np.minimum(width, height) >= limit),
        ("max_aspect", sides, lambda limit, width, height: np.maximum(width / height, height / width) <= limit),
        ("min_similarity", ("similarity",), lambda limit, similarity: similarity >= limit),
        ("max_punsafe", ("punsafe",), lambda limit, punsafe: punsafe <= limit),
        ("max_pwatermark", ("pwatermark",), lambda limit, pwatermark: pwatermark <= limit),
        ("min_aesthetic", ("aesthetic",), lambda limit, aesthetic: aesthetic >= limit),
    )
    asked = vars(arguments)
    conditions = [
        _measured(name, asked[name], columns, partial(test, asked[name]))
        for name, columns, test in measured
        if asked[name] is not None
    ]
    conditions += [_listed(name, asked[name]) for name in ("licence", "language", "nsfw") if asked[name]]
    removed = removal_list(arguments.removal_list) if arguments.removal_list else pa.array([], pa.string())
    if not conditions and not len(removed):
        raise ValueError("nothing is asked of the samples; give at least one condition such as --min-side 256")
    missing = "keep" if arguments.keep_missing else "drop" if arguments.drop_missing else "refuse"
    return Filter(tuple(conditions), missing, removed)


def removal_list(path: Path) -> pa.Array:
    """URLs, keys or hashes that must not stay: one a line, or a `.jsonl` whose objects name any of them."""
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if path.suffix == ".jsonl":
        objects = [json.loads(line) for line in lines]
        lines = [str(entry[name]) for entry in objects for name in _IDENTITIES if entry.get(name)]
    if not lines:
        raise ValueError(f"{path} lists nothing; give URLs, keys or hashes, one a line")
    return pa.array(sorted(set(lines)), pa.string())


def filter_shards(
    source: str, out: Path, chosen: Filter, *, index_dir: str | None = None, within: Path | None = None
) -> dict[str, Any]:
    """Write the selection of what stays of some shards, or of a selection of them; returns the report."""
    shards = open_shards(source, index_dir)
    selection = Selection.read(within) if within else None
    require_known_shards(shards, selection)
    counts = Counts()
    names: list[pa.Array] = []
    keys: list[pa.Array] = []
    with progress.bar("filter", shards.n) as bar:
        for shard, name in enumerate(shards.names):
            table = sample_metadata(shards, shard, chosen.required, chosen.optional)
            table = table.take(pa.array(selected_ids(shards, shard, selection) - shards.starts[shard]))
            keep, found = chosen(table, shards.urls[shard])
            counts.add(found)
            keys.append(table["key"].filter(pa.array(keep)).combine_chunks().cast(pa.large_string()))
            names.append(pa.repeat(pa.scalar(name, pa.large_string()), found.kept))
            bar.advance(int(shards.counts[shard]), f"{counts.kept:,} kept")
    how = chosen.how | {
        "source": source,
        "order_id": shards.order_id,
        "within": selection.digest if selection else None,
    }
    digest = None
    if counts.kept:
        digest = write_selection(out, pa.concat_arrays(names), pa.concat_arrays(keys), how).digest
    marks = sample_metadata(shards, 0, (), _LAION_MARKS).column_names
    return {"how": how, **counts.to_dict(), "digest": digest, "old_laion": _is_old_laion(source, marks, chosen)}


def filter_metadata(files: Sequence[str], source: str, out: Path, chosen: Filter) -> dict[str, Any]:
    """Write each parquet file again with the rows that stay, unless that is done; returns the report."""
    names = [file.rpartition("/")[2] for file in files]
    if len(set(names)) < len(names):
        raise ValueError(f"{source!r} names two files of one name; work on one folder at a time")
    counts, marks = Counts(), set[str]()
    with progress.bar("filter", len(files), unit="files") as bar:
        for file, name in zip(files, names, strict=True):
            if Path(file).resolve() == (out / name).resolve():
                raise ValueError(f"{out} is where the metadata lies; choose another directory")
            with storage.open_read(file) as opened:
                parquet = pq.ParquetFile(opened)
                marks |= columns_for(parquet.schema_arrow.names, file, (), _LAION_MARKS).keys()
                counts.add(_filter_file(parquet, file, out / name, chosen))
            bar.advance(1, f"{counts.kept:,} of {counts.read:,} rows kept")
    how = chosen.how | {"source": source}
    return {"how": how, **counts.to_dict(), "old_laion": _is_old_laion(source, marks, chosen)}


def _filter_file(parquet: pq.ParquetFile, file: str, out: Path, chosen: Filter) -> Counts:
    made_by = chosen.how | {"file": file, "rows": parquet.metadata.num_rows}
    if out.exists() and (known := _counts_of(out, made_by)) is not None:
        return known
    columns = columns_for(parquet.schema_arrow.names, file, chosen.required, chosen.optional)
    counts = Counts()
    with storage.atomic_write(out) as target, pq.ParquetWriter(target, parquet.schema_arrow) as writer:
        for batch in parquet.iter_batches(_ROWS):
            table = pa.Table.from_batches([batch]).select(list(columns.values())).rename_columns(list(columns))
            keep, found = chosen(table, file)
            counts.add(found)
            writer.write_batch(batch.filter(pa.array(keep)))
        writer.add_key_value_metadata({_MADE_BY: json.dumps({"how": made_by, "counts": counts.to_dict()})})
    return counts


def _counts_of(out: Path, made_by: dict[str, Any]) -> Counts | None:
    """What an earlier run with the same conditions found; None where it was another run or another file."""
    metadata = pq.read_metadata(out).metadata or {}
    if _MADE_BY not in metadata:
        raise ValueError(f"{out} was not written by this tool; choose another directory")
    known = json.loads(metadata[_MADE_BY])
    return Counts.from_dict(known["counts"]) if known["how"] == made_by else None


def _is_old_laion(source: str, columns: Iterable[str], chosen: Filter) -> bool:
    """True for LAION's metadata from before Re-LAION took links out, unless a removal list stands in."""
    is_laion = "url" in columns and len(set(columns) & set(_LAION_MARKS)) > 1
    return is_laion and not len(chosen.removed) and not _RE_LAION.search(source)


def _summary(report: dict[str, Any], out: Path, report_file: Path) -> list[str]:
    lines = [f"read {report['read']:,} = kept {report['kept']:,} + dropped {sum(report['dropped'].values()):,}"]
    lines += [f"  dropped {n:9,}  {reason}" for reason, n in Counter(report["dropped"]).most_common()]
    lines += [f"  kept although {name} is unknown: {n:,}" for name, n in report["kept_though_missing"].items()]
    if report["old_laion"]:
        lines += [
            "warning: this looks like LAION metadata from before Re-LAION-5B (August 2024), which took out links to",
            "  abuse material. Use Re-LAION's metadata, or give the links to leave out with --removal-list",
        ]
    if not report["kept"]:
        return [*lines, f"nothing is kept, so {out} is of no use: ask less", f"report: {report_file}"]
    next_step = (
        f"python -m data_tools.download {out} data/images"
        if "digest" not in report
        else precompute_command(report["how"]["source"], selection=str(out))
    )
    return [*lines, f"result: {out}", f"report: {report_file}", f"next: {next_step}"]


def _work(arguments: argparse.Namespace) -> int:
    chosen = filter_from(arguments)
    out: Path = arguments.out
    files = _metadata_files(arguments.source)
    if files and arguments.selection:
        raise ValueError("--selection narrows down shards; metadata has no shards yet")
    if files:
        report_file = arguments.report or out / "filter.json"
        report = filter_metadata(files, arguments.source, out, chosen)
    else:
        report_file = arguments.report or out.with_name(f"{out.name}.json")
        report = filter_shards(arguments.source, out, chosen, index_dir=arguments.index_dir, within=arguments.selection)
    storage.write_json(report_file, report)
    say(*_summary(report, out, report_file))
    return 0 if report["kept"] else 1


def _metadata_files(source: str) -> list[str]:
    """The parquet files that `source` names; none where it names tars, beside which parquet files may lie."""
    try:
        files = storage.expand(source)
    except FileNotFoundError:
        files = storage.expand(source, ".parquet")
    return files if all(file.endswith(".parquet") for file in files) else []


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m data_tools.filter",
        description="Choose samples by their metadata: shards give a selection, metadata gives metadata.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", help="shards (directory, brace range, glob, list, URL), or parquet files of metadata")
    parser.add_argument("out", type=Path, help="selection.parquet for shards, a directory for metadata")
    parser.add_argument("--min-side", type=float, help="pixels of the original's shorter side, at least")
    parser.add_argument("--max-aspect", type=float, help="longer side / shorter side, at most")
    parser.add_argument("--min-similarity", type=float, help="CLIP similarity of image and text, at least")
    parser.add_argument("--max-punsafe", type=float, help="probability of unsafe content, at most")
    parser.add_argument("--max-pwatermark", type=float, help="probability of a watermark, at most")
    parser.add_argument("--min-aesthetic", type=float, help="predicted aesthetic score, at least")
    parser.add_argument(
        "--licence", nargs="+", metavar="NAME", help="allowed licences: names, patterns (cc-by*), known = any but '?'"
    )
    parser.add_argument("--language", nargs="+", metavar="NAME", help="allowed languages, such as en")
    parser.add_argument("--nsfw", nargs="+", metavar="NAME", help="allowed NSFW classes, such as UNLIKELY")
    missing = parser.add_mutually_exclusive_group()
    missing.add_argument("--keep-missing", action="store_true", help="keep samples of which a value is missing")
    missing.add_argument("--drop-missing", action="store_true", help="drop them (default: refuse to go on)")
    parser.add_argument("--removal-list", type=Path, help="URLs, keys or hashes to leave out, one a line, or a .jsonl")
    parser.add_argument("--selection", type=Path, help="look only at these samples of the shards")
    parser.add_argument("--index-dir", help="where indexes go if the shards' folder cannot be written")
    parser.add_argument("--report", type=Path, help="where the JSON report goes (default: beside the result)")
    return run_tool(_work, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
