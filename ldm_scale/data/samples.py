"""What a sample's members mean: image, caption, class, boxes, segmentation; and which of them a task needs.

Knows bytes by field name, not where they come from, and decodes no pixels.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from ldm_scale.data.index import IMAGE_FIELDS


class Task(Enum):
    """What a model is conditioned on, and so what its samples must have."""

    unconditional = "unconditional"
    text = "text"
    class_label = "class_label"
    layout = "layout"
    segmentation = "segmentation"

    @property
    def require(self) -> tuple[str, ...]:
        """What `ShardSet.open` is to require of every sample."""
        return ("image", _CONDITION[self]) if self in _CONDITION else ("image",)

    @property
    def fields(self) -> tuple[str, ...]:
        """The members that are read: images of any format, sizes, and the condition."""
        return (*IMAGE_FIELDS, "json", "txt", *((_CONDITION[self],) if self in _CONDITION else ()))


_CONDITION = {Task.text: "txt", Task.class_label: "cls", Task.layout: "boxes.json", Task.segmentation: "seg.png"}


class MalformedMember(ValueError):
    """A member that is there but does not parse; `reason` is malformed_{field}."""

    def __init__(self, field: str, detail: str) -> None:
        super().__init__(f"{field}: {detail}")
        self.reason = f"malformed_{field}"


@dataclass(frozen=True, slots=True)
class Box:
    """A labelled rectangle; corners normalised to 0..1, x to the right, y down."""

    x0: float
    y0: float
    x1: float
    y1: float
    class_id: int


@dataclass(frozen=True, slots=True)
class Sample:
    """One sample, its pictures still encoded; None or empty for what it lacks."""

    key: str
    image: bytes | None
    caption: str
    class_id: int | None = None
    boxes: tuple[Box, ...] | None = None
    segmentation: bytes | None = None
    original_size: tuple[int, int] | None = None
    """(width, height) before the dataset was made, from img2dataset's json."""

    @classmethod
    def parse(cls, key: str, members: Mapping[str, bytes]) -> "Sample":
        """Read a sample's members.

        raises  MalformedMember for a class or boxes that do not parse; a malformed json only loses the size
        """
        image = next((members[field] for field in IMAGE_FIELDS if field in members), None)
        return cls(
            key=key,
            image=image,
            caption=caption(members.get("txt", b"")),
            class_id=_class_id(members["cls"]) if "cls" in members else None,
            boxes=_boxes(members["boxes.json"]) if "boxes.json" in members else None,
            segmentation=members.get("seg.png"),
            original_size=_original_size(members["json"]) if "json" in members else None,
        )


def caption(data: bytes) -> str:
    """A caption as text; bytes that are no UTF-8 become U+FFFD."""
    return data.decode(errors="replace").strip()


def _class_id(data: bytes) -> int:
    try:
        class_id = int(data)
    except ValueError as error:
        raise MalformedMember("cls", f"{data[:40]!r} is no class number") from error
    if class_id < 0:
        raise MalformedMember("cls", f"class number {class_id} is negative")
    return class_id


def _boxes(data: bytes) -> tuple[Box, ...]:
    try:
        boxes = tuple(_box(entry) for entry in json.loads(data))
    except (ValueError, TypeError, KeyError) as error:
        raise MalformedMember(
            "boxes.json", f'expected [{{"box": [x0, y0, x1, y1], "class_id": 0}}, ...]: {error}'
        ) from error
    for box in boxes:
        if not (0 <= box.x0 < box.x1 <= 1 and 0 <= box.y0 < box.y1 <= 1):
            raise MalformedMember("boxes.json", f"{box} does not lie within 0..1 with x0 < x1 and y0 < y1")
    return boxes


def _box(entry: Mapping[str, Any]) -> Box:
    x0, y0, x1, y1 = (float(edge) for edge in entry["box"])
    return Box(x0, y0, x1, y1, int(entry["class_id"]))


def _original_size(data: bytes) -> tuple[int, int] | None:
    try:
        values = json.loads(data)
        return int(values["original_width"]), int(values["original_height"])
    except (ValueError, TypeError, KeyError):
        return None
