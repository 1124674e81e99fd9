"""The latent cache: images encoded once, as WebDataset shards that any reader understands. Owner of the format.

    {shard}.tar             ustar; a PAX global header with the fingerprint, then `{key}.npy`, `{key}.txt`, ... by key;
                            `{key}.flip.npy` too where the latents of mirror images were asked for, `{key}.text.npy`
                            where what a frozen text encoder makes of the caption was
    {shard}.parquet         metadata of each sample
    .ldm/{shard}.idx        index
    .ldm/{shard}.done.json  what was read, written and rejected, what the latents look like; written last of a shard
    manifest.json           what made the cache; written last of all

`{key}.npy` holds the posterior's moments as the first stage gave them, unscaled, float16 in C order behind a header of
128 bytes; `{key}.text.npy` the caption's tokens alike. The draw from the posterior, the scale and the caption dropout
belong to training. Knows nothing of networks: first stage and text encoder appear here as a name, a configuration and a
digest.

Shape letters: B batch, M channels of the moments (2C for a Gaussian: mean then log-variance; C for a point), C channels
of the latent, H W latent height and width, L tokens of a caption, D their width.
"""

import json
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from xxhash import xxh3_64_intdigest

from ldm_scale.core import storage
from ldm_scale.data.index import Rejection, index_shard
from ldm_scale.data.remote import RemoteReader
from ldm_scale.data.shards import (
    SIDECARS,
    CorruptSample,
    OpenShard,
    ShardSet,
    ShardSummary,
    Sidecars,
    content_id,
    order_id,
    tar_sizes,
)
from ldm_scale.data.tar import ShardWriter

FORMAT = "ldm_scale latents/1"
KINDS = ("gaussian", "point")
NPY_HEADER_BYTES = 128
MIRRORED = "flip.npy"
"""Member that holds the moments of the mirror image."""
TEXT = "text.npy"
"""Member that holds what a frozen text encoder makes of the caption, (L, D)."""
_LOGVAR_RANGE = (-30.0, 20.0)  # as the first stage clamps it before it draws

Substitute = Callable[[int, CorruptSample], int]


def fingerprint(*, first_stage_kind: str, first_stage_sha256: str, transform: Mapping[str, Any], kind: str) -> str:
    """Digest of everything that decides a cached number: weights, image transform, kind and dtype of the moments.

    Not the path or the latent scale of the first stage: moving a file or changing the scale re-encodes nothing.
    """
    return storage.digest(
        {
            "format": FORMAT,
            "first_stage": {"kind": first_stage_kind, "sha256": first_stage_sha256},
            "transform": dict(transform),
            "kind": kind,
            "dtype": "float16",
        }
    )


