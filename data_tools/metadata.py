"""What is known of samples besides their pictures: the columns of a shard's parquet, or else its json members.

Datasets call one thing by many names (`similarity`, `SIMILARITY`, `clip_similarity_vitb32`); the table of them is here.
Also opens what a tool is given: shards, under a progress bar, and the selection of them.
"""

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ldm_scale.core import progress, storage
from ldm_scale.data.remote import fetch
from ldm_scale.data.shards import ShardSet
from ldm_scale.data.views import Selection

ALIASES: dict[str, tuple[str, ...]] = {
    "width": ("original_width", "width"),
    "height": ("original_height", "height"),
    "similarity": ("similarity", "clip_similarity", "clip_similarity_vitb32", "clip_l14_similarity_score"),
    "punsafe": ("punsafe", "p_unsafe"),
    "pwatermark": ("pwatermark", "p_watermark", "watermark_score"),
    "aesthetic": ("aesthetic", "aesthetic_score", "aesthetics_score", "aesthetic_score_laion_v2"),
    "licence": ("license", "licence"),
    "language": ("language", "lang"),
    "nsfw": ("nsfw",),
    "url": ("url", "image_url"),
    "text": ("caption", "text", "alt_text"),
    "sha256": ("sha256",),
    "md5": ("md5",),
    "hash": ("hash",),
    "key": ("key",),
}
"""Our name of a column -> what datasets call it, in lower case; the first one that is there counts."""


def open_shards(source: str, index_dir: str | None) -> ShardSet:
    """Open shards, indexing those that have no index yet.

    raises  ValueError where two shards have one name: selections and reports name samples by shard and key
    """
    with progress.bar("opening", len(storage.expand(source)), unit="shards") as bar:
        shards = ShardSet.open(source, index_dir, progress=lambda done, _: bar.move(done))
    seen: dict[str, str] = {}
    for name, url in zip(shards.names, shards.urls, strict=True):
        if seen.setdefault(name, url) != url:
            raise ValueError(f"{seen[name]} and {url} have the same name; work on one folder at a time")
    return shards


def selected_ids(shards: ShardSet, shard: int, selection: Selection | None) -> np.ndarray:
    """Sample numbers of one shard that are in the selection; all of them where there is none.

    raises  ValueError naming a selected key that the shard does not hold
    """
    ids = shards.shard_ids(shard)
    if selection is None:
        return ids
    wanted = selection.keys(shards.names[shard])
    keys = pa.array(shards.keys(ids), pa.large_string())
    if len(missing := wanted.filter(pc.invert(pc.is_in(wanted, value_set=keys)))):
        raise ValueError(
            f"the selection names {missing[0]}, which is not in {shards.urls[shard]}: it is of other shards"
        )
    return ids[pc.is_in(keys, value_set=wanted.combine_chunks()).to_numpy(zero_copy_only=False)]


@contextmanager
def local_file(url: str) -> Iterator[str]:
    """A shard as a file of this machine: itself, or a temporary copy of a remote one."""
    if not storage.is_remote(url):
        yield url
        return
    with tempfile.NamedTemporaryFile(suffix=".tar") as copy:
        fetch(url, storage.remote_state(url).size, copy)
        copy.flush()
        yield copy.name


def require_known_shards(shards: ShardSet, selection: Selection | None) -> None:
    """Refuse a selection of other shards.

    raises  ValueError naming a shard that is not in the set
    """
    if selection is not None and (strangers := sorted(selection.counts.keys() - set(shards.names))):
        raise ValueError(f"the selection names {strangers[0]}, which is not among the {len(shards.names)} shards given")


def columns_for(
    columns: Sequence[str], where: str, required: Sequence[str], optional: Sequence[str] = ()
) -> dict[str, str]:
    """Our names -> the names that a table uses, whatever their case; what is optional may be left out.

    raises  ValueError naming the columns there are, where a required one is missing or two differ only in case
    """
    by_lower: dict[str, list[str]] = {}
    for column in columns:
        by_lower.setdefault(column.lower(), []).append(column)
    found = {}
    for name in dict.fromkeys((*required, *optional)):
        spellings = next((by_lower[alias] for alias in ALIASES[name] if alias in by_lower), [])
        if len(spellings) > 1:
            raise ValueError(f"{where}: columns {' and '.join(spellings)} differ only in case; drop or rename one")
        if spellings:
            found[name] = spellings[0]
        elif name in required:
            raise ValueError(
                f"{where} has no column for {name} (looked for {', '.join(ALIASES[name])}); it has "
                f"{', '.join(columns) or 'none'}"
            )
    return found


def sample_metadata(shards: ShardSet, shard: int, required: Sequence[str], optional: Sequence[str] = ()) -> pa.Table:
    """`key` and columns of one shard's samples under our names, a row for each sample of the set, in its order.

    raises  ValueError where a required column is missing, or some are required and there is neither parquet nor json
    """
    url = shards.urls[shard]
    parquet = url.removesuffix(".tar") + ".parquet"
    if storage.exists(parquet):
        return _from_parquet(shards, shard, parquet, required, optional)
    if "json" in shards.opened(shard).index.column:
        return _from_json(shards, shard, required, optional)
    if required:
        raise ValueError(f"{url} has neither {parquet} nor json members: nothing is known of its samples")
    return pa.table({"key": shards.keys(shards.shard_ids(shard))})


def _from_parquet(
    shards: ShardSet, shard: int, parquet: str, required: Sequence[str], optional: Sequence[str]
) -> pa.Table:
    with storage.open_read(parquet) as file:
        source = pq.ParquetFile(file)
        names = source.schema_arrow.names
        found = columns_for(names, parquet, required, optional)
        if "key" not in names:
            raise ValueError(f"{parquet} has no column 'key', so its rows cannot be matched; it has {', '.join(names)}")
        table = source.read(["key", *dict.fromkeys(found.values())])
    keys = pa.array(shards.keys(shards.shard_ids(shard)))
    rows = pc.index_in(keys, value_set=table["key"].cast(pa.string()).combine_chunks())
    return pa.table({**{name: table[column].take(rows) for name, column in found.items()}, "key": keys})


def _from_json(shards: ShardSet, shard: int, required: Sequence[str], optional: Sequence[str]) -> pa.Table:
    ids = shards.shard_ids(shard)
    rows = [_parsed(members.get("json", b"")) for members in shards.read(ids, ("json",))]
    names = list(dict.fromkeys(name for row in rows for name in row))
    found = columns_for(names, f"the json members of {shards.urls[shard]}", required, optional)
    columns = {name: _column([row.get(column) for row in rows]) for name, column in found.items()}
    return pa.table({**columns, "key": shards.keys(ids)})


def _parsed(data: bytes) -> dict[str, Any]:
    try:
        values = json.loads(data)
    except ValueError:
        return {}
    return values if isinstance(values, dict) else {}


def _column(values: list[Any]) -> pa.Array:
    """One Arrow type for all: text, where numbers and text are mixed."""
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return pa.array([None if value is None else str(value) for value in values])


def numbers(column: pa.ChunkedArray | pa.Array, name: str) -> np.ndarray:
    """A column as float64, NaN where it is missing.

    raises  ValueError where it holds something else
    """
    try:
        return pc.cast(column, pa.float64()).to_numpy(zero_copy_only=False).astype(np.float64)
    except pa.ArrowInvalid as error:
        raise ValueError(f"column {name} should hold numbers: {error}") from error
