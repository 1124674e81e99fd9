"""What make_shards can add to an image besides its caption: a class, boxes, a label map.

Classes from folder names (`{key}.cls`), boxes from COCO's or Open Images' files (`{key}.boxes.json`), label maps from
PNG files (`{key}.seg.png`, their numbers kept exactly). An image whose annotation is missing or does not fit it is
rejected with the reason; what an annotation file itself leaves out is counted. Members are as `data/samples.py` reads
them.
"""

import io
import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
from PIL import Image

from data_tools.dataset_writer import Rejected, Sample
from ldm_scale.core import storage

_OPEN_IMAGES = {
    "ImageID": pa.string(),
    "LabelName": pa.string(),
    "XMin": pa.float64(),
    "XMax": pa.float64(),
    "YMin": pa.float64(),
    "YMax": pa.float64(),
    "IsGroupOf": pa.int8(),
}
_CORNERS = ("XMin", "YMin", "XMax", "YMax")
_DIGITS = 6  # of a box's corners: a hundredth of a pixel in 10,000
_MAP_MODES = ("1", "L", "P", "I;16")
"""PNG modes whose values are label numbers: grey of 1, 8 or 16 bits, palette."""


@dataclass(frozen=True)
class Classes:
    """Numbers of classes, 0, 1, ..., and the names that annotations call them by."""

    names: tuple[str, ...]
    """In order of their numbers."""
    titles: Mapping[str, str] = field(default_factory=dict)
    """Words for people, where a name is a code."""

    def to_json(self) -> list[dict[str, Any]]:
        """The content of classes.json."""
        return [
            {"class_id": number, "name": name, "title": self.titles.get(name, name)}
            for number, name in enumerate(self.names)
        ]

    @classmethod
    def read(cls, path: Path) -> "Classes":
        """Read the classes.json of another dataset.

        raises  ValueError for another file
        """
        entries = storage.read_json(path)
        try:
            if [entry["class_id"] for entry in entries] != list(range(len(entries))):
                raise ValueError("class_id must count 0, 1, 2, ...")
            return cls(
                tuple(entry["name"] for entry in entries),
                {entry["name"]: entry["title"] for entry in entries},
            )
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(
                f'{path}: expected [{{"class_id": 0, "name": "cat", "title": "cat"}}, ...]: {error!r}'
            ) from error

    def numbers(self, needed: Iterable[str], where: str) -> dict[str, int]:
        """Name -> number.

        raises  ValueError for a needed name that there is not
        """
        numbers = {name: number for number, name in enumerate(self.names)}
        if strangers := sorted(set(needed) - numbers.keys()):
            raise ValueError(
                f"{where} has class {strangers[0]!r} ({len(strangers)} such), which is not among the "
                f"{len(numbers)} classes given; make the larger dataset first and give its classes.json"
            )
        return numbers


class Annotation(ABC):
    """Something known of every image."""

    classes: Classes | None = None
    """What the class numbers in the members mean; None where there are none."""
    left_out: Counter[str]
    """What the annotation file holds and samples do not get, by reason."""

    def __init__(self) -> None:
        self.left_out = Counter()

    @abstractmethod
    def of(self, name: str, original: np.ndarray, size: tuple[int, int]) -> Sample:
        """Members and facts that an image gets.

        name      its path relative to the folder
        original  (H, W, 3) its pixels, upright
        size      (width, height) that it is stored with
        raises    Rejected where it is not annotated or the annotation does not fit it
        """


class FolderClasses(Annotation):
    """The first folder of an image's path is its class; numbers follow the sorted names, as in torchvision."""

    def __init__(self, folder: Path, classes: Classes | None) -> None:
        super().__init__()
        names = sorted(path.name for path in folder.iterdir() if path.is_dir())
        if not names:
            raise ValueError(
                f"{folder} has no subfolders; --classes takes the class of an image from its folder's name"
            )
        self.classes = classes or Classes(tuple(names))
        self._numbers = self.classes.numbers(names, str(folder))

    def of(self, name: str, original: np.ndarray, size: tuple[int, int]) -> Sample:
        parts = PurePath(name).parts
        if len(parts) < 2 or parts[0] not in self._numbers:
            raise Rejected("no_class", f"{name} lies in no class folder")
        number = self._numbers[parts[0]]
        return Sample({"cls": str(number).encode()}, {"class_id": number})


