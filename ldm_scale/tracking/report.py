"""`report.html`: one run, or several side by side, on one page that opens without a server, an account or the network.

Reads run directories and nothing else, so it works during a run, after a kill, and on a copy on a laptop. The page
itself (HTML, CSS, JS) lies in `page/`; this file gathers what it shows and fits it into a size that a browser likes.
"""

import base64
import io
import json
import os
import re
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from fnmatch import fnmatchcase
from importlib import resources
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from ldm_scale.core import storage
from ldm_scale.core.run_dir import RunDir
from ldm_scale.tracking.cost import Cost, Forecast
from ldm_scale.tracking.goodput import LAUNCHES, gpu_hours
from ldm_scale.tracking.panels import layout, levels, section
from ldm_scale.tracking.tracker import CAPTION_KEY, strict_json
from ldm_scale.tracking.weights_and_biases import closing_hint

_PAGE_BYTES = 19_000_000  # of the whole page; pictures take what the rest leaves, but no more than the next line says
_PICTURE_BYTES = 12_000_000  # of all pictures together; a third more as base64
_ONE_PICTURE_BYTES = 400_000  # a larger PNG is shown as WebP
_LONGEST_SIDE = 1600  # of a picture shown as WebP, in pixels
_POINTS, _ALL_POINTS = 800, 200_000  # of a curve, which keeps the extremes of each stretch; of all curves together
_TICKS = 200  # moments at which hours are known; between them they are interpolated
_EVENTS, _EVENT_BYTES = 300, 1_000_000  # newest that are listed, and launches; of each kind in all runs
_NOT_VALUES = ("images_seen", "time", "train/images_seen")
_FAMILY = re.compile(r"_(t\d{3}|min|median|max)$")  # of a score that is shown whole
_NAMES = ("experiment", "name", "run_dir")  # in which any two runs differ
_PACKAGES = ("torch", "accelerate", "deepspeed", "wandb", "numpy")


def write_report(run_dir: RunDir) -> Path:
    """Write `report.html` into the run directory, atomically, and return its path.

    Whatever is missing (a run that has just begun, a torn line, an unreadable picture) is left out of the page.
    raises  FileNotFoundError when there is no such run directory
    """
    return _write([run_dir], run_dir.report)


def write_comparison(run_dirs: Sequence[RunDir], page: Path) -> Path:
    """Write one page on several runs: where their configurations differ, their curves and pictures side by side.

    raises  as `write_report`; ValueError for fewer than two runs
    """
    if len(run_dirs) < 2:
        raise ValueError("a comparison takes two runs or more")
    return _write(run_dirs, page)


