"""Image shards as a queue of tars: nothing of one is read before its turn, and then all of it, once.

A `ShardSet` numbers all samples, so it needs every index before the first image; that would read a set without indexes
twice. Here each tar stands alone, is read into memory from front to back and indexed from those bytes.
"""

import glob
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ldm_scale.core import storage
from ldm_scale.data.index import IMAGE_FIELDS, ShardIndex, scan
from ldm_scale.data.remote import fetch
from ldm_scale.data.shards import ShardSet, ShardSummary, Sidecars, tar_sizes
from ldm_scale.data.tar import Member, split_name, walk
from ldm_scale.data.views import REMOVED, RemovalList, Selection

_PIECE = 1 << 22  # bytes of a tar read at a time
_GLANCE, _LEAST_GLANCE = 32, 1 << 16  # to guess how many samples a tar has, one so-many-th of it is read, or so much


class ImageTars:
    """Tars that stand alone, with what is known of each."""

    def __init__(
        self,
        source: str,
        index_dir: str | None,
        require: Sequence[str],
        *,
        selection: Sequence[str] = (),
        removed: Sequence[str] = (),
    ) -> None:
        """Find the tars that `source` names; the arguments are those of `ShardSet.open` and `ShardSet.view`.

        raises  FileNotFoundError naming what is not there; ValueError for two tars of one name
        """
        self.urls = storage.expand(source)
        self.sizes = tar_sizes(self.urls)
        self.names = [url.rpartition("/")[2] for url in self.urls]
        self._sidecars = Sidecars(index_dir.rstrip("/") if index_dir else None)
        self._require = require
        self.selections = [Selection.read(path) for path in selection]
        if twice := [name for name, count in Counter(self.names).items() if count > 1]:
            raise ValueError(
                f"data.images={source!r} names several shards called {twice[0]}, and a cache keeps the names of its "
                "shards: encode one folder at a time, each to its own data.latents"
            )
        self._known: dict[str, ShardSummary] = {}
        own: list[str] = []
        for url in {url.rpartition("/")[0]: url for url in self.urls}.values():
            self._known |= self._sidecars.read_summaries(url)
            own += [f"{folder}/{REMOVED}" for folder in self._sidecars.folders(url)]
        self._removed = RemovalList.read([*removed, *filter(storage.exists, own)])
        if any(name not in self._known for name in self.names):
            self._sidecars.writable(self.urls[0])

    def summary(self, tar: int) -> ShardSummary | None:
        """What is known of a tar without reading it, from the manifest or its index; None where neither fits it."""
        name, size = self.names[tar], self.sizes[tar]
        if name not in self._known or self._known[name].bytes != size:
            index = self._sidecars.read(self.urls[tar], size)
            if index is None:
                return None
            self._known[name] = ShardSummary.of(name, index)
        return self._known[name]

    def samples(self, tars: Sequence[int]) -> int:
        """How many samples these tars have; by their sizes where some have no index, 0 where nothing can be said."""
        known = {tar: summary for tar in tars if (summary := self.summary(tar)) is not None}
        urls = [self.urls[tar] for tar in known]
        counted = ShardSet(urls, list(known.values()), self._sidecars, self._require).n
        rest = [tar for tar in tars if tar not in known]
        if rest:
            density = counted / sum(self.sizes[tar] for tar in known) if counted else self._glance(rest[0])
            counted += round(density * sum(self.sizes[tar] for tar in rest))
        names = [self.names[tar] for tar in tars]
        return min([counted, *(sum(one.counts.get(name, 0) for name in names) for one in self.selections)])

    def is_newer(self, tar: int, than_ns: int) -> bool:
        """Whether a local tar was written after a time in nanoseconds; what is remote has no date to rely on."""
        return not storage.is_remote(self.urls[tar]) and os.stat(self.urls[tar]).st_mtime_ns > than_ns

    def hold(self, tar: int, *, index_again: bool = False) -> ShardSet:
        """Read a tar into memory and open it there; where it has no index, that is made of the same bytes and kept.

        index_again  take no index's word for what is in it
        raises  ValueError where other bytes arrive than the file system promised
        """
        url, size = self.urls[tar], self.sizes[tar]
        with os.fdopen(os.memfd_create(self.names[tar]), "w+b") as memory:
            if storage.is_remote(url):
                fetch(url, size, memory)
            else:
                with storage.open_read(url) as source:
                    shutil.copyfileobj(source, memory, _PIECE)
            memory.flush()
            if (got := os.fstat(memory.fileno()).st_size) != size:
                raise ValueError(f"{url} gave {got} of {size} bytes: it is being written, or cut; run again")
            path = f"/proc/self/fd/{memory.fileno()}"
            index = None if index_again else self._sidecars.read(url, size)
            index = index or self._index(url, path)
            self._known[self.names[tar]] = summary = ShardSummary.of(self.names[tar], index)
            held = ShardSet(
                [path], [summary], _Known(index_dir=None, index=index), self._require, removed=self._removed
            )
            held.opened(0)  # the memory lives as long as this file is open
        return held

    def summarise(self) -> None:
        """Write the manifests of the tars that have been held, where there are none yet; reads no tar."""
        for parent in {url.rpartition("/")[0] for url in self.urls}:
            there = [tar for tar, url in enumerate(self.urls) if url.rpartition("/")[0] == parent]
            before = self._sidecars.read_summaries(self.urls[there[0]])
            found = {self.names[tar]: summary for tar in there if (summary := self.summary(tar)) is not None}
            if before | found != before:
                self._sidecars.write_summaries(self.urls[there[0]], list((before | found).values()))

    def chosen(self, held: ShardSet) -> list[int]:
        """Numbers of a held tar's samples that every selection names, by key."""
        ids = held.shard_ids(0, by_key=True)
        for selection in self.selections:
            names = set(selection.keys(held.names[0]).to_pylist())
            ids = ids[[key in names for key in held.keys(ids)]]
        return [int(sample) for sample in ids]

    def _index(self, url: str, copy: str) -> ShardIndex:
        index = scan(copy)
        path = Path(self._sidecars.writable(url)) / f"{url.rpartition('/')[2].removesuffix('.tar')}.idx"
        with suppress(FileNotFoundError), storage.atomic_write(path) as file:  # swept by one that has written it
            file.write(index.to_bytes())
        sweep(path)
        return index

    def _glance(self, tar: int) -> float:
        """Samples a byte of a tar, judged by its beginning."""
        size = min(self.sizes[tar], max(self.sizes[tar] // _GLANCE, _LEAST_GLANCE))
        beginning = storage.read_range(self.urls[tar], 0, size)
        members = [item for item in walk(memoryview(beginning)) if isinstance(item, Member)]
        images = sum(split is not None and split[1] in IMAGE_FIELDS for split in (split_name(m.name) for m in members))
        return images / (members[-1].offset + members[-1].length) if members else 0.0


def sweep(path: Path) -> None:
    """Remove what processes left that were killed while they wrote this file."""
    for temporary in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        temporary.unlink(missing_ok=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Known(Sidecars):
    """The index of a tar in memory."""

    index: ShardIndex

    def read(self, url: str, size: int) -> ShardIndex:
        return self.index
