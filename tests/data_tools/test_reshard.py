import json
import tarfile

import fsspec
import pyarrow.parquet as pq
import pytest

from data_tools import reshard
from data_tools.reshard import main
from ldm_scale.data.views import write_selection


def members(folder):
    """(key, field) to bytes of all tars in order, and the names in each tar."""
    found, names = {}, {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as archive:
            entries = {entry.name: archive.extractfile(entry).read() for entry in archive}
        found |= entries
        names[path.name] = list(entries)
    return found, names


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def shards(tmp_path, dataset):
    """1 + 9 + 0 + 3 samples, each with a member that the index does not know."""
    sizes, rows = (1, 9, 0, 3), []
    for shard, size in enumerate(sizes):
        rows.append([{"number": 10 * shard + i, "members": {"mp3": b"%d%d" % (shard, i)}} for i in range(size)])
    rows[1][0]["key"] = "zlast"
    return dataset(tmp_path / "in", rows, parquet=True)


def test_even_shards_hold_every_member_byte_for_byte(tmp_path, shards, capsys):
    out = tmp_path / "out"
    assert main([str(shards), str(out), "--shard-size", "5"]) == 0
    before, _ = members(shards)
    after, names = members(out)
    assert after == before and len(after) == 13 * 4
    assert [len(one) // 4 for one in names.values()] == [4, 4, 5]
    keys = [name.removesuffix(".mp3") for one in names.values() for name in one if name.endswith(".mp3")]
    assert keys == ["000000000", *(f"00001000{i}" for i in range(1, 9)), "zlast", *(f"00003000{i}" for i in range(3))]
    rows = [row for path in sorted(out.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
    assert [row["key"] for row in rows] == keys
    assert [row["number"] for row in rows] == [0, *range(11, 19), 10, 30, 31, 32]
    assert [json.loads(path.read_text())["successes"] for path in sorted(out.glob("*_stats.json"))] == [4, 4, 5]
    assert "read 13 = written 13 + left out 0" in capsys.readouterr().out


def test_a_selection_and_what_it_leaves_out(tmp_path, shards):
    keys = {"00001.tar": ["000010002", "zlast"], "00003.tar": ["000030001"]}
    pairs = [(shard, key) for shard, chosen in keys.items() for key in chosen]
    write_selection(tmp_path / "s.parquet", [a for a, _ in pairs], [b for _, b in pairs], {})
    arguments = [str(shards), str(tmp_path / "out"), "--selection", str(tmp_path / "s.parquet")]
    assert main([*arguments, "--report", str(tmp_path / "report.json")]) == 0
    _, names = members(tmp_path / "out")
    assert [name for name in names["00000.tar"] if name.endswith("txt")] == [
        "000010002.txt", "zlast.txt", "000030001.txt"
    ]  # fmt: skip
    said = json.loads((tmp_path / "report.json").read_text())
    assert (said["read"], said["written"], said["left_out"]) == (13, 3, {"not_selected": 10})


def test_equal_input_gives_equal_files_and_a_cut_off_run_is_finished(tmp_path, shards, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main([str(shards), str(whole), "--shard-size", "4"]) == 0
    calls = []

    def stop(tables, tar):
        calls.append(tar.name)
        if tar.name == "00002.tar":
            raise OSError("the disk went away")
        return reshard.pa.concat_tables(tables, promote_options="permissive")

    with monkeypatch.context() as patch:
        patch.setattr(reshard, "_joined", stop)
        assert main([str(shards), str(parts), "--shard-size", "4"]) == 2
    first = (parts / "00000.tar").stat().st_ino
    (parts / "00001.tar").write_bytes(b"cut")
    assert main([str(shards), str(parts), "--shard-size", "4"]) == 0
    assert (parts / "00000.tar").stat().st_ino == first and calls == ["00000.tar", "00001.tar", "00002.tar"]
    assert files(whole) == files(parts)


def test_damaged_samples_are_left_out_and_named(tmp_path, shards, capsys):
    assert main([str(shards), str(tmp_path / "whole")]) == 0
    tar = shards / "00001.tar"
    data = tar.read_bytes()
    at = data.index(b"caption 4")
    tar.write_bytes(data[:at] + b"C" + data[at + 1 :])
    assert main([str(shards), str(tmp_path / "out")]) == 1
    assert "checksum_txt" in capsys.readouterr().out
    said = json.loads((tmp_path / "out/.ldm/reshard.json").read_text())
    assert said["read"] == said["written"] + 1 == 13 and said["damaged"][0][1].endswith("00001.tar 000010003")
    _, names = members(tmp_path / "out")
    assert "000010003.png" not in names["00000.tar"] and len(names["00000.tar"]) == 12 * 4


def test_what_the_source_rejects_counts_as_left_out(tmp_path, shards):
    data = (shards / "00003.tar").read_bytes()
    at = data.index(b"000030002.png")
    (shards / "00003.tar").write_bytes(data[:at])
    assert main([str(shards), str(tmp_path / "out")]) == 0
    said = json.loads((tmp_path / "out/.ldm/reshard.json").read_text())
    assert said["read"] == said["written"] + sum(said["left_out"].values())
    assert said["written"] == 12 and said["left_out"] == {"no_end_blocks": 1}


def test_keys_that_occur_twice_are_refused_by_name(tmp_path, dataset, capsys):
    shards = dataset(tmp_path / "in", [[{"key": "a"}, {"key": "same"}], [{"key": "same"}]])
    assert main([str(shards), str(tmp_path / "out")]) == 2
    assert "key 'same' occurs in 00000.tar, 00001.tar" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*.tar"))


def test_other_shards_in_the_way_are_refused(tmp_path, shards, capsys):
    assert main([str(shards), str(shards)]) == 2
    assert "already holds shards (00000.tar" in capsys.readouterr().err
    assert main([str(shards), str(tmp_path / "out"), "--shard-size", "5"]) == 0
    assert main([str(shards), str(tmp_path / "out"), "--shard-size", "6"]) == 2
    assert "another recipe" in capsys.readouterr().err


def test_shards_without_parquet_get_none_and_columns_of_different_types_are_named(tmp_path, dataset, capsys):
    bare = dataset(tmp_path / "bare", [[{}], [{}]], parquet=False)
    assert main([str(bare), str(tmp_path / "out")]) == 0
    assert not list((tmp_path / "out").glob("*.parquet"))
    mixed = dataset(tmp_path / "mixed", [[{"score": 1.5}], [{"score": "high"}]])
    assert main([str(mixed), str(tmp_path / "out2")]) == 2
    assert "00000.tar: the parquet files of its sources have columns of different types" in capsys.readouterr().err
    (mixed / "00000.parquet").unlink()
    assert main([str(mixed), str(tmp_path / "out2")]) == 0
    rows = pq.read_table(tmp_path / "out2/00000.parquet").to_pylist()
    assert [(row["key"], row["score"]) for row in rows] == [("000000000", None), ("000010000", "high")]


def test_remote_shards(tmp_path, shards):
    fsspec.filesystem("memory").put(str(shards), "/resharded", recursive=True)
    arguments = ["memory://resharded", str(tmp_path / "far"), "--index-dir", str(tmp_path / "index")]
    assert main([*arguments, "--shard-size", "5"]) == 0
    assert main([str(shards), str(tmp_path / "near"), "--shard-size", "5"]) == 0
    far, near = files(tmp_path / "far"), files(tmp_path / "near")
    assert {name: data for name, data in far.items() if name != ".ldm/reshard.json"} == {
        name: data for name, data in near.items() if name != ".ldm/reshard.json"
    }
