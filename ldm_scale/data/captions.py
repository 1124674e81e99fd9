"""Captions from beside the shards: a parquet file of a column `key` and columns of captions, drawn by weight.

The file is written once more in the layout that look-ups want: Arrow, to be mapped into memory, and the hashes of the
keys, sorted. So new captions for 400M samples need no memory of their own, and no tar is rewritten.

Letters: N rows of the file, B samples of a batch.
"""

import os
import shutil
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import IO, Any, Self

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import xxhash

from ldm_scale.core import rng, storage
from ldm_scale.data.shards import Sidecars

OWN = "txt"
"""Stands among the columns for the caption that a sample came with."""

_KEY = "key"
_ROWS = 1 << 16  # converted at a time
_MAX_ROWS = 1 << 32


@dataclass(kw_only=True, slots=True)
class CaptionsConfig:
    """Captions that take the place of those in the shards."""

    file: str | None = None
    """Parquet file of a column `key` and columns of captions; local or remote. None: captions stay what they are."""
    columns: dict[str, float] = field(default_factory=dict)
    """Columns to draw from, each with its weight, in any unit; `txt` is the sample's own caption."""

    def __post_init__(self) -> None:
        if (self.file is None) != (not self.columns):
            raise ValueError(
                f"captions.file={self.file} with captions.columns={self.columns}: give both, a file and its columns "
                "with their weights, such as +data.captions.columns={blip: 0.7, txt: 0.3}, or neither"
            )
        for name, weight in self.columns.items():
            if not 0 < weight < float("inf"):
                raise ValueError(f"captions.columns.{name}={weight}; a weight above 0: leave the column out instead")

    def open(self, index_dir: str | None, seed: int) -> "CaptionOverlay | None":
        """The captions, laid out for look-ups if need be; None where there are none."""
        return None if self.file is None else CaptionOverlay(Table.open(self.file, index_dir), self.columns, seed)


@dataclass(frozen=True)
class Table:
    """The file, laid out for look-ups."""

    folder: Path

    @cached_property
    def facts(self) -> dict[str, Any]:
        """file, n, sha256 of the parquet file, columns."""
        facts: dict[str, Any] = storage.read_json(self.folder / "facts.json")
        return facts

    @property
    def digest(self) -> str:
        """sha256 of the parquet file."""
        return str(self.facts["sha256"])

    def rows(self, keys: Sequence[str]) -> list[int]:
        """The row of each key; -1 for a key that has none."""
        hashes_B = _hashes(keys)
        places_B = np.searchsorted(self._hashes, hashes_B).tolist()
        return [self._row(key, value, place) for key, value, place in zip(keys, hashes_B, places_B, strict=True)]

    def text(self, column: str, row: int) -> str | None:
        """What a row says in a column; None for nothing."""
        batch = bisect_right(self._begins, row) - 1
        text: str | None = self._batches[batch][column][row - self._begins[batch]].as_py()
        return text

    def _row(self, key: str, value: np.uint64, place: int) -> int:
        while place < len(self._hashes) and self._hashes[place] == value:
            row = int(self._rows[place])
            if self.text(_KEY, row) == key:
                return row
            place += 1
        return -1

    @cached_property
    def _hashes(self) -> np.ndarray:
        return np.load(self.folder / "hashes.npy", mmap_mode="r")

    @cached_property
    def _rows(self) -> np.ndarray:
        return np.load(self.folder / "rows.npy", mmap_mode="r")

    @cached_property
    def _batches(self) -> list[pa.RecordBatch]:
        reader = pa.ipc.open_file(pa.memory_map(str(self.folder / "captions.arrow")))
        return [reader.get_batch(i) for i in range(reader.num_record_batches)]

    @cached_property
    def _begins(self) -> list[int]:
        """The first row of each batch."""
        return list(accumulate((len(batch) for batch in self._batches[:-1]), initial=0))

    @classmethod
    def open(cls, file: str, index_dir: str | None) -> Self:
        """Find the layout of a parquet file, or make it: beside the file, or in `index_dir`.

        raises  FileNotFoundError, or ValueError for a file without keys, or with one key twice
        """
        files, path = fsspec.core.url_to_fs(file)
        if not files.exists(path):
            raise FileNotFoundError(f"captions.file={file} is not there")
        name = f"{Path(path).stem}-{files.ukey(path)[:12]}.captions"
        sidecars = Sidecars(index_dir)
        for folder in sidecars.folders(file):
            if not storage.is_remote(folder) and (Path(folder) / name / "facts.json").exists():
                return cls(Path(folder) / name)
        made = Path(sidecars.writable(file)) / name
        begun = made.with_name(f".{name}.{os.getpid()}.tmp")
        try:
            begun.mkdir()
            _lay_out(file, begun)
            _rename_unless_there(begun, made)
        finally:
            shutil.rmtree(begun, ignore_errors=True)
        return cls(made)


