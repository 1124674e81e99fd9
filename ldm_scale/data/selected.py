"""Selections by number: which rows of each shard's index they take.

Every key is looked up in the indexes once; the rows are then kept in a file that all later readers map into memory, so
that a view of 400M samples opens at once and its processes share one copy.

Letters: S shards, N selected samples.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, reduce
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ldm_scale.core import storage
from ldm_scale.data.index import ShardIndex
from ldm_scale.data.views import Selection

_THREADS = 16

OpenIndex = Callable[[int], ShardIndex]
"""The index of a shard, by number."""
LostKeys = Callable[[int], Collection[str]]
"""Keys that a shard was once to hold and has rejected, by number of the shard."""


@dataclass(frozen=True)
class SelectedRows:
    """The samples that several selections have in common.

    starts  (S + 1,) int64: where the rows of each shard begin
    rows    (N,) uint32: rows of the shards' indexes, ascending in each shard
    """

    starts: np.ndarray
    rows: np.ndarray
    left_out: dict[str, int]
    """Selected samples that the shards cannot give, by reason."""

    def of(self, shard: int) -> np.ndarray:
        """The rows of one shard."""
        return self.rows[self.starts[shard] : self.starts[shard + 1]]

    @cached_property
    def digest(self) -> str:
        """sha256 of starts and rows: with the shards' keys, it says which samples these are."""
        return hashlib.sha256(self.starts.tobytes() + self.rows.tobytes()).hexdigest()


class Numbering:
    """Looks selections up in the indexes of some shards.

    names    of the shards, each once
    require  groups of fields, of each of which a sample must have a member
    lost     keys that count as rejected where a selection names them; others that are not there are a mistake
    """

    def __init__(
        self, names: Sequence[str], index: OpenIndex, require: Sequence[Sequence[str]], lost: LostKeys
    ) -> None:
        self._names, self._index, self._require, self._lost = list(names), index, require, lost
        if twice := [name for name, count in Counter(names).items() if count > 1]:
            raise ValueError(
                f"data.selection names samples by shard and key, but several shards are called {twice[0]}: make each "
                "folder a source of its own in data.mixture"
            )

    def rows(self, files: Sequence[str], folder: Callable[[], str], shards_id: str) -> SelectedRows:
        """The rows of what all selections take, from the file that an earlier call left, or looked up and written.

        folder     where that file is, or goes
        shards_id  digest of the shards that are looked up
        raises     ValueError saying how many selected samples are not in the shards, with the first of them
        """
        name = storage.digest([shards_id, self._require, sorted(map(storage.sha256_file, files))])[:32]
        rows_file, facts_file = (Path(folder()) / f"{name}.rows.{end}" for end in ("npy", "json"))
        if not facts_file.exists():
            found = self._look_up([Selection.read(file) for file in files], " and ".join(files))
            with storage.atomic_write(rows_file) as file:
                np.save(file, found.rows)
            storage.write_json(facts_file, {"starts": found.starts.tolist(), "left_out": found.left_out})
        facts = json.loads(facts_file.read_bytes())
        rows = np.load(rows_file, mmap_mode="r") if facts["starts"][-1] else np.zeros(0, np.uint32)
        return SelectedRows(np.array(facts["starts"], np.int64), rows, facts["left_out"])

    def _look_up(self, selections: Sequence[Selection], files: str) -> SelectedRows:
        known = set(self._names)
        absent = [
            (f"{shard}/{selection.keys(shard)[0]}", count)
            for selection in selections
            for shard, count in selection.counts.items()
            if shard not in known
        ]
        with ThreadPoolExecutor(_THREADS) as pool:
            found = list(pool.map(lambda shard: self._look_up_shard(shard, selections), range(len(self._names))))
        absent += [(one.absent[0], len(one.absent)) for one in found if one.absent]
        if absent:
            raise ValueError(
                f"data.selection={files} names {sum(count for _, count in absent):,} samples that are not there, the "
                f"first {absent[0][0]}: it is of other shards. Make it again of these: python -m data_tools.filter"
            )
        left_out = sum((one.left_out for one in found), Counter[str]())
        starts = np.cumsum([0, *(len(one.rows) for one in found)], dtype=np.int64)
        return SelectedRows(starts, np.concatenate([one.rows for one in found]), dict(left_out))

    def _look_up_shard(self, shard: int, selections: Sequence[Selection]) -> "_Found":
        name = self._names[shard]
        wanted = reduce(_common, (selection.keys(name) for selection in selections))
        if not len(wanted):
            return _Found(np.zeros(0, np.uint32), [], Counter())
        index = self._index(shard)
        places = pc.index_in(wanted, value_set=index.key_array())
        left_out = Counter[str]()
        absent = wanted.filter(pc.is_null(places)).to_pylist()
        if absent:
            lost = {*self._lost(shard), *(entry.key for entry in index.header.rejected)}
            left_out["rejected"] = len(absent)
            absent = [f"{name}/{key}" for key in absent if key not in lost]
        rows = np.sort(places.drop_null().to_numpy().astype(np.uint32))
        whole = np.intersect1d(rows, index.rows_with(self._require), assume_unique=True).astype(np.uint32)
        left_out["lacks_members"] = len(rows) - len(whole)
        return _Found(whole, absent, +left_out)


@dataclass(frozen=True, slots=True)
class _Found:
    """What became of the selected samples of one shard."""

    rows: np.ndarray
    absent: list[str]
    left_out: Counter[str]


def _common(one: pa.ChunkedArray, other: pa.ChunkedArray) -> pa.ChunkedArray:
    return one.filter(pc.is_in(one, value_set=other.combine_chunks()))
