import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ldm_scale.data.cache import CacheShardWriter, LatentCache, fingerprint, finish_cache
from ldm_scale.data.index import Rejection
from ldm_scale.data.shards import RemovedSample, ShardSet, ShardWriter
from ldm_scale.data.views import REMOVED, RemovalList, Selection, write_selection


def test_a_selection_is_sorted_and_knows_how_it_was_made(tmp_path):
    path = tmp_path / "s.parquet"
    shards, keys = ["b.tar", "a.tar", "b.tar", "a.tar"], ["x", "z", "a", "\u00e9"]
    written = write_selection(path, shards, keys, {"tool": "test", "min_side": 256})
    read = Selection.read(path)
    assert read.table.to_pylist() == [
        {"shard": "a.tar", "key": "z"},
        {"shard": "a.tar", "key": "\u00e9"},
        {"shard": "b.tar", "key": "a"},
        {"shard": "b.tar", "key": "x"},
    ]
    assert read.how == {"tool": "test", "min_side": 256} and len(read) == 4
    lines = "a.tar/z\na.tar/\u00e9\nb.tar/a\nb.tar/x\n"
    assert read.digest == written.digest == hashlib.sha256(lines.encode()).hexdigest()
    assert read.counts == {"a.tar": 2, "b.tar": 2}
    assert read.keys("b.tar").to_pylist() == ["a", "x"] and read.keys("c.tar").to_pylist() == []


def test_the_digest_does_not_depend_on_how(tmp_path):
    one = write_selection(tmp_path / "1", ["a", "a"], ["1", "2"], {"tool": "one"})
    two = write_selection(tmp_path / "2", ["a", "a"], ["2", "1"], {"tool": "two"})
    other = write_selection(tmp_path / "3", ["a", "a"], ["2", "3"], {})
    assert one.digest == two.digest != other.digest


def test_an_empty_selection(tmp_path):
    write_selection(tmp_path / "s.parquet", [], [], {})
    assert len(Selection.read(tmp_path / "s.parquet")) == 0


def test_a_sample_twice_is_refused_and_nothing_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"a\.tar/1 is there twice"):
        write_selection(tmp_path / "s.parquet", ["a.tar", "a.tar"], ["1", "1"], {})
    assert list(tmp_path.iterdir()) == []


def test_other_files_are_refused_by_name(tmp_path):
    pq.write_table(pa.table({"url": ["x"]}), tmp_path / "other.parquet")
    with pytest.raises(ValueError, match=r"other\.parquet is no selection: it has columns url"):
        Selection.read(tmp_path / "other.parquet")
    path = tmp_path / "s.parquet"
    write_selection(path, ["a"], ["1"], {})
    pq.write_table(pa.table({"shard": ["b", "a"], "key": ["1", "1"]}, metadata={"ldm_scale.selection": "{}"}), path)
    with pytest.raises(ValueError, match=r"s\.parquet: a/1 is there twice or out of place"):
        Selection.read(path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"s\.parquet is no parquet file or is cut short"):
        Selection.read(path)


def shard_set(folder: Path, counts=(5, 7, 3)) -> ShardSet:
    """Shards whose samples are keyed 000000, 000001, ... throughout."""
    numbers = iter(range(sum(counts)))
    for shard, count in enumerate(counts):
        with ShardWriter(folder / f"{shard:05d}.tar") as writer:
            for number in (next(numbers) for _ in range(count)):
                writer.add(f"{number:06d}", {"jpg": b"%d" % number, "txt": b""} if number % 4 else {"jpg": b"0"})
    return ShardSet.open(str(folder), require=("image",))


def select(
    path: Path, numbers: Sequence[int], shard_of=lambda number: 0 if number < 5 else 1 if number < 12 else 2
) -> str:
    shards = [f"{shard_of(number):05d}.tar" for number in numbers]
    write_selection(path, shards, [f"{number:06d}" for number in numbers], {})
    return str(path)


def numbers_of(shards: ShardSet) -> list[int]:
    return [int(key) for key in shards.keys(np.arange(shards.n))]


def test_a_selected_set_is_numbered_by_what_is_selected(tmp_path):
    whole = shard_set(tmp_path / "images")
    view = whole.view([select(tmp_path / "s", [14, 2, 0, 9, 6])])
    assert numbers_of(view) == [0, 2, 6, 9, 14] and view.n == 5 and view.counts.tolist() == [2, 2, 1]
    assert view.rejected == {"not_selected": 10} and numbers_of(whole) == list(range(15))
    assert [entry.key for entry in view.shard_rejected(2)] == ["000012", "000013"]
    assert view.read(np.array([3]), ("jpg",)) == [{"jpg": b"9"}]
    assert view.content_id == whole.content_id


def test_a_selection_is_part_of_the_order(tmp_path):
    """Which samples, not which files say so."""
    whole = shard_set(tmp_path / "images")
    one = whole.view([select(tmp_path / "1", [1, 2, 9])])
    same = whole.view([select(tmp_path / "2", [1, 2, 9, 10]), select(tmp_path / "3", [0, 1, 2, 9])])
    other = whole.view([select(tmp_path / "4", [1, 2, 10])])
    assert numbers_of(same) == [1, 2, 9] and one.order_id == same.order_id
    assert len({whole.order_id, one.order_id, other.order_id}) == 3
    assert whole.view().order_id == whole.order_id


