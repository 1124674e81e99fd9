import json
import os
import threading
from pathlib import Path

import fsspec
import numpy as np
import pytest

from ldm_scale.data import shards as shards_module
from ldm_scale.data.shards import CorruptSample, ShardSet, ShardWriter


def corrupt(path: str, needle: bytes) -> None:
    data = Path(path).read_bytes()
    at = data.index(needle)
    Path(path).write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])


def test_reads_by_number_over_shards(image_shards, jpeg):
    shards = ShardSet.open(image_shards)
    assert shards.n == 15 and shards.names == ["00000.tar", "00001.tar", "00002.tar"]
    assert shards.counts.tolist() == [5, 7, 3]
    ids = np.array([14, 0, 5, 4, 11, 12, 0])
    assert shards.keys(ids) == [f"{i:06d}" for i in ids]
    for i, sample in zip(ids, shards.read(ids, ("jpg", "txt", "cls")), strict=True):
        assert sample == {"jpg": jpeg(int(i)), "txt": f"caption {i}".encode()}
    with pytest.raises(IndexError, match=r"outside 0 \.\. 14"):
        shards.read(np.array([15]), ("jpg",))


def test_sidecars_lie_in_ldm_and_nothing_else_is_written(image_shards):
    ShardSet.open(image_shards)
    assert sorted(os.listdir(image_shards)) == [".ldm", "00000.tar", "00001.tar", "00002.tar"]
    manifest = json.loads((Path(image_shards) / ".ldm" / "manifest.json").read_text())
    assert [shard["n"] for shard in manifest["shards"]] == [5, 7, 3] and manifest["n"] == 15
    shards = ShardSet.open(image_shards)
    assert (manifest["order_id"], manifest["content_id"]) == (shards.order_id, shards.content_id)


def test_second_open_reads_no_tar(image_shards, monkeypatch):
    first = ShardSet.open(image_shards)
    monkeypatch.setattr(shards_module, "index_shard", lambda *a: pytest.fail("indexed again"))
    second = ShardSet.open(image_shards)
    assert second.order_id == first.order_id and second.keys(np.array([3])) == ["000003"]


def test_progress_is_told(image_shards):
    calls = []
    ShardSet.open(image_shards, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(1, 3), (2, 3), (3, 3)]


def test_changed_shard_is_indexed_again(image_shards):
    before = ShardSet.open(image_shards)
    with ShardWriter(f"{image_shards}/00001.tar") as writer:
        for i in range(40):
            writer.add(f"new{i:02d}", {"jpg": b"x" * 100})
    after = ShardSet.open(image_shards)
    assert after.n == 48 and after.order_id != before.order_id
    with pytest.raises(ValueError, match=r"00001\.tar.*open"):
        before.read(np.array([6]), ("jpg",))


def test_order_id_ignores_bytes_and_content_id_does_not(tmp_path):
    def make(folder: str, caption: bytes, key: str = "b") -> ShardSet:
        with ShardWriter(tmp_path / folder / "0.tar") as writer:
            writer.add("a", {"jpg": b"x", "txt": caption})
            writer.add(key, {"jpg": b"y", "txt": b""})
        return ShardSet.open(str(tmp_path / folder))

    first, same, other_bytes, other_key = make("1", b"p"), make("2", b"p"), make("3", b"q"), make("4", b"p", "c")
    assert first.order_id == same.order_id == other_bytes.order_id != other_key.order_id
    assert first.content_id == same.content_id != other_bytes.content_id


def test_some_shards_of_a_folder(image_shards):
    shards = ShardSet.open(f"{image_shards}/{{00000..00001}}.tar")
    assert shards.n == 12
    assert ShardSet.open(image_shards).n == 15
    assert len(json.loads((Path(image_shards) / ".ldm" / "manifest.json").read_text())["shards"]) == 3


def test_several_folders_with_equal_shard_names(image_shards, tmp_path):
    with ShardWriter(tmp_path / "more" / "00000.tar") as writer:
        writer.add("extra", {"jpg": b"x"})
    shards = ShardSet.open(f"{image_shards}::{tmp_path}/more", str(tmp_path / "index"))
    assert shards.n == 16 and shards.keys(np.array([0, 15])) == ["000000", "extra"]
    assert len(os.listdir(tmp_path / "index")) == 2
    assert not (tmp_path / "more" / ".ldm").exists()


