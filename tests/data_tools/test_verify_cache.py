import json

import numpy as np
import pytest

from data_tools.verify import main
from ldm_scale.data import tar
from ldm_scale.data.cache import CacheShardWriter, fingerprint, finish_cache, finished_shard
from ldm_scale.data.index import Rejection, index_shard

SHA = "ab" * 32
TRANSFORM = {"size": 32, "crop": "center", "flip": False}
PRINT = fingerprint(first_stage_kind="kl", first_stage_sha256=SHA, transform=TRANSFORM, kind="gaussian")
SHAPE = (8, 4, 4)


@pytest.fixture
def cache(tmp_path):
    """Three shards of 4 latents, of 5 samples read each."""
    folder, records = tmp_path / "latents", []
    for shard in range(3):
        with CacheShardWriter(folder / f"{shard:05d}.tar", fingerprint=PRINT, kind="gaussian") as writer:
            for i in range(4):
                moments = np.random.default_rng(10 * shard + i).normal(size=SHAPE)
                writer.add(f"{shard:05d}{i:04d}", moments, f"caption {i}")
            rejected = [Rejection("unreadable", "bad", 0)]
            records.append(writer.finish(source=f"{shard:05d}.tar", source_sha256=SHA, rejected=rejected))
    first_stage = {"kind": "kl", "config": {}, "sha256": SHA}
    finish_cache(folder, records, first_stage=first_stage, transform=TRANSFORM, kind="gaussian")
    return folder


def run(cache, level, *options):
    report = cache.parent / "report.json"
    code = main([str(cache), "--level", level, "--report", str(report), "--threads", "2", *options])
    said = json.loads(report.read_text())
    assert said["ok"] == (code == 0)
    return {(one["shard"], one["key"], one["reason"]) for one in said["problems"]}, said


def edit(path, change):
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def flip(path, needle, by=0):
    data = bytearray(path.read_bytes())
    data[data.index(needle) + by] ^= 1
    path.write_bytes(data)


def rewrite(path, change):
    """Write a shard again with other content, and an index that fits it: only what it says shows the difference."""
    data = path.read_bytes()
    with tar.ShardWriter(path, comment=tar.comment(memoryview(data))) as writer:
        samples: dict[str, dict[str, bytes]] = {}
        for item in tar.walk(memoryview(data)):
            key, field = tar.split_name(item.name)
            samples.setdefault(key, {})[field] = data[item.offset : item.offset + item.length]
        for key, members in samples.items():
            writer.add(key, change(key, members))
    index_shard(str(path), path.parent / f".ldm/{path.stem}.idx")


@pytest.mark.parametrize("level", ["fast", "hash", "decode"])
def test_a_sound_cache_passes(cache, level, capsys):
    assert run(cache, level)[0] == set()
    assert "12 latents, level " + level + ": all is well" in capsys.readouterr().out


def test_lost_and_cut_shards_and_sidecars(cache):
    (cache / "00000.tar").unlink()
    data = (cache / "00001.tar").read_bytes()
    (cache / "00001.tar").write_bytes(data[: data.index(b"000010002.npy")])
    (cache / "00002.parquet").unlink()
    (cache / ".ldm/00002.idx").unlink()
    found, said = run(cache, "fast")
    assert found == {
        ("00000.tar", None, "lost_shard"),
        ("00001.tar", None, "wrong_size"),
        ("00001.tar", None, "no_end_blocks"),
        ("00001.tar", None, "another_tar_than_indexed"),
        ("00002.tar", None, "damaged_parquet"),
        ("00002.tar", None, "no_index"),
    }
    assert said["damaged_shards"] == ["00000.tar", "00001.tar", "00002.tar"]


def test_a_flipped_bit_in_a_latent_is_found_by_hash(cache):
    flip(cache / "00001.tar", b"000010002.npy", 512 + 128 + 40)
    assert run(cache, "fast")[0] == set()
    assert run(cache, "hash")[0] == {("00001.tar", "000010002", "checksum_npy")}


