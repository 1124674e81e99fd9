"""What `sample.py` is asked to draw, as a list: one `Request` a picture.

Which key says it is settled by what the model is told; every other such key is refused by name, before any weights are
read.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from ldm_scale.conditioning.base import ConditionerConfig
from ldm_scale.conditioning.class_label import ClassLabelConfig
from ldm_scale.conditioning.layout import WHOLE, Layout, LayoutConfig, LayoutObject, LayoutTokens
from ldm_scale.conditioning.spatial import ConcatConfig, LabelMapConfig
from ldm_scale.core import storage
from ldm_scale.images import fit
from ldm_scale.images.asked import class_name
from ldm_scale.jobs.schemas.sample import SampleJob

_IMAGE_CHANNELS = 3
_MASK = "_mask"  # may end the name of a mask, where its picture's has nothing


class Kind(Enum):
    """What a model is told, and the keys that say it."""

    captions = ("prompts", "prompts_file")
    classes = ("classes",)
    layouts = ("boxes",)
    label_maps = ("label_maps",)
    low_resolution = ("low_resolution",)
    masked_images = ("images", "masks")
    nothing = ("count",)

    @classmethod
    def of(cls, conditioning: ConditionerConfig | None, latent_channels: int) -> "Kind":
        """The kind of a model; a conditioner that is unknown here is taken to read captions."""
        if isinstance(conditioning, ConcatConfig):
            return cls.masked_images if conditioning.channels == latent_channels + 1 else cls.low_resolution
        known: dict[type, Kind] = {
            type(None): cls.nothing,
            ClassLabelConfig: cls.classes,
            LayoutConfig: cls.layouts,
            LabelMapConfig: cls.label_maps,
        }
        return known.get(type(conditioning), cls.captions)


_EXAMPLES = {
    Kind.captions: "prompts=['a caption', ...] or prompts_file=FILE",
    Kind.classes: "classes=[1, 2]",
    Kind.layouts: "boxes=FILE.json",
    Kind.label_maps: "label_maps=FILES",
    Kind.low_resolution: "low_resolution=FILES",
    Kind.masked_images: "images=FILES masks=FILES",
    Kind.nothing: "count=NUMBER",
}


@dataclass(frozen=True, slots=True)
class Request:
    """One picture that is asked for."""

    condition: Any = None
    """Caption, class id or Layout; None where the model is told nothing, or what `files` hold."""
    told: Mapping[str, Any] = field(default_factory=dict)
    """The same as JSON values, under its name."""
    files: Mapping[str, Path] = field(default_factory=dict)
    """What the picture is drawn from, by the key of the job that names it."""
    truth: Path | None = None
    """What should come, to be shown beside what does; no part of what is asked."""

    def label(self, names: Sequence[str] = ()) -> str:
        """A few words, for a grid; `names` are those of classes."""
        if isinstance(self.condition, str):
            return self.condition
        if isinstance(self.condition, Layout):
            return ", ".join(class_name(names, thing.class_id) for thing in self.condition.objects)
        if self.condition is not None:
            return class_name(names, self.condition)
        return ", ".join(dict.fromkeys(path.stem for path in self.files.values()))

    def described(self) -> dict[str, Any]:
        """What is told and the names of files, as JSON values."""
        return {**self.told, **{key: path.name for key, path in self.files.items()}}

    def identity(self) -> dict[str, Any]:
        """The same with what is in the files instead of their names: who this request is."""
        return {**self.told, **{key: _sha256(path) for key, path in self.files.items()}}


def read(job: SampleJob, conditioning: ConditionerConfig | None, latent_channels: int) -> list[Request]:
    """Every picture that `job` asks of a model, `images_per_prompt` of each condition in turn.

    raises  ValueError or FileNotFoundError naming the key: one that this kind of model does not take, one that is
            missing, a value that is wrong
    """
    kind = Kind.of(conditioning, latent_channels)
    _require_keys(job, kind)
    columns = {kind.value[0]: _READERS[kind](job, conditioning)}
    columns |= {key: _from_files(key, source) for key, source in _pictures(job).items() if key not in kind.value}
    if job.truth is not None:
        columns["truth"] = [Request(truth=path) for path in _files("truth", job.truth)]
    if kind is Kind.nothing and job.count is None:
        del columns["count"]
    rows = _rows(columns)
    if "images" in rows[0].files:
        _require_pairs(rows)
    return [row for row in rows for _ in range(job.images_per_prompt)]


def low_resolution_size(requests: Sequence[Request]) -> tuple[int, int]:
    """Height and width that all small pictures of a super-resolution have.

    raises  ValueError where they differ
    """
    sizes: dict[tuple[int, int], Path] = {}
    for path in {request.files["low_resolution"] for request in requests}:
        height, width = fit.read_picture(path).shape[-2:]
        sizes.setdefault((height, width), path)
    if len(sizes) > 1:
        shown = ", ".join(f"{path.name} {height} x {width}" for (height, width), path in sorted(sizes.items())[:3])
        raise ValueError(f"low_resolution= has pictures of several sizes ({shown}); say what to make: size=[H,W]")
    return next(iter(sizes))


def class_names(job: SampleJob) -> list[str]:
    """What classes are called, by number; empty where nothing says it.

    raises  ValueError where `class_names` is no classes.json
    """
    if job.class_names is None:
        return []
    try:
        return [str(entry["title"]) for entry in storage.read_json(job.class_names)]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"class_names={job.class_names}: expected the classes.json that data_tools.make_shards writes: {error!r}"
        ) from error


def _require_keys(job: SampleJob, kind: Kind) -> None:
    given = [key for other in Kind for key in other.value if getattr(job, key)]
    source = f"run_dir={job.run_dir}" if job.run_dir else f"model={job.model}"
    told = "is unconditional" if kind is Kind.nothing else f"is told of {kind.name.replace('_', ' ')}"
    for key in given:
        if key not in (*kind.value, *_pictures(job)):
            raise ValueError(f"{key}= was given, but {source} {told}: give {_EXAMPLES[kind]}")
    steered = kind is Kind.nothing and _pictures(job)  # whose number then says how many
    if not steered and not any(key in given for key in kind.value):
        raise ValueError(f"{source} {told}: give {_EXAMPLES[kind]}")


def _pictures(job: SampleJob) -> dict[str, str]:
    """The keys that any model may be steered by, with what they name."""
    named = {"images": job.images, "masks": job.masks, "start": job.start, "guide.images": job.guide.images}
    return {key: source for key, source in named.items() if source is not None}


def _captions(job: SampleJob, conditioning: Any) -> list[Request]:
    prompts = job.prompts
    if job.prompts_file is not None:
        prompts = [line.strip() for line in Path(job.prompts_file).read_text().splitlines() if line.strip()]
        if not prompts:
            raise ValueError(f"prompts_file={job.prompts_file} holds no caption")
    return [Request(prompt, {"prompt": prompt}) for prompt in prompts]


def _classes(job: SampleJob, conditioning: ClassLabelConfig) -> list[Request]:
    for one in job.classes:
        if not 0 <= one < conditioning.classes:
            raise ValueError(f"classes={job.classes}: {one} is none; this model's are 0 to {conditioning.classes - 1}")
    return [Request(one, {"class": one}) for one in job.classes]


def _layouts(job: SampleJob, conditioning: LayoutConfig) -> list[Request]:
    try:
        pictures = storage.read_json(str(job.boxes))
        if pictures and isinstance(pictures[0], dict) and "box" in pictures[0]:
            pictures = [pictures]  # the boxes of one picture, as shards hold them
        layouts = [_layout(picture) for picture in pictures]
        tokens = LayoutTokens(
            vocab_size=conditioning.vocab_size, max_objects=conditioning.max_objects, crop=conditioning.crop
        )
        for layout in layouts:
            tokens.encode(layout)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f'boxes={job.boxes}: expected [{{"objects": [{{"class_id": 3, "box": [x0, y0, x1, y1]}}, ...], "crop": '
            f"[x0, y0, x1, y1]}}, ...], crop optional: {error!r}"
        ) from error
    if not layouts:
        raise ValueError(f"boxes={job.boxes} holds no picture")
    return [Request(layout, {"layout": _plain(layout)}) for layout in layouts]


def _layout(picture: Any) -> Layout:
    objects, crop = (picture, WHOLE) if isinstance(picture, list) else (picture["objects"], picture.get("crop", WHOLE))
    return Layout([LayoutObject(int(one["class_id"]), _box(one["box"])) for one in objects], _box(crop))


def _box(edges: Sequence[float]) -> tuple[float, float, float, float]:
    left, top, right, bottom = (float(edge) for edge in edges)
    return left, top, right, bottom


def _plain(layout: Layout) -> dict[str, Any]:
    objects = [{"class_id": one.class_id, "box": list(one.box)} for one in layout.objects]
    return {"objects": objects, "crop": list(layout.crop)}


def _nothing(job: SampleJob, conditioning: None) -> list[Request]:
    return [Request() for _ in range(job.count or 0)]


def _masked_images(job: SampleJob, conditioning: ConcatConfig) -> list[Request]:
    return _rows({"images": _from_files("images", str(job.images)), "masks": _from_files("masks", str(job.masks))})


def _from_files(key: str, source: str) -> list[Request]:
    """A request for each file of `source`."""
    return [Request(files={key: path}) for path in _files(key, source)]


def _files(key: str, source: str) -> list[Path]:
    where = Path(source)
    if where.is_dir():
        files = sorted(path for path in where.iterdir() if path.suffix.lower() in fit.SUFFIXES)
        if not files:
            raise FileNotFoundError(f"{key}={source} holds no picture ({', '.join(fit.SUFFIXES)})")
        return files
    try:
        return [Path(name) for name in storage.expand(source, suffix=".png")]
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{key}={source} names no file; give a file, directory, glob or list") from error


_READERS: Mapping[Kind, Callable[[SampleJob, Any], list[Request]]] = {
    Kind.captions: _captions,
    Kind.classes: _classes,
    Kind.layouts: _layouts,
    Kind.label_maps: lambda job, conditioning: _from_files("label_maps", str(job.label_maps)),
    Kind.low_resolution: lambda job, conditioning: _from_files("low_resolution", str(job.low_resolution)),
    Kind.masked_images: _masked_images,
    Kind.nothing: _nothing,
}


def _rows(columns: Mapping[str, list[Request]]) -> list[Request]:
    """One request a row; a column of one entry serves every row.

    raises  ValueError naming two columns that do not go together
    """
    longest = max(columns, key=lambda key: len(columns[key]))
    count = len(columns[longest])
    for key, column in columns.items():
        if len(column) not in (1, count):
            raise ValueError(f"{key}= gives {len(column)} and {longest}= {count}; give one for all, or one each")
    rows = zip(*(column * count if len(column) == 1 else column for column in columns.values()), strict=True)
    return [functools.reduce(_merged, row) for row in rows]


def _merged(one: Request, other: Request) -> Request:
    told, files = {**one.told, **other.told}, {**one.files, **other.files}
    return Request(one.condition, told, files, one.truth or other.truth)


def _require_pairs(rows: Sequence[Request]) -> None:
    """Refuse masks that lie beside pictures of other names, unless one mask or one picture serves all."""
    if len({row.files["masks"] for row in rows}) == 1 or len({row.files["images"] for row in rows}) == 1:
        return
    for row in rows:
        image, mask = row.files["images"], row.files["masks"]
        if mask.stem.removesuffix(_MASK) != image.stem:
            raise ValueError(
                f"images= and masks= pair {image.name} with {mask.name}; name masks as pictures, or so with {_MASK}"
            )


@functools.cache
def _sha256(path: Path) -> str:
    return storage.sha256_file(path)
