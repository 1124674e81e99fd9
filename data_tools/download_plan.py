"""What a download is to fetch, in which shard each row comes, and what has become of it: kept in `{out}/.download/`.

img2dataset numbers shards by counting through the files it is given, and skips those that have a `_stats.json`. So the
metadata is written again as input files that never change: canonical columns, without rows that must not be fetched,
each file but the last of a round a whole number of shards. Failed rows that are worth another try become a new round
behind all others. Nothing of ours lies beside the shards: a `.json` that is not img2dataset's stops it.
"""

import json
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_tools.filter import Filter
from data_tools.metadata import columns_for
from ldm_scale.core import progress, storage
from ldm_scale.data.tar import BLOCK

_FOLDER = ".download"
_IDENTITIES = ("sha256", "md5", "hash", "key")
_SIZES = ("width", "height", "original_width", "original_height")
_RESERVED = frozenset(("key", "url", "caption", *_SIZES, "status", "error_message", "exif", "md5", "sha256", "sha512"))
"""Columns that img2dataset writes itself."""
_FILE_ROWS = 1_000_000  # img2dataset holds an input file in memory
_SUCCESS = "success"
_REASONS = (
    ("image too small", "too_small"),
    ("aspect ratio too large", "too_elongated"),
    ("X-Robots-Tag", "disallowed"),
    ("timed out|timeout", "timeout"),
    ("name or service|name resolution|nodename|getaddrinfo|no address associated", "name_not_found"),
    ("ssl|certificate", "ssl"),
    ("refused|reset|closed connection|IncompleteRead|unreachable|broken pipe|no route", "connection"),
    ("decoding|opencv", "no_image"),
    ("unknown url type|no host|nonnumeric port|control characters|can't encode|invalid ipv6|label ", "bad_url"),
)
"""What img2dataset's messages hold -> our name of the reason."""
_FINAL = frozenset({"http_404", "http_410", "disallowed", "too_small", "too_elongated", "no_image", "bad_url", "lost"})
"""Reasons for which trying again is no use."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """All that decides what is asked for and what becomes of an image. A download is finished by the same."""

    metadata: str
    url_column: str | None
    caption_column: str | None
    removal_list_sha256: str | None
    size: int
    resize: str
    enlarge: bool
    min_side: int
    max_aspect: float | None
    format: str
    quality: int
    shard_size: int

    def __post_init__(self) -> None:
        """Refuse what img2dataset would only find out in its processes."""
        best = 9 if self.format == "png" else 100
        for name, value, least, most in (
            ("size", self.size, 1, 65_535),
            ("min-side", self.min_side, 0, 65_535),
            ("quality", self.quality, 0 if self.format == "png" else 1, best),
            ("shard-size", self.shard_size, 1, 100_000),
        ):
            if not least <= value <= most:
                raise ValueError(f"--{name} {value}; must be {least} to {most} (--format {self.format})")
        if self.max_aspect is not None and self.max_aspect < 1:
            raise ValueError(f"--max-aspect {self.max_aspect}; longer side / shorter side is never below 1")


@dataclass(slots=True)
class Round:
    """Rows that are fetched one after another: all of the metadata, later what failed."""

    files: list[int] = field(default_factory=list)
    """Rows of each input file."""
    retried: dict[str, int] = field(default_factory=dict)
    """Failures of the round before that these rows are, by reason."""

    @property
    def rows(self) -> int:
        return sum(self.files)


@dataclass(slots=True)
class Plan:
    """The whole of a download."""

    out: Path
    recipe: Recipe
    columns: list[str]
    """What is kept of the metadata beside url and caption."""
    has_caption: bool
    left_out: Counter[str]
    """Rows of the metadata that are not asked for, by reason."""
    rounds: list[Round]

    @property
    def folder(self) -> Path:
        return self.out / _FOLDER

    @property
    def input(self) -> Path:
        return self.folder / "input"

    @property
    def rows(self) -> int:
        """Rows of all rounds."""
        return sum(one.rows for one in self.rounds)

    @property
    def shards(self) -> int:
        """Shards of all rounds."""
        return sum(self._shards(one) for one in self.rounds)

    @property
    def digits(self) -> int:
        """Of a shard's number; there is room for as many shards again to be tried again."""
        return max(5, len(str(2 * self._shards(self.rounds[0]) - 1)))

    def tar(self, number: int) -> Path:
        """The path of a shard."""
        return self.out / f"{number:0{self.digits}d}.tar"

    def _shards(self, one: Round) -> int:
        return sum(-(-rows // self.recipe.shard_size) for rows in one.files)

    def save(self) -> None:
        """Write the plan; input files that it does not name are not part of it."""
        values = {
            "recipe": asdict(self.recipe),
            "columns": self.columns,
            "has_caption": self.has_caption,
            "left_out": dict(self.left_out),
            "rounds": [asdict(one) for one in self.rounds],
        }
        storage.write_json(self.folder / "plan.json", values)

    @classmethod
    def load(cls, out: Path) -> "Plan | None":
        """The plan of a download that was begun in `out`; None where there is none."""
        file = out / _FOLDER / "plan.json"
        if not file.exists():
            return None
        values = storage.read_json(file)
        return cls(
            out,
            Recipe(**values["recipe"]),
            values["columns"],
            values["has_caption"],
            Counter(values["left_out"]),
            [Round(**one) for one in values["rounds"]],
        )

    def require(self, recipe: Recipe) -> None:
        """Refuse to finish this with another recipe.

        raises  ValueError naming what differs
        """
        asked, known = asdict(recipe), asdict(self.recipe)
        differing = [f"{name} {asked[name]}, was {known[name]}" for name in asked if asked[name] != known[name]]
        if differing:
            raise ValueError(
                f"{self.out} was begun otherwise ({'; '.join(differing)}); repeat that command or choose another "
                "directory. What is already there is removed with data_tools.remove"
            )

    def tidy(self) -> list[Path]:
        """Remove what a killed run left: shards that are not whole, which it returns, and input that is in no round.

        A shard without its sidecars would be fetched again, but until then readers would find a tar that is cut short.
        """
        known = {f"{number:06d}.parquet" for number in range(sum(len(one.files) for one in self.rounds))}
        for file in self.input.iterdir():
            if file.name not in known:
                file.unlink()
        shutil.rmtree(self.out / "_tmp", ignore_errors=True)
        broken = [tar for tar in map(self.tar, range(self.shards)) if _has_parts(tar) and not _is_whole(tar)]
        for tar in broken:
            for part in _parts(tar):
                part.unlink(missing_ok=True)
        return broken

    def add_round(self) -> int:
        """Plan another try of what failed in the last round for a reason that may pass; returns how many rows."""
        last = self.rounds[-1]
        stop = self.shards
        tables = (self._failed(number) for number in range(stop - self._shards(last), stop))
        retried: Counter[str] = Counter()

        def rows() -> Iterator[pa.Table]:
            for table, reasons in tables:
                retried.update(reasons)
                yield table

        files = list(self._write_input(rows(), sum(len(one.files) for one in self.rounds)))
        if files:
            self.rounds.append(Round(files, dict(retried)))
            self.save()
        return sum(files)

    def _failed(self, number: int) -> tuple[pa.Table, Counter[str]]:
        """The input rows of a shard that are worth another try, and why they failed."""
        table = pq.read_table(self.tar(number).with_suffix(".parquet"))
        table = table.filter(pc.not_equal(table["status"], _SUCCESS))
        reasons = [reason_of(message) for message in table["error_message"].to_pylist()]
        again = [reason not in _FINAL for reason in reasons]
        names = [*self.columns, *(["caption"] if self.has_caption else []), "url"]
        return table.select(names).filter(pa.array(again, pa.bool_())), Counter(
            reason for reason, keep in zip(reasons, again, strict=True) if keep
        )

    def _write_input(self, tables: Iterable[pa.Table], first: int) -> Iterator[int]:
        """Write rows as input files numbered from `first`; yields the rows of each."""
        most = max(_FILE_ROWS // self.recipe.shard_size, 1) * self.recipe.shard_size
        for number, piece in enumerate(_pieces(tables, most), start=first):
            with storage.atomic_write(self.input / f"{number:06d}.parquet") as file:
                pq.write_table(piece, file)
            yield len(piece)


def _pieces(tables: Iterable[pa.Table], rows: int) -> Iterator[pa.Table]:
    """Tables of exactly `rows` rows, the last one of what is left."""
    waiting: list[pa.Table] = []
    for table in tables:
        waiting.append(table)
        while sum(map(len, waiting)) >= rows:
            joined = pa.concat_tables(waiting)
            yield joined.slice(0, rows)
            waiting = [joined.slice(rows)]
    if any(map(len, waiting)):
        yield pa.concat_tables(waiting)


def prepare(out: Path, recipe: Recipe, removed: pa.Array) -> Plan:
    """Write the input files of a new download, and its plan last.

    removed  URLs, keys or hashes that must not be fetched
    raises   ValueError where a column is missing, files differ in theirs, or no row is left
    """
    files = storage.expand(recipe.metadata, ".parquet")
    if not all(file.endswith(".parquet") for file in files):
        raise ValueError(f"{recipe.metadata}: metadata must be .parquet files; convert {files[0]} first")
    if any(out.glob("*.tar")):
        raise ValueError(f"{out} holds shards of another origin; choose another directory")
    reader = _Reader(files, recipe, removed)
    plan = Plan(out, recipe, reader.columns, reader.has_caption, reader.left_out, [Round()])
    shutil.rmtree(plan.folder / "input", ignore_errors=True)
    plan.input.mkdir(parents=True)
    plan.rounds[0].files = list(plan._write_input(reader.tables(), 0))
    if not plan.rows:
        raise ValueError(f"no row of {recipe.metadata} is left to fetch: {dict(reader.left_out)}")
    plan.save()
    return plan


class _Reader:
    """Metadata as input rows: canonical names, text and numbers only, without what must not be fetched."""

    def __init__(self, files: Sequence[str], recipe: Recipe, removed: pa.Array) -> None:
        self.files, self.recipe, self.removed = files, recipe, Filter((), "keep", removed)
        self.left_out: Counter[str] = Counter()
        with storage.open_read(files[0]) as file:
            schema = pq.ParquetFile(file).schema_arrow
        used = self._used(schema.names, files[0])
        self.has_caption = "text" in used
        taken = {used["url"], used.get("text")}
        kept = [one for one in schema if one.name not in taken and one.name.lower() not in _RESERVED and _is_plain(one)]
        self.columns = [one.name.lower() for one in kept]
        fields = [pa.field(one.name.lower(), one.type) for one in kept]
        fields += [pa.field("caption", pa.string())] if self.has_caption else []
        self.schema = pa.schema([*fields, pa.field("url", pa.string())])
        if len(set(self.columns)) < len(self.columns):
            raise ValueError(
                f"{files[0]}: some of the columns {', '.join(schema.names)} differ only in case; drop some"
            )

    def _used(self, names: Sequence[str], where: str) -> dict[str, str]:
        """`url`, `text` and what the removal list may name -> the names in a file."""
        given = {"url": self.recipe.url_column, "text": self.recipe.caption_column}
        for column in given.values():
            if column is not None and column not in names:
                raise ValueError(f"{where} has no column {column!r}; it has {', '.join(names)}")
        wanted = [name for name, column in given.items() if column is None]
        optional = ["text", *_IDENTITIES] if "text" in wanted else _IDENTITIES
        found = columns_for(names, where, [name for name in wanted if name == "url"], optional)
        return found | {name: column for name, column in given.items() if column is not None}

    def tables(self) -> Iterator[pa.Table]:
        """Input rows, some at a time."""
        with progress.bar("metadata", len(self.files), unit="files") as bar:
            for name in self.files:
                with storage.open_read(name) as file:
                    parquet = pq.ParquetFile(file)
                    used = self._used(parquet.schema_arrow.names, name)
                    by_lower = {column.lower(): column for column in parquet.schema_arrow.names}
                    source = {column: by_lower.get(column, "") for column in self.columns}
                    source |= {"url": used["url"]} | ({"caption": used.get("text", "")} if self.has_caption else {})
                    if missing := [column for column, spelling in source.items() if not spelling]:
                        raise ValueError(f"{name} has no column {missing[0]}, unlike {self.files[0]}")
                    for batch in parquet.iter_batches(columns=list({*source.values(), *used.values()})):
                        yield self._canonical(pa.Table.from_batches([batch]), source, used, name)
                bar.advance(1)

    def _canonical(self, table: pa.Table, source: dict[str, str], used: dict[str, str], where: str) -> pa.Table:
        try:
            rows = pa.table([table[source[one.name]].cast(one.type) for one in self.schema], schema=self.schema)
        except pa.ArrowInvalid as error:
            raise ValueError(f"{where} has other types than {self.files[0]}: {error}") from error
        keep = pc.fill_null(pc.not_equal(pc.utf8_trim_whitespace(rows["url"]), ""), False)
        rows, identities = rows.filter(keep), table.select(list(used.values())).rename_columns(list(used)).filter(keep)
        self.left_out["missing_url"] += len(table) - len(rows)
        if not len(self.removed.removed):
            return rows
        stays, _ = self.removed(identities, where)
        self.left_out["removal_list"] += len(stays) - int(stays.sum())
        return rows.filter(pa.array(stays))


def _is_plain(one: pa.Field) -> bool:
    """What can stand in a sample's json."""
    kinds = (
        pa.types.is_string,
        pa.types.is_large_string,
        pa.types.is_integer,
        pa.types.is_floating,
        pa.types.is_boolean,
    )
    return any(kind(one.type) for kind in kinds)


@dataclass(slots=True)
class Fetched:
    """What finished shards hold; grows while img2dataset works."""

    plan: Plan
    shards: set[int] = field(default_factory=set)
    rows: int = 0
    downloaded: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    """Over all rounds, by reason."""

    def update(self) -> Self:
        """Count shards that were finished since."""
        for file in self.plan.out.glob("*_stats.json"):
            number = int(file.name.removesuffix("_stats.json"))
            if number not in self.shards and (stats := _read_stats(file)) is not None:
                self.shards.add(number)
                self._add(stats)
        return self

    def _add(self, stats: dict[str, Any]) -> None:
        failed = stats["failed_to_download"] + stats["failed_to_resize"]
        self.rows += stats["count"]
        self.downloaded += stats["successes"]
        for message, count in stats["status_dict"].items():
            if message != _SUCCESS:
                self.failures[reason_of(message)] += count
        # Exceptions in img2dataset's own loop are printed and not counted.
        self.failures["lost"] += stats["count"] - stats["successes"] - failed

    def to_dict(self) -> dict[str, Any]:
        """The report: asked = downloaded + failed + pending, a row that was tried again counted once."""
        failed = Counter(self.failures)
        for one in self.plan.rounds:
            failed.subtract(one.retried)
        return {
            "asked": self.plan.rounds[0].rows,
            "downloaded": self.downloaded,
            "failed": dict((+failed).most_common()),
            "worth_another_try": sum(count for reason, count in (+failed).items() if reason not in _FINAL),
            "pending": self.plan.rows - self.rows,
            "left_out": dict(+self.plan.left_out),
            "shards": len(self.shards),
            "shards_planned": self.plan.shards,
            "rounds": len(self.plan.rounds),
            "columns": self.plan.columns,
            "recipe": asdict(self.plan.recipe),
        }


def reason_of(message: str | None) -> str:
    """A short name for one of img2dataset's error messages."""
    if match := re.match(r"HTTP Error (\d{3})", message or ""):
        return f"http_{match[1]}"
    found = (reason for pattern, reason in _REASONS if re.search(pattern, message or "", re.IGNORECASE))
    return next(found, "other")


def _parts(tar: Path) -> tuple[Path, Path, Path]:
    return tar, tar.with_suffix(".parquet"), tar.with_name(f"{tar.stem}_stats.json")


def _has_parts(tar: Path) -> bool:
    return any(part.exists() for part in _parts(tar))


def _is_whole(tar: Path) -> bool:
    """True for a shard whose stats, parquet and tar were written to their ends."""
    _, parquet, stats = _parts(tar)
    try:
        pq.read_metadata(parquet)
        with open(tar, "rb") as file:
            file.seek(-2 * BLOCK, 2)
            return _read_stats(stats) is not None and not any(file.read())
    except (OSError, pa.ArrowInvalid):
        return False


def _read_stats(file: Path) -> dict[str, Any] | None:
    """A shard's stats; None while they are being written or where a killed run left half of them."""
    try:
        stats = json.loads(file.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return stats if isinstance(stats, dict) and "status_dict" in stats else None
