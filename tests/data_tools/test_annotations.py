import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_tools.make_shards import main
from ldm_scale.data.samples import Box, Task
from ldm_scale.data.samples import Sample as ReadSample
from ldm_scale.data.shards import ShardSet


def image(path: Path, size: tuple[int, int] = (40, 30), level: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (level, 255 - level, 50)).save(path)


def make(folder: Path, out: Path, *arguments: object) -> int:
    return main([str(folder), str(out), "--val-share", "0", *map(str, arguments)])


def read(out: Path, task: Task) -> dict[str, ReadSample]:
    """Samples by the file they came from, as a training job reads them."""
    shards = ShardSet.open(str(out / "train"), require=task.require)
    found = {}
    ids = np.arange(shards.n)
    for key, members in zip(shards.keys(ids), shards.read(ids, task.fields), strict=True):
        found[json.loads(members["json"])["source"]] = ReadSample.parse(key, members)
    return found


def members(out: Path) -> dict[str, bytes]:
    with tarfile.open(out / "train/00000.tar") as tar:
        return {member.name.partition(".")[2]: tar.extractfile(member).read() for member in tar}


def reasons(out: Path) -> dict[str, str]:
    return {row["path"]: row["reason"] for row in map(json.loads, (out / "rejected.jsonl").read_text().splitlines())}


def test_folders_are_classes(tmp_path):
    folder, out = tmp_path / "in", tmp_path / "out"
    for name in ("zebra/1.png", "ant/1.png", "ant/deep/2.png", "stray.png"):
        image(folder / name)
    (folder / "empty").mkdir()
    (folder / "ant/1.txt").write_text("a caption")
    assert make(folder, out, "--classes") == 0
    found = read(out, Task.class_label)
    assert {name: one.class_id for name, one in found.items()} == {
        "ant/1.png": 0,
        "ant/deep/2.png": 0,
        "zebra/1.png": 2,
    }
    assert [found[name].caption for name in sorted(found)] == ["a caption", "", ""]
    assert reasons(out) == {"stray.png": "no_class"}
    classes = json.loads((out / "classes.json").read_text())
    assert [(one["class_id"], one["name"]) for one in classes] == [(0, "ant"), (1, "empty"), (2, "zebra")]


def test_another_dataset_numbers_classes_alike_or_is_refused(tmp_path, capsys):
    for name in ("ant", "bee", "cat"):
        image(tmp_path / f"train/{name}/1.png")
    image(tmp_path / "val/cat/1.png")
    image(tmp_path / "other/dog/1.png")
    assert make(tmp_path / "train", tmp_path / "out", "--classes") == 0
    ids = ("--class-ids", tmp_path / "out/classes.json")
    assert make(tmp_path / "val", tmp_path / "out_val", "--classes", *ids) == 0
    assert read(tmp_path / "out_val", Task.class_label)["cat/1.png"].class_id == 2
    assert make(tmp_path / "other", tmp_path / "out_other", "--classes", *ids) == 2
    assert "'dog'" in capsys.readouterr().err
    (tmp_path / "bad.json").write_text('[{"class_id": 4}]')
    assert make(tmp_path / "val", tmp_path / "o", "--classes", "--class-ids", tmp_path / "bad.json") == 2
    assert "bad.json: expected" in capsys.readouterr().err


def coco(tmp_path: Path, annotations: list[dict[str, object]]) -> Path:
    names = ["a.jpg", "b.jpg", "turned.jpg", "half.jpg"]
    content = {
        "images": [{"id": 7 + i, "file_name": name, "width": 40, "height": 30} for i, name in enumerate(names)],
        "categories": [{"id": 90, "name": "brush"}, {"id": 1, "name": "person"}, {"id": 3, "name": "car"}],
        "annotations": annotations,
    }
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(content))
    return path


def thing(image_id: int, bbox: list[float], category_id: int = 1, **more: object) -> dict[str, object]:
    return {"image_id": image_id, "bbox": bbox, "category_id": category_id, "iscrowd": 0, **more}