def test_read_only_source_names_the_key_to_set(image_shards, tmp_path):
    (Path(image_shards) / ".ldm").write_text("a file where the folder should be")
    with pytest.raises(ValueError, match=r"data\.index_dir"):
        ShardSet.open(image_shards)
    assert ShardSet.open(image_shards, str(tmp_path / "index")).n == 15
    assert ShardSet.open(image_shards, str(tmp_path / "index")).keys(np.array([2])) == ["000002"]


def test_missing_sources_are_named(image_shards, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        ShardSet.open(str(tmp_path / "nowhere"))
    listed = tmp_path / "list.txt"
    listed.write_text(f"{image_shards}/00000.tar\n{image_shards}/00009.tar\n")
    with pytest.raises(FileNotFoundError, match=r"00009\.tar"):
        ShardSet.open(str(listed))


def test_require_leaves_out_and_counts(tmp_path):
    with ShardWriter(tmp_path / "0.tar") as writer:
        writer.add("a", {"jpg": b"x", "txt": b"1"})
        writer.add("b", {"jpg": b"x"})
        writer.add("c", {"png": b"x", "txt": b"2"})
        writer.add("d", {"npy": b"x", "txt": b"2"})
        writer.add("e", {"txt": b"2"})
    everything = ShardSet.open(str(tmp_path))
    shards = ShardSet.open(str(tmp_path), require=("image", "txt"))
    assert everything.n == 4 and everything.rejected == {"orphan_member": 1}
    assert shards.n == 2 and shards.keys(np.arange(2)) == ["a", "c"]
    assert shards.rejected == {"orphan_member": 1, "missing_image": 1, "missing_txt": 1}
    found = {(str(entry.reason), entry.key) for entry in shards.shard_rejected(0)}
    assert found == {("orphan_member", "e"), ("missing_image", "d"), ("missing_txt", "b")}
    assert shards.order_id != everything.order_id
    with pytest.raises(ValueError, match="choose image or one of"):
        ShardSet.open(str(tmp_path), require=("caption",))
    with pytest.raises(ValueError, match="no sample in 1 shards"):
        ShardSet.open(str(tmp_path), require=("cls",))


def test_shard_ids_by_key(tmp_path):
    with ShardWriter(tmp_path / "0.tar") as writer:
        for key in ("c", "a", "b"):
            writer.add(key, {"jpg": b"x"})
    shards = ShardSet.open(str(tmp_path))
    assert shards.shard_ids(0).tolist() == [0, 1, 2]
    assert shards.keys(shards.shard_ids(0, by_key=True)) == ["a", "b", "c"]


def test_flipped_payload_bit_is_found_by_key(image_shards):
    ShardSet.open(image_shards)
    corrupt(f"{image_shards}/00001.tar", b"caption 7")
    shards = ShardSet.open(image_shards)
    assert shards.read(np.array([6]), ("txt",)) == [{"txt": b"caption 6"}]
    with pytest.raises(CorruptSample, match=r"'000007'.*00001\.tar.*checksum_txt") as raised:
        shards.read(np.array([7]), ("jpg", "txt"))
    assert (raised.value.key, raised.value.reason) == ("000007", "checksum_txt")


def test_remote_shards_by_range_reads(image_shards, tmp_path):
    files = fsspec.filesystem("memory")
    files.put(f"{image_shards}/00001.tar", "/bucket/images/00001.tar")
    files.put(f"{image_shards}/00002.tar", "/bucket/images/00002.tar")
    with pytest.raises(ValueError, match=r"data\.index_dir"):
        ShardSet.open("memory://bucket/images")
    remote = ShardSet.open("memory://bucket/images", str(tmp_path / "index"))
    local = ShardSet.open(f"{image_shards}/{{00001..00002}}.tar")
    assert remote.order_id == local.order_id and remote.content_id == local.content_id
    ids = np.array([9, 0, 7])
    assert remote.read(ids, ("jpg", "txt")) == local.read(ids, ("jpg", "txt"))


def test_few_descriptors_are_enough_and_threads_share(image_shards, monkeypatch):
    shards = ShardSet.open(image_shards)
    shards._limit = 1
    failures = []

    def read_much() -> None:
        for i in np.random.default_rng(0).integers(0, 15, 300).tolist():
            if shards.read(np.array([i]), ("txt",)) != [{"txt": f"caption {i}".encode()}]:
                failures.append(i)

    threads = [threading.Thread(target=read_much) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == [] and len(shards._open) == 1
