import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset
from PIL import Image

from data_tools.make_toy_world import Recipe, main, pieces, samples, write_world
from ldm_scale.evaluation.alignment import caption_accuracy
from ldm_scale.images.scenes import all_scenes, parse_caption

SMALL = ["--train", "50", "--val", "12", "--shard-size", "20"]


def members(tar: Path) -> dict[str, bytes]:
    with tarfile.open(tar) as archive:
        return {member.name: archive.extractfile(member).read() for member in archive}


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("toy")
    assert main([str(out), *SMALL]) == 0
    return out


def test_layout_of_the_world(world):
    assert sorted(path.name for path in (world / "train").iterdir()) == [
        f"0000{n}{end}" for n in range(3) for end in (".parquet", ".tar", "_stats.json")
    ]
    assert [json.loads((world / f"train/0000{n}_stats.json").read_text())["successes"] for n in range(3)] == [
        20,
        20,
        10,
    ]
    keys = [
        name.split(".")[0] for tar in sorted(world.rglob("*.tar")) for name in members(tar) if name.endswith(".txt")
    ]
    assert len(keys) == len(set(keys)) == 62
    first = [name for name in members(world / "train/00000.tar") if name.startswith("train_00000_00000")]
    assert {name.partition(".")[2] for name in first} == {"png", "txt", "json", "cls", "boxes.json", "seg.png"}


def test_members_agree_with_each_other(world):
    found = members(world / "train/00001.tar")
    table = pq.read_table(world / "train/00001.parquet").to_pylist()
    assert len(table) == 20
    for row in table:
        key = row["key"]
        said = json.loads(found[f"{key}.json"])
        assert {name: said[name] for name in row} == row
        assert (said["original_width"], said["original_height"], said["width"], said["height"]) == (32, 32, 32, 32)
        assert said["caption"] == found[f"{key}.txt"].decode() and "url" not in said
        scene = parse_caption(said["caption"])
        class_id = int(found[f"{key}.cls"])
        assert class_id == scene.things[0].class_id
        (box,) = json.loads(found[f"{key}.boxes.json"])
        assert box["class_id"] == class_id
        labels = np.asarray(Image.open(io.BytesIO(found[f"{key}.seg.png"])))
        rows, columns = np.nonzero(labels == class_id + 1)
        x0, y0, x1, y1 = box["box"]
        assert x0 <= (columns.mean() + 0.5) / 32 <= x1 and y0 <= (rows.mean() + 0.5) / 32 <= y1


def test_pictures_show_their_captions_and_webdataset_reads_them(world):
    for split in ("train", "val"):
        urls = [str(path) for path in sorted((world / split).glob("*.tar"))]
        read = list(webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8").to_tuple("png", "txt"))
        images, captions = zip(*read, strict=True)
        assert caption_accuracy(captions, np.stack(images)).overall == 1
        assert all(parse_caption(caption).held_out == (split == "val") for caption in captions)


def test_same_seed_same_bytes_other_seed_other_pictures(world, tmp_path):
    main([str(tmp_path / "again"), *SMALL])
    assert everything(tmp_path / "again") == everything(world)
    main([str(tmp_path / "other"), *SMALL, "--seed", "1"])
    theirs, ours = everything(tmp_path / "other"), everything(world)
    assert theirs.keys() == ours.keys()
    assert all(theirs[name] != ours[name] for name in ours if name.endswith(".tar"))


def test_a_complete_world_is_left_alone(world, capsys):
    before = {path: path.stat().st_mtime_ns for path in world.rglob("*")}
    assert main([str(world), *SMALL]) == 0
    assert "already complete" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in world.rglob("*")} == before


def test_a_world_that_was_cut_off_is_finished(world, tmp_path, monkeypatch):
    from data_tools import make_toy_world

    real, written = make_toy_world._write_piece, []

    def killed_at_the_third(out, recipe, piece, bar):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(piece.name)
        return real(out, recipe, piece, bar)

    monkeypatch.setattr(make_toy_world, "_write_piece", killed_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        main([str(tmp_path), *SMALL])
    monkeypatch.setattr(make_toy_world, "_write_piece", real)
    (tmp_path / "train/00000_stats.json").unlink()
    (tmp_path / "train/00001.tar").write_bytes(b"cut short")
    recipe = Recipe(train=50, val=12, objects=1, size=32, shard_size=20, seed=0)
    assert write_world(tmp_path, recipe) == 4
    assert everything(tmp_path) == everything(world)


def test_another_world_in_the_way_is_refused_or_replaced(tmp_path, capsys):
    assert main([str(tmp_path), "--train", "8", "--val", "4", "--shard-size", "3"]) == 0
    assert main([str(tmp_path), "--train", "5", "--val", "4", "--shard-size", "3"]) == 2
    assert "--overwrite" in capsys.readouterr().err
    (tmp_path / "train/mine.txt").write_text("not theirs")
    assert main([str(tmp_path), "--train", "5", "--val", "4", "--shard-size", "3", "--overwrite"]) == 0
    assert sorted(path.name for path in (tmp_path / "train").glob("*.tar")) == ["00000.tar", "00001.tar"]
    assert (tmp_path / "train/mine.txt").exists()


@pytest.mark.parametrize("wrong", [["--train", "0"], ["--val", "-1"], ["--size", "8"], ["--shard-size", "0"]])
def test_impossible_numbers_are_refused_by_name(tmp_path, capsys, wrong):
    assert main([str(tmp_path), *wrong]) == 2
    assert wrong[0] in capsys.readouterr().err


def test_every_caption_comes_once_before_any_comes_again():
    held_out = [scene for scene in all_scenes(1) if scene.held_out]
    recipe = Recipe(train=1, val=3 * len(held_out), objects=1, size=16, shard_size=50, seed=0)
    captions = [
        sample.facts["caption"] for piece in pieces(recipe) if piece.split == "val" for sample in samples(recipe, piece)
    ]
    turns = [captions[start : start + len(held_out)] for start in range(0, len(captions), len(held_out))]
    assert all(len(set(turn)) == len(held_out) for turn in turns)
    assert turns[0] != turns[1]


def test_two_things_at_64(tmp_path):
    assert main([str(tmp_path), "--objects", "2", "--size", "64", "--train", "6", "--val", "3"]) == 0
    found = members(tmp_path / "val/00000.tar")
    captions = [data.decode() for name, data in found.items() if name.endswith(".txt")]
    images = [np.asarray(Image.open(io.BytesIO(data))) for name, data in found.items() if name.endswith(".png")]
    assert len(captions) == 3 and all(len(parse_caption(caption).things) == 2 for caption in captions)
    assert [image.shape for image in images] == [(64, 64, 3), (64, 64)] * 3
    assert all(len(json.loads(data)) == 2 for name, data in found.items() if name.endswith(".boxes.json"))


def test_help_shows_examples(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "python -m data_tools.make_toy_world data/toy" in capsys.readouterr().out