class LatentStatistics:
    """Mean and variance of the sampled latents, summed in float64; add up over shards, then read.

    The variance of a latent drawn from its posterior is the variance of the means plus the mean of the variances.
    """

    def __init__(self, kind: str, channels: int) -> None:
        self.kind, self.count = kind, 0
        self._sums = np.zeros((3, channels))  # of mean, mean^2 and posterior variance, by channel

    def add(self, moments: np.ndarray) -> None:
        """Count moments (M, H, W) or (B, M, H, W)."""
        moments = moments.reshape(-1, *moments.shape[-3:]).astype(np.float64)
        mean, variance = moments, np.zeros(())
        if self.kind == "gaussian":
            mean, logvar = np.split(moments, 2, axis=1)
            variance = np.exp(np.clip(logvar, *_LOGVAR_RANGE))
        self.count += mean[:, 0].size
        for i, values in enumerate((mean, mean**2, variance)):
            self._sums[i] += values.sum(axis=(0, 2, 3)) if values.ndim else 0.0

    def merge(self, other: "LatentStatistics") -> None:
        """Count what another one counted."""
        if (self.kind, self._sums.shape) != (other.kind, other._sums.shape):
            raise ValueError(
                f"statistics of {other.kind} latents with {other._sums.shape[1]} channels cannot be added to those of "
                f"{self.kind} latents with {self._sums.shape[1]}"
            )
        self.count += other.count
        self._sums += other._sums

    @property
    def channel_mean(self) -> list[float]:
        return [float(x) for x in self._sums[0] / max(self.count, 1)]

    @property
    def channel_std(self) -> list[float]:
        mean, square, variance = self._sums / max(self.count, 1)
        return [float(x) for x in np.sqrt(np.maximum(square + variance - mean**2, 0))]

    @property
    def mean(self) -> float:
        """Over all channels."""
        return float(self._sums[0].mean() / max(self.count, 1))

    @property
    def std(self) -> float:
        """Over all channels, around the one mean: 1 / this is the latent scale of Rombach et al. 2022, appendix G."""
        _, square, variance = self._sums.mean(axis=1) / max(self.count, 1)
        return float(np.sqrt(max(square + variance - self.mean**2, 0)))

    def to_dict(self) -> dict[str, Any]:
        """JSON values, exact."""
        return {"kind": self.kind, "count": self.count, "sums": self._sums.tolist()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "LatentStatistics":
        """The inverse of `to_dict`."""
        statistics = cls(values["kind"], len(values["sums"][0]))
        statistics.count, statistics._sums = values["count"], np.array(values["sums"])
        return statistics


@dataclass(kw_only=True, slots=True)
class Audit:
    """What a shard's check by decoding found; a shard outside its bands fails the stage."""

    images: int
    """Images decoded again."""
    psnr: float
    """Mean reconstruction PSNR, dB."""
    latent_mean: float
    latent_std: float


@dataclass(kw_only=True, slots=True)
class ShardRecord:
    """One finished shard. read = written + rejected, always."""

    name: str
    fingerprint: str
    read: int
    """Samples looked at in the source shard."""
    written: int
    bytes: int
    sha256: str
    keys_sha256: str
    combinations: dict[str, int]
    shape: list[int]
    """(M, H, W) of each sample's moments; empty where nothing was written."""
    rejected: dict[str, int]
    """How many were left out, by reason."""
    rejected_keys: list[list[str | None]]
    """[reason, key] of each."""
    source: dict[str, str]
    """name and sha256 of the image shard."""
    statistics: dict[str, Any]
    audit: Audit | None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ShardRecord":
        audit = Audit(**values["audit"]) if values["audit"] is not None else None
        return cls(**{**values, "audit": audit})

    @property
    def summary(self) -> ShardSummary:
        return ShardSummary(
            self.name, self.written, self.bytes, self.sha256, self.keys_sha256, self.combinations, self.rejected
        )


@dataclass(kw_only=True, slots=True)
class CacheManifest:
    """What made a cache and what is in it: `manifest.json`."""

    format: str
    fingerprint: str
    first_stage: dict[str, Any]
    """kind, config, sha256 of the weights."""
    transform: dict[str, Any]
    """`ImageTransform.fingerprint()`."""
    kind: str
    """gaussian or point."""
    dtype: str
    shape: list[int]
    """(M, H, W) of each sample's moments."""
    latent_mean: float
    latent_std: float
    channel_mean: list[float]
    channel_std: list[float]
    flip: bool
    """Whether images were mirrored before encoding; training cannot mirror a latent."""
    n: int
    read: int
    rejected: dict[str, int]
    order_id: str
    content_id: str
    text: dict[str, Any] | None = None
    """kind, config, sha256 of the weights, vocabulary and shape (L, D) of the text encoder; None without one."""
    shards: list[ShardRecord] = field(default_factory=list)

    @classmethod
    def read_from(cls, folder: str) -> "CacheManifest":
        """The manifest of a cache.

        raises  FileNotFoundError for an unfinished cache, ValueError for another format
        """
        path = f"{folder}/manifest.json"
        try:
            values = storage.read_json(path)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{folder} is an unfinished latent cache: it has no manifest.json, which is written last. Run "
                "precompute_latents again with the same settings; it goes on where it stopped"
            ) from error
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            found = values.get("format") if isinstance(values, dict) else type(values).__name__
            raise ValueError(
                f"{path} has format {found!r}; this version reads {FORMAT!r}: precompute the latents again"
            )
        records = [ShardRecord.from_dict(record) for record in values.pop("shards")]
        return cls(**values, shards=records)


