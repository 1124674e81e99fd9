"""The grid keeps every pixel, puts captions under their images, and refuses what is not pictures."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ImageFont

from ldm_scale.tracking.grid import _wrap, labelled_grid

WORDS = st.text(st.characters(codec="ascii", exclude_categories=["C"]), max_size=120)


def colours(count: int, size: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.broadcast_to(rng.integers(0, 250, (count, 1, 1, 3), dtype=np.uint8), (count, size, size, 3))


def test_every_image_is_there_enlarged_by_a_whole_factor():
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    page = labelled_grid(images, columns=3)
    assert page.shape == (16 + 2 * (128 + 16), 16 + 3 * (128 + 16), 3)
    for i, image in enumerate(images):
        top, left = 16 + (i // 3) * 144, 16 + (i % 3) * 144
        np.testing.assert_array_equal(page[top : top + 128 : 4, left : left + 128 : 4], image)
    assert (page[16 + 144 :, 16 + 2 * 144 :] == 255).all(), "the place of the missing sixth image is paper"


def test_large_images_are_not_touched():
    images = colours(2, 256)
    page = labelled_grid(images, columns=2)
    np.testing.assert_array_equal(page[16:272, 16:272], images[0])


@settings(max_examples=25, deadline=None)
@given(count=st.integers(1, 9), columns=st.none() | st.integers(1, 12), label=WORDS, title=WORDS)
def test_ink_stays_out_of_images_and_gutters(count, columns, label, title):
    images = np.zeros((count, 64, 64, 3), np.uint8)
    page = labelled_grid(images, [label] * count, columns=columns, title=title)
    assert page.dtype == np.uint8 and page.ndim == 3
    black = (page == 0).all(-1)
    assert black.sum() == count * 128 * 128
    assert (page[:, :14] == 255).all() and (page[-12:] == 255).all() and (page[:14] == 255).all()


def test_captions_lie_under_their_own_image():
    bare, labelled = (labelled_grid(colours(2, 128), labels, columns=2) for labels in ([], ["a red circle", ""]))
    caption = labelled[16 + 128 :]
    assert labelled.shape[0] > bare.shape[0]
    assert (caption[:, 16:144] < 255).any() and (caption[:, 160:] == 255).all()


@settings(max_examples=50, deadline=None)
@given(text=WORDS, width=st.integers(20, 300))
def test_wrapped_lines_fit_and_lose_nothing(text, width):
    font = ImageFont.load_default(13)
    lines = _wrap(text, font, width)
    assert all(font.getlength(line) <= width for line in lines)
    if len(lines) < 4:
        assert "".join("".join(lines).split()) == "".join(text.split())


@pytest.mark.parametrize(
    "images, labels, told",
    [
        (np.zeros((2, 8, 8, 3), np.float32), [], "float32"),
        (np.zeros((8, 8, 3), np.uint8), [], "8, 8, 3"),
        (np.zeros((0, 8, 8, 3), np.uint8), [], "0, 8, 8, 3"),
        (np.zeros((2, 8, 8, 3), np.uint8), ["one"], "1 labels for 2 images"),
    ],
)
def test_what_is_no_picture_is_refused(images, labels, told):
    with pytest.raises(ValueError, match=told):
        labelled_grid(images, labels)