def test_coco_boxes_are_shares_of_the_image_with_classes_without_gaps(tmp_path, capsys):
    folder, out = tmp_path / "in", tmp_path / "out"
    for name in ("a.jpg", "b.jpg", "unknown.jpg"):
        image(folder / name)
    image(folder / "turned.jpg", (30, 40))
    image(folder / "half.jpg", (20, 15))
    annotations = [
        thing(10, [20, 0, 10, 30], 3),
        thing(7, [10, 15, 20, 15], 90),
        thing(7, [-5, 0, 50, 7.5]),
        thing(7, [0, 0, 40, 30], iscrowd=1),
        thing(7, [3, 3, 0, 5]),
        thing(99, [0, 0, 1, 1]),
    ]
    assert make(folder, out, "--coco", coco(tmp_path, annotations)) == 0
    found = read(out, Task.layout)
    assert found["a.jpg"].boxes == (Box(0.25, 0.5, 0.75, 1.0, 2), Box(0.0, 0.0, 1.0, 0.25, 0))
    assert found["b.jpg"].boxes == ()
    assert found["half.jpg"].boxes == (Box(0.5, 0.0, 0.75, 1.0, 1),)
    assert reasons(out) == {"turned.jpg": "size_differs", "unknown.jpg": "not_annotated"}
    report = json.loads((out / "report.json").read_text())
    assert report["left_out"] == {"crowd": 1, "unknown_image": 1, "empty_box": 1} and report["classes"] == 3
    assert [one["name"] for one in json.loads((out / "classes.json").read_text())] == ["person", "car", "brush"]
    assert "left out 1 boxes: crowd" in capsys.readouterr().out


def test_what_is_no_coco_file_is_refused(tmp_path, capsys):
    image(tmp_path / "in/a.jpg")
    (tmp_path / "no.json").write_text('{"images": []}')
    assert make(tmp_path / "in", tmp_path / "out", "--coco", tmp_path / "no.json") == 2
    assert "no COCO instances file" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def open_images(tmp_path: Path, *rows: str) -> Path:
    head = (
        "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf,IsDepiction,IsInside"
    )
    path = tmp_path / "boxes.csv"
    path.write_text("\n".join((head, *rows)))
    return path


def test_open_images_boxes_in_the_order_of_their_columns(tmp_path):
    folder, out = tmp_path / "in", tmp_path / "out"
    for name in ("00ff.jpg", "12ab.jpg", "none.jpg"):
        image(folder / name)
    rows = (
        "12ab,x,/m/z,1,0.1,0.9,0.2,0.4,0,0,0,0,0",
        "00ff,x,/m/a,1,0,0.5,0.25,1.0,1,0,0,0,0",
        "12ab,x,/m/a,1,0.5,0.5,0.2,0.4,0,0,0,0,0",
        "00ff,x,/m/z,1,0,1,0,1,0,0,1,0,0",
        "00ff,x,/m/z,1,0.5,1,0,1,0,0,0,0,0",
    )
    boxes = open_images(tmp_path, *rows)
    assert make(folder, out, "--open-images", boxes) == 0
    found = read(out, Task.layout)
    assert found["00ff.jpg"].boxes == (Box(0.0, 0.25, 0.5, 1.0, 0), Box(0.5, 0.0, 1.0, 1.0, 1))
    assert found["12ab.jpg"].boxes == (Box(0.1, 0.2, 0.9, 0.4, 1),)
    assert reasons(out) == {"none.jpg": "not_annotated"}
    assert json.loads((out / "report.json").read_text())["left_out"] == {"group": 1, "empty_box": 1}
    names = tmp_path / "names.csv"
    names.write_text('/m/z,Zebra\n/m/q,"Quail, bird"\n/m/a,Ant\n')
    assert make(folder, tmp_path / "named", "--open-images", boxes, "--class-names", names) == 0
    assert read(tmp_path / "named", Task.layout)["12ab.jpg"].boxes[0].class_id == 0
    classes = json.loads((tmp_path / "named/classes.json").read_text())
    assert [one["title"] for one in classes] == ["Zebra", "Quail, bird", "Ant"]