def require_match(manifest: CacheManifest, wanted: str, *, wanted_first_stage: str = "", where: str = "") -> None:
    """Refuse a cache that another first stage, transform or format made.

    wanted              the run's `fingerprint`
    wanted_first_stage  sha256 of the run's first stage, to say which side differs
    raises              ValueError naming both sides
    """
    if manifest.fingerprint == wanted:
        return
    theirs = str(manifest.first_stage.get("sha256"))
    if wanted_first_stage and theirs != wanted_first_stage:
        reason = f"it was encoded by first stage {theirs[:12]}, this run has {wanted_first_stage[:12]}"
    else:
        reason = f"its image transform is {json.dumps(manifest.transform)} and its kind {manifest.kind}, not this run's"
    raise ValueError(
        f"latent cache {where} has fingerprint {manifest.fingerprint[:12]}, this run needs {wanted[:12]}: {reason}. "
        "Point first_stage.checkpoint and data.transform at what made the cache, or precompute the latents again"
    )


def require_text(cache: "LatentCache", wanted: Mapping[str, Any]) -> None:
    """Refuse a cache whose captions are not embedded, or by another text encoder.

    wanted  what its manifest should say of the text encoder
    raises  ValueError naming both sides
    """
    theirs = cache.manifest.text
    if theirs is None or not cache.holds_text:
        raise ValueError(
            f"latent cache {cache.folder} holds no embeddings of its captions, which conditioning={wanted['kind']} "
            "trains on. Make them with the latents: accelerate launch precompute_latents.py, the same overrides and "
            "precompute.text_embeddings=true (in place of this cache: precompute.overwrite=true too)"
        )
    one, other = ({**text, **text["config"], "config": None} for text in (theirs, wanted))
    differing = [
        f"{key}={_short(one.get(key))} (this run: {_short(other[key])})" for key in other if one.get(key) != other[key]
    ]
    if differing:
        raise ValueError(
            f"latent cache {cache.folder} holds embeddings of another text encoder: {', '.join(differing)}. Point "
            "conditioning.model at what made the cache, or precompute with this one"
        )


def _short(value: Any) -> Any:
    return value[:12] if isinstance(value, str) else value


