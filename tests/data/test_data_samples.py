import pytest

from ldm_scale.data.samples import Box, MalformedMember, Sample, Task


def test_all_members_of_all_tasks():
    sample = Sample.parse(
        "k",
        {
            "webp": b"image",
            "txt": " ein H\u00e4uschen\n".encode(),
            "json": b'{"original_width": 640, "original_height": 480}',
            "cls": b"207\n",
            "boxes.json": b'[{"box": [0, 0.25, 0.5, 1], "class_id": 3}]',
            "seg.png": b"map",
        },
    )
    assert sample == Sample(
        "k", b"image", "ein H\u00e4uschen", 207, (Box(0, 0.25, 0.5, 1, 3),), b"map", original_size=(640, 480)
    )


def test_what_is_missing_is_none():
    assert Sample.parse("k", {}) == Sample("k", None, "")


@pytest.mark.parametrize("data", [b"not json", b"[]", b"{}", b'{"original_width": null, "original_height": 1}'])
def test_malformed_json_only_loses_the_size(data):
    assert Sample.parse("k", {"json": data}).original_size is None


def test_caption_that_is_no_utf8():
    assert Sample.parse("k", {"txt": b"bl\xe4ue"}).caption == "bl\ufffdue"


@pytest.mark.parametrize(
    "field, data",
    [
        ("cls", b"dog"),
        ("cls", b"-1"),
        ("boxes.json", b"{"),
        ("boxes.json", b"[[1, 2]]"),
        ("boxes.json", b'[{"box": [0, 0, 2, 1], "class_id": 0}]'),
        ("boxes.json", b'[{"box": [0.5, 0, 0.5, 1], "class_id": 0}]'),
        ("boxes.json", b'[{"box": [0, 0, 1], "class_id": 0}]'),
    ],
)
def test_malformed_conditions_are_refused_by_reason(field, data):
    with pytest.raises(MalformedMember) as raised:
        Sample.parse("k", {field: data})
    assert raised.value.reason == f"malformed_{field}"


def test_tasks_name_what_they_need():
    assert Task.text.require == ("image", "txt") and Task.unconditional.require == ("image",)
    assert "seg.png" in Task.segmentation.fields and "cls" not in Task.text.fields
