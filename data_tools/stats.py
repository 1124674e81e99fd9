"""What a dataset or a latent cache looks like: counts, sizes, captions, white borders; as a page and as JSON.

Counts, captions and file sizes come from the indexes and the metadata, of every sample; what needs pixels or latents
comes from a random sample that is the same on every run.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich import filesize

from data_tools.command_line import run_tool, say
from data_tools.contact_sheet import Histogram, Picture, page, thumbnail
from data_tools.metadata import numbers, open_shards, require_known_shards, sample_metadata, selected_ids
from data_tools.stats_cache import cache_statistics
from data_tools.verify_cache import is_cache
from ldm_scale.core import progress, storage
from ldm_scale.data.index import IMAGE_FIELDS
from ldm_scale.data.samples import Sample
from ldm_scale.data.shards import CorruptSample, ShardSet
from ldm_scale.data.views import Selection
from ldm_scale.images.decode import UndecodableImage, decode
from ldm_scale.images.resize import find_content

_INF = float("inf")
_SIDES = (0, 64, 128, 192, 256, 320, 384, 512, 640, 768, 1024, 1536, 2048, _INF)
_ASPECTS = (0, 0.33, 0.5, 0.67, 0.75, 0.9, 1, 1.1, 1.33, 1.5, 2, 3, _INF)
_UPSCALES = (0, 0.125, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 2, 3, 4, _INF)
_CAPTIONS = (0, 1, 10, 20, 40, 60, 80, 120, 160, 240, 320, 480, 1000, _INF)
_FILES = (*(1024 * size for size in (0, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)), _INF)
_CHUNK = 256
_CELLS = {False: 200, True: 520}  # pixels of a picture on the page; of a cache, of all its channels
_THREADS = 8

_EXAMPLES = """\
examples:
  python -m data_tools.stats data/laion laion.html --size 256
      how many, how large, how much a model of 256 pixels would blow them up; 60 of them with their captions
  python -m data_tools.stats data/laion kept.html --selection selection.parquet --sample 20000
      only what data_tools.filter kept; white borders looked for in 20000 images
  python -m data_tools.stats runs/latents latents.html --images data/laion
      a latent cache: mean and spread of each channel, and latents in false colour beside their images
      (python -m ldm_scale.jobs.decoded decodes them)

