"""What was asked for, drawn: every class in its own colour, boxes and masks on the pixels where they belong."""

import numpy as np
import pytest

from ldm_scale.images.asked import class_colours, class_name, legend, masked, paper, with_boxes, within

NAMES = ["sky", "sea", "sand"]


def test_every_class_has_its_own_colour_and_no_label_is_black() -> None:
    colours = class_colours(np.arange(-1, 8192))
    assert colours.dtype == np.uint8 and len(np.unique(colours, axis=0)) == 8193
    assert colours[:5].tolist() == [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0], [0, 0, 128]]  # VOC's
    apart = class_colours(np.arange(182)).astype(int)
    gaps = np.abs(apart[:, None] - apart[None]).max(-1)[~np.eye(182, dtype=bool)]
    assert gaps.min() >= 32, "of 182 classes any two can be told apart"


@pytest.mark.parametrize("shape", [(64, 128), (128, 64)])
def test_a_box_lies_where_it_should(shape: tuple[int, int]) -> None:
    height, width = shape
    page = with_boxes(paper(shape), [(1, (0.25, 0.25, 0.75, 0.75))], ["", ""])
    inked = (page != 255).any(-1)
    rows, columns = np.flatnonzero(inked.any(1)), np.flatnonzero(inked.any(0))
    assert (rows[0], rows[-1]) == (height // 4, 3 * height // 4 - 1)
    assert (columns[0], columns[-1]) == (width // 4, 3 * width // 4 - 1)
    edges = [page[rows[-1], columns[0] : columns[-1] + 1], page[rows[0] : rows[-1] + 1, columns[-1]]]
    assert all((edge == class_colours(np.array(1))).all() for edge in edges)
    assert not inked[rows[0] + 20 : rows[-1] - 1, columns[0] + 2 : columns[-1] - 1].any() or height < 128


def test_a_small_box_is_seen_on_a_large_one_and_names_are_written() -> None:
    small, large = (0, (0.4, 0.6, 0.6, 0.8)), (2, (0.0, 0.0, 1.0, 1.0))
    page = with_boxes(paper((128, 128)), [small, large], NAMES)
    assert (page[int(0.8 * 128) - 1, int(0.6 * 128) - 1] == class_colours(np.array(0))).all()
    assert (page[0] == class_colours(np.array(2))).all() and (page[:, -1] == class_colours(np.array(2))).all()
    nameless = with_boxes(paper((128, 128)), [large], ["", "", ""])
    assert (page[:20, :60] != nameless[:20, :60]).any()
    assert (class_name(NAMES, 1), class_name(NAMES, 7)) == ("sea", "class 7")


def test_the_picture_under_the_boxes_stays() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    before = picture.copy()
    page = with_boxes(picture, [(1, (0.5, 0.5, 1.0, 1.0)), (0, (-0.5, 0.2, 1.5, 0.4))], ["", ""])
    assert np.array_equal(picture, before)
    assert np.array_equal(page[:12], picture[:12]) and np.array_equal(page[34:60, 45:60], picture[34:60, 45:60])


def test_boxes_of_a_whole_image_are_moved_into_its_crop() -> None:
    assert within((0.5, 0.5, 0.75, 1.0), (0.5, 0.0, 1.0, 1.0)) == pytest.approx((0, 0.5, 0.5, 1))
    assert within((0.1, 0.2, 0.3, 0.4), (0.0, 0.0, 1.0, 1.0)) == pytest.approx((0.1, 0.2, 0.3, 0.4))


def test_masked_pixels_show_nothing_of_the_picture() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    paint = np.zeros((32, 32), bool)
    paint[8:24, 4:] = True
    shown = masked(picture, paint)
    assert np.array_equal(shown[~paint], picture[~paint])
    assert {tuple(pixel) for pixel in shown[paint]} == {(176, 176, 176), (208, 208, 208)}


def test_the_legend_names_the_largest_areas_first() -> None:
    labels = np.full((32, 32), -1)
    labels[:20], labels[20:24] = 2, 0
    page = legend(labels, NAMES, (48, 96))
    assert page.shape == (48, 96, 3)
    swatches = [tuple(page[row + 8, 5]) for row in (0, 16, 32)]
    assert swatches == [tuple(class_colours(np.array(class_id))) for class_id in (2, -1, 0)]
    assert ((page[:, 16:] < 128).any(-1).any(1).reshape(3, 16).any(1)).all(), "a name beside each"
    assert legend(labels, NAMES, (20, 96)).shape == (20, 96, 3)
