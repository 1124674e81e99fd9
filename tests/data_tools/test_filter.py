import json
import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_tools.filter import main
from ldm_scale.data.views import Selection

SIZES = [(512, 512), (300, 900), (200, 400), (256, 256), (1024, 512)]


@pytest.fixture
def shards(tmp_path, dataset):
    rows = [{"original_width": w, "original_height": h, "width": 64, "height": 64} for w, h in SIZES]
    return dataset(tmp_path / "in", [rows, rows[:2]])


def report(tmp_path):
    return json.loads((tmp_path / "s.parquet.json").read_text())


def keys(tmp_path):
    return Selection.read(tmp_path / "s.parquet").table["key"].to_pylist()


def test_sizes_are_the_originals_and_counts_add_up(tmp_path, shards, capsys):
    arguments = [str(shards), str(tmp_path / "s.parquet"), "--min-side", "256", "--max-aspect", "2"]
    assert main(arguments) == 0
    assert keys(tmp_path) == ["000000000", "000000003", "000000004", "000010000"]
    said = report(tmp_path)
    assert (said["read"], said["kept"], said["dropped"]) == (7, 4, {"min_side": 1, "max_aspect": 2})
    assert said["digest"] == Selection.read(tmp_path / "s.parquet").digest
    assert said["how"]["conditions"] == {"min_side": 256, "max_aspect": 2}
    assert "read 7 = kept 4 + dropped 3" in capsys.readouterr().out
    assert main([*arguments[:1], str(tmp_path / "s2.parquet"), "--max-aspect", "1", "--selection", arguments[1]]) == 0
    assert len(Selection.read(tmp_path / "s2.parquet")) == 3


def test_json_members_stand_in_for_the_parquet(tmp_path, dataset):
    rows = [{"original_width": w, "original_height": h} for w, h in SIZES]
    shards = dataset(tmp_path / "in", [rows], parquet=False)
    assert main([str(shards), str(tmp_path / "s.parquet"), "--min-side", "300"]) == 0
    assert keys(tmp_path) == ["000000000", "000000001", "000000004"]


@pytest.mark.parametrize(
    "names, option, values, kept",
    [
        (["SIMILARITY", "clip_similarity_vitb32"], ["--min-similarity", "0.3"], [0.2, 0.3, 0.4], [1, 2]),
        (["PUNSAFE"], ["--max-punsafe", "0.5"], [0.2, 0.5, 0.9], [0, 1]),
        (["pwatermark", "watermark_score"], ["--max-pwatermark", "0.8"], [0.9, 0.1, 1.0], [1]),
        (["AESTHETIC_SCORE", "aesthetic"], ["--min-aesthetic", "6"], ["5.9", "6", "7"], [1, 2]),
        (["LICENSE", "Licence"], ["--licence", "cc-by*", "mit"], ["CC-BY-4.0", "?", "mit"], [0, 2]),
        (["License"], ["--licence", "known"], ["?", "cc0", ""], [1]),
        (["LANGUAGE", "lang"], ["--language", "en"], ["en", "de", "EN"], [0, 2]),
        (["NSFW"], ["--nsfw", "unlikely"], ["UNLIKELY", "UNSURE", "NSFW"], [0]),
    ],
)
def test_columns_by_any_of_their_names(tmp_path, dataset, names, option, values, kept):
    for name in names:
        shards = dataset(tmp_path / name, [[{name: value} for value in values]])
        assert main([str(shards), str(tmp_path / "s.parquet"), *option]) == 0
        assert keys(tmp_path) == [f"00000{i:04d}" for i in kept]


def test_a_missing_column_is_an_error_that_names_those_there_are(tmp_path, shards, capsys):
    assert main([str(shards), str(tmp_path / "s.parquet"), "--max-punsafe", "0.5"]) == 2
    error = capsys.readouterr().err
    assert "punsafe" in error and "original_width" in error and not (tmp_path / "s.parquet").exists()


@pytest.mark.parametrize("parquet", [True, False])
@pytest.mark.parametrize("gap", [None, math.nan])
def test_missing_values_are_refused_kept_or_dropped_as_told(tmp_path, dataset, capsys, gap, parquet):
    shards = dataset(tmp_path / "in", [[{"punsafe": 0.1}, {"punsafe": gap}, {"punsafe": 0.9}]], parquet=parquet)
    arguments = [str(shards), str(tmp_path / "s.parquet"), "--max-punsafe", "0.5"]
    assert main(arguments) == 2
    assert "max_punsafe cannot be asked of 1 of 3 samples" in capsys.readouterr().err
    assert main([*arguments, "--keep-missing"]) == 0
    assert keys(tmp_path) == ["000000000", "000000001"] and report(tmp_path)["kept_though_missing"] == {
        "max_punsafe": 1
    }
    assert main([*arguments, "--drop-missing"]) == 0
    assert keys(tmp_path) == ["000000000"]
    assert report(tmp_path)["dropped"] == {"max_punsafe": 1, "missing_max_punsafe": 1}


def test_a_column_that_is_nowhere_is_missing_everywhere(tmp_path, shards):
    arguments = [str(shards), str(tmp_path / "s.parquet"), "--max-punsafe", "0.5"]
    assert main([*arguments, "--keep-missing"]) == 0 and len(keys(tmp_path)) == 7
    assert main([*arguments, "--drop-missing"]) == 1 and report(tmp_path)["dropped"] == {"missing_max_punsafe": 7}


