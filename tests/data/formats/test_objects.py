"""Objects in ms-swift's format: what does not match or is malformed is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.data.formats.prepared import error_of, learned, parse, prepare, write_pictures


def row(answer: str, objects: Any, question: str = "<image>Find <ref-object>") -> dict[str, Any]:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "images": ["a.png"], "objects": objects}


BOX = [20, 20, 60, 60]


@pytest.mark.parametrize(
    ("answer", "objects", "error"),
    [
        ("<bbox>", {"ref": ["x"], "bbox": []}, "1 <bbox> tags for 0 entries of objects.bbox"),
        ("<bbox>", {"ref": ["x"], "bbox": [BOX, BOX]}, "1 <bbox> tags for 2 entries"),
        ("<bbox>", {"ref": ["x", "y"], "bbox": [BOX]}, "1 <ref-object> tags for 2 entries of"),
        ("no", {"bbox": []}, "1 <ref-object> tags for 0 entries"),
        ("<bbox>", None, "1 <ref-object> tags for 0 entries of objects.ref"),
        ("<bbox>", [{"caption": "x", "bbox": BOX}], 'it must be {"ref": ["a phrase"], "bbox"'),
        ("<bbox>", "{", "objects is not JSON"),
        ("<bbox>", {"ref": ["x"], "bbox": [[1, 2, 3]]}, "objects.bbox[0] is [1, 2, 3]; it must be"),
        ("<bbox>", {"ref": ["x"], "bbox": [[60, 1, 2, 3]]}, "x2 and y2 must not be smaller"),
        ("<bbox>", {"ref": ["x"], "bbox": ["1,2"]}, "objects.bbox[0] is '1,2'; it must be"),
        ("<bbox>", {"ref": ["x"], "bbox": BOX}, "objects.bbox[0] is 20; it must be"),
        ("<bbox>", {"ref": [""], "bbox": [BOX]}, "objects.ref[0] is ''; give a phrase"),
        ("<bbox>", {"ref": "x", "bbox": [BOX]}, "objects.ref is 'x'; it must be a list"),
        (
            "<bbox>",
            {"ref": ["x"], "bbox": [BOX], "bbox_type": "norm1000"},
            "objects.bbox_type is 'norm1000'; known are real and norm1",
        ),
        (
            "<bbox>",
            {"ref": ["x"], "bbox": [[0.1, 0.2, 0.6, 0.8]]},
            "box: objects.bbox[0] is [0.1, 0.2, 0.6, 0.8]: these are fractions, less than one "
            "pixel; their bbox_type is norm1",
        ),
        (
            "<bbox>",
            {"ref": ["x"], "bbox": [BOX], "bbox_type": "norm1"},
            "with bbox_type norm1 all numbers are from 0 to 1",
        ),
        ("<bbox>", {"ref": ["x"], "bbox": [BOX], "image_id": [0, 1]}, "has 2 entries for 1 boxes"),
        ("<bbox>", {"ref": ["x"], "bbox": [BOX], "image_id": [-1]}, "objects.image_id has -1"),
    ],
)
def test_objects_that_do_not_match_are_refused(answer: str, objects: Any, error: str) -> None:
    assert error in error_of(row(answer, objects))


def test_tags_where_objects_have_no_place_are_refused() -> None:
    objects = {"bbox": [BOX]}
    call = {"role": "tool_call", "content": '{"name": "f", "arguments": {"at": "<bbox>"}}'}
    messages = [{"role": "user", "content": "<image>?"}, call]
    text = error_of({"messages": messages, "images": ["a.png"], "objects": objects})
    assert "the arguments of a tool call have <bbox>, and are text only" in text
    assert error_of({"text": "at <bbox>", "objects": objects}).startswith("placeholders: the text")
    text = error_of({"prompt": "a", "completion": "<bbox>", "objects": None})
    assert "objects belong to conversations" in text
    assert parse({"text": "at <bbox>"}).parts == ("at <bbox>",)


@pytest.mark.parametrize("image_id", [1, 3])
def test_a_box_in_an_image_that_the_row_lacks_is_refused(image_id: int) -> None:
    error = error_of(row("<bbox>", {"ref": ["x"], "bbox": [BOX], "image_id": [image_id]}))
    assert f"objects.image_id[0] is {image_id}, and the row has 1 image, counted from 0" in error


def test_objects_may_be_a_json_string_and_other_keys_are_named(tmp_path: Path) -> None:
    write_pictures(tmp_path)
    objects = {"ref": ["x"], "bbox": [BOX], "bbox_type": "", "width": [112], "category": None}
    samples = [parse(row("at <bbox>", value)) for value in (objects, json.dumps(objects))]
    assert [sample.unused for sample in samples] == [("objects.width",)] + [
        ("objects.width", "objects.category")
    ]
    assert [learned(prepare(sample, tmp_path)) for sample in samples] == [
        ["at <|box_start|>(179,238),(536,714)<|box_end|><|im_end|>"]
    ] * 2


def test_a_point_in_fractions_has_the_box_tokens(tmp_path: Path) -> None:
    write_pictures(tmp_path)
    objects = {"bbox": [[0.5, 0.25]], "bbox_type": "norm1"}
    sample = parse(row("<bbox>", objects, question="<image>?"))
    assert learned(prepare(sample, tmp_path)) == ["<|box_start|>(500,250)<|box_end|><|im_end|>"]


@pytest.mark.parametrize("tag", ["<bbox>", "<ref-object>"])
def test_tags_without_the_column_are_refused(tag: str) -> None:
    for texts in ((f"a {tag}?", "b"), ("a?", f"b {tag}")):
        roles = ("user", "assistant")
        messages = [{"role": r, "content": t} for r, t in zip(roles, texts, strict=True)]
        assert f"the text has {tag}, and the row has no objects" in error_of({"messages": messages})


def test_objects_without_a_tag_are_unused() -> None:
    sample = parse(row("here", {"ref": ["x"], "bbox": [BOX]}, question="<image>?"))
    assert sample.unused == ("objects",)
