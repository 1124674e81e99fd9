import hashlib
import json
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_tools.make_shards import main
from ldm_scale.images.decode import decode


def save(path: Path, *, size: tuple[int, int] = (40, 30), level: int = 100, kind: str | None = None) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (level, 2 * level % 256, 50)).save(path, kind)
    return path.read_bytes()


def captioned(path: Path, caption: str, **options: object) -> bytes:
    data = save(path, **options)
    path.with_suffix(".txt").write_text(caption)
    return data


def read(out: Path, split: str = "train") -> dict[str, bytes]:
    found = {}
    for tar in sorted((out / split).glob("*.tar")):
        with tarfile.open(tar) as archive:
            found |= {member.name: archive.extractfile(member).read() for member in archive}
    return found


def rejected(out: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]


def test_files_are_stored_as_they_are_with_their_sizes(tmp_path):
    folder, out = tmp_path / "in", tmp_path / "out"
    stored = {
        "jpg": captioned(folder / "a.jpg", " a caption \n"),
        "png": captioned(folder / "sub/b.PNG", "another"),
        "webp": captioned(folder / "sub/c.webp", "third"),
    }
    bitmap = captioned(folder / "d.bmp", "fourth")
    assert main([str(folder), str(out), "--val-share", "0"]) == 0
    found = read(out)
    assert [name for name in found if name.endswith("txt")] == [f"train_00000_0000{i}.txt" for i in range(4)]
    by_caption = {found[name].decode(): name.removesuffix(".txt") for name in found if name.endswith(".txt")}
    assert by_caption.keys() == {"a caption", "another", "third", "fourth"}
    for caption, field in (("a caption", "jpg"), ("another", "png"), ("third", "webp")):
        key = by_caption[caption]
        said = json.loads(found[f"{key}.json"])
        assert found[f"{key}.{field}"] == stored[field]
        assert said["sha256"] == hashlib.sha256(stored[field]).hexdigest()
        assert (said["width"], said["height"], said["original_width"], said["original_height"]) == (40, 30, 40, 30)
    np.testing.assert_array_equal(decode(found[f"{by_caption['fourth']}.png"]), decode(bitmap))
    assert [row["source"] for row in pq.read_table(out / "train/00000.parquet").to_pylist()] == [
        "a.jpg", "d.bmp", "sub/b.PNG", "sub/c.webp"
    ]  # fmt: skip
    assert rejected(out) == []


