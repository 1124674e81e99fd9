import dataclasses
import io
import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st

from ldm_scale.data import cache as cache_module
from ldm_scale.data import tar
from ldm_scale.data.cache import (
    Audit,
    CacheManifest,
    CacheShardWriter,
    LatentCache,
    LatentStatistics,
    fingerprint,
    finish_cache,
    finished_shard,
    npy_header,
    require_match,
)
from ldm_scale.data.index import Rejection
from ldm_scale.data.shards import CorruptSample, ShardSet

FIRST_STAGE = {"kind": "AutoencoderKL", "config": {"factor": 8}, "sha256": "ab" * 32}
TRANSFORM = {"size": 32, "crop": "center", "flip": False}
PRINT = fingerprint(
    first_stage_kind="AutoencoderKL", first_stage_sha256="ab" * 32, transform=TRANSFORM, kind="gaussian"
)
SHAPE = (8, 4, 4)


def moments(number: int) -> np.ndarray:
    return np.random.default_rng(number).normal(size=SHAPE).astype(np.float16)


def write_shard(path: Path, numbers: range, *, rejected=(), audit=None):
    with CacheShardWriter(path, fingerprint=PRINT, kind="gaussian") as writer:
        for i in numbers:
            writer.add(
                f"{i:06d}", moments(i), f"caption {i}", members={"cls": b"%d" % (i % 3)}, metadata={"width": 640 + i}
            )
        return writer.finish(source=path.name, source_sha256="cd" * 32, rejected=rejected, audit=audit)


@pytest.fixture
def folder(tmp_path) -> Path:
    rejected = [Rejection("unreadable", "bad", 0), Rejection("truncated", None, 9)]
    audit = Audit(images=4, psnr=27.5, latent_mean=0.1, latent_std=4.5)
    records = [
        write_shard(tmp_path / "latents" / "00000.tar", range(5), rejected=rejected, audit=audit),
        write_shard(tmp_path / "latents" / "00001.tar", range(5, 12)),
    ]
    finish_cache(tmp_path / "latents", records, first_stage=FIRST_STAGE, transform=TRANSFORM, kind="gaussian")
    return tmp_path / "latents"


@pytest.mark.parametrize("shape", [(8, 32, 32), (4, 64, 64), (16, 1, 1), (3,), (256, 128, 128)])
def test_npy_header_is_what_numpy_reads(shape):
    header = npy_header(shape)
    data = (np.arange(np.prod(shape)) % 1000).astype(np.float16).reshape(shape)
    assert len(header) == 128
    np.testing.assert_array_equal(np.load(io.BytesIO(header + data.tobytes())), data)
    if len(shape) == 3 and max(shape) < 100:
        file = io.BytesIO()
        np.save(file, data)
        assert file.getvalue() == header + data.tobytes()


def test_webdataset_and_tar_read_the_shards(folder):
    dataset = webdataset.WebDataset(str(folder / "00001.tar"), shardshuffle=False).decode()
    read = list(dataset)
    assert [sample["__key__"] for sample in read] == [f"{i:06d}" for i in range(5, 12)]
    np.testing.assert_array_equal(read[2]["npy"], moments(7))
    assert read[2]["txt"] == "caption 7" and read[2]["cls"] == 1
    listed = subprocess.run(["tar", "tf", folder / "00000.tar"], capture_output=True, text=True, check=True)
    assert listed.stderr == "" and listed.stdout.split()[:3] == ["000000.npy", "000000.txt", "000000.cls"]


def test_shard_carries_the_fingerprint_in_its_first_record(folder):
    comment = tar.comment(memoryview((folder / "00000.tar").read_bytes()))
    assert comment is not None
    assert json.loads(comment) == {"format": "ldm_scale latents/1", "fingerprint": PRINT}