The page is one file. The JSON report lies beside it (laion.json) unless --report says where. Memory: 50 bytes a sample.
Exit code: 1 where a sampled image or latent cannot be read, 2 for a mistake in the arguments.
"""


@dataclass(frozen=True, slots=True)
class Look:
    """One image of the random sample."""

    sample: Sample
    pixels: np.ndarray | None
    """(H, W, 3) uint8, of those that are shown."""
    size: tuple[int, int] | None
    """(width, height) in pixels; None where it does not decode."""
    border: bool | None
    """Whether it has white bars; None where that cannot be known."""
    fault: str = ""


def image_statistics(
    source: str, *, index_dir: str | None, within: Path | None, size: int, sample: int, shown: int
) -> tuple[dict[str, Any], list[Histogram], list[Picture]]:
    """Report, histograms and pictures of image shards.

    size    side of the images that a model would be trained on, pixels
    sample  images to decode; `shown` of them appear as pictures
    """
    shards = open_shards(source, index_dir)
    selection = Selection.read(within) if within else None
    require_known_shards(shards, selection)
    ids, known = _measure_all(shards, selection)
    drawn = chosen_ids(ids, sample)
    looks = _look_at_all(shards, drawn, set(chosen_ids(drawn, shown).tolist()))
    judged = [look for look in looks if look.border is not None]
    with_border = sum(look.border is True for look in judged)
    shorter = np.minimum(known["width"], known["height"])
    report = {
        "source": source,
        "shards": len(shards.names),
        "samples": len(ids),
        "bytes": sum(summary.bytes for summary in shards.summaries),
        "left_out": dict(shards.rejected),
        "members": dict(sum((Counter(summary.combinations) for summary in shards.summaries), Counter[str]())),
        "below_size": int((shorter < size).sum()),
        "without_caption": int((~(known["caption_bytes"] > 0)).sum()),
        "sampled": len(looks),
        "unreadable": dict(Counter(look.fault for look in looks if look.fault)),
        "white_borders": {"share": with_border / len(judged) if judged else None, "of": len(judged)},
    }
    histograms = [
        Histogram.of("Shorter side of the original, pixels", shorter, _SIDES),
        Histogram.of("Width / height of the original", known["width"] / known["height"], _ASPECTS),
        Histogram.of(f"Upscale to {size} pixels", size / shorter, _UPSCALES, "above 1 is blown up"),
        Histogram.of("Shorter side as stored, pixels", _stored_sides(looks), _SIDES, f"of {len(looks):,} decoded"),
        Histogram.of("Caption, bytes", known["caption_bytes"], _CAPTIONS),
        Histogram.of("Image file, bytes", known["image_bytes"], _FILES),
    ]
    return report, histograms, [_picture(look) for look in looks if look.pixels is not None]


def chosen_ids(ids: np.ndarray, count: int) -> np.ndarray:
    """A random part of some samples, ascending; the same on every run."""
    if len(ids) <= count:
        return ids
    return np.sort(ids[np.random.default_rng(0).choice(len(ids), count, replace=False)])


def _measure_all(shards: ShardSet, selection: Selection | None) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Sample numbers, and what indexes and metadata say of each; NaN where they say nothing."""
    ids, parts = [], []
    with progress.bar("metadata", shards.n, unit="samples") as bar:
        for shard in range(len(shards.names)):
            ids.append(selected_ids(shards, shard, selection))
            rows = ids[-1] - shards.starts[shard]
            parts.append({name: values[rows] for name, values in _measure(shards, shard).items()})
            bar.advance(int(shards.counts[shard]))
    return np.concatenate(ids), {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _measure(shards: ShardSet, shard: int) -> dict[str, np.ndarray]:
    table = sample_metadata(shards, shard, (), ("width", "height"))
    unknown = np.full(len(table), np.nan)
    sides = {
        name: numbers(table[name], name) if name in table.column_names else unknown for name in ("width", "height")
    }
    return sides | {
        "image_bytes": _lengths(shards, shard, IMAGE_FIELDS),
        "caption_bytes": _lengths(shards, shard, ("txt",)),
    }


def _lengths(shards: ShardSet, shard: int, fields: Sequence[str]) -> np.ndarray:
    """Bytes of each sample's first member among `fields`; NaN where it has none."""
    index = shards.opened(shard).index
    lengths = np.full(index.header.n, np.nan)
    for column in reversed([index.column[name] for name in fields if name in index.column]):
        np.copyto(lengths, index.lengths[:, column], where=index.offsets[:, column] > 0)
    return lengths


def _look_at_all(shards: ShardSet, ids: np.ndarray, shown: set[int]) -> list[Look]:
    """Decode some images with a few threads."""

    def look(sample_id: int) -> Look:
        return _look_at(shards, sample_id, keep=sample_id in shown)

    looks: list[Look] = []
    with ThreadPoolExecutor(_THREADS) as pool, progress.bar("images", len(ids)) as bar:
        for start in range(0, len(ids), _CHUNK):
            looks += pool.map(look, ids[start : start + _CHUNK].tolist())
            bar.move(len(looks))
    return looks


def _look_at(shards: ShardSet, sample_id: int, *, keep: bool) -> Look:
    place = np.array([sample_id])
    try:
        sample = Sample.parse(shards.keys(place)[0], shards.read(place, (*IMAGE_FIELDS, "txt", "json"))[0])
        pixels = decode(sample.image or b"")
    except CorruptSample as error:
        return Look(Sample(error.key, None, ""), None, None, None, error.reason)
    except UndecodableImage as error:
        return Look(sample, None, None, None, error.reason)
    border = None if sample.original_size is None else find_content(pixels, sample.original_size) is not None
    return Look(sample, pixels if keep else None, (pixels.shape[1], pixels.shape[0]), border)


def _stored_sides(looks: Sequence[Look]) -> np.ndarray:
    return np.array([min(look.size) if look.size else np.nan for look in looks], float)


def _picture(look: Look) -> Picture:
    assert look.pixels is not None and look.size is not None
    facts = "{} x {}".format(*look.size)
    if look.sample.original_size not in (None, look.size):
        facts += " of {} x {}".format(*look.sample.original_size)
    mark = "white border" if look.border else ""
    return Picture((thumbnail(look.pixels),), look.sample.key, look.sample.caption or "no caption", facts, mark)


def _facts(report: dict[str, Any], size: int) -> dict[str, str]:
    """The report's numbers as a person reads them."""
    borders, samples = report["white_borders"], max(report["samples"], 1)
    share = "unknown: no original sizes" if borders["share"] is None else f"{borders['share']:.1%} of {borders['of']:,}"
    return {
        "samples": f"{report['samples']:,}",
        "shards": f"{report['shards']:,}, {filesize.decimal(report['bytes'])}",
        "members": ", ".join(f"{fields} {count:,}" for fields, count in report["members"].items()),
        "left out": _counted(report["left_out"]),
        f"original below {size} pixels": f"{report['below_size']:,} ({report['below_size'] / samples:.1%})",
        "without caption": f"{report['without_caption']:,}",
        "white borders": share,
        "unreadable": f"{_counted(report['unreadable'])} of {report['sampled']:,} sampled",
    }


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in counts.items()) or "none"


