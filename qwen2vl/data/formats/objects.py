"""Objects of a row, in ms-swift's format: phrases and boxes that tags in the text stand for.

    "objects": {"ref": ["a dog"], "bbox": [[331, 761, 853, 1594]]}
    "<ref-object><bbox> is on the beach"

Each `<ref-object>` is replaced by the next of `ref`, each `<bbox>` by the next of `bbox`; the two
lists are independent. `bbox_type` is "real" (pixels of the image that `image_id` counts from 0) or
"norm1" (fractions). Four numbers are a box, two a point between the box tokens. They become the
content items of visual grounding, so that pixels are scaled by the image's own size.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from numbers import Real
from typing import Any

from qwen2vl.data.formats.columns import Row
from qwen2vl.data.formats.samples import SampleError
from qwen2vl.errors import abbreviate
from qwen2vl.grounding import BOX_END, BOX_START, Box, Point, are_fractions

__all__ = ["OBJECT_TAG", "RowObjects"]

OBJECT_TAG = re.compile(r"(<ref-object>|<bbox>)")

_TYPES = ("real", "norm1")
_KEYS = ("ref", "bbox", "bbox_type", "image_id")
_UNIT_SIZE = (1, 1)  # of an image whose pixels are fractions

ContentItem = Mapping[str, Any]


class RowObjects:
    """The objects of one row, each to be used once."""

    def __init__(self, row: Row, *, tag: str) -> None:
        """Read the column `objects`.

        Args:
            row: of the file.
            tag: the first one in the row's text; "": the column is unused, as in ms-swift.

        Raises:
            SampleError: the column is malformed, or there is a tag and no column.
        """
        self.has_column = row.has_column("objects")
        if tag and not self.has_column:
            raise SampleError(
                "placeholders",
                f"the text has {tag}, and the row has no objects; give a column objects, as "
                '{"ref": ["a phrase"], "bbox": [[x1, y1, x2, y2]]}, or write the text without the '
                "tag",
            )
        self.is_active = bool(tag)
        self._refs: Sequence[str] = ()
        self._boxes: Sequence[Sequence[float]] = ()
        self._image_ids: Sequence[int] = ()
        self._is_real = True
        self._num_used = {"<ref-object>": 0, "<bbox>": 0}
        if self.is_active:
            self._read(row)

    def split(self, text: str) -> Iterator[ContentItem]:
        """Split text at its tags into content items, using objects; whitespace is kept."""
        for segment in OBJECT_TAG.split(text):
            if segment in self._num_used:
                yield from self._next_object(segment)
            elif segment:
                yield _text_item(segment)

    def check_all_used(self) -> None:
        """Check that there were as many tags as objects.

        Raises:
            SampleError: there were fewer or more.
        """
        for tag, key, objects in (
            ("<ref-object>", "ref", self._refs),
            ("<bbox>", "bbox", self._boxes),
        ):
            if self._num_used[tag] != len(objects):
                raise SampleError(
                    "placeholders",
                    f"{self._num_used[tag]} {tag} tags for {len(objects)} entries of "
                    f"objects.{key}; each needs one",
                )

    def check_image_ids(self, num_images: int) -> None:
        """Check that the images that boxes are in exist.

        Raises:
            SampleError: one does not.
        """
        for i, image_id in enumerate(self._image_ids):
            if image_id >= max(num_images, 1):  # without images the boxes are refused themselves
                raise SampleError(
                    "box",
                    f"objects.image_id[{i}] is {image_id}, and the row has {num_images} image"
                    f"{'s' * (num_images != 1)}, counted from 0",
                )

    def _read(self, row: Row) -> None:
        objects = _parse_json(row.take("objects"))
        if objects is None:
            return
        if not isinstance(objects, Mapping):
            raise SampleError(
                "messages",
                f"objects is {abbreviate(objects)}; it must be "
                '{"ref": ["a phrase"], "bbox": [[x1, y1, x2, y2]]}',
            )
        for key in objects:
            if key not in _KEYS:
                row.add_unused(f"objects.{key}")
        self._refs = _read_refs(objects.get("ref"))
        self._boxes = [
            _read_box(box, f"objects.bbox[{i}]")
            for i, box in enumerate(_read_list(objects.get("bbox"), "objects.bbox"))
        ]
        bbox_type = objects.get("bbox_type") or "real"
        if bbox_type not in _TYPES:
            raise SampleError(
                "messages",
                f"objects.bbox_type is {abbreviate(bbox_type)}; known are {' and '.join(_TYPES)}",
            )
        self._is_real = bbox_type == "real"
        if self._is_real:
            _check_pixels(self._boxes)
            self._image_ids = _read_image_ids(objects.get("image_id"), len(self._boxes))
        else:
            _check_fractions(self._boxes)

    def _next_object(self, tag: str) -> Iterator[ContentItem]:
        index = self._num_used[tag]
        self._num_used[tag] += 1  # too many of them are found by `check_all_used`
        if tag == "<ref-object>":
            if index < len(self._refs):
                yield {"type": "ref", "ref": self._refs[index]}
        elif index < len(self._boxes):
            yield from self._box_items(index)

    def _box_items(self, index: int) -> Iterator[ContentItem]:
        numbers = self._boxes[index]
        is_point = len(numbers) == 2
        kind = "point" if is_point else "box"
        if not self._is_real:
            shape = (Point if is_point else Box).from_pixels(numbers, _UNIT_SIZE)
            text = shape.to_text()
            yield _text_item(f"{BOX_START}{text}{BOX_END}" if is_point else text)
            return
        item = {"type": kind, kind: numbers, "picture": self._image_ids[index] + 1}
        yield from (
            (_text_item(BOX_START), item, _text_item(BOX_END))  # a point has no tokens of its own
            if is_point
            else (item,)
        )


def _parse_json(value: Any) -> Any:
    """Parse a column that some files store as a JSON string."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except ValueError as error:
        raise SampleError("messages", f"objects is not JSON: {error}") from error