def test_files_of_a_cache(folder):
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    shards = [f"{stem}.{end}" for stem in ("00000", "00001") for end in ("parquet", "tar")]
    sidecars = [f".ldm/{stem}.{end}" for stem in ("00000", "00001") for end in ("done.json", "idx")]
    assert names == sorted([*shards, *sidecars, "manifest.json"])
    table = pq.read_table(folder / "00000.parquet").to_pylist()
    assert table[1] == {"key": "000001", "caption": "caption 1", "width": 641}


def test_equal_latents_give_equal_shards(folder, tmp_path):
    write_shard(tmp_path / "again.tar", range(5))
    assert (tmp_path / "again.tar").read_bytes() == (folder / "00000.tar").read_bytes()


def test_manifest_says_what_made_the_cache(folder):
    manifest = CacheManifest.read_from(str(folder))
    assert manifest.first_stage == FIRST_STAGE and manifest.transform == TRANSFORM
    assert (manifest.kind, manifest.dtype, manifest.shape) == ("gaussian", "float16", list(SHAPE))
    assert (manifest.n, manifest.read) == (12, 14) and manifest.rejected == {"unreadable": 1, "truncated": 1}
    first = manifest.shards[0]
    assert first.read == first.written + sum(first.rejected.values())
    assert first.rejected_keys == [["unreadable", "bad"], ["truncated", None]]
    assert first.source == {"name": "00000.tar", "sha256": "cd" * 32}
    assert first.audit == Audit(images=4, psnr=27.5, latent_mean=0.1, latent_std=4.5)
    for shard in manifest.shards:
        assert shard.bytes == (folder / shard.name).stat().st_size
    assert ShardSet.open(str(folder)).order_id == manifest.order_id == LatentCache.open(str(folder)).order_id
    assert LatentCache.open(str(folder)).content_id == manifest.content_id


def test_statistics_are_of_latents_drawn_from_the_posterior(folder):
    manifest = CacheManifest.read_from(str(folder))
    mean, logvar = np.split(np.stack([moments(i) for i in range(12)]).astype(np.float64), 2, axis=1)
    draws = mean + np.exp(logvar / 2) * np.random.default_rng(0).normal(size=(4000, *mean.shape))
    np.testing.assert_allclose(manifest.channel_mean, mean.mean(axis=(0, 2, 3)), rtol=1e-9)
    np.testing.assert_allclose(manifest.channel_std, draws.std(axis=(0, 1, 3, 4)), rtol=3e-3)
    assert manifest.latent_mean == pytest.approx(mean.mean(), rel=1e-9)
    assert manifest.latent_std == pytest.approx(draws.std(), rel=2e-3)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=5), st.sampled_from(["gaussian", "point"]))
def test_statistics_of_parts_are_those_of_the_whole(sizes, kind):
    everything = np.random.default_rng(0).normal(3, 2, (sum(sizes), 6, 2, 3)).astype(np.float16)
    whole = LatentStatistics(kind, 3 if kind == "gaussian" else 6)
    whole.add(everything)
    parts = LatentStatistics(kind, 3 if kind == "gaussian" else 6)
    for part in np.split(everything, np.cumsum(sizes)[:-1]):
        one = LatentStatistics(kind, 3 if kind == "gaussian" else 6)
        one.add(part)
        parts.merge(LatentStatistics.from_dict(json.loads(json.dumps(one.to_dict()))))
    assert parts.count == whole.count
    np.testing.assert_allclose(parts.channel_std, whole.channel_std, rtol=1e-12)
    assert parts.std == pytest.approx(whole.std)
    if kind == "point":
        assert whole.std == pytest.approx(everything.astype(np.float64).std())
    with pytest.raises(ValueError, match="cannot be added"):
        parts.merge(LatentStatistics(kind, 5))