def _work(arguments: argparse.Namespace) -> int:
    if min(arguments.sample, arguments.size) < 1 or arguments.thumbnails < 0:
        raise ValueError("--sample and --size must be at least 1, --thumbnails at least 0")
    cache = is_cache(arguments.source)
    if cache:
        report, facts, histograms, pictures = cache_statistics(
            arguments.source, images=arguments.images, sample=arguments.sample, shown=arguments.thumbnails
        )
    else:
        report, histograms, pictures = image_statistics(
            arguments.source,
            index_dir=arguments.index_dir,
            within=arguments.selection,
            size=arguments.size,
            sample=arguments.sample,
            shown=arguments.thumbnails,
        )
        facts = _facts(report, arguments.size)
    report["histograms"] = {histogram.title: histogram.to_dict() for histogram in histograms}
    out: Path = arguments.out
    report_file = arguments.report or out.with_suffix(".json")
    storage.write_json(report_file, report)
    with storage.atomic_write(out) as file:
        file.write(page(arguments.source, facts, histograms, pictures, cell=_CELLS[cache]).encode())
    say(*(f"{name:26s} {value}" for name, value in facts.items()))
    say(f"page: {out}", f"report: {report_file}", f"next: open {out} in a browser")
    return 1 if report["unreadable"] else 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m data_tools.stats",
        description="Show what shards or a latent cache hold: numbers, histograms and a contact sheet.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", help="shards (directory, brace range, glob, list, URL), or a cache's directory")
    parser.add_argument("out", type=Path, help="the page to write, for instance stats.html")
    parser.add_argument("--size", type=int, default=256, help="side of training images, pixels (default: 256)")
    parser.add_argument("--sample", type=int, default=2000, help="images or latents to look into (default: 2000)")
    parser.add_argument("--thumbnails", type=int, default=60, help="pictures on the page (default: 60)")
    parser.add_argument("--images", help="of a cache: the shards it was made from, to show beside the latents")
    parser.add_argument("--selection", type=Path, help="of shards: look only at these samples")
    parser.add_argument("--index-dir", help="where indexes go if the shards' folder cannot be written")
    parser.add_argument("--report", type=Path, help="where the JSON report goes (default: OUT with .json)")
    return run_tool(_work, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
