"""Bytes of an image file to pixels, refusing what cannot be trusted before it costs memory.

Only bitmap formats that are read without outside programs are opened (JPEG, PNG, WebP, GIF, BMP, TIFF); the size in the
header is checked before any pixel is decoded. EXIF orientation is applied, transparency is laid over white, 16-bit grey
is scaled. Embedded colour profiles are ignored. Knows nothing of shards, captions or transforms.

Shape letters: H W image height and width.
"""

import io
import warnings

import numpy as np
from PIL import Image, ImageOps

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
_ORIENTATION = 0x0112  # EXIF tag
_SIXTEEN_BIT = ("I", "I;16", "I;16B", "I;16L", "I;16N")

# Pillow warns of big images and odd metadata, which are judged here. Set once: catch_warnings is not safe in threads.
warnings.filterwarnings("ignore", module=r"PIL\.")
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class UndecodableImage(ValueError):
    """An image that cannot become pixels; `reason` is unreadable, truncated, too_large or empty."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


def decode(data: bytes, *, max_pixels: int = 2**26) -> np.ndarray:
    """Decode one image file to (H, W, 3) uint8 RGB; an animation gives its first frame.

    max_pixels  refuse an image whose header promises more, before decoding it; at most 2**27
    raises      UndecodableImage
    """
    if not data:
        raise UndecodableImage("empty")
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            _require_size(image, max_pixels)
            return np.array(_to_rgb(_upright(image)))
    except UndecodableImage:
        raise
    except Image.DecompressionBombError as error:
        raise UndecodableImage("too_large", str(error)) from error
    except Exception as error:  # decoders fail in many ways: OSError, SyntaxError, struct.error, EOFError, ...
        raise UndecodableImage("truncated" if _is_cut_short(data) else "unreadable", str(error)) from error


def _require_size(image: Image.Image, max_pixels: int) -> None:
    if image.width * image.height > max_pixels:
        raise UndecodableImage("too_large", f"{image.width} x {image.height} pixels, more than {max_pixels}")
    if image.width * image.height == 0:
        raise UndecodableImage("empty", f"{image.width} x {image.height} pixels")


def _upright(image: Image.Image) -> Image.Image:
    image.load()
    try:
        turned = image.getexif().get(_ORIENTATION, 1) != 1
    except Exception:  # damaged metadata around sound pixels
        return image
    return ImageOps.exif_transpose(image) if turned else image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in _SIXTEEN_BIT:
        return Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise UndecodableImage("unreadable", "floating point pixels have no agreed range")
    if image.has_transparency_data:
        coloured = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), coloured).convert("RGB")
    return image.convert("RGB")


def _is_cut_short(data: bytes) -> bool:
    """True where a known format lacks its end: what a killed download or a full disk leaves behind."""
    if data.startswith(b"\xff\xd8"):
        return not data.rstrip(b"\0").endswith(b"\xff\xd9")
    if data.startswith(b"\x89PNG"):
        return b"IEND" not in data[-64:]
    if data.startswith(b"RIFF"):
        return len(data) < 8 + int.from_bytes(data[4:8], "little")
    if data.startswith(b"GIF8"):
        return not data.rstrip(b"\0").endswith(b";")
    return data.startswith(b"BM") and len(data) < int.from_bytes(data[2:6], "little")
