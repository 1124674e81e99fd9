"""The page of what was asked beside what came: which pictures lie where, pixel by pixel."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm_scale.conditioning.base import ConditionerConfig
from ldm_scale.conditioning.layout import LayoutConfig
from ldm_scale.conditioning.spatial import ConcatConfig, LabelMapConfig
from ldm_scale.conditioning.text import TextTransformerConfig
from ldm_scale.images.asked import class_colours
from ldm_scale.jobs import config, requests
from ldm_scale.jobs.beside import Page
from ldm_scale.jobs.pictures import Pictures

SIDE, GUTTER = 128, 16
TEXT, LAYOUT, MAPS = TextTransformerConfig(), LayoutConfig(), LabelMapConfig(classes=5)
SMALL, MASKED = ConcatConfig(channels=3), ConcatConfig(channels=5)


@pytest.fixture
def given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files to draw from, in the working directory."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for name, side in (("truth", SIDE), ("small", SIDE // 4)):
        Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(f"{name}.png")
    labels = np.zeros((SIDE, SIDE), np.uint8)
    labels[64:, :32], labels[:, 96:] = 4, 255
    Image.fromarray(labels).save("map.png")
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[:, 64:] = 255
    Image.fromarray(mask).save("mask.png")
    boxes = [{"class_id": 3, "box": [0.5, 0.25, 1.0, 1.0]}]
    Path("boxes.json").write_text(json.dumps([{"objects": boxes, "crop": [0.5, 0, 1, 1]}]))
    Path("classes.json").write_text(json.dumps([{"class_id": 0, "name": "n0", "title": "sky"}]))
    return tmp_path


def cells(conditioning: ConditionerConfig | None, *overrides: str) -> tuple[list[list[np.ndarray]], list[np.ndarray]]:
    """The page's pictures, row by row, and what was "drawn" on it."""
    job = config.compose("sample", ["model=M", *overrides])
    asked = requests.read(job, conditioning, 4)
    pictures = Pictures(Path("out"), [str(i) for i in range(len(asked))])
    drawn = list(np.random.default_rng(1).integers(0, 256, (len(asked), SIDE, SIDE, 3), dtype=np.uint8))
    Path("out").mkdir()
    for i, picture in enumerate(drawn):
        pictures.write(i, picture, {})
    page = Page(
        conditioning=conditioning,
        small=(SIDE // 4, SIDE // 4),
        names=requests.class_names(job),
        each=job.images_per_prompt,
    ).of(pictures, asked, "")
    columns = page.shape[1] // (SIDE + GUTTER)
    lefts = [GUTTER + column * (SIDE + GUTTER) for column in range(columns)]
    tops = [y for y in range(GUTTER, page.shape[0]) if (page[y - 1, :] == 255).all() and _is_top(page, y, drawn)]
    return [[page[top : top + SIDE, left : left + SIDE] for left in lefts] for top in tops], drawn


def _is_top(page: np.ndarray, y: int, drawn: list[np.ndarray]) -> bool:
    """Whether a row of pictures begins at y: one of them was drawn."""
    row = page[y]
    return any(
        (row[x : x + SIDE] == one[0]).all() for one in drawn for x in range(GUTTER, len(row) - SIDE, SIDE + GUTTER)
    )


def picture(name: str) -> np.ndarray:
    return np.asarray(Image.open(f"{name}.png"))


def test_boxes_lie_beside_and_on_what_came(given: Path) -> None:
    ((asked, came, both, truth),), (drawn,) = cells(LAYOUT, "boxes=boxes.json", "truth=truth.png")
    assert np.array_equal(came, drawn) and np.array_equal(truth, picture("truth"))
    outline = class_colours(np.array(3))
    for shown, under in ((asked, np.full_like(drawn, 255)), (both, drawn)):  # of the crop, the box is all but the top
        assert np.array_equal(shown[:32], under[:32])
        assert (
            (shown[60:, :2] == outline).all() and (shown[-2:] == outline).all() and (shown[60:, -2:] == outline).all()
        )
        assert np.array_equal(shown[64:-2, 2:-2], under[64:-2, 2:-2])


def test_label_maps_are_coloured_and_explained(given: Path) -> None:
    overrides = ["label_maps=map.png", "images_per_prompt=2", "class_names=classes.json"]
    ((colours, words, *came),), drawn = cells(MAPS, *overrides)
    assert all(np.array_equal(one, other) for one, other in zip(came, drawn, strict=True))
    sky, fourth, none = (tuple(class_colours(np.array(one))) for one in (0, 4, -1))
    corners = [tuple(colours[y, x]) for y, x in ((0, 0), (127, 0), (63, 0), (127, 32), (127, 95), (5, 96))]
    assert corners == [sky, fourth, sky, sky, sky, none]
    assert [tuple(words[y, 5]) for y in (8, 24, 40, 56)] == [sky, none, fourth, (255, 255, 255)]


def test_small_pictures_are_enlarged_as_the_model_saw_them(given: Path) -> None:
    ((small, came, truth),), (drawn,) = cells(SMALL, "low_resolution=small.png", "truth=truth.png")
    assert np.array_equal(small, picture("small").repeat(4, axis=0).repeat(4, axis=1))
    assert np.array_equal(came, drawn) and np.array_equal(truth, picture("truth"))


@pytest.mark.parametrize(("conditioning", "told"), [(MASKED, []), (TEXT, ["prompts=[a,b]"])])
def test_masked_pictures_show_what_the_model_was_not_shown(
    given: Path, conditioning: ConditionerConfig, told: list[str]
) -> None:
    rows, drawn = cells(conditioning, "images=truth.png", "masks=mask.png", *told)
    assert len(rows) == len(drawn) == max(1, 2 * len(told))
    for (masked, came), one in zip(rows, drawn, strict=True):
        assert np.array_equal(masked[:, :64], picture("truth")[:, :64]) and np.array_equal(came, one)
        assert set(masked[:, 64:].flatten()) == {176, 208}


def test_captions_alone_make_a_square_or_a_row_each(given: Path) -> None:
    rows, drawn = cells(TEXT, "prompts=[a,b,c,d]")
    assert [len(row) for row in rows] == [2, 2]
    assert np.array_equal(np.stack([cell for row in rows for cell in row]), np.stack(drawn))


def test_what_should_come_is_no_part_of_the_request(given: Path) -> None:
    one, other = (
        requests.read(config.compose("sample", ["model=M", "low_resolution=small.png", *more]), SMALL, 4)[0]
        for more in ([], ["truth=truth.png"])
    )
    assert one.identity() == other.identity() and one.described() == other.described()
    with pytest.raises(FileNotFoundError, match=r"truth=none\.png names no file"):
        cells(TEXT, "prompts=[a]", "truth=none.png")
    with pytest.raises(ValueError, match=r"class_names=boxes.*expected the classes"):
        requests.class_names(config.compose("sample", ["model=M", "count=1", "class_names=boxes.json"]))
