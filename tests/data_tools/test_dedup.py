import json

import numpy as np
import pytest

from data_tools import dedup
from data_tools.dedup import main, normal_text, normal_url
from ldm_scale.data.views import Selection


def run(tmp_path, shards, *options):
    out = tmp_path / "unique.parquet"
    assert main([str(shards), str(out), *options]) == 0
    groups = [json.loads(line) for line in (tmp_path / "unique.parquet.groups.jsonl").read_text().splitlines()]
    return Selection.read(out), json.loads((tmp_path / "unique.parquet.json").read_text()), groups


@pytest.fixture
def shards(tmp_path, dataset, picture):
    """Two shards; 0 = 2 = 4 by bytes, 1 = 5 by URL and text; 3 has the URL of 1 and another text."""
    rows = [
        {"image": picture(1), "url": "http://a/1", "text": "one"},
        {"image": picture(2), "url": "HTTP://B:80/2#top", "text": "A  Cat"},
        {"image": picture(1), "url": "http://a/3", "text": "three"},
        {"image": picture(4), "url": "http://b/2", "text": "a dog"},
        {"image": picture(1), "url": "http://a/5", "text": "five"},
        {"image": picture(6), "url": "http://b/2", "text": "a cat"},
        {"image": picture(7), "url": None, "text": "a cat"},
        {"image": picture(8), "url": None, "text": "a cat"},
    ]
    return dataset(tmp_path / "in", [rows[:3], rows[3:]])


def test_the_first_of_equal_samples_stays(tmp_path, shards, capsys):
    selection, report, groups = run(tmp_path, shards, "--by", "bytes,url_text")
    assert selection.table["key"].to_pylist() == ["000000000", "000000001", "000010000", "000010003", "000010004"]
    assert groups == [
        {"by": "bytes", "kept": "00000.tar/000000000", "equal": ["00000.tar/000000002", "00001.tar/000010001"]},
        {"by": "url_text", "kept": "00000.tar/000000001", "equal": ["00001.tar/000010002"]},
    ]
    assert (report["read"], report["kept"], report["dropped"]) == (8, 5, {"bytes": 2, "url_text": 1})
    assert report["digest"] == selection.digest and selection.how["by"] == ["bytes", "url_text"]
    assert "read 8 = kept 5 + dropped 3" in capsys.readouterr().out


def test_one_rule_only_and_an_unknown_one(tmp_path, shards, capsys):
    assert len(run(tmp_path, shards, "--by", "bytes")[0]) == 6
    assert len(run(tmp_path, shards, "--by", "url_text")[0]) == 7
    assert main([str(shards), str(tmp_path / "x"), "--by", "bytes,colour"]) == 2
    assert "--by colour; choose one or more of bytes,url_text" in capsys.readouterr().err


def test_within_a_selection_only_its_samples_are_compared(tmp_path, shards, dataset):
    run(tmp_path, shards, "--by", "url_text")
    (tmp_path / "unique.parquet").rename(tmp_path / "first.parquet")
    selection, report, _ = run(tmp_path, shards, "--by", "bytes", "--selection", str(tmp_path / "first.parquet"))
    assert (report["read"], report["kept"]) == (7, 5) and len(selection) == 5
    assert report["how"]["within"] == Selection.read(tmp_path / "first.parquet").digest


def test_equal_hashes_of_unequal_bytes_are_no_duplicates(tmp_path, shards, monkeypatch):
    everything = dedup.Rule(
        lambda shards, shard: np.full(shards.counts[shard], 7, np.uint64), dedup.RULES["bytes"].proofs
    )
    monkeypatch.setitem(dedup.RULES, "bytes", everything)
    assert len(run(tmp_path, shards, "--by", "bytes")[0]) == 6


@pytest.mark.parametrize("chunk", [1, 2, 1024])
def test_groups_over_any_chunks_equal_a_plain_count(tmp_path, dataset, picture, monkeypatch, chunk):
    monkeypatch.setattr(dedup, "_CHUNK", chunk)
    numbers = np.random.default_rng(0).integers(0, 12, (4, 10)).tolist()
    shards = dataset(tmp_path / "in", [[{"image": picture(number)} for number in shard] for shard in numbers])
    selection, _, groups = run(tmp_path, shards, "--by", "bytes")
    flat = [number for shard in numbers for number in shard]
    first = [f"{i // 10:05d}{i % 10:04d}" for i, number in enumerate(flat) if number not in flat[:i]]
    assert selection.table["key"].to_pylist() == first
    assert sum(len(group["equal"]) for group in groups) == len(flat) - len(first)


def test_a_shard_that_changed_behind_its_index_is_named(tmp_path, shards, picture, capsys):
    run(tmp_path, shards)
    tar = shards / "00000.tar"
    data = tar.read_bytes()
    at = data.index(picture(1)) + 60
    tar.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    assert main([str(shards), str(tmp_path / "unique.parquet")]) == 2
    assert "checksum_png" in capsys.readouterr().err


def test_metadata_without_urls_is_refused_by_name(tmp_path, dataset, capsys):
    shards = dataset(tmp_path / "in", [[{}, {}]])
    assert main([str(shards), str(tmp_path / "x.parquet"), "--by", "url_text"]) == 2
    assert "no column for url" in capsys.readouterr().err


@pytest.mark.parametrize(
    "one, two, same",
    [
        ("http://Host/a", "HTTP://host:80/a#x", True),
        ("https://host:443/a?b=1", "https://host/a?b=1", True),
        ("http://host", "http://host/", True),
        ("http://host/a", "http://host/A", False),
        ("http://host:8080/a", "http://host/a", False),
        ("http://host/a", "https://host/a", False),
        ("http://[broken", "http://[broken", True),
    ],
)
def test_urls(one, two, same):
    assert (normal_url(one) == normal_url(two)) is same


def test_texts():
    assert normal_text(" A\u00a0Caf\u00e9\n of  \uff21 ") == normal_text("a cafe\u0301 OF a")
    assert normal_text("a b") != normal_text("ab")