def test_reads_moments_captions_and_keys(folder):
    cache = LatentCache.open(str(folder))
    assert cache.n == 12
    ids = np.array([11, 0, 4, 5, 0])
    out = np.full((5, *SHAPE), np.nan, np.float16)
    got, captions, keys = cache.read(ids, out)
    assert got is out
    np.testing.assert_array_equal(out, np.stack([moments(i) for i in ids]))
    assert captions == [f"caption {i}" for i in ids] and keys == [f"{i:06d}" for i in ids] == cache.keys(ids)
    np.testing.assert_array_equal(cache.read(ids)[0], out)
    assert cache.members(np.array([7]), ("cls",)) == [{"cls": b"1"}]


def test_some_shards_of_a_cache(folder):
    cache = LatentCache.open(str(folder / "00001.tar"))
    assert cache.n == 7 and cache.keys(np.array([0])) == ["000005"]


def test_remote_cache(folder, tmp_path):
    import fsspec

    files = fsspec.filesystem("memory")
    files.put(str(folder), "/cache/latents", recursive=True)
    cache = LatentCache.open("memory://cache/latents")
    np.testing.assert_array_equal(cache.read(np.array([6]))[0][0], moments(6))


def test_unfinished_cache_is_refused(folder):
    (folder / "manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"unfinished latent cache.*precompute_latents again"):
        LatentCache.open(str(folder))


def test_missing_cut_and_foreign_shards_are_refused(folder):
    whole = (folder / "00001.tar").read_bytes()
    (folder / "00001.tar").write_bytes(whole[:-512])
    with pytest.raises(ValueError, match=rf"00001\.tar has {len(whole) - 512} bytes.*says {len(whole)}"):
        LatentCache.open(str(folder))
    (folder / "00001.tar").unlink()
    with pytest.raises(FileNotFoundError, match=r"00001\.tar"):
        LatentCache.open(str(folder))
    write_shard(folder / "99999.tar", range(3))
    with pytest.raises(ValueError, match=r"99999\.tar is not in .*manifest\.json"):
        LatentCache.open(str(folder / "99999.tar"))


def test_another_format_is_refused(folder):
    values = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(values | {"format": "ldm_scale latents/0"}))
    with pytest.raises(ValueError, match=r"'ldm_scale latents/0'.*'ldm_scale latents/1'"):
        LatentCache.open(str(folder))


def test_mismatch_names_both_sides(folder):
    manifest = LatentCache.open(str(folder)).manifest
    require_match(manifest, PRINT)
    with pytest.raises(ValueError, match=r"first stage abababababab, this run has efefefefefef"):
        require_match(manifest, "0" * 64, wanted_first_stage="ef" * 32)
    with pytest.raises(ValueError, match=r'"size": 32'):
        require_match(manifest, "0" * 64, wanted_first_stage="ab" * 32)


@pytest.mark.parametrize(
    "changed",
    [
        {"first_stage_sha256": "00" * 32},
        {"transform": TRANSFORM | {"size": 64}},
        {"kind": "point"},
        {"first_stage_kind": "VQ"},
    ],
)
def test_fingerprint_depends_on_everything(changed):
    parts = {
        "first_stage_kind": "AutoencoderKL",
        "first_stage_sha256": "ab" * 32,
        "transform": TRANSFORM,
        "kind": "gaussian",
    }
    assert fingerprint(**parts) == PRINT != fingerprint(**(parts | changed))


def flip(path: Path, needle: bytes) -> None:
    data = bytearray(path.read_bytes())
    data[data.index(needle)] ^= 1
    path.write_bytes(data)


def test_flipped_bits_are_found_and_substituted(folder):
    flip(folder / "00000.tar", moments(3).tobytes()[:64])
    flip(folder / "00001.tar", b"caption 9")
    cache = LatentCache.open(str(folder))
    with pytest.raises(CorruptSample, match=r"'000003'.*checksum_npy"):
        cache.read(np.array([2, 3]))
    asked = []

    def substitute(place: int, bad: CorruptSample) -> int:
        asked.append((place, bad.key, bad.reason))
        return 9 if len(asked) == 1 else 10

    got, _, keys = cache.read(np.array([2, 3, 4]), substitute=substitute)
    assert asked == [(1, "000003", "checksum_npy"), (1, "000009", "checksum_txt")]
    assert keys == ["000002", "000010", "000004"]
    np.testing.assert_array_equal(got[1], moments(10))