class CacheShardWriter:
    """Writes one shard of a cache; nothing of it counts before `finish`.

    Keys must ascend. As a context manager it leaves nothing half-written behind when an exception ends it.
    """

    def __init__(self, path: str | Path, *, fingerprint: str, kind: str) -> None:
        if kind not in KINDS:
            raise ValueError(f"moments of kind {kind!r}; choose one of {', '.join(KINDS)}")
        self.path = Path(path)
        self.fingerprint, self.kind = fingerprint, kind
        self.statistics: LatentStatistics | None = None
        self._shape: tuple[int, ...] = ()
        self._last_key = ""
        self._metadata: list[dict[str, Any]] = []
        comment = storage.canonical_json({"format": FORMAT, "fingerprint": fingerprint}).decode()
        done_record(self.path).unlink(missing_ok=True)
        self._tar = ShardWriter(self.path, comment=comment)

    def add(
        self,
        key: str,
        moments: np.ndarray,
        caption: str,
        *,
        members: Mapping[str, bytes] | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Append one sample.

        moments   (M, H, W), finite in float16; the same shape throughout the shard
        members   further small members such as `cls`, by field
        metadata  columns of the parquet file
        raises    ValueError for keys that do not ascend, and for moments that are not finite or change shape
        """
        if key <= self._last_key:
            raise ValueError(f"{self.path}: key {key!r} after {self._last_key!r}; keys must ascend")
        halves = np.ascontiguousarray(moments, np.float16)
        if not np.isfinite(halves).all():
            raise ValueError(f"{self.path}: the moments of {key!r} are not finite in float16")
        if self.statistics is None:
            channels = halves.shape[0] // 2 if self.kind == "gaussian" else halves.shape[0]
            self.statistics, self._shape = LatentStatistics(self.kind, channels), halves.shape
        if halves.shape != self._shape:
            raise ValueError(f"{self.path}: the moments of {key!r} have shape {halves.shape}, not {self._shape}")
        data = npy_header(self._shape) + halves.tobytes()
        self._tar.add(key, {"npy": data, "txt": caption.encode(), **(members or {})})
        self.statistics.add(halves)
        self._metadata.append({"key": key, "caption": caption, **(metadata or {})})
        self._last_key = key

    def finish(
        self, *, source: str, source_sha256: str, rejected: Sequence[Rejection] = (), audit: Audit | None = None
    ) -> ShardRecord:
        """Publish tar, parquet and index, then the record that says the shard is done.

        source    name of the image shard that was read, and the sha256 of its bytes
        rejected  what was read of it and not written
        """
        self._tar.close()
        with storage.atomic_write(self.path.with_suffix(".parquet")) as file:
            pq.write_table(pa.Table.from_pylist(self._metadata), file)
        index = index_shard(str(self.path), self.path.parent / SIDECARS / f"{self.path.stem}.idx").header
        assert index.n == self._tar.count and not index.rejected, f"{self.path} does not read back as written"
        statistics = self.statistics or LatentStatistics(self.kind, 0)
        record = ShardRecord(
            name=self.path.name,
            fingerprint=self.fingerprint,
            read=index.n + len(rejected),
            written=index.n,
            bytes=index.tar_bytes,
            sha256=index.sha256,
            keys_sha256=index.keys_sha256,
            combinations=index.combinations,
            shape=list(self._shape),
            rejected=dict(Counter(str(entry.reason) for entry in rejected)),
            rejected_keys=[[str(entry.reason), entry.key] for entry in rejected],
            source={"name": source, "sha256": source_sha256},
            statistics=statistics.to_dict(),
            audit=audit,
        )
        storage.write_json(done_record(self.path), asdict(record))
        return record

    def abort(self) -> None:
        """Leave nothing half-written behind."""
        self._tar.abort()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.abort()


def npy_header(shape: Sequence[int]) -> bytes:
    """The first 128 bytes of a float16 `.npy` file, format 1.0 of numpy.lib.format."""
    sizes = ", ".join(str(size) for size in shape) + ("," if len(shape) == 1 else "")
    text = f"{{'descr': '<f2', 'fortran_order': False, 'shape': ({sizes}), }}".encode()
    length = NPY_HEADER_BYTES - 10
    return b"\x93NUMPY\x01\x00" + length.to_bytes(2, "little") + text.ljust(length - 1) + b"\n"


def done_record(shard: Path) -> Path:
    """Where the record of a finished shard lies."""
    return shard.parent / SIDECARS / f"{shard.stem}.done.json"


def finished_shard(path: str | Path, fingerprint: str, source_sha256: str) -> ShardRecord | None:
    """The record of a shard that needs no more work: tar as recorded, this fingerprint, this source; else None."""
    path = Path(path)
    try:
        record = ShardRecord.from_dict(storage.read_json(done_record(path)))
        size = path.stat().st_size
    except (OSError, ValueError, KeyError, TypeError):
        return None
    same = (record.bytes, record.fingerprint, record.source["sha256"]) == (size, fingerprint, source_sha256)
    return record if same and (path.parent / SIDECARS / f"{path.stem}.idx").exists() else None


def finish_cache(
    folder: str | Path,
    records: Sequence[ShardRecord],
    *,
    first_stage: Mapping[str, Any],
    transform: Mapping[str, Any],
    kind: str,
    text: Mapping[str, Any] | None = None,
) -> CacheManifest:
    """Write the manifest of a cache whose shards are all done, from their records.

    first_stage  kind, config (JSON values) and sha256 of the weights
    transform    `ImageTransform.fingerprint()`
    text         kind, config, sha256, vocabulary and shape of the text encoder, if one embedded the captions
    raises       ValueError where nothing was written, or shards disagree in fingerprint or shape
    """
    records = sorted(records, key=lambda record: record.name)
    wanted = fingerprint(
        first_stage_kind=first_stage["kind"], first_stage_sha256=first_stage["sha256"], transform=transform, kind=kind
    )
    for record in records:
        if record.fingerprint != wanted:
            raise ValueError(f"{folder}/{record.name} has fingerprint {record.fingerprint[:12]}, not {wanted[:12]}")
    filled = [record for record in records if record.written]
    rejected = sum((Counter(record.rejected) for record in records), Counter[str]())
    if not filled:
        raise ValueError(f"{folder}: not one latent in {len(records)} shards; rejected: {dict(rejected)}")
    shapes = {tuple(record.shape) for record in filled}
    if len(shapes) != 1:
        raise ValueError(
            f"{folder}: moments of shapes {sorted(shapes)} in {len(records)} shards; there must be one shape"
        )
    statistics = LatentStatistics.from_dict(filled[0].statistics)
    for record in filled[1:]:
        statistics.merge(LatentStatistics.from_dict(record.statistics))
    summaries = [record.summary for record in records]
    manifest = CacheManifest(
        format=FORMAT,
        fingerprint=wanted,
        first_stage=dict(first_stage),
        transform=dict(transform),
        kind=kind,
        dtype="float16",
        shape=list(filled[0].shape),
        latent_mean=statistics.mean,
        latent_std=statistics.std,
        channel_mean=statistics.channel_mean,
        channel_std=statistics.channel_std,
        flip=bool(transform["flip"]),
        n=sum(record.written for record in records),
        read=sum(record.read for record in records),
        rejected=dict(rejected),
        order_id=order_id(summaries),
        content_id=storage.digest([wanted, content_id(summaries)]),
        text=None if text is None else dict(text),
        shards=list(records),
    )
    storage.write_json(Path(folder) / "manifest.json", asdict(manifest))
    return manifest


class LatentCache:
    """A finished cache, read by sample number. Opening it checks every shard against the manifest.

    names   of the shards
    starts  (shards + 1,) int64: number of the first sample of each, then of all
    """

    def __init__(self, folder: str, manifest: CacheManifest, shards: ShardSet) -> None:
        self.folder, self.manifest, self._shards = folder, manifest, shards
        self.n, self.names, self.starts = shards.n, shards.names, shards.starts
        self.order_id = shards.order_id
        self.shape = tuple(manifest.shape)
        self.holds_mirrored = self._everyone_has(MIRRORED)
        self.holds_text = manifest.text is not None and self._everyone_has(TEXT)

    def _everyone_has(self, member: str) -> bool:
        return all(record.summary.count_with([[member]]) == record.written for record in self.manifest.shards)

    @property
    def text_shape(self) -> tuple[int, ...]:
        """(L, D) of each caption's tokens, in a cache that holds them."""
        assert self.manifest.text is not None, "asked only where `holds_text`"
        return tuple(self.manifest.text["shape"])

    @property
    def content_id(self) -> str:
        """Digest of the shards' bytes and the fingerprint: may change where one lost shard was encoded again."""
        return storage.digest([self.manifest.fingerprint, self._shards.content_id])

    @classmethod
    def open(cls, source: str, index_dir: str | None = None, remote: RemoteReader | None = None) -> "LatentCache":
        """Open the shards that `source` names: a cache's directory, or some of its tars.

        remote  how remote shards are read; by blocks if None
        raises  FileNotFoundError where nothing is there or the cache is unfinished
                ValueError naming the shard and both sizes where a tar is not the one in the manifest
        """
        folder = source.rstrip("/")
        if not storage.is_remote(folder) and Path(folder).is_dir():
            manifest = CacheManifest.read_from(folder)
            urls = [f"{folder}/{record.name}" for record in manifest.shards]
        else:
            urls = storage.expand(source)
            folders = sorted({url.rpartition("/")[0] or "." for url in urls})
            if len(folders) > 1:
                raise ValueError(f"data.latents={source!r} names shards of several caches: {', '.join(folders)}")
            folder = folders[0]
            manifest = CacheManifest.read_from(folder)
        known = {record.name: record for record in manifest.shards}
        names = [url.rpartition("/")[2] for url in urls]
        if strangers := sorted(set(names) - set(known)):
            raise ValueError(f"{folder}/{strangers[0]} is not in {folder}/manifest.json: it belongs to another cache")
        records = [known[name] for name in names]
        _require_sizes(urls, records)
        shards = ShardSet(urls, [record.summary for record in records], Sidecars(index_dir), remote=remote)
        return cls(folder, manifest, shards)

    def view(self, selection: Sequence[str] = (), removed: Sequence[str] = ()) -> "LatentCache":
        """The same cache as a training reads it; see `ShardSet.view`. What precompute rejected may be selected."""
        records = {record.name: record for record in self.manifest.shards}

        def rejected(shard: int) -> Collection[str]:
            return {key for _, key in records[self._shards.names[shard]].rejected_keys if key is not None}

        return LatentCache(self.folder, self.manifest, self._shards.view(selection, removed, lost=rejected))

    def keys(self, sample_ids: np.ndarray) -> list[str]:
        """The key of each sample."""
        return self._shards.keys(sample_ids)

    def announce(self, sample_ids: np.ndarray) -> None:
        """Say that these samples will be read soon; see `ShardSet.announce`."""
        self._shards.announce(sample_ids)

    def members(self, sample_ids: np.ndarray, fields: Sequence[str]) -> list[dict[str, bytes]]:
        """Further members of each sample, such as `cls`."""
        return self._shards.read(sample_ids, fields)

    def read(
        self,
        sample_ids: np.ndarray,
        out: np.ndarray | None = None,
        *,
        into: Sequence[int] | None = None,
        mirrored: Sequence[bool] | None = None,
        text: np.ndarray | None = None,
        substitute: Substitute | None = None,
    ) -> tuple[np.ndarray, list[str], list[str]]:
        """Moments, captions and keys of B samples.

        out         (R, M, H, W) float16, contiguous, to read into; a new array if None
        into        which of the R rows each sample goes to; the first B if None
        mirrored    of which samples the moments of the mirror image are read; of none if None
        text        (R, L, D) float16, contiguous, to read the captions' tokens into; they are not read if None
        substitute  called with (place in the batch, what is wrong) for a sample that was removed, or whose bytes are
                    not the indexed ones; returns the number of the sample to read instead
        returns     `out`, B captions, B keys
        raises      CorruptSample where there is no substitute
        """
        if self._shards.is_remote:
            self.announce(sample_ids)
        count = len(sample_ids)
        if out is None:
            out = np.empty((count, *self.shape), np.float16)
        assert out.flags.c_contiguous and out.shape[1:] == self.shape and out.dtype == np.float16
        assert text is None or (text.flags.c_contiguous and text.shape == (len(out), *self.text_shape))
        batch = _Batch(
            out=out.data.cast("B"),
            size=out[0].nbytes,
            text=None if text is None else text.data.cast("B"),
            text_size=0 if text is None else text[0].nbytes,
            rows=range(count) if into is None else into,
            mirrored=[False] * count if mirrored is None else mirrored,
            captions=[""] * count,
            keys=[""] * count,
        )
        bad = self._read(sample_ids, np.arange(count), batch)
        while bad:
            if substitute is None:
                raise bad[0][1]
            again = np.array([[i, substitute(i, error)] for i, error in bad])
            bad = self._read(again[:, 1], again[:, 0], batch)
        return out, batch.captions, batch.keys

    def _read(self, sample_ids: np.ndarray, slots: np.ndarray, batch: "_Batch") -> list[tuple[int, CorruptSample]]:
        """Read samples into these places of a batch; returns what is wrong with those that cannot be read."""
        bad: list[tuple[int, CorruptSample]] = []
        for shard, places, order in self._shards.by_shard(sample_ids):
            opened = self._shards.opened(shard)
            rows, mine = opened.rows(places).tolist(), slots[order].tolist()
            while rows:
                try:
                    batch.fill(opened, rows, mine)
                except CorruptSample as error:
                    bad.append((mine[0], error))
                    del rows[0], mine[0]
        return bad


@dataclass(frozen=True, slots=True)
class _Batch:
    """What is read together, and where it goes."""

    out: memoryview
    """Bytes of the moments, row after row."""
    size: int
    """Of a row, bytes."""
    text: memoryview | None
    """Bytes of the captions' tokens, likewise; None where they are not wanted."""
    text_size: int
    rows: Sequence[int]
    mirrored: Sequence[bool]
    captions: list[str]
    keys: list[str]

    def fill(self, shard: OpenShard, rows: list[int], slots: list[int]) -> None:
        """Read samples of one shard, by index row and place in the batch, taking from both lists what has been read.

        Written for speed: of the two microseconds that a sample takes, copying and hashing its moments are most.

        raises  CorruptSample for the sample that is then first of both lists
        """
        index, content, out, size = shard.index, shard.content, self.out, self.size
        records, keys, removed, whole = index.record_bytes, index.key_bytes, shard.removed_rows, NPY_HEADER_BYTES + size
        plain, step = index.unpacker("npy", "txt").unpack_from, index.record_size
        flipped = index.unpacker("txt", MIRRORED).unpack_from if MIRRORED in index.column else plain
        captions, names, mirrored, places, tokens = self.captions, self.keys, self.mirrored, self.rows, self.text
        done = 0
        try:
            for row, slot in zip(rows, slots, strict=True):
                if row in removed:
                    shard.require_kept(row)
                if mirrored[slot]:
                    text, begin, text_xxh3, xxh3, text_length, length, key, key_length = flipped(records, row * step)
                else:
                    begin, text, xxh3, text_xxh3, length, text_length, key, key_length = plain(records, row * step)
                if length != whole:
                    raise CorruptSample(index.key(row), "wrong_size_npy", shard.url)
                data, at = content[begin : begin + whole], places[slot] * size
                out[at : at + size] = data[NPY_HEADER_BYTES:]
                if xxh3_64_intdigest(data) != xxh3:
                    field = MIRRORED if mirrored[slot] else "npy"
                    raise CorruptSample(index.key(row), f"checksum_{field}", shard.url)
                caption = content[text : text + text_length]
                if xxh3_64_intdigest(caption) != text_xxh3:
                    raise CorruptSample(index.key(row), "checksum_txt", shard.url)
                if tokens is not None:
                    self._fill_text(tokens, shard, row, places[slot] * self.text_size)
                captions[slot] = str(caption, "utf8")
                names[slot] = str(keys[key : key + key_length], "utf8")
                done += 1
        finally:
            del rows[:done], slots[:done]

    def _fill_text(self, out: memoryview, shard: OpenShard, row: int, at: int) -> None:
        """Read the tokens of a caption; raises CorruptSample."""
        index, whole = shard.index, NPY_HEADER_BYTES + self.text_size
        begin, xxh3, length, _, _ = index.unpacker(TEXT).unpack_from(index.record_bytes, row * index.record_size)
        if length != whole:
            raise CorruptSample(index.key(row), f"wrong_size_{TEXT}", shard.url)
        data = shard.content[begin : begin + whole]
        out[at : at + self.text_size] = data[NPY_HEADER_BYTES:]
        if xxh3_64_intdigest(data) != xxh3:
            raise CorruptSample(index.key(row), f"checksum_{TEXT}", shard.url)


def _require_sizes(urls: Sequence[str], records: Sequence[ShardRecord]) -> None:
    for url, record, found in zip(urls, records, tar_sizes(urls), strict=True):
        if found != record.bytes:
            raise ValueError(
                f"{url} has {found} bytes, but its manifest.json says {record.bytes}: the shard was cut short or "
                "replaced; run precompute_latents again, it encodes only what is missing"
            )