def _write(run_dirs: Sequence[RunDir], file: Path) -> Path:
    for run_dir in run_dirs:
        if not run_dir.path.is_dir():
            raise FileNotFoundError(f"{run_dir.path} is not a directory; give a run directory, runs/EXPERIMENT/NAME")
    runs = [_gather(run_dir, file.parent, _EVENT_BYTES // len(run_dirs)) for run_dir in run_dirs]
    _thin_together([run["curves"] for run in runs])
    left = min(_PICTURE_BYTES, (_PAGE_BYTES - len(_json(runs).encode())) * 3 // 4)
    for run, run_dir in zip(runs, run_dirs, strict=True):
        run["media"] = _media(run_dir.media, left // len(runs))
    names = {name for run in runs for name in (*run["curves"], *(item["name"] for item in run["media"]))}
    panels = [
        {"section": section(panel), "title": panel.heading, "act": panel.act_when, "names": own}
        for panel, own in layout(names)
    ]
    whole = {"runs": runs, "panels": panels, "differences": _differences(runs), "written": time.time()}
    resource = resources.files("ldm_scale.tracking") / "page"
    parts = {name: (resource / f"report.{name}").read_text("utf-8") for name in ("html", "css", "js")}
    parts["data"] = _json(whole).replace("<", "\\u003c")  # no text of the run can end the script element
    html = re.sub(r"/\*(css|js|data)\*/", lambda mark: parts[mark[1]], parts["html"])
    with storage.atomic_write(file) as out:
        out.write(html.encode())
    return file


def _json(value: Any) -> str:
    return json.dumps(strict_json(value), ensure_ascii=False, separators=(",", ":"))


def _gather(run_dir: RunDir, page_folder: Path, event_bytes: int) -> dict[str, Any]:
    """Everything the page shows of one run but its pictures, of plain JSON types."""
    config = _read_json(run_dir.config)
    status = _read_json(run_dir.status)
    lines = run_dir.read_metrics()
    events = run_dir.read_events()
    stamps = [line["time"] for line in [*lines, *events]]
    saved = sorted(run_dir.checkpoints.glob("images_*[0-9]/complete.json"))
    parts = run_dir.path.absolute().parts
    launches = [event for event in events if event["event"] in LAUNCHES]
    forecast = Forecast.of(_read_json(run_dir.plan), launches[-1]["world"] if launches else 0)
    images, total = max([line["images_seen"] for line in lines] + [int(status.get("images", 0))]), _total_images(config)
    curves, told = _curves(lines), _newest(events, event_bytes)
    started = _launches(_read_json(run_dir.repro))
    launched = _newest(started, event_bytes)
    return {
        "experiment": parts[-2],
        "name": parts[-1],
        "path": str(run_dir.path),
        "status": status,
        "images_seen": images,
        "total_images": total,
        "first": min(stamps, default=None),
        "last": max(stamps, default=None),
        "saved": saved[-1].stat().st_mtime if saved else None,
        "alerts": len(run_dir.read_lines(run_dir.alerts)),
        "cost": asdict(Cost.of(config, launches, stamps, done=total and images / total, forecast=forecast)),
        "clock": _clock(run_dir.read_lines(run_dir.metrics), events),  # not what watches beside it logged, later
        "curves": curves,
        "levels": _levels(parts[-2], forecast, curves),
        "scores": _scores(lines, events),
        "events": told,
        "events_left_out": len(events) - len(told),
        "launches": launched[::-1],
        "launches_left_out": len(started) - len(launched),
        "config": config,
        "files": _files(run_dir, page_folder),
        "commands": _commands(run_dir, config),
    }


def _newest(lines: Sequence[dict[str, Any]], budget: int) -> list[dict[str, Any]]:
    """The last of them, newest first: as many as are listed, and fit into `budget` bytes."""
    shown = []
    for line in reversed(lines[-_EVENTS:]):
        budget -= len(_json(line).encode())
        if budget < 0:
            break
        shown.append(line)
    return shown


def _levels(experiment: str, forecast: Forecast | None, names: Iterable[str]) -> list[dict[str, Any]]:
    """Dashed lines, each once for every curve that it is drawn beside."""
    return [
        {"name": name, "label": level.label, "value": level.value}
        for level in levels(experiment, forecast)
        for name in names
        if any(fnmatchcase(name, pattern) for pattern in level.names)
    ]


def _clock(lines: Sequence[Mapping[str, Any]], events: Iterable[Mapping[str, Any]]) -> list[list[float]]:
    """What was spent by when: [images_seen, GPU hours, hours since the first launch]."""
    launches = [event for event in events if event["event"] in LAUNCHES]
    if not launches or not lines:
        return []
    spent = gpu_hours(launches, [line["time"] for line in lines])
    ticks = {0: launches[0]["time"]} | {line["images_seen"]: line["time"] for line in lines}
    every = -(-len(ticks) // _TICKS)
    shown = [*list(ticks.items())[:-1:every], list(ticks.items())[-1]]
    return [[images, spent(moment), (moment - launches[0]["time"]) / 3600] for images, moment in shown]


def _launches(repro: Mapping[str, Any]) -> list[dict[str, Any]]:
    """How each process of a run was started, and on what."""
    told = ("time", "images_seen", "host", "engine", "code", "data", "order_id", "command", "python", "platform")
    return [
        {
            **{key: launch[key] for key in told if launch.get(key) is not None},
            "packages": {name: version for name, version in launch["packages"].items() if name in _PACKAGES},
        }
        for launch in repro.get("launches", [])
    ]


def _differences(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Configuration keys whose values are not the same in all runs, with each run's value; "-" where it has none."""
    flat = [dict(_leaves(run["config"])) for run in runs]
    keys = dict.fromkeys(key for leaves in flat for key in leaves if key not in _NAMES)
    values = {key: [leaves.get(key, "-") for leaves in flat] for key in keys}
    return [{"key": key, "values": held} for key, held in values.items() if any(value != held[0] for value in held)]


def _leaves(part: Any, key: str = "") -> Iterable[tuple[str, Any]]:
    """Every value of a configuration under its dotted key; a list is a value."""
    if not isinstance(part, dict):
        return [(key, part)]
    return [leaf for name, inner in part.items() for leaf in _leaves(inner, f"{key}.{name}" if key else name)]


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


def _curves(lines: Iterable[Mapping[str, Any]]) -> dict[str, list[list[float]]]:
    """For each name its points, [images_seen, value]; values that were not finite are left out."""
    points: dict[str, list[list[float]]] = defaultdict(list)
    for line in lines:
        for name, value in line.items():
            if name not in _NOT_VALUES and isinstance(value, (int, float)):
                points[name].append([line["images_seen"], value])
    return {name: _thinned(values) for name, values in points.items()}


def _thin_together(runs: Sequence[dict[str, list[list[float]]]]) -> None:
    """Thin the curves of many runs further, so that all of them fit."""
    limit = _ALL_POINTS // max(1, sum(map(len, runs)))
    for curves in runs:
        curves.update({name: _thinned(points, limit) for name, points in curves.items()})


def _thinned(points: list[list[float]], limit: int = _POINTS) -> list[list[float]]:
    """At most about `limit` points, with the extremes of every stretch, so that no spike goes missing."""
    if len(points) <= limit:
        return points
    stretch = -(-2 * len(points) // limit)
    kept: list[list[float]] = [points[0]]
    for start in range(1, len(points) - 1, stretch):
        part = points[start : min(start + stretch, len(points) - 1)]
        extremes = (min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1]))
        kept += sorted({tuple(point): point for point in extremes}.values())
    return [*kept, points[-1]]


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


def _media(folder: Path, budget: int) -> list[dict[str, Any]]:
    """For each name its pictures, oldest first; where there are too many, evenly spaced ones and the newest."""
    names = sorted(path for path in folder.glob("*") if path.is_dir())
    return [_pictures(path, budget // len(names)) for path in names]


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


def _files(run_dir: RunDir, page_folder: Path) -> list[dict[str, Any]]:
    """What a person looks for in the run directory, where it exists; links lead there from the page's folder."""
    known = {
        run_dir.metrics: "every number, one JSON object a line",
        run_dir.events: "what happened, one JSON object a line",
        run_dir.media: "pictures",
        run_dir.config: "the resolved configuration",
        run_dir.status: "how the run stands",
        run_dir.alerts: "what somebody should know, one JSON object a line",
        run_dir.plan: "what `make plan` foretold",
        run_dir.repro: "versions, code, data and configuration of every launch",
        run_dir.checkpoints: "to resume from",
        run_dir.weights: "inference weights",
        run_dir.wandb: "W&B's files",
    }
    return [
        {"path": str(path), "link": os.path.relpath(path, page_folder), "what": what}
        for path, what in known.items()
        if path.exists()
    ]


def _commands(run_dir: RunDir, config: Mapping[str, Any]) -> list[str]:
    """What to type next: a run with a U-Net can draw."""
    made = []
    if run_dir.weights.exists():
        made = [f"python evaluate.py run_dir={run_dir.path}"]
        if "unet" in config:
            made = [f"python sample.py run_dir={run_dir.path} prompts=\"['A CAPTION']\" out=DIRECTORY", *made]
    return [*made, *(line.split(":", 1)[1].strip() for line in closing_hint(run_dir).splitlines())]