def test_every_kind_of_bad_input_is_counted_and_named(tmp_path, capsys):
    folder, out = tmp_path / "in", tmp_path / "out"
    for i in range(3):
        captioned(folder / f"good{i}.jpg", "good", level=10 * i)
    whole = captioned(folder / "cut.jpg", "cut", size=(300, 300))
    (folder / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    captioned(folder / "html.jpg", "html")
    (folder / "html.jpg").write_text("<html>")
    captioned(folder / "zero.png", "zero")
    (folder / "zero.png").write_bytes(b"")
    Image.new("1", (70_000, 1000)).save(folder / "huge.png")
    (folder / "huge.txt").write_text("huge")
    save(folder / "wordless.png")
    captioned(folder / "blank.png", " \n ")
    (folder / "orphan.txt").write_text("no image")
    (folder / "notes.md").write_text("left alone")
    assert main([str(folder), str(out), "--val-share", "0"]) == 0
    assert {line["path"]: line["reason"] for line in rejected(out)} == {
        "cut.jpg": "truncated",
        "html.jpg": "unreadable",
        "zero.png": "empty",
        "huge.png": "too_large",
        "wordless.png": "missing_caption",
        "blank.png": "missing_caption",
        "orphan.txt": "missing_file",
    }
    assert sum(name.endswith(".jpg") for name in read(out)) == 3
    assert "read 10 = written 3 + rejected 7" in capsys.readouterr().out


def write_table(path: Path, rows: list[dict[str, str | None]]) -> None:
    if path.suffix == ".csv":
        lines = ["file,text", *(f'{row["file"] or ""},"{row["text"] or ""}"' for row in rows)]
        path.write_text("\n".join(lines), encoding="utf-8-sig")
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\nnot json\n")
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl", "t.parquet"])
def test_captions_from_a_table(tmp_path, name):
    folder, out = tmp_path / "in", tmp_path / "out"
    save(folder / "a/one.jpg")
    save(folder / "two.png")
    save(folder / "unnamed.png")
    rows = [
        {"file": "a/one.jpg", "text": "one, with a comma"},
        {"file": "two.png", "text": "two \u00e9"},
        {"file": "gone.png", "text": "gone"},
        {"file": "two.png", "text": None},
        {"file": None, "text": "no file"},
    ]
    write_table(tmp_path / name, rows)
    arguments = [str(folder), str(out), "--table", str(tmp_path / name), "--val-share", "0"]
    assert main([*arguments, "--image-column", "file", "--caption-column", "text"]) == 0
    assert [data.decode() for key, data in read(out).items() if key.endswith(".txt")] == [
        "one, with a comma",
        "two \u00e9",
    ]
    expected = {"missing_file": 2, "missing_caption": 1}
    if name == "t.jsonl":
        expected["missing_file"] += 1  # the line that is no json
    assert Counter(line["reason"] for line in rejected(out)) == expected


def test_a_missing_column_is_refused_naming_those_that_are_there(tmp_path, capsys):
    save(tmp_path / "in/a.png")
    write_table(tmp_path / "t.csv", [{"file": "a.png", "text": "words"}])
    assert main([str(tmp_path / "in"), str(tmp_path / "out"), "--table", str(tmp_path / "t.csv")]) == 2
    assert "'image'; it has file, text" in capsys.readouterr().err
    assert main([str(tmp_path / "in"), str(tmp_path / "out"), "--table", "t.xlsx"]) == 2


def test_long_sides_are_shrunk_and_say_what_they_were(tmp_path):
    folder, out = tmp_path / "in", tmp_path / "out"
    captioned(folder / "a.jpg", "wide", size=(400, 131))
    captioned(folder / "b.png", "tall", size=(90, 200))
    small = captioned(folder / "c.png", "small", size=(64, 10))
    assert main([str(folder), str(out), "--val-share", "0", "--max-side", "64"]) == 0
    found = read(out)
    said = [json.loads(data) for name, data in found.items() if name.endswith(".json")]
    assert [(one["width"], one["height"]) for one in said] == [(64, 21), (29, 64), (64, 10)]
    assert [(one["original_width"], one["original_height"]) for one in said] == [(400, 131), (90, 200), (64, 10)]
    assert decode(found["train_00000_00000.jpg"]).shape == (21, 64, 3)
    assert found["train_00000_00002.png"] == small


def test_the_split_follows_the_image_and_shards_have_their_size(tmp_path):
    folder, out = tmp_path / "in", tmp_path / "out"
    for i in range(60):
        captioned(folder / f"{i:02d}.png", f"caption {i}", level=i)
        captioned(folder / f"copy{i:02d}.png", f"copy {i}", level=i)
    assert main([str(folder), str(out), "--val-share", "0.25", "--shard-size", "16"]) == 0
    splits = {}
    for split in ("train", "val"):
        rows = [row for path in sorted((out / split).glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
        splits[split] = {row["sha256"] for row in rows}
        counts = [json.loads(path.read_text())["count"] for path in sorted((out / split).glob("*_stats.json"))]
        assert all(count == 16 for count in counts[:-1]) and sum(counts) == len(rows)
    assert not splits["train"] & splits["val"]
    assert 60 * 0.1 < len(splits["val"]) < 60 * 0.4
    keys = [name for split in splits for name in read(out, split)]
    assert len(keys) == len(set(keys)) == 3 * 120


def test_nothing_written_fails(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.jpg").write_bytes(b"junk")
    assert main([str(tmp_path / "in"), str(tmp_path / "out")]) == 1
    assert "nothing was written" in capsys.readouterr().out
    assert not list((tmp_path / "out").rglob("*.tar"))
    assert main([str(tmp_path / "no such folder"), str(tmp_path / "out")]) == 2


def test_shards_in_the_way_are_not_replaced_unasked(tmp_path, capsys):
    folder, out = tmp_path / "in", tmp_path / "out"
    captioned(folder / "a.png", "a")
    assert main([str(folder), str(out), "--val-share", "0"]) == 0
    captioned(folder / "b.png", "b")
    assert main([str(folder), str(out), "--val-share", "0"]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main([str(folder), str(out), "--val-share", "0", "--overwrite"]) == 0
    assert len([name for name in read(out) if name.endswith(".txt")]) == 2


def test_same_folder_same_bytes(tmp_path):
    for i in range(5):
        captioned(tmp_path / f"in/{i}.png", f"caption {i}", level=i)
    for out in ("one", "two"):
        assert main([str(tmp_path / "in"), str(tmp_path / out)]) == 0
    one, two = (
        {path.name: path.read_bytes() for path in (tmp_path / out).rglob("*") if path.is_file()}
        for out in ("one", "two")
    )
    assert one == two


def test_the_report_says_what_the_summary_says(tmp_path):
    folder, out = tmp_path / "in", tmp_path / "out"
    captioned(folder / "a.png", "a")
    save(folder / "b.png")
    assert main([str(folder), str(out), "--val-share", "0", "--report", str(tmp_path / "r.json")]) == 0
    said = json.loads((tmp_path / "r.json").read_text())
    assert said == {"read": 2, "written": {"train": 1}, "rejected": {"missing_caption": 1}}