@pytest.mark.parametrize(
    "key, data, message",
    [
        ("000001", moments(0), "ascend"),
        ("000000", moments(0), "ascend"),
        ("000002", np.full(SHAPE, 1e6), "not finite"),
        ("000002", np.full(SHAPE, np.nan), "not finite"),
        ("000002", moments(0)[:4], "shape"),
    ],
)
def test_bad_samples_are_refused_and_leave_nothing(tmp_path, key, data, message):
    with (
        pytest.raises(ValueError, match=message),
        np.errstate(over="ignore"),
        CacheShardWriter(tmp_path / "a.tar", fingerprint=PRINT, kind="gaussian") as writer,
    ):
        writer.add("000001", moments(1), "")
        writer.add(key, data, "")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_restart_skips_exactly_the_finished_shards(folder):
    done = finished_shard(folder / "00000.tar", PRINT, "cd" * 32)
    assert done == CacheManifest.read_from(str(folder)).shards[0]
    assert finished_shard(folder / "00009.tar", PRINT, "cd" * 32) is None
    assert finished_shard(folder / "00000.tar", "0" * 64, "cd" * 32) is None, "another first stage"
    assert finished_shard(folder / "00000.tar", PRINT, "00" * 32) is None, "the source changed"
    os.truncate(folder / "00000.tar", 2048)
    assert finished_shard(folder / "00000.tar", PRINT, "cd" * 32) is None


@pytest.mark.parametrize("step", ["write_table", "index_shard"])
def test_killed_between_files_is_not_done(tmp_path, monkeypatch, step):
    def killed(*args) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cache_module.pq if step == "write_table" else cache_module, step, killed)
        with pytest.raises(KeyboardInterrupt):
            write_shard(tmp_path / "00000.tar", range(3))
    assert finished_shard(tmp_path / "00000.tar", PRINT, "cd" * 32) is None
    again = write_shard(tmp_path / "00000.tar", range(3))
    assert finished_shard(tmp_path / "00000.tar", PRINT, "cd" * 32) == again


def test_starting_a_shard_again_withdraws_its_record(folder):
    CacheShardWriter(folder / "00000.tar", fingerprint=PRINT, kind="gaussian").abort()
    assert finished_shard(folder / "00000.tar", PRINT, "cd" * 32) is None


def test_empty_shards_count_and_an_empty_cache_is_refused(tmp_path):
    empty = write_shard(tmp_path / "00000.tar", range(0), rejected=[Rejection("unreadable", "a", 0)])
    with pytest.raises(ValueError, match=r"not one latent.*unreadable"):
        finish_cache(tmp_path, [empty], first_stage=FIRST_STAGE, transform=TRANSFORM, kind="gaussian")
    full = write_shard(tmp_path / "00001.tar", range(3))
    manifest = finish_cache(tmp_path, [full, empty], first_stage=FIRST_STAGE, transform=TRANSFORM, kind="gaussian")
    assert (manifest.n, manifest.read, manifest.rejected) == (3, 4, {"unreadable": 1})
    assert LatentCache.open(str(tmp_path)).keys(np.arange(3)) == ["000000", "000001", "000002"]


def test_shards_of_another_fingerprint_do_not_make_a_manifest(folder):
    record = CacheManifest.read_from(str(folder)).shards[0]
    other = dataclasses.replace(record, fingerprint="0" * 64)
    with pytest.raises(ValueError, match=r"00000\.tar has fingerprint 000000000000"):
        finish_cache(folder, [other], first_stage=FIRST_STAGE, transform=TRANSFORM, kind="gaussian")
