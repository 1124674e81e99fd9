import io
import json
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ldm_scale.images.resize import (
    UNIFORMS,
    Border,
    Crop,
    ImageTransformConfig,
    RejectedImage,
    find_content,
    resize_shorter_side,
)


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Large soft blobs and fine noise, never white."""
    generator = np.random.default_rng(seed)
    coarse = Image.fromarray(generator.integers(20, 200, (6, 6, 3), dtype=np.uint8)).resize((width, height))
    return (np.asarray(coarse) + generator.integers(0, 20, (height, width, 3))).astype(np.uint8)


def padded(image: np.ndarray) -> np.ndarray:
    """What img2dataset's mode `border` does after resizing: white bars, the odd pixel below or right."""
    height, width = image.shape[:2]
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    square = np.full((side, side, 3), 255, np.uint8)
    square[top : top + height, left : left + width] = image
    return square


@pytest.mark.parametrize("shape", [(300, 200), (97, 301), (64, 64), (50, 40), (1000, 33)])
@pytest.mark.parametrize("size", [32, 64])
def test_resizing_agrees_with_pillow(shape, size):
    image = picture(*shape)
    ours = resize_shorter_side(image, size)
    theirs = np.asarray(Image.fromarray(image).resize(ours.shape[1::-1], Image.Resampling.BICUBIC))
    assert min(ours.shape[:2]) == size
    assert np.abs(ours.astype(int) - theirs).max() <= 1


def test_an_image_of_the_right_size_is_untouched():
    image = picture(32, 32)
    np.testing.assert_array_equal(ImageTransformConfig(size=32).build()(image), image)


def test_centre_crop_takes_the_middle():
    image = picture(32, 96)
    np.testing.assert_array_equal(ImageTransformConfig(size=32).build()(image), image[:, 32:64])


def test_random_crop_and_flip_follow_the_numbers():
    image = picture(32, 41)
    transform = ImageTransformConfig(size=32, crop=Crop.random, flip=True).build()
    for left in range(10):
        u = np.array([0.5, (left + 0.5) / 10, 0.9])
        np.testing.assert_array_equal(transform(image, u=u), image[:, left : left + 32])
    flipped = transform(image, u=np.array([0.5, 0.05, 0.1]))
    np.testing.assert_array_equal(flipped, image[:, 31::-1])
    assert flipped.flags.c_contiguous
    with pytest.raises(ValueError, match="uniform"):
        transform(image)


def test_a_transform_without_chance_ignores_the_numbers():
    transform = ImageTransformConfig(size=32).build()
    image = picture(50, 80)
    np.testing.assert_array_equal(transform(image), transform(image, u=np.zeros(UNIFORMS)))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 90), st.integers(1, 90), st.integers(1, 40), st.integers(0, 20),
    st.floats(0, 1, exclude_max=True), st.booleans(),
)  # fmt: skip
def test_the_result_is_always_a_square_of_the_resized_image(height, width, size, more, number, random):
    """`resize` pixels on the shorter side, then `size` x `size` of them, from where the numbers say."""
    config = ImageTransformConfig(size=size, resize=size + more, crop=Crop.random if random else Crop.center)
    square = config.build()(image := picture(height, width), u=np.full(UNIFORMS, number))
    resized = resize_shorter_side(image, size + more)
    top, left = (int((number if random else 0.5) * (side - size + 1)) for side in resized.shape[:2])
    np.testing.assert_array_equal(square, resized[top : top + size, left : left + size])
    assert square.shape == (size, size, 3)


@pytest.mark.parametrize(
    ("original", "quality"),
    [((640, 635), None), *product([(1000, 700), (700, 1000), (999, 500), (640, 590), (640, 620)], [None, 95, 75])],
)
def test_white_bars_are_found_and_cropped(original, quality):
    width, height = original
    scale = 256 / max(original)
    image = picture(round(height * scale), round(width * scale))
    square = padded(image)
    if quality is not None:
        buffer = io.BytesIO()
        Image.fromarray(square).save(buffer, "jpeg", quality=quality)
        square = np.asarray(Image.open(buffer))
    content = find_content(square, original)
    assert content is not None
    rows, columns = content
    top, left = (256 - image.shape[0]) // 2, (256 - image.shape[1]) // 2
    found = [rows.start or 0, rows.stop or 256, columns.start or 0, columns.stop or 256]
    np.testing.assert_allclose(found, [top, top + image.shape[0], left, left + image.shape[1]], atol=1)
    assert not (square[content] > 250).all(-1).all(1).any()


def test_border_crop_reject_and_keep():
    image = picture(64, 100)
    square = padded(image)
    build = {border: ImageTransformConfig(size=32, border=border).build() for border in Border}
    expected = ImageTransformConfig(size=32).build()(image)
    np.testing.assert_array_equal(build[Border.crop](square, original_size=(200, 128)), expected)
    with pytest.raises(RejectedImage) as caught:
        build[Border.reject](square, original_size=(200, 128))
    assert caught.value.reason == "border"
    kept = build[Border.keep](square, original_size=(200, 128))
    assert (kept[0] == 255).all()
    np.testing.assert_array_equal(build[Border.crop](square), kept)  # no json, no way to know


@pytest.mark.parametrize(
    ("image", "original"),
    [
        (picture(64, 64), (200, 128)),  # cropped to a square, not padded
        (padded(picture(64, 100)), (100, 100)),  # the original was square
        (padded(picture(64, 100)), (128, 200)),  # bars on the wrong sides
        (picture(64, 100), (200, 128)),  # not square
        (padded(picture(64, 100)), (0, 0)),  # nonsense in the json
    ],
)
def test_images_without_such_bars_are_left_alone(image, original):
    assert find_content(image, original) is None


def test_small_images_are_rejected_by_the_side_of_the_picture_itself():
    transform = ImageTransformConfig(size=32, min_side=65).build()
    with pytest.raises(RejectedImage) as caught:
        transform(padded(picture(64, 100)), original_size=(200, 128))
    assert caught.value.reason == "too_small"
    assert transform(picture(65, 100)).shape == (32, 32, 3)


def test_fingerprint_moves_with_every_setting_that_moves_a_pixel():
    configs = [
        ImageTransformConfig(size=32),
        ImageTransformConfig(size=64),
        ImageTransformConfig(size=32, crop=Crop.random),
        ImageTransformConfig(size=32, border=Border.keep),
        ImageTransformConfig(size=32, flip=True),
        ImageTransformConfig(size=32, resize=48),
    ]
    prints = [json.dumps(config.build().fingerprint(), sort_keys=True) for config in configs]
    assert len(set(prints)) == len(prints)
    assert configs[0].build().fingerprint()["normalisation"] == "x / 127.5 - 1"


def test_caches_from_before_resize_could_be_chosen_keep_their_fingerprint():
    old = ImageTransformConfig(size=32).build().fingerprint()
    assert list(old) == ["size", "crop", "border", "flip", "resampling", "library", "normalisation"]
    assert ImageTransformConfig(size=32, resize=32).build().fingerprint() == old


@pytest.mark.parametrize("wrong", [{"size": 0}, {"size": 32, "min_side": 0}, {"size": 32, "resize": 31}])
def test_impossible_settings_are_refused_by_name(wrong):
    with pytest.raises(ValueError, match=r"transform\."):
        ImageTransformConfig(**wrong)
