import json
import tarfile

import numpy as np
import pytest

from data_tools import make_openmoji
from data_tools.dataset_writer import Rejected
from data_tools.make_openmoji import caption, code_points, main, rasterise, svg_files
from ldm_scale.images.decode import decode


@pytest.fixture
def few(monkeypatch):
    """A hundred drawings, with every skin tone of the waving hand and one of OpenMoji's own signs."""
    whole = svg_files()
    chosen = whole[::45] + [path for path in whole if path.stem.startswith("1F44B")] + [whole[-1]]
    chosen = sorted(set(chosen))
    monkeypatch.setattr(make_openmoji, "svg_files", lambda: chosen)
    return chosen


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("1F600", "grinning face"),
        ("1F44B-1F3FB", "waving hand light skin tone"),
        ("1F1EB-1F1F7", "flag of France"),
        ("1F3F4-E0067-E0062-E0073-E0063-E0074-E007F", "flag of Scotland"),
        ("2764", "red heart"),
        ("1F555", "six o'clock"),
        ("1F12F", "copyleft symbol"),
    ],
)
def test_captions(name, expected):
    path = next(path for path in svg_files() if path.stem == name)
    assert caption(code_points(path)) == expected


@pytest.mark.parametrize("points", [[0xE000], [0x1F3F3, 0xFE0F, 0x200D, 0x1F7E7]])
def test_signs_without_a_name_are_rejected(points):
    with pytest.raises(Rejected):
        caption(points)


def test_every_drawing_has_a_caption_or_is_one_of_their_own():
    captions = []
    for path in svg_files():
        try:
            captions.append(caption(code_points(path)))
        except Rejected:
            continue
    assert len(captions) > 3900
    assert len(set(captions)) > 0.99 * len(captions)
    assert not any(set(text) & set("_:") for text in captions)


@pytest.mark.parametrize("size", [32, 64])
def test_rasters_are_square_on_white_and_not_empty(size):
    path = next(path for path in svg_files() if path.stem == "1F534")  # a red circle
    pixels = decode(rasterise(path, size).members["png"])
    assert pixels.shape == (size, size, 3)
    assert (pixels[[0, 0, -1, -1], [0, -1, 0, -1]] == 255).all()
    middle = pixels[size // 2, size // 2].astype(int)
    assert middle[0] > 150 and middle[1:].max() < 120


def test_shards_summary_and_attribution(tmp_path, few, capsys):
    assert main([str(tmp_path), "--size", "32", "--val-share", "0.3"]) == 0
    said = capsys.readouterr().out
    assert "CC BY-SA 4.0" in said and "OpenMoji" in said
    captions: dict[str, list[str]] = {}
    for split in ("train", "val"):
        with tarfile.open(tmp_path / split / "00000.tar") as archive:
            read = {member.name: archive.extractfile(member).read() for member in archive}
        captions[split] = [data.decode() for name, data in read.items() if name.endswith(".txt")]
        for name, data in read.items():
            if name.endswith(".json"):
                assert json.loads(data)["license"] == "CC BY-SA 4.0"
            if name.endswith(".png"):
                assert np.ptp(decode(data)) > 0
    rejected = (tmp_path / "rejected.jsonl").read_text().splitlines()
    assert sum(map(len, captions.values())) + len(rejected) == len(few)
    waving = [split for split, texts in captions.items() for text in texts if text.startswith("waving hand")]
    assert len(waving) == 6 and len(set(waving)) == 1
