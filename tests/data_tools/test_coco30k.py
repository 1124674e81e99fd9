import csv
import hashlib
import json
import tarfile
from collections import Counter
from pathlib import Path

import pytest

from data_tools.coco30k import Prompt, draw, main, read_list

IDS = list(range(10, 30))


@pytest.fixture
def coco(tmp_path: Path, picture) -> Path:
    """captions_val2014.json and val2014, of twenty pictures with five captions each."""
    (tmp_path / "val2014").mkdir()
    names = {number: f"COCO_val2014_{number:012d}.jpg" for number in IDS}
    for number, name in names.items():
        (tmp_path / "val2014" / name).write_bytes(picture(number, kind="jpeg"))
    captions = {
        "images": [{"id": number, "file_name": name} for number, name in names.items()],
        "annotations": [
            {"id": 5 * number + i, "image_id": number, "caption": f"{number}, said in way {i} \n"}
            for number in IDS
            for i in range(5)
        ],
    }
    (tmp_path / "captions.json").write_text(json.dumps(captions))
    return tmp_path


def made(coco: Path, name: str, *options: str) -> int:
    return main([str(coco / "captions.json"), str(coco / "val2014"), str(coco / name), *options])


def prompts(folder: Path) -> list[dict[str, str]]:
    with open(folder / "prompts.csv", newline="") as file:
        return list(csv.DictReader(file))


def tars(folder: Path) -> dict[str, bytes]:
    found = {}
    for tar in folder.glob("*.tar"):
        with tarfile.open(tar) as archive:
            found |= {member.name: archive.extractfile(member).read() for member in archive}
    return found


def test_shards_hold_the_pictures_as_they_are_with_one_caption_each(coco: Path) -> None:
    assert made(coco, "out", "--count", "8", "--shard-size", "3") == 0
    said = prompts(coco / "out")
    assert len({row["image_id"] for row in said}) == 8
    members = tars(coco / "out")
    assert len(members) == 3 * 8 and len(list((coco / "out").glob("*.tar"))) == 3
    for row in said:
        number, key = int(row["image_id"]), row["key"]
        assert members[f"{key}.txt"].decode() == row["caption"]
        assert row["caption"].startswith(f"{number}, said in way ") and row["caption"] == row["caption"].strip()
        assert members[f"{key}.jpg"] == (coco / f"val2014/COCO_val2014_{number:012d}.jpg").read_bytes()
        assert json.loads(members[f"{key}.json"])["image_id"] == number
    report = json.loads((coco / "out/report.json").read_text())
    assert report["images"] == 8 and report["seed"] == 0
    files = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in (coco / "out").glob("*.[tc][as][rv]")}
    assert report["sha256"] == files and len(files) == 4


def test_a_draw_depends_on_the_seed_and_not_on_the_order_of_the_annotations(coco: Path) -> None:
    annotations = json.loads((coco / "captions.json").read_text())["annotations"]
    assert draw(annotations, 12, seed=1) == draw(annotations[::-1], 12, seed=1)
    assert draw(annotations, 12, seed=1)[:5] == draw(annotations, 5, seed=1)
    assert draw(annotations, 12, seed=1) != draw(annotations, 12, seed=2)


def test_every_picture_and_every_caption_is_as_likely(coco: Path) -> None:
    annotations = json.loads((coco / "captions.json").read_text())["annotations"]
    drawn = [one for seed in range(400) for one in draw(annotations, 5, seed)]
    pictures = Counter(one.image_id for one in drawn)
    ways = Counter(one.caption[-1] for one in drawn)
    assert len(pictures) == 20 and all(abs(n - 100) < 45 for n in pictures.values())  # 4.5 deviations and more
    assert len(ways) == 5 and all(abs(n - 400) < 80 for n in ways.values())


@pytest.mark.parametrize(
    "name, text",
    [
        ("uid_caption.csv", 'uid,caption\n12_mscoco_3,"a bus, red"\n29_mscoco_0,two\n'),
        ("30k.tsv", "image_id\tid\tcaption\n12\t7\ta bus, red\n29\t8\ttwo\n"),
        ("30k.csv", 'file_name,text\nval2014/COCO_val2014_000000000012.jpg,"a bus, red"\n29.jpg,two\n'),
    ],
)
def test_a_published_list_is_taken_as_it_is(coco: Path, name: str, text: str) -> None:
    (coco / name).write_text(text)
    assert read_list(coco / name) == [Prompt(12, "a bus, red"), Prompt(29, "two")]
    assert made(coco, "out", "--list", str(coco / name)) == 0
    assert [(row["image_id"], row["caption"]) for row in prompts(coco / "out")] == [("12", "a bus, red"), ("29", "two")]
    report = json.loads((coco / "out/report.json").read_text())
    assert report["list_sha256"] == hashlib.sha256(text.encode()).hexdigest()


def test_what_is_not_whole_is_refused_in_a_line(coco: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*options: str) -> str:
        assert made(coco, "out", *options) == 2
        return capsys.readouterr().err

    assert "the annotations know 20 pictures" in refused()
    (coco / "list.csv").write_text("picture,caption\n1,one\n")
    assert "has the columns picture, caption; it needs one of image_id" in refused("--list", str(coco / "list.csv"))
    (coco / "list.csv").write_text("image_id,caption\n1,one\n")
    assert "knows no picture 1" in refused("--list", str(coco / "list.csv"))
    (coco / "list.csv").write_text("uid,caption\nx_1,one\n")
    assert "'x_1' names no picture" in refused("--list", str(coco / "list.csv"))
    damaged = coco / f"val2014/COCO_val2014_{IDS[3]:012d}.jpg"
    damaged.write_bytes(damaged.read_bytes()[:200])
    assert f"{damaged} cannot be used (" in refused("--count", "20")
    damaged.unlink()
    assert f"lacks 1 of 20 pictures, {damaged.name} among them" in refused("--count", "20")
    assert not list((coco / "out").glob("*")), "nothing half done stays"
    assert made(coco, "out", "--count", "1") == 0
    assert "is not empty" in refused("--count", "1")
