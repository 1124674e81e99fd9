import json
import shutil
from collections.abc import Callable

import fsspec
import pytest

from data_tools.verify import main
from ldm_scale.data.shards import ShardSet


def flip(data, at, bit=1):
    return data[:at] + bytes([data[at] ^ bit]) + data[at + 1 :]


def head(data, name):
    """Where a member's header begins."""
    return data.index(name.encode() + bytes(100 - len(name)))


def patched(data, at, field, value):
    """Overwrite bytes of the header at `at`, with a checksum that fits."""
    block = bytearray(data[at : at + 512])
    block[field : field + len(value)] = value
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return data[:at] + bytes(block) + data[at + 512 :]


def damaged_size(data):
    return patched(data, head(data, "000000004.png"), 124, b"00000000001\0")


def renamed(data, old, new):
    return patched(data, head(data, old), 0, new.encode().ljust(100, b"\0"))


DAMAGES: dict[str, tuple[Callable[[bytes], bytes], set[str]]] = {
    "cut at a member boundary": (lambda d: d[: head(d, "000000005.png")], {"no_end_blocks"}),
    "cut inside a header": (lambda d: d[: head(d, "000000005.png") + 200], {"truncated"}),
    "cut inside a content": (lambda d: d[: head(d, "000000005.png") + 600], {"truncated"}),
    "cut after the image": (lambda d: d[: head(d, "000000005.txt")], {"no_end_blocks"}),
    "cut between the end blocks": (
        lambda d: d.rstrip(b"\0") + bytes(-len(d.rstrip(b"\0")) % 512 + 512),
        {"no_end_blocks"},
    ),
    "zeroed header": (
        lambda d: d[: head(d, "000000005.png")] + bytes(512) + d[head(d, "000000005.png") + 512 :],
        {"damaged_header"},
    ),
    "flipped bit in a header": (lambda d: flip(d, head(d, "000000005.png") + 130), {"damaged_header"}),
    "damaged size": (damaged_size, {"damaged_size"}),
    "empty file": (lambda d: b"", {"no_end_blocks"}),
}


@pytest.fixture
def shards(tmp_path, dataset):
    return dataset(tmp_path / "in", [[{} for _ in range(10)] for _ in range(2)])


def run(tmp_path, source, level, *options):
    report = tmp_path / "report.json"
    code = main([str(source), "--level", level, "--report", str(report), "--threads", "2", *options])
    said = json.loads(report.read_text())
    assert said["ok"] == (code == 0) == (not said["problems"])
    return code, said


def reasons(said):
    return {problem["reason"] for problem in said["problems"]}


@pytest.mark.parametrize("level", ["fast", "hash", "decode"])
def test_sound_shards_pass(tmp_path, shards, level, capsys):
    ShardSet.open(str(shards))
    code, said = run(tmp_path, shards, level)
    assert (code, said["samples"]) == (0, 20)
    assert "20 samples, level " + level + ": all is well" in capsys.readouterr().out


@pytest.mark.parametrize("with_sidecars", [True, False])
@pytest.mark.parametrize("level", ["fast", "hash"])
@pytest.mark.parametrize("name", DAMAGES)
def test_every_damage_to_the_container_is_named(tmp_path, shards, name, level, with_sidecars):
    damage, expected = DAMAGES[name]
    if with_sidecars:
        ShardSet.open(str(shards))
    else:
        for path in (*shards.glob("*.parquet"), *shards.glob("*.json")):
            path.unlink()
    tar = shards / "00000.tar"
    tar.write_bytes(damage(tar.read_bytes()))
    code, said = run(tmp_path, shards, level)
    found = {problem["reason"] for problem in said["problems"] if problem["shard"] == "00000.tar"}
    assert code == 1 and expected <= found and {problem["shard"] for problem in said["problems"]} <= {
        "00000.tar", *(["00001.tar"] if not with_sidecars and level == "hash" else [])
    }  # fmt: skip
    if with_sidecars:
        assert "another_tar_than_indexed" in found or "lost_sample" in found or name == "cut between the end blocks"


def test_damage_is_named_with_its_samples(tmp_path, shards):
    ShardSet.open(str(shards))
    tar = shards / "00000.tar"
    tar.write_bytes(DAMAGES["cut at a member boundary"][0](tar.read_bytes()))
    _, said = run(tmp_path, shards, "hash")
    lost = [problem["key"] for problem in said["problems"] if problem["reason"] == "lost_sample"]
    assert lost == [f"00000000{i}" for i in range(5, 10)]
    assert said["samples"] == 15 and said["damaged_shards"] == ["00000.tar"]


def test_a_flipped_bit_in_an_image_is_found_by_hash(tmp_path, shards):
    ShardSet.open(str(shards))
    tar = shards / "00001.tar"
    data = tar.read_bytes()
    tar.write_bytes(flip(data, head(data, "000010003.png") + 512 + 100))
    assert run(tmp_path, shards, "fast")[0] == 0
    _, said = run(tmp_path, shards, "hash")
    assert [(one["shard"], one["key"], one["reason"]) for one in said["problems"]] == [
        ("00001.tar", "000010003", "checksum_png")
    ]


