"""Boxes, points and quads of an answer as structured data, in pixels of the images as sent.

The model writes thousandths of the upright image, whatever it was resized to. A client draws on the
pixels that it has stored, so that the EXIF orientation, which preprocessing has applied, is undone
here. The answer does not say which image it is about: there are coordinates for each image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from qwen2vl.grounding import Box, GroundingShape, Point, parse
from qwen2vl.processor.inputs import Item
from qwen2vl.processor.tokenizer import Tokenizer
from qwen2vl.server.protocol.chat import GroundingInPixels, GroundingResult

__all__ = ["find_groundings", "to_stored_pixels"]


def find_groundings(
    token_ids: Sequence[int], tokenizer: Tokenizer, items: Sequence[Item], paths: Sequence[str]
) -> list[GroundingResult]:
    """Return the shapes of an output, whose text need not show the grounding tokens.

    Args:
        token_ids: of the output.
        tokenizer: of the model.
        items: the prompt's images and videos; shapes are located in images only.
        paths: of the items in the request.
    """
    images = [(i, path) for i, path in zip(items, paths, strict=True) if i.kind == "image"]
    return [
        GroundingResult(
            type=_type_of(found.shape),
            label=found.phrase,
            normalized=_numbers(found.shape),
            pixels=[
                GroundingInPixels(
                    param=path,
                    coordinates=to_stored_pixels(found.shape, item.original_size, item.orientation),
                )
                for item, path in images
            ],
        )
        for found in parse(tokenizer.decode(token_ids, keep_special="grounding"))
    ]


def to_stored_pixels(shape: GroundingShape, size: tuple[int, int], orientation: int) -> list[float]:
    """Return the coordinates of a shape in the pixels of the stored image.

    Args:
        shape: in thousandths of the upright image.
        size: (height, width) of the upright image.
        orientation: EXIF orientation that made it upright, 1 to 8.
    """
    height, width = size
    numbers = shape.to_pixels(size)
    corners = [
        _stored_point(x, y, width, height, orientation)
        for x, y in zip(numbers[::2], numbers[1::2], strict=True)
    ]
    if isinstance(shape, Box):  # two of its corners, which may have changed places
        (xa, ya), (xb, yb) = corners
        corners = [(min(xa, xb), min(ya, yb)), (max(xa, xb), max(ya, yb))]
    return [round(value, 2) for corner in corners for value in corner]


def _stored_point(
    x: float, y: float, width: float, height: float, orientation: int
) -> tuple[float, float]:
    """Map a point of the upright image (`width` x `height`) to the stored one."""
    if orientation in (2, 3):
        x = width - x
    if orientation in (3, 4):
        y = height - y
    if orientation <= 4:
        return x, y
    # 5 to 8 exchange the axes: the stored image is `height` wide.
    if orientation in (6, 7):
        x = width - x
    if orientation in (7, 8):
        y = height - y
    return y, x


def _type_of(shape: GroundingShape) -> Literal["box", "point", "quad"]:
    if isinstance(shape, Point):
        return "point"
    return "box" if isinstance(shape, Box) else "quad"


def _numbers(shape: GroundingShape) -> list[int]:
    if isinstance(shape, Point):
        return [shape.x, shape.y]
    if isinstance(shape, Box):
        return [shape.x1, shape.y1, shape.x2, shape.y2]
    return [number for corner in shape.corners for number in (corner.x, corner.y)]