def _read_list(value: Any, path: str) -> list[Any]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise SampleError("messages", f"{path} is {abbreviate(value)}; it must be a list")
    return value


def _read_refs(value: Any) -> list[str]:
    refs = _read_list(value, "objects.ref")
    for i, ref in enumerate(refs):
        if not isinstance(ref, str) or not ref:
            raise SampleError("messages", f"objects.ref[{i}] is {abbreviate(ref)}; give a phrase")
    return refs


def _read_box(value: Any, path: str) -> list[float]:
    if (
        not isinstance(value, list)
        or len(value) not in (2, 4)
        or not all(isinstance(n, Real) and not isinstance(n, bool) for n in value)
    ):
        raise SampleError(
            "messages",
            f"{path} is {abbreviate(value)}; it must be [x1, y1, x2, y2], or [x, y] for a point",
        )
    if len(value) == 4 and (value[0] > value[2] or value[1] > value[3]):
        raise SampleError(
            "messages", f"{path} is {value}: x2 and y2 must not be smaller than x1 and y1"
        )
    return value


def _read_image_ids(value: Any, num_boxes: int) -> list[int]:
    """Read the indices of the images that boxes are in; those that lack are 0, as in ms-swift."""
    ids = _read_list(value, "objects.image_id")
    for image_id in ids:
        if isinstance(image_id, bool) or not isinstance(image_id, int) or image_id < 0:
            raise SampleError(
                "messages",
                f"objects.image_id has {abbreviate(image_id)}; give indices of images, from 0",
            )
    if len(ids) > num_boxes:
        raise SampleError(
            "messages", f"objects.image_id has {len(ids)} entries for {num_boxes} boxes"
        )
    return ids + [0] * (num_boxes - len(ids))


def _check_pixels(boxes: Sequence[Sequence[float]]) -> None:
    for i, box in enumerate(boxes):
        if are_fractions(box):
            raise SampleError(
                "box",
                f"objects.bbox[{i}] is {abbreviate(box)}: these are fractions, less than one "
                "pixel; their bbox_type is norm1",
            )


def _check_fractions(boxes: Sequence[Sequence[float]]) -> None:
    for i, box in enumerate(boxes):
        if not all(0 <= number <= 1 for number in box):
            raise SampleError(
                "box",
                f"objects.bbox[{i}] is {abbreviate(box)}; with bbox_type norm1 all numbers are "
                "from 0 to 1",
            )


def _text_item(text: str) -> ContentItem:
    return {"type": "text", "text": text}