def save_map(path: Path, labels: np.ndarray, palette: list[int] | None = None) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn = Image.fromarray(labels)
    if palette is not None:
        drawn = drawn.convert("P")
        drawn = Image.frombytes("P", drawn.size, labels.tobytes())
        drawn.putpalette(palette)
    drawn.save(path, "png")
    return path.read_bytes()


@pytest.mark.parametrize("kind", ["grey", "palette", "sixteen"])
def test_label_maps_are_kept_exactly(tmp_path, kind):
    labels = np.random.default_rng(0).choice([0, 3, 181, 255], (30, 40)).astype(np.uint8)
    if kind == "sixteen":
        labels = labels.astype(np.uint16) * 256
    image(tmp_path / "in/sub/a.jpg")
    stored = save_map(tmp_path / "maps/sub/a.png", labels, [1] * 768 if kind == "palette" else None)
    assert make(tmp_path / "in", tmp_path / "out", "--maps", tmp_path / "maps") == 0
    found = read(tmp_path / "out", Task.segmentation)["sub/a.jpg"].segmentation
    assert found == stored
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(found))), labels)
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["labels"] == np.unique(labels).tolist()


@pytest.mark.parametrize(("mode", "palette"), [("L", None), ("P", list(range(256)) * 3)])
def test_a_shrunk_image_gets_a_shrunk_map_of_the_same_labels(tmp_path, mode, palette):
    labels = np.zeros((60, 120), np.uint8)
    labels[:, 61:] = 200
    image(tmp_path / "in/a.png", (120, 60))
    save_map(tmp_path / "maps/a.png", labels, palette)
    assert make(tmp_path / "in", tmp_path / "out", "--maps", tmp_path / "maps", "--max-side", "40") == 0
    held = members(tmp_path / "out")
    shrunk = Image.open(io.BytesIO(held["seg.png"]))
    assert shrunk.mode == mode and shrunk.size == Image.open(io.BytesIO(held["png"])).size == (40, 20)
    np.testing.assert_array_equal(np.asarray(shrunk), labels[1::3, 1::3])


def test_maps_that_do_not_fit_are_named(tmp_path, capsys):
    folder, maps = tmp_path / "in", tmp_path / "maps"
    for name in ("good", "missing", "other_size", "coloured", "broken"):
        image(folder / f"{name}.jpg")
    grey = np.zeros((30, 40), np.uint8)
    save_map(maps / "good.png", grey)
    save_map(maps / "other_size.png", np.zeros((31, 40), np.uint8))
    save_map(maps / "coloured.png", np.zeros((30, 40, 3), np.uint8))
    (maps / "broken.png").write_bytes(save_map(maps / "whole.png", grey)[:50])
    assert make(folder, tmp_path / "out", "--maps", maps) == 0
    assert reasons(tmp_path / "out") == {
        "missing.jpg": "missing_map",
        "other_size.jpg": "size_differs",
        "coloured.jpg": "coloured_map",
        "broken.jpg": "unreadable_map",
    }
    assert make(tmp_path, tmp_path / "out2", "--maps", maps) == 2
    assert "taken for images" in capsys.readouterr().err


def test_kinds_combine_but_only_one_numbers_classes(tmp_path, capsys):
    folder = tmp_path / "in"
    image(folder / "ant/a.jpg")
    save_map(tmp_path / "maps/ant/a.png", np.ones((30, 40), np.uint8))
    (folder / "ant/a.txt").write_text("an ant")
    assert make(folder, tmp_path / "out", "--classes", "--maps", tmp_path / "maps") == 0
    assert members(tmp_path / "out").keys() == {"jpg", "txt", "cls", "seg.png", "json"}
    assert make(folder, tmp_path / "out2", "--classes", "--coco", coco(tmp_path, [])) == 2
    assert "choose one" in capsys.readouterr().err