class Boxes(Annotation):
    """Boxes with classes, by image; see `coco` and `open_images` for where they come from."""

    classes: Classes

    def __init__(self, classes: Classes, where: Path) -> None:
        super().__init__()
        self.classes, self._where = classes, where

    @abstractmethod
    def _find(self, name: str) -> tuple[tuple[int, int] | None, np.ndarray, np.ndarray] | None:
        """(width, height) that the annotation was made on, corners (K, 4) as shares, class numbers (K,)."""

    def of(self, name: str, original: np.ndarray, size: tuple[int, int]) -> Sample:
        found = self._find(name)
        if found is None:
            raise Rejected("not_annotated", f"{self._where} does not know {name}")
        annotated, corners, numbers = found
        height, width = original.shape[:2]
        if annotated is not None and not _same_shape((width, height), annotated):
            raise Rejected(
                "size_differs", f"boxes are of {annotated[0]} x {annotated[1]} pixels, the image has {width} x {height}"
            )
        boxes = [
            {"box": box, "class_id": number}
            for box, number in zip(corners.round(_DIGITS).tolist(), numbers.tolist(), strict=True)
        ]
        return Sample({"boxes.json": json.dumps(boxes).encode()}, {"boxes": len(boxes)})

    def _whole(self, corners: np.ndarray) -> np.ndarray:
        """Which of (K, 4) corners, clipped to the image, are boxes; others are counted as left out."""
        corners = corners.round(_DIGITS)
        whole = (corners[:, 0] < corners[:, 2]) & (corners[:, 1] < corners[:, 3])
        self.left_out["empty_box"] += int((~whole).sum())
        return whole


class CocoBoxes(Boxes):
    """Boxes of a COCO instances file; its category ids, which have gaps, become 0, 1, ... in their order.

    Crowd regions are left out: they are no box of one thing. An image without any box gets an empty list.
    """

    def __init__(self, file: Path, classes: Classes | None) -> None:
        content = storage.read_json(file)
        try:
            categories = sorted(content["categories"], key=lambda category: category["id"])
            names = [category["name"] for category in categories]
            super().__init__(classes or Classes(tuple(names)), file)
            numbers = self.classes.numbers(names, str(file))
            number = {category["id"]: numbers[category["name"]] for category in categories}
            self._images = {
                image["file_name"]: (image["id"], (image["width"], image["height"])) for image in content["images"]
            }
            self._boxes = self._gather(content["annotations"], dict(self._images.values()), number)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{file} is no COCO instances file: {error!r} is not as it should be") from error

    def _gather(
        self, entries: Sequence[Mapping[str, Any]], sizes: Mapping[int, tuple[int, int]], number: Mapping[int, int]
    ) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """Image id -> corners (K, 4) as shares, class numbers (K,)."""
        things = [entry for entry in entries if not entry.get("iscrowd") and entry["image_id"] in sizes]
        self.left_out["crowd"] = sum(bool(entry.get("iscrowd")) for entry in entries)
        self.left_out["unknown_image"] = len(entries) - len(things) - self.left_out["crowd"]
        if not things:
            return {}
        boxes = np.array([entry["bbox"] for entry in things], np.float64)  # left, top, width, height in pixels
        sides = np.array([sizes[entry["image_id"]] for entry in things], np.float64)
        corners = np.hstack([boxes[:, :2] / sides, (boxes[:, :2] + boxes[:, 2:]) / sides]).clip(0, 1)
        images = np.array([entry["image_id"] for entry in things])
        classes = np.array([number[entry["category_id"]] for entry in things])
        whole = np.flatnonzero(self._whole(corners))
        order = whole[np.argsort(images[whole], kind="stable")]
        ids, starts = np.unique(images[order], return_index=True)
        pieces = zip(
            ids.tolist(), np.split(corners[order], starts[1:]), np.split(classes[order], starts[1:]), strict=True
        )
        return {image: (box, number) for image, box, number in pieces}

    def _find(self, name: str) -> tuple[tuple[int, int] | None, np.ndarray, np.ndarray] | None:
        if name not in self._images:
            return None
        image, size = self._images[name]
        return size, *self._boxes.get(image, (np.empty((0, 4)), np.empty(0, np.int64)))


