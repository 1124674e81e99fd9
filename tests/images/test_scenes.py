import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm_scale.images.scenes import (
    CLASS_NAMES,
    COLOURS,
    HELD_OUT_SHARE,
    JITTER_NUMBERS,
    PLACES,
    SHAPES,
    Scene,
    Thing,
    all_scenes,
    coverage,
    parse_caption,
)

EVERY_SCENE = all_scenes(1) + all_scenes(2)
scenes = st.sampled_from(EVERY_SCENE)
jitters = st.lists(st.floats(0, 1, exclude_max=True), min_size=JITTER_NUMBERS, max_size=JITTER_NUMBERS)


def test_number_of_scenes():
    assert len(all_scenes(1)) == 2 * 4 * 3 * 9 * 3
    assert len(all_scenes(2)) == 24 * (24 - 2) * 4 * 3
    assert len({scene.caption() for scene in EVERY_SCENE}) == len(EVERY_SCENE)


def test_captions_read_as_the_documentation_says():
    one = Scene((Thing("small", "red", "circle"),), "at the top left", "white")
    two = Scene((Thing("small", "red", "circle"), Thing("large", "blue", "square")), "left of", "grey")
    assert one.caption() == "a small red circle at the top left on a white background"
    assert two.caption() == "a small red circle left of a large blue square on a grey background"


@given(scenes)
def test_parse_caption_inverts_caption(scene):
    assert parse_caption(scene.caption()) == scene


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a small red circle",
        "a small pink circle at the top on a white background",
        "a small red circle at the top on a white background.",
        "a small red circle left of a large red circle on a white background",
    ],
)
def test_other_sentences_are_refused(text):
    with pytest.raises(ValueError):
        parse_caption(text)


def test_impossible_scenes_are_refused_by_name():
    with pytest.raises(ValueError, match="pink"):
        Thing("small", "pink", "circle")
    with pytest.raises(ValueError, match="relation"):
        Scene((Thing("small", "red", "circle"), Thing("small", "blue", "circle")), "at the top", "white")
    with pytest.raises(ValueError, match="16"):
        EVERY_SCENE[0].render(8)


@settings(max_examples=200, deadline=None)
@given(scenes, jitters, st.sampled_from([16, 32, 64]))
def test_boxes_and_labels_say_where_the_things_are(scene, jitter, size):
    drawing = scene.draw(size, np.array(jitter))
    assert drawing.image.shape == (size, size, 3) and drawing.image.dtype == np.uint8
    assert set(np.unique(drawing.labels)) == {0} | {thing.class_id + 1 for thing in scene.things}
    for thing, box in zip(scene.things, drawing.boxes, strict=True):
        assert box.class_id == thing.class_id
        assert CLASS_NAMES[box.class_id] == f"{thing.colour} {thing.shape}"
        rows, columns = np.nonzero(drawing.labels == thing.class_id + 1)
        seen = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]) / size
        tip = 2 * 3**0.5 / size  # a triangle's tip is narrower than half a pixel for that long
        np.testing.assert_allclose(seen, [box.x0, box.y0, box.x1, box.y1], atol=tip)


@settings(max_examples=300, deadline=None)
@given(scenes, jitters)
def test_things_lie_inside_and_apart(scene, jitter):
    boxes = scene.draw(16, np.array(jitter)).boxes
    assert all(0 < box.x0 < box.x1 < 1 and 0 < box.y0 < box.y1 < 1 for box in boxes)
    if len(boxes) == 2:
        gap = max(
            max(boxes[0].x0, boxes[1].x0) - min(boxes[0].x1, boxes[1].x1),
            max(boxes[0].y0, boxes[1].y0) - min(boxes[0].y1, boxes[1].y1),
        )
        assert gap > 2 / 32


@pytest.mark.parametrize("shape", SHAPES)
def test_coverage_has_the_area_and_the_centre_of_the_outline(shape):
    x, y, radius, size = 0.52, 0.47, 0.19, 64
    cover = coverage(shape, x, y, radius, size)
    at = (np.arange(size) + 0.5) / size
    assert cover.sum() / size**2 == pytest.approx(SHAPES[shape].area * radius**2, rel=0.01)
    assert (cover.sum(0) @ at) / cover.sum() == pytest.approx(x, abs=0.002)
    assert (cover.sum(1) @ at) / cover.sum() == pytest.approx(y + SHAPES[shape].centroid_y * radius, abs=0.002)


def test_jitter_moves_every_picture_and_keeps_the_named_colour():
    scene = parse_caption("a large red square in the centre on a black background")
    generator = np.random.default_rng(0)
    pictures = [scene.render(32, generator.random(JITTER_NUMBERS)) for _ in range(20)]
    assert len({picture.tobytes() for picture in pictures}) == 20
    np.testing.assert_array_equal(scene.render(32)[16, 16], COLOURS["red"])


def test_sizes_agree_when_shrunk():
    """A picture at 64 pixels, averaged over 2 x 2, is the picture at 32."""
    jitter = np.random.default_rng(1).random(JITTER_NUMBERS)
    for scene in EVERY_SCENE[::700]:
        fine = scene.render(64, jitter).astype(float)
        coarse = fine.reshape(32, 2, 32, 2, 3).mean((1, 3))
        difference = np.abs(coarse - scene.render(32, jitter))
        assert difference.max() <= 255 / 8 and difference.mean() < 0.5


@pytest.mark.parametrize("things", [1, 2])
def test_split_is_fixed_covers_every_word_and_keeps_paraphrases_together(things):
    whole = all_scenes(things)
    held_out = [scene for scene in whole if scene.held_out]
    assert len(held_out) / len(whole) == pytest.approx(HELD_OUT_SHARE, abs=0.03)
    for part in (held_out, [scene for scene in whole if not scene.held_out]):
        words = {word for scene in part for word in scene.caption().split()}
        assert words == {word for scene in whole for word in scene.caption().split()}
        assert things == 2 or {scene.where for scene in part} == set(PLACES)


def test_split_does_not_move():
    """Published scores rest on these captions being unseen."""
    assert sum(scene.held_out for scene in all_scenes(1)) == 68
    assert sum(scene.held_out for scene in all_scenes(2)) == 644


@given(st.sampled_from(all_scenes(2)))
def test_a_paraphrase_is_on_the_same_side_of_the_split(scene):
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}[scene.where]
    paraphrase = Scene(scene.things[::-1], opposite, scene.background)
    assert paraphrase.canonical() == scene.canonical()
    assert paraphrase.held_out == scene.held_out


def test_pictures_are_unchanged():
    """Meant to move? Then worlds on disk are other worlds: raise the format in data_tools/make_toy_world.py as well."""
    digest = hashlib.sha256()
    for i, scene in enumerate(EVERY_SCENE[::250]):
        drawing = scene.draw(32, np.modf(np.arange(1, JITTER_NUMBERS + 1) * (0.618 + 0.01 * i))[0])
        digest.update(drawing.image.tobytes() + drawing.labels.tobytes())
    assert digest.hexdigest()[:16] == "c32ebf2f41fca2ab"