def test_two_spellings_and_words_for_numbers_are_refused(tmp_path, dataset, capsys):
    shards = dataset(tmp_path / "in", [[{"punsafe": 0.1, "PUNSAFE": 0.2}]])
    assert main([str(shards), str(tmp_path / "s.parquet"), "--max-punsafe", "0.5"]) == 2
    assert "differ only in case" in capsys.readouterr().err
    shards = dataset(tmp_path / "words", [[{"punsafe": "low"}]])
    assert main([str(shards), str(tmp_path / "s.parquet"), "--max-punsafe", "0.5"]) == 2
    assert "column punsafe should hold numbers" in capsys.readouterr().err


def test_nothing_asked_nothing_kept_and_strange_selections(tmp_path, shards, dataset, capsys):
    out = str(tmp_path / "s.parquet")
    assert main([str(shards), out]) == 2
    assert main([str(shards), out, "--min-side", "9999"]) == 1
    assert "nothing is kept" in capsys.readouterr().out and not (tmp_path / "s.parquet").exists()
    assert main([str(shards), out, "--min-side", "1"]) == 0
    fewer = dataset(tmp_path / "fewer", [[{"original_width": 9, "original_height": 9}]])
    assert main([str(fewer), str(tmp_path / "t.parquet"), "--min-side", "1", "--selection", out]) == 2
    assert "00001.tar, which is not among the 1 shards" in capsys.readouterr().err


def metadata(folder, **more):
    folder.mkdir(parents=True)
    for part in range(2):
        table = {
            "URL": [f"http://host/{part}/{i}" for i in range(4)],
            "TEXT": ["a", "b", "c", "d"],
            "WIDTH": [256, 512, 1024, 640],
            "HEIGHT": [512, 512, 256, 480],
            "NSFW": ["UNLIKELY"] * 4,
            **more,
        }
        pq.write_table(pa.table(table), folder / f"part-{part}.parquet")
    return folder


def test_metadata_before_its_download(tmp_path, capsys):
    source, out = metadata(tmp_path / "meta"), tmp_path / "out"
    assert main([f"{source}/part-*.parquet", str(out), "--min-side", "400"]) == 0
    printed = capsys.readouterr().out
    assert "before Re-LAION-5B" in printed and "data_tools.download" in printed
    for part in range(2):
        table = pq.read_table(out / f"part-{part}.parquet")
        assert table["URL"].to_pylist() == [f"http://host/{part}/1", f"http://host/{part}/3"]
        assert table.column_names == ["URL", "TEXT", "WIDTH", "HEIGHT", "NSFW"]
    said = json.loads((out / "filter.json").read_text())
    assert (said["read"], said["kept"], said["dropped"], said["old_laion"]) == (8, 4, {"min_side": 4}, True)


def test_finished_metadata_files_are_kept_and_other_conditions_write_them_again(tmp_path):
    source, out = metadata(tmp_path / "meta"), tmp_path / "out"
    arguments = [str(source), str(out), "--min-side"]
    assert main([*arguments, "400"]) == 0
    before = {path.name: path.stat().st_ino for path in out.glob("*.parquet")}
    (out / "part-1.parquet").unlink()
    assert main([*arguments, "400"]) == 0
    assert (out / "part-0.parquet").stat().st_ino == before["part-0.parquet"]
    assert json.loads((out / "filter.json").read_text())["kept"] == 4
    assert main([*arguments, "500"]) == 0
    assert pq.read_table(out / "part-0.parquet").num_rows == 1


def test_foreign_files_and_the_source_itself_are_not_overwritten(tmp_path, capsys):
    source = metadata(tmp_path / "meta")
    assert main([str(source), str(source), "--min-side", "1"]) == 2
    assert "choose another directory" in capsys.readouterr().err
    other = metadata(tmp_path / "other")
    assert main([str(source), str(other), "--min-side", "1"]) == 2
    assert "not written by this tool" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["removed.txt", "removed.jsonl"])
def test_a_removal_list_leaves_out_and_silences_the_warning(tmp_path, capsys, name):
    source, out = metadata(tmp_path / "meta", hash=[11, 22, 33, 44]), tmp_path / "out"
    entries = [{"url": "http://host/0/1"}, {"hash": "33"}, {"key": "not here"}]
    lines = [json.dumps(entry) if name.endswith("jsonl") else next(iter(entry.values())) for entry in entries]
    (tmp_path / name).write_text("\n".join(lines) + "\n")
    assert main([str(source), str(out), "--removal-list", str(tmp_path / name)]) == 0
    assert "Re-LAION" not in capsys.readouterr().out
    assert json.loads((out / "filter.json").read_text())["dropped"] == {"removal_list": 3}
    assert pq.read_table(out / "part-0.parquet")["URL"].to_pylist() == ["http://host/0/0", "http://host/0/3"]


def test_re_laion_is_not_warned_of(tmp_path, capsys):
    source = metadata(tmp_path / "relaion2B-en-research")
    assert main([str(source), str(tmp_path / "out"), "--min-side", "400"]) == 0
    assert "warning" not in capsys.readouterr().out


def test_a_removal_list_works_on_shards_by_key(tmp_path, shards):
    (tmp_path / "removed.txt").write_text("000000001\n000010000\n")
    assert main([str(shards), str(tmp_path / "s.parquet"), "--removal-list", str(tmp_path / "removed.txt")]) == 0
    assert len(keys(tmp_path)) == 5 and report(tmp_path)["dropped"] == {"removal_list": 2}
