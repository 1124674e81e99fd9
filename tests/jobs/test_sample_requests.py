"""What is asked of which model: requests, refusals by name, files to pixels."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ldm_scale.conditioning.base import ConditionerConfig
from ldm_scale.conditioning.class_label import ClassLabelConfig
from ldm_scale.conditioning.layout import LayoutConfig
from ldm_scale.conditioning.spatial import ConcatConfig, LabelMapConfig
from ldm_scale.conditioning.text import TextTransformerConfig
from ldm_scale.images import fit
from ldm_scale.jobs import config, requests

TEXT, CLASSES, LAYOUT = TextTransformerConfig(), ClassLabelConfig(classes=10), LayoutConfig()
MAPS, SMALL, MASKED = LabelMapConfig(classes=5), ConcatConfig(channels=3), ConcatConfig(channels=5)
LATENT_CHANNELS = 4


def read(conditioning: ConditionerConfig | None, *overrides: str) -> list[requests.Request]:
    job = config.compose("sample", ["model=M", *overrides])
    return requests.read(job, conditioning, LATENT_CHANNELS)


def picture(path: Path, height: int = 8, width: int = 8, value: Any = 200) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.broadcast_to(np.asarray(value, np.uint8), (height, width, 3)).copy()).save(path)
    return path


def test_conditions_are_repeated_in_turn() -> None:
    asked = read(TEXT, "prompts=[a circle,a square]", "images_per_prompt=2")
    assert [one.condition for one in asked] == ["a circle", "a circle", "a square", "a square"]
    classes = read(CLASSES, "classes=[3,9]")
    assert [one.label() for one in classes] == ["class 3", "class 9"]
    assert [one.label(["", "", "", "cat"]) for one in classes] == ["cat", "class 9"]
    assert len(read(None, "count=3")) == 3


def test_layouts_are_read_as_pictures_or_as_the_boxes_of_one(tmp_path: Path) -> None:
    boxes = [{"class_id": 3, "box": [0.1, 0.2, 0.5, 0.6]}]
    (tmp_path / "b.json").write_text(json.dumps([{"objects": boxes, "crop": [0, 0, 0.5, 1]}, boxes]))
    framed, bare = read(LAYOUT, f"boxes={tmp_path}/b.json")
    assert framed.condition.crop == (0, 0, 0.5, 1) and bare.condition.crop == (0, 0, 1, 1)
    assert framed.condition.objects == bare.condition.objects
    (tmp_path / "one.json").write_text(json.dumps(boxes))
    (one,) = read(LAYOUT, f"boxes={tmp_path}/one.json")
    assert one == bare


def test_one_file_serves_all_and_several_go_one_each(tmp_path: Path) -> None:
    pair = [picture(tmp_path / "in" / f"{name}.png") for name in "ab"]
    one = picture(tmp_path / "one.png")
    several = ["prompts=[x,y]", f"start={tmp_path}/in", "strength=0.5", f"guide.images={one}", "guide.scale=2"]
    assert [row.files for row in read(TEXT, *several)] == [{"start": path, "guide.images": one} for path in pair]
    assert len(read(TEXT, "prompts=[x]", f"start={tmp_path}/in", "strength=1")) == 2
    assert len(read(None, f"start={tmp_path}/in", "strength=1")) == 2
    with pytest.raises(ValueError, match=r"start= gives 2 and prompts= 3"):
        read(TEXT, "prompts=[x,y,z]", f"start={tmp_path}/in", "strength=0.5")


def test_masks_are_paired_by_name(tmp_path: Path) -> None:
    for name in ("images/a", "images/b", "masks/a_mask", "masks/b"):
        picture(tmp_path / f"{name}.png")
    given = [f"images={tmp_path}/images", f"masks={tmp_path}/masks"]
    for conditioning, more in ((MASKED, []), (None, []), (TEXT, ["prompts=[x]"])):
        rows = read(conditioning, *given, *more)
        assert [(row.files["images"].stem, row.files["masks"].stem) for row in rows] == [("a", "a_mask"), ("b", "b")]
    (tmp_path / "masks" / "b.png").rename(tmp_path / "masks" / "c.png")
    with pytest.raises(ValueError, match=r"b\.png with c\.png"):
        read(MASKED, *given)


def test_a_request_is_known_by_the_content_of_its_files(tmp_path: Path) -> None:
    def who(path: Path) -> dict[str, Any]:
        (row,) = read(None, f"start={path}", "strength=1")
        return row.identity()

    a, same, other = picture(tmp_path / "a.png"), picture(tmp_path / "b.png"), picture(tmp_path / "c.png", value=9)
    assert who(a) == who(same) != who(other)


@pytest.mark.parametrize(
    ("conditioning", "overrides", "said"),
    [
        (TEXT, [], "model=M is told of captions: give prompts="),
        (TEXT, ["classes=[1]"], "classes= was given, but model=M is told of captions"),
        (CLASSES, ["prompts=[x]"], "prompts= was given, but model=M is told of classes: give classes=[1, 2]"),
        (CLASSES, ["classes=[1,10]"], "10 is none; this model's are 0 to 9"),
        (LAYOUT, ["count=2"], "is told of layouts: give boxes=FILE.json"),
        (MAPS, ["low_resolution=x"], "low_resolution= was given, but model=M is told of label maps"),
        (SMALL, [], "is told of low resolution: give low_resolution=FILES"),
        (SMALL, ["label_maps=x"], "is told of low resolution"),
        (MASKED, ["low_resolution=x"], "is told of masked images: give images=FILES masks=FILES"),
        (None, [], "model=M is unconditional: give count=NUMBER"),
        (None, ["prompts=[x]"], "prompts= was given, but model=M is unconditional"),
        (MAPS, ["label_maps=nowhere/*.png"], "label_maps=nowhere/*.png names no file"),
        (LAYOUT, ["boxes=conf_of_nothing.json"], "conf_of_nothing.json"),
    ],
)
def test_the_wrong_thing_is_refused_by_name(
    conditioning: ConditionerConfig | None, overrides: list[str], said: str
) -> None:
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        read(conditioning, *overrides)
    assert said in str(caught.value)


@pytest.mark.parametrize("text", ["[{}]", '[{"objects": [{"class_id": 1, "box": [0, 0, 2, 1]}]}]', "{", "[]"])
def test_a_bad_layout_is_refused_with_its_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "b.json").write_text(text)
    with pytest.raises(ValueError, match=r"boxes=.*b\.json"):
        read(LAYOUT, f"boxes={tmp_path}/b.json")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["run_dir=R"], "run_dir=RUN or model=DIRECTORY, one of the two"),
        (["weights=raw"], "weights= choose within run_dir="),
        (["prompts=[x]", "prompts_file=f"], "one of the two"),
        (["start=x"], "start= and strength= go together"),
        (["start=x", "strength=1.5"], "strength=1.5"),
        (["masks=x"], "images= and masks= go together"),
        (["guide.images=x"], "guide.images=FILES and guide.scale=NUMBER go together"),
        (["guide.distance=lpips"], "guide.distance= needs both"),
        (["guide.distance=l3"], "guide.distance"),
        (["tiles.overlap=2"], "without tiles.size"),
        (["tiles.size=4", "tiles.overlap=4"], "tiles.overlap=4"),
        (["size=[64]"], "size=[64]"),
        (["count=0"], "count=0"),
        (["images_per_prompt=0"], "images_per_prompt=0"),
        (["sampler=euler"], "dpm_solver"),
    ],
)
def test_what_contradicts_itself_is_refused(overrides: list[str], said: str) -> None:
    with pytest.raises(Exception) as caught:
        config.compose("sample", ["model=M", *overrides])
    assert said in (str(caught.value) if isinstance(caught.value, ValueError) else config.explain(caught.value))


def test_another_sampler_keeps_the_run_s_guidance(tmp_path: Path) -> None:
    run_sampler = {"schema": "ddim", "steps": 7, "guidance": 2.5, "eta": 0.5, "spacing": "leading"}
    (tmp_path / "config.json").write_text(json.dumps({"sampler": run_sampler}))

    def sampler(*overrides: str) -> dict[str, Any]:
        return config.to_plain(config.compose("sample", [f"run_dir={tmp_path}", *overrides]).sampler)

    own, other, chosen = sampler(), sampler("sampler=dpm_solver"), sampler("sampler=ddim", "sampler.guidance=3")
    assert own.items() >= run_sampler.items()
    assert (other["schema"], other["guidance"], other["steps"]) == ("dpm_solver", 2.5, 20)
    assert (chosen["guidance"], chosen["steps"], chosen["eta"]) == (3, 50, 0)


def test_pictures_cover_the_size_and_keep_their_middle(tmp_path: Path) -> None:
    bars = np.zeros((8, 16, 3), np.uint8)
    bars[:, 4:12] = 255
    Image.fromarray(bars).save(tmp_path / "wide.png")
    assert fit.read_picture(tmp_path / "wide.png").shape == (3, 8, 16)
    assert (fit.read_picture(tmp_path / "wide.png", (8, 8)) == 1).all()
    assert fit.read_picture(tmp_path / "wide.png", (12, 6)).shape == (3, 12, 6)
    mask_1HW = fit.read_mask(tmp_path / "wide.png", (4, 8))
    assert mask_1HW.unique().tolist() == [0, 1] and mask_1HW[..., 2:6].all() and mask_1HW.sum() == 16
    (tmp_path / "cut.png").write_bytes((tmp_path / "wide.png").read_bytes()[:40])
    with pytest.raises(ValueError, match=r"cut\.png is no picture"):
        fit.read_picture(tmp_path / "cut.png")


@pytest.mark.parametrize(("dtype", "highest"), [(np.uint8, 255), (np.uint16, 65535)])
def test_label_maps_are_numbers_and_their_highest_value_is_none(tmp_path: Path, dtype: type, highest: int) -> None:
    labels = np.array([[0, 3], [highest, 4]], dtype)
    Image.fromarray(labels).save(tmp_path / "map.png")
    read_HW = fit.read_labels(tmp_path / "map.png", (4, 4), classes=5, no_label=-1)
    assert read_HW.tolist() == torch.tensor([[0, 3], [-1, 4]]).repeat_interleave(2, 0).repeat_interleave(2, 1).tolist()
    with pytest.raises(ValueError, match=r"map\.png has labels \[4\]; this model's are 0 to 3"):
        fit.read_labels(tmp_path / "map.png", (4, 4), classes=4, no_label=-1)
    with pytest.raises(ValueError, match="no label map"):
        fit.read_labels(picture(tmp_path / "rgb.png"), (4, 4), classes=4, no_label=-1)
