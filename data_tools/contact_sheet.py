"""One page that shows a dataset: facts, histograms and pictures with their captions. Self-contained, light and dark."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
from PIL import Image

_THUMBNAIL = 192  # pixels of the longer side
_QUALITY = 85
_TICKS = 13  # labels below a histogram at most

_STYLE = """
:root { --paper: #fff; --raised: #f7f7f8; --line: #e3e4e8; --ink: #1f2328; --soft: #656d76; --accent: #1f6feb;
  --warn: #9a6700; }
@media (prefers-color-scheme: dark) { :root { --paper: #0f1216; --raised: #171b21; --line: #2a3038; --ink: #e2e6eb;
  --soft: #929ba6; --accent: #5aa2ff; --warn: #d9a52b; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 28px 28px 60px; max-width: 1320px; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 24px; line-height: 1.25; margin: 0 0 20px; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 40px 0 14px; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(180px, 1fr)); gap: 12px 24px; margin: 0; }
dt { font-size: 12px; color: var(--soft); }
dd { margin: 0; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 400px), 1fr)); gap: 16px; }
.chart { border: 1px solid var(--line); border-radius: 8px; padding: 12px 14px; min-width: 0; }
.chart b { font-weight: 600; font-size: 14px; } .chart p { margin: 0 0 8px; font-size: 13px; color: var(--soft); }
.bars { display: flex; align-items: flex-end; gap: 2px; height: 120px; border-bottom: 1px solid var(--line); }
.bars i { flex: 1; background: var(--accent); border-radius: 2px 2px 0 0; min-width: 0; }
.ticks { display: flex; gap: 2px; font-size: 10px; color: var(--soft); font-variant-numeric: tabular-nums; }
.ticks span { min-width: 0; overflow: hidden; white-space: nowrap; }
.sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, var(--cell)), 1fr)); gap: 14px; }
figure { margin: 0; border: 1px solid var(--line); border-radius: 8px; background: var(--raised); overflow: hidden; }
figure .row { display: flex; flex-wrap: wrap; gap: 2px; padding: 6px; align-items: center; justify-content: center; }
figure img { display: block; min-width: 96px; max-width: 100%; height: auto; }
figure .pixels { image-rendering: pixelated; width: 96px; }
figcaption { padding: 8px 10px; border-top: 1px solid var(--line); font-size: 13px; line-height: 1.35;
  overflow-wrap: anywhere; }
figcaption small { display: block; color: var(--soft); } figcaption .mark { color: var(--warn); }
"""


@dataclass(frozen=True, slots=True)
class Histogram:
    """How often a number falls between which edges."""

    title: str
    edges: tuple[float, ...]
    """One more than counts; the first and last may be infinite."""
    counts: tuple[int, ...]
    note: str = ""

    @classmethod
    def of(cls, title: str, values: np.ndarray, edges: Sequence[float], note: str = "") -> "Histogram":
        """Count values; those that are not a number are left out and said."""
        known = values[~np.isnan(values)]
        counts, _ = np.histogram(known, np.array(edges, float))
        missing = len(values) - len(known)
        middle = f"median {_number(float(np.median(known)))}" if len(known) else "nothing known"
        said = [part for part in (note, middle, f"unknown for {missing:,}" if missing else "") if part]
        return cls(title, tuple(map(float, edges)), tuple(counts.tolist()), "; ".join(said))

    def to_dict(self) -> dict[str, Any]:
        """JSON values; infinite edges are None."""
        edges = [edge if np.isfinite(edge) else None for edge in self.edges]
        return {"edges": edges, "counts": list(self.counts), "note": self.note}


@dataclass(frozen=True, slots=True)
class Picture:
    """One figure of the sheet."""

    images: tuple[str, ...]
    """HTML of its images."""
    name: str
    caption: str
    facts: str = ""
    mark: str = ""
    """What should catch the eye."""


def thumbnail(pixels: np.ndarray) -> str:
    """HTML of a picture, (H, W, 3) uint8, made small."""
    image = Image.fromarray(pixels)
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    return _img(image, "jpeg")


def false_colour(channel: np.ndarray) -> str:
    """HTML of one channel, (H, W) in standard deviations from its mean: blue below, white at the mean, orange above."""
    level = np.clip(channel / 3, -1, 1)[..., None]
    end = np.where(level < 0, (31, 111, 235), (219, 109, 40))
    return _img(Image.fromarray((255 + (end - 255) * np.abs(level)).astype(np.uint8)), "png", "pixels")


def _img(image: Image.Image, kind: str, style: str = "") -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind, quality=_QUALITY)
    data = base64.b64encode(buffer.getvalue()).decode()
    size = f'width="{image.width}" height="{image.height}"'
    return f'<img class="{style}" {size} src="data:image/{kind};base64,{data}" alt="">'


def page(
    title: str,
    facts: Mapping[str, str],
    histograms: Sequence[Histogram],
    pictures: Sequence[Picture],
    *,
    cell: int = 200,
) -> str:
    """The whole page.

    cell  least width of a figure, pixels
    """
    said = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items())
    charts = "".join(map(_chart, histograms))
    figures = "".join(map(_figure, pictures))
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style>"
        f"<h1>{escape(title)}</h1><dl>{said}</dl>"
        f'<h2>Histograms</h2><div class="charts">{charts}</div>'
        f'<h2>A random sample</h2><div class="sheet" style="--cell: {cell}px">{figures}</div></html>\n'
    )


def _chart(histogram: Histogram) -> str:
    counts, edges = histogram.counts, histogram.edges
    largest, total = max((*counts, 1)), max(sum(counts), 1)
    every = -(-len(counts) // _TICKS)
    bars, ticks = "", ""
    for i, count in enumerate(counts):
        tip = f"{_number(edges[i])} to {_number(edges[i + 1])}: {count:,} ({count / total:.1%})"
        bars += f'<i style="height: {100 * count / largest:.1f}%" title="{tip}"></i>'
        if i % every == 0:
            ticks += f'<span style="flex: {min(every, len(counts) - i)}">{_number(edges[i])}</span>'
    return (
        f'<div class="chart"><b>{escape(histogram.title)}</b><p>{escape(histogram.note)}</p>'
        f'<div class="bars">{bars}</div><div class="ticks">{ticks}</div></div>'
    )


def _number(value: float) -> str:
    if not np.isfinite(value):
        return "more" if value > 0 else "less"
    if value >= 4096:
        return f"{value / 1024:.4g}k"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _figure(picture: Picture) -> str:
    facts = f"<small>{escape(picture.facts)}</small>" if picture.facts else ""
    mark = f'<small class="mark">{escape(picture.mark)}</small>' if picture.mark else ""
    return (
        f'<figure><div class="row">{"".join(picture.images)}</div><figcaption>{escape(picture.caption)}'
        f"<small>{escape(picture.name)}</small>{facts}{mark}</figcaption></figure>"
    )
