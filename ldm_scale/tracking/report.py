"""`report.html`: one run on one page that opens without a server, an account or the network.

Reads the run directory and nothing else, so it works during a run, after a kill, and on a copy on a laptop. The page
itself (HTML, CSS, JS) lies in `page/`; this file gathers what it shows and fits it into a size that a browser likes.
"""

import base64
import io
import json
import re
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from ldm_scale.core import storage
from ldm_scale.core.run_dir import RunDir
from ldm_scale.tracking.tracker import CAPTION_KEY, strict_json
from ldm_scale.tracking.weights_and_biases import closing_hint

_PICTURE_BYTES = 12_000_000  # of all pictures together; a third more as base64
_ONE_PICTURE_BYTES = 400_000  # a larger PNG is shown as WebP
_LONGEST_SIDE = 1600  # of a picture shown as WebP, in pixels
_POINTS = 800  # of a curve; longer ones keep the smallest and largest value of each stretch
_EVENTS = 300  # newest that are listed
_NOT_VALUES = ("images_seen", "time")
_FAMILY = re.compile(r"_(t\d{3}|min|median|max)$|(?<=^perf/split)_\w+$|(?<=^perf/lost)_\w+$")  # share a chart


def write_report(run_dir: RunDir) -> Path:
    """Write `report.html` into the run directory, atomically, and return its path.

    Whatever is missing (a run that has just begun, a torn line, an unreadable picture) is left out of the page.
    raises  FileNotFoundError when there is no such run directory
    """
    if not run_dir.path.is_dir():
        raise FileNotFoundError(f"{run_dir.path} is not a directory; give a run directory, runs/EXPERIMENT/NAME")
    page = resources.files("ldm_scale.tracking") / "page"
    parts = {name: (page / f"report.{name}").read_text("utf-8") for name in ("html", "css", "js")}
    data = json.dumps(strict_json(_gather(run_dir)), ensure_ascii=False, separators=(",", ":"))
    parts["data"] = data.replace("<", "\\u003c")  # no text of the run can end the script element
    html = re.sub(r"/\*(css|js|data)\*/", lambda mark: parts[mark[1]], parts["html"])
    with storage.atomic_write(run_dir.report) as file:
        file.write(html.encode())
    return run_dir.report


def _gather(run_dir: RunDir) -> dict[str, Any]:
    """Everything the page shows, of plain JSON types."""
    config = _read_json(run_dir.config)
    status = _read_json(run_dir.status)
    lines = run_dir.read_metrics()
    events = run_dir.read_events()
    stamps = [line["time"] for line in [*lines, *events]]
    parts = run_dir.path.absolute().parts
    return {
        "experiment": parts[-2],
        "name": parts[-1],
        "path": str(run_dir.path),
        "written": time.time(),
        "status": status,
        "images_seen": max([line["images_seen"] for line in lines] + [int(status.get("images", 0))]),
        "total_images": _total_images(config),
        "first": min(stamps, default=None),
        "last": max(stamps, default=None),
        "charts": _charts(_series(lines)),
        "scores": _scores(lines, events),
        "media": _media(run_dir.media),
        "events": events[-_EVENTS:][::-1],
        "events_left_out": max(0, len(events) - _EVENTS),
        "config": config,
        "files": _files(run_dir),
        "commands": _commands(run_dir, config),
    }


def _read_json(path: Path) -> dict[str, Any]:
    try:
        held = storage.read_json(path)
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
    return held if isinstance(held, dict) else {}


def _total_images(config: Mapping[str, Any]) -> int | None:
    """`total_images`, wherever the configuration has it."""
    if "total_images" in config:
        return int(config["total_images"])
    inner = (_total_images(part) for part in config.values() if isinstance(part, dict))
    return next((total for total in inner if total is not None), None)


def _series(lines: Iterable[Mapping[str, Any]]) -> dict[str, list[list[float]]]:
    """For each name its points, [images_seen, value]; values that were not finite are left out."""
    points: dict[str, list[list[float]]] = defaultdict(list)
    for line in lines:
        for name, value in line.items():
            if name not in _NOT_VALUES and isinstance(value, (int, float)):
                points[name].append([line["images_seen"], value])
    points.pop("train/images_seen", None)
    losses_first = sorted(points, key=lambda name: ("loss" not in name, name))
    return {name: _thinned(points[name]) for name in losses_first}


def _thinned(points: list[list[float]]) -> list[list[float]]:
    """At most about `_POINTS` points, with the extremes of every stretch, so that no spike goes missing."""
    if len(points) <= _POINTS:
        return points
    stretch = -(-2 * len(points) // _POINTS)
    kept: list[list[float]] = [points[0]]
    for start in range(1, len(points) - 1, stretch):
        part = points[start : min(start + stretch, len(points) - 1)]
        extremes = (min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1]))
        kept += sorted({tuple(point): point for point in extremes}.values())
    return [*kept, points[-1]]


