"""What can be wrong with one tar: its blocks, its members against its index, every byte against its checksum.

The reading side stands on its own: headers are walked again and bytes hashed again, and only then compared with what an
index says. Knows nothing of what members mean beyond which ones a sample cannot do without.
"""

import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from data_tools.metadata import local_file
from ldm_scale.core import progress
from ldm_scale.data.index import FIELDS, IMAGE_FIELDS, ShardIndex, scan
from ldm_scale.data.shards import Sidecars
from ldm_scale.data.tar import Damage, Fault, split_name, walk

_CARRIERS = {*IMAGE_FIELDS, "npy"}


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong."""

    shard: str | None
    """Name of the tar; None where it is about the whole dataset."""
    key: str | None
    """The sample concerned, where it is known."""
    reason: str
    detail: str = ""

    def __str__(self) -> str:
        name = "/".join(part for part in (self.shard, self.key) if part)
        return f"{name or 'dataset'}: {self.reason}" + (f" ({self.detail})" if self.detail else "")


@dataclass(slots=True)
class Findings:
    """What one shard, or a whole dataset, holds and what is wrong with it."""

    samples: int = 0
    problems: list[Problem] = field(default_factory=list)

    def add(self, *problems: Problem) -> None:
        self.problems += problems


Check = Callable[[str, str], Findings]
"""Checks one tar: (path of a local copy, URL) -> findings."""


@contextmanager
def mapped(path: str) -> Iterator[memoryview]:
    """A local file's bytes, without reading them all."""
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            yield memoryview(b"")
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapping, memoryview(mapping) as view:
            yield view


class Layout:
    """What a walk over a tar's headers finds; no content is read.

    keys  samples by key, each with its fields
    """

    def __init__(self, name: str, data: memoryview) -> None:
        self.keys: dict[str, set[str]] = {}
        self.problems: list[Problem] = []
        self.size = len(data)
        self._lengths: dict[int, int] = {}  # by offset
        for item in walk(data):
            split = split_name(item.name) if item.name else None
            if isinstance(item, Damage):
                self.problems.append(Problem(name, split[0] if split else None, item.fault, f"byte {item.offset}"))
                if split:
                    self.keys.pop(split[0], None)
            elif split and split[1] in FIELDS:
                self._lengths[item.offset] = item.length
                if split[1] in self.keys.setdefault(split[0], set()):
                    self.problems.append(Problem(name, split[0], Fault.DUPLICATE, f"second {split[1]}"))
                self.keys[split[0]].add(split[1])
        for key in [key for key, fields in self.keys.items() if not fields & _CARRIERS]:
            self.problems.append(Problem(name, key, Fault.ORPHAN, "+".join(sorted(self.keys.pop(key)))))

    def against(self, index: ShardIndex, name: str) -> list[Problem]:
        """What the index says is wrong, and where members do not lie where it says."""
        if index.header.tar_bytes != self.size:
            detail = f"{self.size} bytes, the index is of {index.header.tar_bytes}"
            return [Problem(name, None, "another_tar_than_indexed", detail)]
        known = [Problem(name, entry.key, entry.reason, f"byte {entry.offset}") for entry in index.header.rejected]
        rows, columns = np.nonzero(index.offsets)
        offsets, wanted = index.offsets[rows, columns].tolist(), index.lengths[rows, columns].tolist()
        lost = {
            row
            for row, offset, length in zip(rows.tolist(), offsets, wanted, strict=True)
            if self._lengths.get(offset) != length
        }
        return known + [
            Problem(name, index.key(row), "lost_sample", "its members are not where they were") for row in sorted(lost)
        ]


def stored_index(url: str, index_dir: str | None, name: str) -> tuple[ShardIndex | None, list[Problem]]:
    """The index that lies beside a shard or in `index_dir`, whatever tar it is of; and what is wrong with it."""
    for folder in Sidecars(index_dir).folders(url):
        path = f"{folder}/{name.removesuffix('.tar')}.idx"
        try:
            return ShardIndex.open(path), []
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            return None, [Problem(name, None, "damaged_index", str(error))]
    return None, []


def hashed_again(path: str, name: str, index: ShardIndex | None) -> tuple[ShardIndex, list[Problem]]:
    """Read every byte of a local tar and compare it with its index.

    returns  what the tar holds now, and where that differs
    """
    fresh = scan(path)
    problems = [Problem(name, entry.key, entry.reason, f"byte {entry.offset}") for entry in fresh.header.rejected]
    if index is None:
        detail = "nothing to compare its bytes with: run python -m data_tools.index first"
        return fresh, [*problems, Problem(name, None, "not_indexed", detail)]
    if fresh.header.sha256 == index.header.sha256:
        return fresh, problems
    rows = {key: row for row, key in enumerate(fresh.keys())}
    changed = []
    for row, key in enumerate(index.keys()):
        if key not in rows:
            changed.append(Problem(name, key, "lost_sample"))
            continue
        before, after = _checksums(index, row), _checksums(fresh, rows[key])
        changed += [Problem(name, key, f"checksum_{field}") for field in before if before[field] != after.get(field)]
    return fresh, [*problems, *(changed or [Problem(name, None, "changed_bytes", "outside the indexed members")])]


def _checksums(index: ShardIndex, row: int) -> dict[str, tuple[int, int]]:
    return {
        field: (int(index.lengths[row, column]), int(index.xxh3[row, column]))
        for field, column in index.column.items()
        if index.offsets[row, column]
    }


def without_repeats(problems: list[Problem]) -> list[Problem]:
    """Each fault of a sample once, and each damaged place once: the header walk and the hashing find the same."""
    once = {(one.shard, one.key, str(one.reason), one.detail if one.key is None else ""): one for one in problems}
    return list(once.values())


def members(data: memoryview, index: ShardIndex, row: int) -> dict[str, bytes]:
    """The members of one sample, straight from the tar's bytes, unverified."""
    found = {}
    for name, column in index.column.items():
        if offset := int(index.offsets[row, column]):
            found[name] = bytes(data[offset : offset + int(index.lengths[row, column])])
    return found


def check_all(urls: Sequence[str], check: Check, threads: int) -> Findings:
    """Check every tar, several at a time."""

    def attempt(url: str) -> Findings:
        try:
            with local_file(url) as path:
                return check(path, url)
        except OSError as error:
            return Findings(0, [Problem(url.rpartition("/")[2], None, "unreadable", str(error))])

    total = Findings()
    with ThreadPoolExecutor(threads) as pool, progress.bar("verify", len(urls), unit="shards") as bar:
        for found in pool.map(attempt, urls):
            total.samples += found.samples
            total.add(*without_repeats(found.problems))
            bar.advance(1, f"{len(total.problems):,} problems")
    return total