class CaptionOverlay:
    """Draws each sample's caption, by its stream position.

    missing  how many samples had none in any of the columns, and kept their own
    """

    def __init__(self, table: Table, columns: Mapping[str, float], seed: int) -> None:
        self.table, self.missing = table, 0
        self._columns, self._seed = dict(columns), seed
        if unknown := [name for name in columns if name not in (*table.facts["columns"], OWN)]:
            raise ValueError(
                f"captions.columns.{unknown[0]}: {table.facts['file']} has the columns "
                f"{', '.join(table.facts['columns'])}; {OWN} stands for a sample's own caption"
            )

    def __call__(self, keys: Sequence[str], captions: Sequence[str], positions: np.ndarray) -> list[str]:
        """The captions drawn for samples of these keys and own captions, at these stream positions, (B,) all."""
        draws = rng.uniform(self._seed, "caption", torch.from_numpy(np.array(positions, np.int64))).tolist()
        rows = self.table.rows(keys)
        return [self._draw(row, own, u) for row, own, u in zip(rows, captions, draws, strict=True)]

    def _draw(self, row: int, own: str, u: float) -> str:
        texts = {} if row < 0 else {name: self.table.text(name, row) for name in self._columns if name != OWN}
        given = {name: text.strip() for name, text in texts.items() if text and text.strip()}
        if not given:
            self.missing += 1
            return own
        there = [(given.get(name, own), weight) for name, weight in self._columns.items() if name in {*given, OWN}]
        ends = list(accumulate(weight for _, weight in there))
        return there[min(bisect_right(ends, u * ends[-1]), len(there) - 1)][0]


def _lay_out(file: str, folder: Path) -> None:
    """Write the rows as Arrow, then the keys' hashes in order, then what it is."""
    with storage.open_read(file) as content:
        columns, hashes_N = _copy(content, file, folder / "captions.arrow")
    order_N = np.argsort(hashes_N, kind="stable").astype(np.uint32)
    np.save(folder / "hashes.npy", hashes_N[order_N])
    np.save(folder / "rows.npy", order_N)
    _require_unique(Table(folder), hashes_N[order_N], order_N, file)
    facts = {"file": file, "n": len(order_N), "sha256": storage.sha256_file(file), "columns": columns}
    storage.write_json(folder / "facts.json", facts)


def _copy(content: IO[bytes], file: str, to: Path) -> tuple[list[str], np.ndarray]:
    """Write keys and captions as Arrow; returns the columns of captions and the hash of every key, (N,) uint64."""
    try:
        source = pq.ParquetFile(content)
    except pa.ArrowInvalid as error:
        raise ValueError(f"captions.file={file} is no parquet file or is cut short: {error}") from error
    texts = [column.name for column in source.schema_arrow if _is_text(column.type)]
    if _KEY not in texts or len(texts) == 1 or not 0 < source.metadata.num_rows < _MAX_ROWS:
        raise ValueError(
            f"captions.file={file} has {source.metadata.num_rows:,} rows of {', '.join(source.schema_arrow.names)}; it "
            f"needs a column {_KEY} and one of captions, all text, and 1 to 2^32 - 1 rows"
        )
    columns = [name for name in texts if name not in (_KEY, OWN)]
    schema = pa.schema([(name, pa.large_string()) for name in (_KEY, *columns)])
    hashes: list[np.ndarray] = [np.zeros(0, np.uint64)]
    with pa.OSFile(str(to), "wb") as sink, pa.ipc.new_file(sink, schema) as out:
        for batch in source.iter_batches(_ROWS, columns=schema.names):
            out.write_table(pa.Table.from_batches([batch]).select(schema.names).cast(schema))
            if batch[_KEY].null_count:
                raise ValueError(f"captions.file={file} has {batch[_KEY].null_count} rows without a key: drop them")
            hashes.append(_hashes(batch[_KEY].to_pylist()))
    return columns, np.concatenate(hashes)


def _hashes(keys: Sequence[str]) -> np.ndarray:
    return np.array([xxhash.xxh3_64_intdigest(key.encode()) for key in keys], np.uint64)


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _require_unique(table: Table, hashes_N: np.ndarray, rows_N: np.ndarray, file: str) -> None:
    for place in np.flatnonzero(hashes_N[1:] == hashes_N[:-1]).tolist():
        one, other = (table.text(_KEY, int(row)) for row in rows_N[place : place + 2])
        if one == other:
            raise ValueError(f"captions.file={file} has two rows of key {one!r}: give each sample one row")


def _rename_unless_there(begun: Path, made: Path) -> None:
    """Give a folder its name, unless another process was faster."""
    try:
        begun.rename(made)
    except OSError:
        if not (made / "facts.json").exists():
            raise