def test_a_flipped_bit_in_the_padding_is_found_by_hash(tmp_path, shards):
    ShardSet.open(str(shards))
    tar = shards / "00000.tar"
    data = tar.read_bytes()
    tar.write_bytes(flip(data, head(data, "000000003.txt") + 1000))
    assert reasons(run(tmp_path, shards, "hash")[1]) == {"changed_bytes"}


def test_hash_without_an_index_is_no_proof(tmp_path, shards):
    _, said = run(tmp_path, shards, "hash")
    assert reasons(said) == {"not_indexed"} and "data_tools.index" in said["problems"][0]["detail"]


def test_orphans_and_duplicates(tmp_path, shards):
    tar = shards / "00000.tar"
    data = tar.read_bytes()
    caption = data[head(data, "000000000.txt") : head(data, "000000000.json")]
    sample = data[head(data, "000000001.png") : head(data, "000000002.png")]
    end = head(data, "000000009.json") + 1024
    orphan = renamed(caption, "000000000.txt", "lonely.txt")
    tar.write_bytes(data[:end] + orphan + sample + bytes(10240))
    ShardSet.open(str(shards))
    _, said = run(tmp_path, shards, "fast")
    assert {(one["reason"], one["key"]) for one in said["problems"]} == {
        ("orphan_member", "lonely"), ("duplicate_key", "000000001")
    }  # fmt: skip


def test_counts_and_keys_are_those_of_the_sidecars(tmp_path, shards, dataset):
    shorter = dataset(tmp_path / "shorter", [[{} for _ in range(8)]])
    shutil.copy(shorter / "00000.tar", shards / "00000.tar")
    _, said = run(tmp_path, shards, "fast")
    assert [(one["reason"], one["key"]) for one in said["problems"]] == [
        ("other_count_than_stats", None), ("lost_sample", "000000008"), ("lost_sample", "000000009")
    ]  # fmt: skip
    (shards / "00000_stats.json").write_text("{")
    (shards / "00000.parquet").write_bytes(b"PAR1")
    assert reasons(run(tmp_path, shards, "fast")[1]) == {"damaged_stats", "damaged_parquet"}


def test_lost_and_unfinished_shards(tmp_path, shards):
    ShardSet.open(str(shards))
    (shards / "00001_stats.json").unlink()
    (shards / "00000.tar").unlink()
    _, said = run(tmp_path, shards, "fast")
    assert {(one["shard"], one["reason"]) for one in said["problems"]} == {
        ("00000.tar", "lost_shard"), ("00001.tar", "no_stats")
    }  # fmt: skip


def test_a_damaged_index_is_named(tmp_path, shards):
    ShardSet.open(str(shards))
    (shards / ".ldm/00000.idx").write_bytes(b"LDMIDX1\n")
    assert reasons(run(tmp_path, shards, "fast")[1]) == {"damaged_index"}


def test_members_that_do_not_decode(tmp_path, dataset, picture):
    cut = picture(0)[:300]
    rows = [
        {"image": b"<html>"},
        {"image": cut},
        {"members": {"cls": b"minus one"}},
        {"members": {"boxes.json": b"[{}]"}},
        {"members": {"seg.png": b"no png"}},
        {"members": {"txt": b"\xff\xfe"}},
        {},
    ]
    shards = dataset(tmp_path / "in", [rows])
    ShardSet.open(str(shards))
    assert run(tmp_path, shards, "hash")[0] == 0
    _, said = run(tmp_path, shards, "decode")
    assert [(one["key"][-1], one["reason"]) for one in said["problems"]] == [
        ("0", "unreadable_png"),
        ("1", "truncated_png"),
        ("2", "malformed_cls"),
        ("3", "malformed_boxes.json"),
        ("4", "unreadable_seg.png"),
        ("5", "malformed_txt"),
    ]


def test_read_only_source_with_its_indexes_elsewhere(tmp_path, shards):
    (shards / ".ldm").write_text("in the way")
    ShardSet.open(str(shards), str(tmp_path / "index"))
    (shards / ".ldm").unlink()
    assert run(tmp_path, shards, "hash", "--index-dir", str(tmp_path / "index"))[0] == 0


def test_mistakes(tmp_path, shards, capsys):
    assert main([str(tmp_path / "nowhere")]) == 2
    assert main([str(shards), "--repair"]) == 2
    assert "--repair is for a local latent cache" in capsys.readouterr().err
    assert main([str(shards), "--threads", "0"]) == 2


def test_remote_shards_with_their_indexes_at_hand(tmp_path, shards):
    remote = fsspec.filesystem("memory")
    remote.put(str(shards), "/verified", recursive=True)
    index = str(tmp_path / "index")
    ShardSet.open("memory://verified", index)
    assert run(tmp_path, "memory://verified", "decode", "--index-dir", index)[0] == 0
    data = remote.cat("/verified/00001.tar")
    remote.pipe("/verified/00001.tar", flip(data, head(data, "000010003.png") + 512 + 100))
    code, said = run(tmp_path, "memory://verified", "hash", "--index-dir", index)
    assert code == 1 and [one["reason"] for one in said["problems"]] == ["checksum_png"]
