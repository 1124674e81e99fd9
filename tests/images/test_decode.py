import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ldm_scale.images.decode import UndecodableImage, decode


def smooth(height: int = 40, width: int = 60) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 4, y * 6, x + y], -1).astype(np.uint8)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def reason(data: bytes, **options: int) -> str:
    with pytest.raises(UndecodableImage) as caught:
        decode(data, **options)
    return caught.value.reason


@pytest.mark.parametrize("kind", ["png", "webp", "bmp", "tiff"])
def test_lossless_formats_give_the_same_pixels(kind):
    options = {"lossless": True} if kind == "webp" else {}
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(smooth()), kind, **options)), smooth())


def test_jpeg_is_close():
    pixels = decode(encoded(Image.fromarray(smooth()), "jpeg", quality=95, subsampling=0))
    assert np.abs(pixels.astype(int) - smooth()).mean() < 2


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "gif", "bmp", "tiff"])
def test_truncated_files_never_give_pixels(kind):
    data = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)), kind)
    for share in (0.3, 0.6, 0.9):
        assert reason(data[: int(len(data) * share)]) in ("truncated", "unreadable")
    if kind in ("png", "jpeg", "webp", "bmp"):
        assert reason(data[: len(data) // 2]) == "truncated"


def test_what_is_no_image_is_refused_with_its_reason():
    assert reason(b"") == "empty"
    assert reason(b"<html>404 not found</html>") == "unreadable"
    assert reason(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n") == "unreadable"
    damaged = bytearray(encoded(Image.fromarray(smooth()), "png"))
    damaged[60] ^= 0xFF
    assert reason(bytes(damaged)) == "unreadable"


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


@pytest.mark.parametrize("side", [20_000, 60_000])
def test_a_decompression_bomb_is_refused_by_its_header(side):
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    assert reason(bomb) == "too_large"


def test_the_pixel_limit_is_the_callers():
    data = encoded(Image.fromarray(smooth(40, 60)), "png")
    assert decode(data, max_pixels=2400).shape == (40, 60, 3)
    assert reason(data, max_pixels=2399) == "too_large"


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    upright = smooth()
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(np.ascontiguousarray(stored)), "png", exif=exif)
    np.testing.assert_array_equal(decode(data), upright)


def test_transparency_is_laid_over_white():
    rgba = np.dstack([smooth(), np.full((40, 60), 64, np.uint8)])
    expected = smooth() * (64 / 255) + 255 * (1 - 64 / 255)
    assert np.abs(decode(encoded(Image.fromarray(rgba), "png")) - expected).max() <= 1
    palette = Image.fromarray(np.zeros((8, 8), np.uint8)).convert("P")
    assert (decode(encoded(palette, "png", transparency=0)) == 255).all()
    grey_alpha = Image.merge("LA", [Image.new("L", (8, 8), 10), Image.new("L", (8, 8), 0)])
    assert (decode(encoded(grey_alpha, "png")) == 255).all()


def test_other_colour_models_become_rgb():
    grey = Image.new("L", (8, 8), 77)
    assert (decode(encoded(grey, "png")) == 77).all()
    assert (decode(encoded(Image.new("1", (8, 8), 1), "png")) == 255).all()
    cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    red = decode(encoded(cmyk, "jpeg", quality=95))
    assert red[..., 0].min() > 240 and red[..., 1:].max() < 15
    deep = Image.fromarray(np.full((8, 8), 257 * 99, np.uint16))
    assert (decode(encoded(deep, "png")) == 99).all()
    assert reason(encoded(Image.new("F", (8, 8), 0.5), "tiff")) == "unreadable"


@settings(max_examples=150, deadline=None)
@given(st.binary(min_size=1, max_size=400), st.sampled_from([b"", b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n", b"RIFF"]))
def test_any_bytes_give_pixels_or_a_reason(data, start):
    try:
        assert decode(start + data).dtype == np.uint8
    except UndecodableImage as error:
        assert error.reason in ("unreadable", "truncated", "too_large", "empty")
