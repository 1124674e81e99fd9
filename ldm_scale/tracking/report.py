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
from ldm_scale.tracking.goodput import Launch, gpu_hours, state_of
from ldm_scale.tracking.panels import layout, levels, section
from ldm_scale.tracking.tracker import CAPTION_KEY, strict_json
from ldm_scale.tracking.weights_and_biases import closing_hint

_PAGE_BYTES = 19_000_000  # of the whole page; pictures take what the rest leaves, but no more than the next line says
_PICTURE_BYTES = 12_000_000  # of all pictures together; a third more as base64
_ONE_PICTURE_BYTES = 400_000  # a larger PNG is shown as WebP
_PACKINGS = ((1600, 85), (1200, 80), (800, 75), (560, 70), (400, 60))  # most pixels across, quality of WebP
_POINTS, _ALL_POINTS = 800, 200_000  # of a curve, which keeps the extremes of each stretch; of all curves together
_TICKS = 200  # moments at which hours are known; between them they are interpolated
_EVENTS, _EVENT_BYTES = 300, 1_000_000  # newest that are listed, and launches; of each kind in all runs
_EVALUATION = "evaluation/"  # how names of pictures begin that `evaluate.py` drew
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
    sets = {(i, name): paths for i, run_dir in enumerate(run_dirs) for name, paths in _pictures(run_dir).items()}
    for ((i, name), paths), shown in zip(sets.items(), _packed([*sets.values()], left), strict=True):
        runs[i]["media"].append({"name": name, "pictures": shown, "left_out": len(paths) - len(shown)})
    logged = {name for _, name in sets if not name.startswith(_EVALUATION)}
    names = logged.union(*(run["curves"] for run in runs))
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
    lines, own_lines = run_dir.read_metrics(), run_dir.read_lines(run_dir.metrics)
    events, own_events = run_dir.read_events(), run_dir.read_lines(run_dir.events)
    stamps = [line["time"] for line in [*lines, *events]]
    signs = [line["time"] for line in (*own_lines, *own_events, *([status] if status else []))]
    saved = sorted(run_dir.checkpoints.glob("images_*[0-9]/complete.json"))
    parts = run_dir.path.absolute().parts
    launches = Launch.all_of(own_lines, own_events)
    forecast = Forecast.of(_read_json(run_dir.plan), launches[-1].world if launches else 0)
    images, total = max([line["images_seen"] for line in lines] + [int(status.get("images", 0))]), _total_images(config)
    curves, told = _curves(lines), _newest(events, event_bytes)
    started = _launches(_read_json(run_dir.repro))
    launched = _newest(started, event_bytes)
    return {
        "experiment": parts[-2],
        "name": parts[-1],
        "path": str(run_dir.path),
        "status": status,
        "state": state_of(status, silent_s=time.time() - max(signs)) if status else "unknown",
        "images_seen": images,
        "total_images": total,
        "first": min(stamps, default=None),
        "last": max(stamps, default=None),
        "saved": saved[-1].stat().st_mtime if saved else None,
        "alerts": len(run_dir.read_lines(run_dir.alerts)),
        "cost": asdict(Cost.of(config, launches, images=images, total=total, forecast=forecast)),
        "clock": _clock(own_lines, launches),
        "curves": curves,
        "levels": _levels(parts[-2], forecast, curves),
        "scores": _scores(lines, events),
        "evaluations": _evaluations(run_dir.evaluation),
        "media": [],
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


def _clock(lines: Sequence[Mapping[str, Any]], launches: Sequence[Launch]) -> list[list[float]]:
    """What was spent by when: [images_seen, GPU hours, hours since the first launch]."""
    if not launches or not lines:
        return []
    spent, began = gpu_hours(launches), launches[0].began
    ticks = {launches[0].images_seen: began} | {line["images_seen"]: line["time"] for line in lines}
    every = -(-len(ticks) // _TICKS)
    shown = [*list(ticks.items())[:-1:every], list(ticks.items())[-1]]
    return [[images, spent(moment), (moment - began) / 3600] for images, moment in shown]


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


def _pictures(run_dir: RunDir) -> dict[str, list[Path]]:
    """Pictures by name, oldest first; those of `evaluate.py` by the name of their file."""
    drawn = {part.name.replace("__", "/"): sorted(part.glob("*.png")) for part in sorted(run_dir.media.glob("*"))}
    return drawn | {_EVALUATION + path.stem: [path] for path in sorted(run_dir.evaluation.glob("*.png"))}


def _evaluations(folder: Path) -> list[dict[str, Any]]:
    """What `evaluate.py` wrote: of each file its rows of scores, one a strength of guidance, and their conditions."""
    found = []
    for path in sorted(folder.glob("*.json")):
        held = _read_json(path)
        points = held.get("points", [{"scores": held["scores"]}] if "scores" in held else [])
        rows = [{"name": _row_name(point), "scores": point["scores"]} for point in points]
        if real := {name.removesuffix("_real"): value for name, value in held.get("real", {}).items()}:
            rows.append({"name": "real images", "scores": real})
        if points:
            found.append({"name": _EVALUATION + path.stem, "rows": rows, "conditions": held.get("conditions", {})})
    return found


def _row_name(point: Mapping[str, Any]) -> str:
    return f"guidance {point['guidance']:g}" if "guidance" in point else "scores"


def _packed(sets: Sequence[Sequence[Path]], budget: int) -> list[list[dict[str, Any]]]:
    """Of each set of pictures as many as fit, in order; all of them together in `budget` bytes.

    Every set has an equal share, and those that need more also what smaller ones leave. Where a share is too small for
    three pictures, they are packed smaller.
    """
    shown: list[list[dict[str, Any]]] = [[] for _ in sets]
    sizes = [sum(path.stat().st_size for path in paths) for paths in sets]
    for rank, place in enumerate(sorted(range(len(sets)), key=lambda place: sizes[place])):
        used = 0
        for width, quality in _PACKINGS:
            fitting, bytes_of_them = _fitting(sets[place], budget // (len(sets) - rank), width, quality)
            if len(fitting) > len(shown[place]):
                shown[place], used = fitting, bytes_of_them
            if len(fitting) >= min(3, len(sets[place])):
                break
        budget -= used
    return shown


def _fitting(paths: Sequence[Path], budget: int, width: int, quality: int) -> tuple[list[dict[str, Any]], int]:
    """As many pictures as fit into `budget` bytes, and their bytes: the last, then others ever closer, evenly."""
    shown, used = dict[int, dict[str, Any]](), 0
    for place in _coarse_to_fine(len(paths)):
        try:
            picture, size = _embedded(paths[place], width, quality)
        except (UnidentifiedImageError, OSError):
            continue
        if used + size > budget:
            break
        used += size
        shown[place] = picture
    return [shown[place] for place in sorted(shown)], used


def _coarse_to_fine(count: int) -> list[int]:
    """All of 0 .. count - 1: the last, the first, then halves, quarters, eighths of what lies between."""
    order = dict.fromkeys([count - 1, 0] if count else [])
    parts = 2
    while len(order) < count:
        order.update(dict.fromkeys(count * k // parts for k in range(1, parts, 2)))
        parts *= 2
    return list(order)


def _embedded(path: Path, width: int, quality: int) -> tuple[dict[str, Any], int]:
    """A picture as the page holds it, and its bytes: as it is where it is small, or WebP.

    Never narrower for being tall: pages of captions stay legible.
    """
    with Image.open(path) as image:
        image.load()
        caption = str(image.info.get(CAPTION_KEY, ""))
        data, kind, shown = path.read_bytes(), "png", image.copy()
        if len(data) > _ONE_PICTURE_BYTES or (width, quality) != _PACKINGS[0]:
            height = max(1, image.height * width // image.width)
            shown = image.convert("RGB").resize((width, height)) if image.width > width else image.convert("RGB")
            packed = io.BytesIO()
            shown.save(packed, format="WEBP", quality=quality)
            data, kind = packed.getvalue(), "webp"
        url = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
        seen = int(path.stem) if path.stem.isdigit() else None
        told = {"images_seen": seen, "caption": caption, "url": url, "width": shown.width, "drawn": image.width}
        return told, len(data)


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
