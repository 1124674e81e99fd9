"""A latent cache against its manifest: every shard, its record, its index, its fingerprint, and the sums over all."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from data_tools.shard_checks import Findings, Layout, Problem, check_all, hashed_again, mapped, members, stored_index
from ldm_scale.core import storage
from ldm_scale.data.cache import (
    MIRRORED,
    NPY_HEADER_BYTES,
    TEXT,
    CacheManifest,
    LatentStatistics,
    ShardRecord,
    done_record,
    fingerprint,
    npy_header,
)
from ldm_scale.data.index import ShardIndex
from ldm_scale.data.shards import SIDECARS, Sidecars, content_id, order_id
from ldm_scale.data.tar import comment
from ldm_scale.data.views import RemovalList


def is_cache(source: str) -> bool:
    """True for the directory of a latent cache, finished or not."""
    return storage.exists(f"{source.rstrip('/')}/manifest.json") or any((Path(source) / SIDECARS).glob("*.done.json"))


def repair(folder: Path, shards: Sequence[str]) -> None:
    """Withdraw the records of damaged shards, so that precompute_latents encodes these again and no other."""
    for name in shards:
        done_record(folder / name).unlink(missing_ok=True)


def check_latents(path: str, url: str, level: str, record: ShardRecord, manifest: CacheManifest) -> Findings:
    """Everything about one shard of a latent cache."""
    name = record.name
    index, problems = stored_index(url, None, name)
    found = Findings(0, problems)
    if index is None and not problems:
        found.add(Problem(name, None, "no_index"))
    elif index is not None and (index.header.sha256, index.header.n) != (record.sha256, record.written):
        found.add(Problem(name, None, "index_of_another_tar"))
    found.add(*_against_record(url, record))
    with mapped(path) as data:
        layout = Layout(name, data)
        found.samples = len(layout.keys)
        found.add(*layout.problems)
        if len(data) != record.bytes:
            found.add(Problem(name, None, "wrong_size", f"{len(data)} bytes, manifest.json says {record.bytes}"))
        if _fingerprint_in(data) != manifest.fingerprint:
            found.add(Problem(name, None, "foreign_fingerprint", "its first record is not of this cache"))
        if index is not None:
            found.add(*layout.against(index, name))
        if level != "fast":
            fresh, changed = hashed_again(path, name, index)
            found.add(*changed)
            if fresh.header.sha256 != record.sha256 and not changed:
                found.add(Problem(name, None, "changed_bytes", "sha256 is not the one in manifest.json"))
        if level == "decode":
            found.add(*_moments(url, data, fresh, record, manifest))
    return found


def _against_record(url: str, record: ShardRecord) -> list[Problem]:
    """The record and the parquet file beside a shard."""
    folder, stem = url.rpartition("/")[0], record.name.removesuffix(".tar")
    problems = []
    try:
        if storage.read_json(f"{folder}/{SIDECARS}/{stem}.done.json") != json.loads(json.dumps(asdict(record))):
            problems.append(Problem(record.name, None, "record_differs", "from manifest.json"))
    except (OSError, ValueError) as error:
        problems.append(Problem(record.name, None, "no_record", str(error)))
    try:
        with storage.open_read(f"{folder}/{stem}.parquet") as file:
            rows = pq.ParquetFile(file).metadata.num_rows
        if rows != record.written:
            problems.append(
                Problem(record.name, None, "other_count_than_parquet", f"{rows} rows, {record.written} written")
            )
    except (OSError, ValueError) as error:
        problems.append(Problem(record.name, None, "damaged_parquet", str(error)))
    if record.read != record.written + sum(record.rejected.values()):
        problems.append(Problem(record.name, None, "counts_do_not_add_up", "read is not written + rejected"))
    return problems


def _fingerprint_in(data: memoryview) -> str | None:
    try:
        return json.loads(comment(data) or "{}").get("fingerprint")
    except (ValueError, AttributeError):
        return None


def _moments(
    url: str, data: memoryview, index: ShardIndex, record: ShardRecord, manifest: CacheManifest
) -> list[Problem]:
    """Arrays that are not finite or not of the manifest's shape, and statistics that are not the recorded ones."""
    problems = []
    channels = manifest.shape[0] // 2 if manifest.kind == "gaussian" else manifest.shape[0]
    statistics = LatentStatistics(manifest.kind, channels)
    shapes = {"npy": manifest.shape, MIRRORED: manifest.shape}
    if manifest.text is not None:
        shapes[TEXT] = manifest.text["shape"]
    for row in range(index.header.n):
        found = members(data, index, row)
        for field, shape in shapes.items():
            if field == MIRRORED and field not in found:
                continue
            npy, head = found.get(field, b""), npy_header(shape)
            if npy[:NPY_HEADER_BYTES] != head or len(npy) != len(head) + 2 * int(np.prod(shape)):
                detail = f"not float16 {shape}"
                problems.append(Problem(record.name, index.key(row), f"malformed_{field}", detail))
                continue
            moments = np.frombuffer(npy, np.float16, offset=len(head)).reshape(shape)
            if not np.isfinite(moments).all():
                problems.append(Problem(record.name, index.key(row), f"not_finite_{field}"))
            elif field == "npy":
                statistics.add(moments)
    removed = RemovalList.read(Sidecars(None).removal_lists(url)).of(record.name)  # counted before they were blanked
    if index.header.n and not problems and not removed and not _same_statistics(statistics, record):
        problems.append(Problem(record.name, None, "other_statistics", "than the record says"))
    return problems