def test_rows_are_looked_up_once(tmp_path, monkeypatch):
    whole = shard_set(tmp_path / "images")
    first = whole.view([select(tmp_path / "s", [1, 9])])
    with monkeypatch.context() as patch:
        patch.setattr(ShardSet, "_index", None)
        again = whole.view([str(tmp_path / "s")])
    assert again.order_id == first.order_id and isinstance(again.selected.rows, np.memmap)


@pytest.mark.parametrize(
    "numbers, message",
    [
        ([1, 77, 78], r"names 2 samples that are not there, the first 00002\.tar/000077: .*data_tools\.filter"),
        ([], "leaves no sample"),
    ],
)
def test_impossible_selections_are_refused(tmp_path, numbers, message):
    with pytest.raises(ValueError, match=message):
        shard_set(tmp_path / "images").view([select(tmp_path / "s", numbers)])


def test_a_selection_of_other_shards_is_refused(tmp_path):
    path = select(tmp_path / "s", [1, 2, 3], lambda number: 9 if number > 1 else 0)
    with pytest.raises(ValueError, match=r"names 2 samples that are not there, the first 00009\.tar/000002"):
        shard_set(tmp_path / "images").view([path])
    (tmp_path / "twice").mkdir()
    shutil.copy(tmp_path / "images" / "00000.tar", tmp_path / "twice" / "00000.tar")
    both = ShardSet.open(f"{tmp_path}/images::{tmp_path}/twice")
    with pytest.raises(ValueError, match=r"several shards are called 00000\.tar: .*data\.mixture"):
        both.view([path])


def test_selected_samples_that_lack_what_the_task_needs_are_counted(tmp_path):
    shard_set(tmp_path / "images")
    whole = ShardSet.open(str(tmp_path / "images"), require=("image", "txt"))
    view = whole.view([select(tmp_path / "s", [0, 1, 4, 5])])
    assert numbers_of(view) == [1, 5] and view.selected.left_out == {"lacks_members": 2}


def latents(folder: Path, rejected: Sequence[Rejection] = ()) -> LatentCache:
    """Twelve latents, 000003 among those that were rejected."""
    what = {"transform": {"size": 8, "flip": False}, "kind": "point"}
    printed = fingerprint(first_stage_kind="kl", first_stage_sha256="0", **what)
    with CacheShardWriter(folder / "00000.tar", fingerprint=printed, kind="point") as writer:
        for number in (n for n in range(13) if n != 3):
            writer.add(f"{number:06d}", np.full((1, 2, 2), number), f"caption {number}")
        record = writer.finish(source="", source_sha256="", rejected=rejected)
    finish_cache(folder, [record], first_stage={"kind": "kl", "config": {}, "sha256": "0"}, **what)
    return LatentCache.open(str(folder))


def test_a_selection_of_the_images_fits_their_latents(tmp_path):
    """What precompute rejected is left out and counted; what was never there is a mistake."""
    path = select(tmp_path / "s", [1, 3, 7], lambda number: 0)
    with pytest.raises(ValueError, match=r"names 1 samples that are not there, the first 00000\.tar/000003"):
        latents(tmp_path / "1").view([path])
    view = latents(tmp_path / "2", [Rejection("undecodable", "000003", 0)]).view([path])
    assert view.keys(np.arange(view.n)) == ["000001", "000007"]
    assert view.read(np.array([1]))[0][0, 0, 0, 0] == 7
    assert view.order_id != latents(tmp_path / "2").order_id


def remove(folder: Path, *keys: str, shard: str = "00000.tar", name: str = REMOVED) -> str:
    entries = [{"shard": shard, "key": key, "reason": "asked", "time": "2026-01-01"} for key in keys]
    (folder / name).write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return str(folder / name)


def test_removed_samples_keep_their_number_and_are_never_read(tmp_path):
    whole = shard_set(tmp_path / "images")
    listed = remove(tmp_path, "000002", "no such key")
    view = whole.view(removed=[listed])
    assert view.n == whole.n and view.order_id == whole.order_id and numbers_of(view) == list(range(15))
    with pytest.raises(RemovedSample, match="removed"):
        view.read(np.array([2]), ("jpg",))
    assert view.read(np.array([1, 3]), ("jpg",)) == whole.read(np.array([1, 3]), ("jpg",))
    assert len(view.removed) == 2 and view.removed.digest == RemovalList.read([listed, listed]).digest


def test_the_list_beside_the_shards_always_holds(tmp_path):
    shard_set(tmp_path / "images")
    remove(tmp_path / "images" / ".ldm", "000006", shard="00001.tar")
    view = ShardSet.open(str(tmp_path / "images")).view()
    with pytest.raises(RemovedSample):
        view.read(np.array([6]), ("jpg",))
    latents(tmp_path / "cache")
    remove(tmp_path / "cache" / ".ldm", "000006")
    cache = LatentCache.open(str(tmp_path / "cache")).view()
    with pytest.raises(RemovedSample):
        cache.read(np.array([5]))


@pytest.mark.parametrize("line", ["no json", '{"shard": "00000.tar"}', "[1]"])
def test_a_list_that_is_none_is_refused(tmp_path, line):
    (tmp_path / REMOVED).write_text(f'{{"shard": "a", "key": "b"}}\n{line}\n')
    with pytest.raises(ValueError, match=r"removed\.jsonl, line 2: .* is no removal"):
        RemovalList.read([tmp_path / REMOVED])