def _charts(series: Mapping[str, list[list[float]]]) -> list[dict[str, Any]]:
    """One chart a name, but for families (`val/loss_t000`, `val/loss_t100`, ...), whose curves share one."""
    charts: dict[str, dict[str, Any]] = {}
    for name, points in series.items():
        family = _FAMILY.sub("", name) if _FAMILY.search(name) else None
        title = name if family is None else f"{family}_*"
        chart = charts.setdefault(title, {"title": title, "group": name.split("/")[0], "curves": []})
        chart["curves"].append({"name": name if family is None else name.removeprefix(f"{family}_"), "points": points})
    return list(charts.values())


def _scores(lines: Sequence[Mapping[str, Any]], events: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The newest and the first value of everything under eval/ and val/, with what the score depends on.

    The conditions are the other fields of the newest `evaluation` event whose `scores` has the name.
    """
    first: dict[str, list[float]] = {}
    newest: dict[str, list[float]] = {}
    for line in lines:
        for name, value in line.items():
            if name.startswith(("eval/", "val/")) and not _FAMILY.search(name) and isinstance(value, (int, float)):
                first.setdefault(name, [line["images_seen"], value])
                newest[name] = [line["images_seen"], value]
    conditions: dict[str, dict[str, Any]] = {}
    for event in events:
        if event.get("event") == "evaluation":
            known = {k: v for k, v in event.items() if k not in ("time", "images_seen", "event", "scores")}
            conditions.update(dict.fromkeys(event.get("scores", {}), known))
    return [
        {"name": name, "first": first[name], "newest": newest[name], "conditions": conditions.get(name, {})}
        for name in sorted(newest)
    ]


def _media(folder: Path) -> list[dict[str, Any]]:
    """For each name its pictures, oldest first; where there are too many, evenly spaced ones and the newest."""
    names = sorted(path for path in folder.glob("*") if path.is_dir())
    return [_pictures(path, _PICTURE_BYTES // len(names)) for path in names]


def _pictures(folder: Path, budget: int) -> dict[str, Any]:
    """As many pictures as fit into `budget` bytes: the newest, then others at ever finer even spacing."""
    paths = sorted(folder.glob("*.png"))
    shown: dict[int, dict[str, Any]] = {}
    for place in _coarse_to_fine(len(paths)):
        try:
            picture, size = _embedded(paths[place])
        except (UnidentifiedImageError, OSError):
            continue
        if size > budget:
            break
        budget -= size
        shown[place] = picture
    pictures = [shown[place] for place in sorted(shown)]
    return {"name": folder.name.replace("__", "/"), "pictures": pictures, "left_out": len(paths) - len(pictures)}


def _coarse_to_fine(count: int) -> list[int]:
    """All of 0 .. count - 1: the last, the first, then halves, quarters, eighths of what lies between."""
    order = dict.fromkeys([count - 1, 0] if count else [])
    parts = 2
    while len(order) < count:
        order.update(dict.fromkeys(count * k // parts for k in range(1, parts, 2)))
        parts *= 2
    return list(order)


def _embedded(path: Path) -> tuple[dict[str, Any], int]:
    """A picture as the page holds it, and its bytes."""
    with Image.open(path) as image:
        image.load()
        caption = str(image.info.get(CAPTION_KEY, ""))
        data, kind = path.read_bytes(), "png"
        if len(data) > _ONE_PICTURE_BYTES:
            image.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
            packed = io.BytesIO()
            image.convert("RGB").save(packed, format="WEBP", quality=85)
            data, kind = packed.getvalue(), "webp"
        url = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
        return {"images_seen": int(path.stem), "caption": caption, "url": url, "width": image.width}, len(data)


def _files(run_dir: RunDir) -> list[dict[str, Any]]:
    """What a person looks for in the run directory, where it exists."""
    known = {
        run_dir.metrics: "every number, one JSON object a line",
        run_dir.events: "what happened, one JSON object a line",
        run_dir.media: "pictures",
        run_dir.config: "the resolved configuration",
        run_dir.status: "how the run stands",
        run_dir.checkpoints: "to resume from",
        run_dir.weights: "inference weights",
        run_dir.wandb: "W&B's files",
    }
    return [{"path": str(path), "what": what} for path, what in known.items() if path.exists()]


def _commands(run_dir: RunDir, config: Mapping[str, Any]) -> list[str]:
    """What to type next: a run with a U-Net can draw."""
    made = []
    if run_dir.weights.exists():
        made = [f"python evaluate.py run_dir={run_dir.path}"]
        if "unet" in config:
            made = [f"python sample.py run_dir={run_dir.path} prompts=\"['A CAPTION']\" out=DIRECTORY", *made]
    return [*made, *(line.split(":", 1)[1].strip() for line in closing_hint(run_dir).splitlines())]