def _same_statistics(statistics: LatentStatistics, record: ShardRecord) -> bool:
    ours, theirs = statistics.to_dict(), record.statistics
    if (ours["kind"], ours["count"]) != (theirs["kind"], theirs["count"]):
        return False
    return np.allclose(ours["sums"], theirs["sums"], rtol=1e-9, atol=1e-9)


def check_manifest(manifest: CacheManifest) -> list[Problem]:
    """What the manifest says as a whole against what it says of each shard."""
    records, first_stage = manifest.shards, manifest.first_stage
    summaries = [record.summary for record in records]
    statistics = [LatentStatistics.from_dict(record.statistics) for record in records if record.written]
    for other in statistics[1:]:
        statistics[0].merge(other)
    recounted = {
        "n": sum(record.written for record in records),
        "read": sum(record.read for record in records),
        "rejected": dict(sum((Counter(record.rejected) for record in records), Counter[str]())),
        "order_id": order_id(summaries),
        "content_id": storage.digest([manifest.fingerprint, content_id(summaries)]),
        "fingerprint": fingerprint(
            first_stage_kind=first_stage["kind"],
            first_stage_sha256=first_stage["sha256"],
            transform=manifest.transform,
            kind=manifest.kind,
        ),
        "latent_mean": statistics[0].mean,
        "latent_std": statistics[0].std,
        "channel_mean": statistics[0].channel_mean,
        "channel_std": statistics[0].channel_std,
    }
    said = asdict(manifest)
    problems = [
        Problem(None, None, f"manifest_{name}", f"says {said[name]}, its shards give {value}")
        for name, value in recounted.items()
        if said[name] != value
    ]
    strangers = [record.name for record in records if record.fingerprint != manifest.fingerprint]
    return problems + [Problem(name, None, "foreign_fingerprint", "in its record") for name in strangers]


def verify_cache(folder: str, level: str, threads: int) -> Findings:
    """Check a latent cache against its manifest."""
    try:
        manifest = CacheManifest.read_from(folder)
    except FileNotFoundError as error:
        return Findings(0, [Problem(None, None, "unfinished", str(error))])
    except (ValueError, TypeError, KeyError) as error:
        return Findings(0, [Problem(None, None, "damaged_manifest", str(error))])
    records = {record.name: record for record in manifest.shards}
    there = {url.rpartition("/")[2] for url in storage.expand(folder)}
    lost = [Problem(name, None, "lost_shard", "manifest.json has it") for name in sorted(records.keys() - there)]

    def check(path: str, url: str) -> Findings:
        return check_latents(path, url, level, records[url.rpartition("/")[2]], manifest)

    found = check_all([f"{folder}/{name}" for name in sorted(records.keys() & there)], check, threads)
    found.problems[:0] = [*check_manifest(manifest), *lost]
    return found