def test_edited_bytes_with_an_index_that_fits_are_found(cache):
    rewrite(cache / "00001.tar", lambda key, members: members | {"txt": b"caption X"})
    assert run(cache, "fast")[0] == {("00001.tar", None, "index_of_another_tar")}
    assert run(cache, "hash")[0] == {
        ("00001.tar", None, "index_of_another_tar"), ("00001.tar", None, "changed_bytes")
    }  # fmt: skip


def test_a_shard_of_another_cache_is_found_by_its_first_record(cache):
    data = (cache / "00002.tar").read_bytes()
    other = tar.global_comment(json.dumps({"format": "x", "fingerprint": "cd" * 32}))
    (cache / "00002.tar").write_bytes(other + data[len(other) :])
    assert ("00002.tar", None, "foreign_fingerprint") in run(cache, "fast")[0]


def test_moments_that_are_not_finite_or_of_another_shape(cache):
    def spoil(key, members):
        npy = members["npy"]
        if key.endswith("1"):
            npy = npy[:128] + np.float16("nan").tobytes() + npy[130:]
        if key.endswith("2"):
            npy = npy[:-2]
        if key.endswith("3"):
            members["flip.npy"] = npy[:128] + np.float16("inf").tobytes() + npy[130:]
        return members | {"npy": npy}

    rewrite(cache / "00000.tar", spoil)
    found = run(cache, "decode")[0]
    assert {
        ("00000.tar", "000000001", "not_finite_npy"),
        ("00000.tar", "000000002", "malformed_npy"),
        ("00000.tar", "000000003", "not_finite_flip.npy"),
    } <= found


def test_statistics_that_are_not_those_of_the_moments(cache):
    def change(values):
        values["statistics"]["sums"][0][0] += 1

    edit(cache / ".ldm/00001.done.json", change)
    assert run(cache, "fast")[0] == {("00001.tar", None, "record_differs")}
    edit(cache / "manifest.json", lambda values: change(values["shards"][1]))
    found = {reason for _, _, reason in run(cache, "decode")[0]}
    assert found == {"manifest_latent_mean", "manifest_latent_std", "manifest_channel_mean", "manifest_channel_std"} | {
        "other_statistics"
    }


@pytest.mark.parametrize(
    "name, value",
    [("n", 13), ("read", 0), ("latent_std", 1.0), ("order_id", "x"), ("content_id", "x"), ("rejected", {})],
)
def test_a_manifest_that_does_not_add_up(cache, name, value):
    edit(cache / "manifest.json", lambda values: values.update({name: value}))
    assert run(cache, "fast")[0] == {(None, None, f"manifest_{name}")}


def test_another_transform_in_the_manifest_is_another_fingerprint(cache):
    edit(cache / "manifest.json", lambda values: values["transform"].update(size=64))
    assert run(cache, "fast")[0] == {(None, None, "manifest_fingerprint")}


def test_records_that_do_not_add_up(cache):
    for path, at in ((cache / ".ldm/00001.done.json", None), (cache / "manifest.json", 1)):
        edit(path, lambda values, at=at: (values if at is None else values["shards"][at]).update(read=6))
    assert ("00001.tar", None, "counts_do_not_add_up") in run(cache, "fast")[0]


def test_an_unfinished_cache_and_a_damaged_manifest_say_so(cache):
    text = (cache / "manifest.json").read_text()
    (cache / "manifest.json").write_text(text[:100])
    assert run(cache, "fast")[0] == {(None, None, "damaged_manifest")}
    (cache / "manifest.json").unlink()
    assert run(cache, "fast")[0] == {(None, None, "unfinished")}


def test_repair_marks_only_the_damaged_shards_for_encoding(cache, capsys):
    flip(cache / "00001.tar", b"000010002.npy", 512 + 128 + 40)
    run(cache, "hash")
    printed = capsys.readouterr().out
    assert "--level hash --repair" in printed and "precompute_latents" in printed
    assert finished_shard(cache / "00001.tar", PRINT, SHA)
    found, _ = run(cache, "hash", "--repair")
    assert found == {("00001.tar", "000010002", "checksum_npy")} and "encodes only these" in capsys.readouterr().out
    done = [finished_shard(cache / f"{shard:05d}.tar", PRINT, SHA) is not None for shard in range(3)]
    assert done == [True, False, True]
