"""Views of a dataset: which of its samples count and which must not be read, decided without rewriting a tar.

A selection is a parquet file of the columns `shard` (name of the tar) and `key`, sorted and unique, whose metadata says
how it was made; it changes what is numbered. A removal list is a file of JSON lines {"shard":, "key":, "reason":,
"time":}; numbers stay, and readers put another sample in the place of a removed one. Knows nothing of tars or indexes:
samples are named, not numbered.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ldm_scale.core import storage

REMOVED = "removed.jsonl"
"""Name of the removal list that belongs to a dataset, in its folder of sidecars."""

_MADE_BY = b"ldm_scale.selection"
_COLUMNS = ("shard", "key")
_ROWS = 1 << 16  # turned into text at a time


@dataclass(frozen=True)
class Selection:
    """Some samples of a dataset."""

    table: pa.Table
    """Columns `shard` and `key`, in this order, ascending and each row once."""
    how: dict[str, Any]
    """What made it, JSON values."""

    def __len__(self) -> int:
        return self.table.num_rows

    @cached_property
    def digest(self) -> str:
        """sha256 of a line `shard/key` for each sample."""
        lines = hashlib.sha256()
        for batch in self.table.to_batches(max_chunksize=_ROWS):
            rows = zip(batch["shard"].to_pylist(), batch["key"].to_pylist(), strict=True)
            lines.update("".join(f"{shard}/{key}\n" for shard, key in rows).encode())
        return lines.hexdigest()

    @cached_property
    def counts(self) -> dict[str, int]:
        """Samples by shard, in order."""
        return {entry["values"]: entry["counts"] for entry in pc.value_counts(self.table["shard"]).to_pylist()}

    def keys(self, shard: str) -> pa.ChunkedArray:
        """The keys of one shard, ascending; none where it is not in the selection."""
        start, count = self._spans.get(shard, (0, 0))
        return self.table["key"].slice(start, count)

    @cached_property
    def _spans(self) -> dict[str, tuple[int, int]]:
        starts = np.cumsum([0, *self.counts.values()]).tolist()
        return {shard: (start, count) for (shard, count), start in zip(self.counts.items(), starts, strict=False)}

    @classmethod
    def read(cls, path: str | Path) -> "Selection":
        """Read a local or remote selection.

        raises  ValueError for another file, or one whose rows are not sorted and unique
        """
        with storage.open_read(str(path)) as file:
            try:
                table = pq.read_table(pa.BufferReader(file.read()))
            except pa.ArrowInvalid as error:
                raise ValueError(f"{path} is no parquet file or is cut short: {error}") from error
        made_by = (table.schema.metadata or {}).get(_MADE_BY)
        if made_by is None or not set(_COLUMNS) <= set(table.column_names):
            raise ValueError(
                f"{path} is no selection: it has columns {', '.join(table.column_names)}; make one with "
                "data_tools.filter or data_tools.dedup"
            )
        table = table.select(_COLUMNS).cast(_SCHEMA)
        _require_ascending(table, str(path))
        return cls(table, json.loads(made_by))


_SCHEMA = pa.schema([(name, pa.large_string()) for name in _COLUMNS])  # 32-bit offsets overflow near 100M keys


def write_selection(
    path: str | Path, shards: Sequence[str] | pa.Array, keys: Sequence[str] | pa.Array, how: dict[str, Any]
) -> Selection:
    """Write samples, in any order, as a selection; atomically.

    shards, keys  one of each a sample
    raises        ValueError where a sample is given twice
    """
    table = pa.table([pa.array(shards, pa.large_string()), pa.array(keys, pa.large_string())], schema=_SCHEMA)
    table = table.sort_by([(name, "ascending") for name in _COLUMNS])
    _require_ascending(table, str(path))
    with storage.atomic_write(path) as file:
        pq.write_table(table.replace_schema_metadata({_MADE_BY: json.dumps(how, ensure_ascii=False)}), file)
    return Selection(table, how)


def _require_ascending(table: pa.Table, name: str) -> None:
    before, after = table.slice(0, max(len(table) - 1, 0)), table.slice(1)
    later = pc.greater(after["shard"], before["shard"])
    same = pc.equal(after["shard"], before["shard"])
    ascending = pc.or_(later, pc.and_(same, pc.greater(after["key"], before["key"])))
    if (place := pc.index(ascending, False).as_py()) >= 0:
        row = after.slice(place, 1).to_pylist()[0]
        raise ValueError(
            f"{name}: {row['shard']}/{row['key']} is there twice or out of place; a selection is sorted by shard and "
            "key and names each sample once"
        )


@dataclass(frozen=True)
class RemovalList:
    """Samples that must not be read any more."""

    keys: Mapping[str, frozenset[str]]
    """By name of the shard."""

    def __len__(self) -> int:
        return sum(map(len, self.keys.values()))

    def of(self, shard: str) -> frozenset[str]:
        """The removed keys of one shard."""
        return self.keys.get(shard, frozenset())

    @cached_property
    def digest(self) -> str:
        """sha256 of a line `shard/key` for each sample, in order."""
        names = sorted((shard, key) for shard, keys in self.keys.items() for key in keys)
        return hashlib.sha256("".join(f"{shard}/{key}\n" for shard, key in names).encode()).hexdigest()

    @classmethod
    def read(cls, paths: Iterable[str | Path]) -> "RemovalList":
        """Read local or remote removal lists, as one.

        raises  FileNotFoundError, or ValueError naming the line that is none of a removal list
        """
        keys: dict[str, set[str]] = {}
        for path in paths:
            for shard, key in _removals(str(path)):
                keys.setdefault(shard, set()).add(key)
        return cls({shard: frozenset(found) for shard, found in keys.items()})


def _removals(path: str) -> Iterable[tuple[str, str]]:
    with storage.open_read(path) as file:
        lines = file.read().decode().splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            yield str(entry["shard"]), str(entry["key"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f'{path}, line {number}: {line[:80]!r} is no removal; a line is {{"shard": "00000.tar", "key": "...", '
                '"reason": "...", "time": "..."}'
            ) from error