class OpenImagesBoxes(Boxes):
    """Boxes of an Open Images csv, already shares of the sides; an image's id is its file name without the ending.

    Boxes around groups are left out: they are no box of one thing. An image without any box is not in the csv and is
    rejected.
    """

    def __init__(self, file: Path, names: Path | None, classes: Classes | None) -> None:
        try:
            table = pyarrow.csv.read_csv(
                file,
                convert_options=pyarrow.csv.ConvertOptions(
                    include_columns=list(_OPEN_IMAGES), column_types=_OPEN_IMAGES
                ),
            )
        except (pa.ArrowInvalid, pa.ArrowKeyError) as error:
            raise ValueError(f"{file} is no Open Images box file: {error}") from error
        titles = _titles(names) if names else {}
        labels = pc.unique(table["LabelName"]).to_pylist()
        super().__init__(classes or Classes(tuple(titles) or tuple(sorted(labels)), titles), file)
        self.classes.numbers(labels, str(file))
        groups = pc.equal(table["IsGroupOf"], 1)
        self.left_out["group"] = pc.sum(groups).as_py() or 0
        table = table.filter(pc.invert(groups)).sort_by("ImageID")
        corners = np.stack([table[name].to_numpy() for name in _CORNERS], axis=1).clip(0, 1)
        whole = self._whole(corners)
        self._corners, table = corners[whole], table.filter(pa.array(whole))
        self._numbers = pc.index_in(table["LabelName"], value_set=pa.array(self.classes.names)).to_numpy()
        counts = [(entry["values"], entry["counts"]) for entry in pc.value_counts(table["ImageID"]).to_pylist()]
        stops = np.cumsum([count for _, count in counts]).tolist()
        self._spans = {image: (stop - count, stop) for (image, count), stop in zip(counts, stops, strict=True)}

    def _find(self, name: str) -> tuple[tuple[int, int] | None, np.ndarray, np.ndarray] | None:
        span = self._spans.get(PurePath(name).stem)
        return None if span is None else (None, self._corners[slice(*span)], self._numbers[slice(*span)])


def _titles(file: Path) -> dict[str, str]:
    """Open Images' class descriptions, two columns without a head: code, words."""
    table = pyarrow.csv.read_csv(file, read_options=pyarrow.csv.ReadOptions(column_names=["code", "words"]))
    return dict(zip(table["code"].to_pylist(), table["words"].to_pylist(), strict=True))


class LabelMaps(Annotation):
    """PNG label maps in a folder of their own, under the images' names; grey or palette values are the labels.

    The bytes stay as they are. Where an image is shrunk, its map is too, by nearest neighbour, so no label is invented.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is no directory; give the folder that holds the label maps")
        self._folder = folder

    def of(self, name: str, original: np.ndarray, size: tuple[int, int]) -> Sample:
        path = (self._folder / name).with_suffix(".png")
        try:
            data = path.read_bytes()
        except OSError as error:
            raise Rejected("missing_map", str(error)) from error
        labels = _open_map(data, path, original.shape[1::-1])
        if labels.size != size:
            labels = labels.resize(size, Image.Resampling.NEAREST)
            file = io.BytesIO()
            labels.save(file, "png")
            data = file.getvalue()
        return Sample({"seg.png": data}, {"labels": np.unique(np.asarray(labels)).tolist()})


def _open_map(data: bytes, path: Path, size: tuple[int, ...]) -> Image.Image:
    """A label map of a size, with its values as they are in the file."""
    try:
        labels = Image.open(io.BytesIO(data), formats=("PNG",))
        if labels.size == size:  # so that a small file cannot ask for much memory
            labels.load()
    except Exception as error:  # decoders fail in many ways
        raise Rejected("unreadable_map", f"{path}: {error}") from error
    if labels.size != size:
        raise Rejected(
            "size_differs", f"{path} has {labels.width} x {labels.height} pixels, the image {size[0]} x {size[1]}"
        )
    if labels.mode not in _MAP_MODES:
        raise Rejected("coloured_map", f"{path} has mode {labels.mode}; label numbers are grey values or a palette's")
    return labels


def _same_shape(one: tuple[int, int], other: tuple[int, int]) -> bool:
    """True for sizes that differ by a common factor, each side rounded to a whole pixel."""
    return abs(one[0] / other[0] - one[1] / other[1]) <= 1 / other[0] + 1 / other[1]
