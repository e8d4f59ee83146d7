"""Visual grounding format: boxes, points and quads in model text, in [0, 1000), and in pixels.

Coordinates in the model's text are normalized: x * 1000 / width (or y * 1000 / height) of the
original image, rounded, independent of resizing, and written between special tokens:

    <|object_ref_start|>the cat<|object_ref_end|><|box_start|>(176,106),(232,160)<|box_end|>

The classes hold these integers; `from_pixels` and `to_pixels` convert with the image size (height,
width), `to_text` writes and `parse` reads model text. Prompts use it in processor/chat_template.py;
`check_pixels` and `check_normalized` refuse what is in another scale than it is given in.
Standard library only. (Qwen2-VL sec. 2.2.1.)
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from qwen2vl.errors import InputError

__all__ = [
    "BOX_END",
    "BOX_START",
    "GROUNDING_TOKENS",
    "QUAD_END",
    "QUAD_START",
    "REF_END",
    "REF_START",
    "Box",
    "CoordinateError",
    "Grounding",
    "GroundingShape",
    "ObjectRef",
    "Point",
    "Quad",
    "Size",
    "are_fractions",
    "check_normalized",
    "check_pixels",
    "parse",
]

REF_START, REF_END = "<|object_ref_start|>", "<|object_ref_end|>"
BOX_START, BOX_END = "<|box_start|>", "<|box_end|>"
QUAD_START, QUAD_END = "<|quad_start|>", "<|quad_end|>"
GROUNDING_TOKENS = (REF_START, REF_END, BOX_START, BOX_END, QUAD_START, QUAD_END)

SCALE = 1000  # coordinates are in [0, 1000)
MAX_OUTSIDE = (
    2  # pixels outside the image that are clamped: annotations are rounded, or count from 1
)

T = TypeVar("T")
Size = tuple[int, int]  # (height, width) of the original image, in pixels


class CoordinateError(InputError):
    """Coordinates are not in the scale that they are given in, or not in their image."""


@dataclass(frozen=True, slots=True)
class Point:
    """A point, in thousandths of the image's width and height."""

    x: int
    y: int

    @classmethod
    def from_pixels(cls, numbers: Sequence[float], size: Size) -> Point:
        """Normalize (x, y) given in pixels; values outside the image are clamped to its border."""
        (xy,) = _pairs_from_pixels(numbers, size, 1)
        return cls(*xy)

    def to_pixels(self, size: Size) -> tuple[float, float]:
        """Scale to pixels of an image of `size` (height, width)."""
        height, width = size
        return self.x * width / SCALE, self.y * height / SCALE

    def to_text(self) -> str:
        """Return "(x,y)", as in tool-call arguments; points have no special tokens."""
        return f"({self.x},{self.y})"


@dataclass(frozen=True, slots=True)
class Box:
    """An axis-aligned bounding box, top left to bottom right corner, in thousandths."""

    x1: int
    y1: int
    x2: int
    y2: int

    @classmethod
    def from_pixels(cls, numbers: Sequence[float], size: Size) -> Box:
        """Normalize (x1, y1, x2, y2) given in pixels; values outside the image are clamped."""
        (x1, y1), (x2, y2) = _pairs_from_pixels(numbers, size, 2)
        return cls(x1, y1, x2, y2)

    def to_pixels(self, size: Size) -> tuple[float, float, float, float]:
        """Scale to pixels of an image of `size` (height, width)."""
        return (*Point(self.x1, self.y1).to_pixels(size), *Point(self.x2, self.y2).to_pixels(size))

    def to_text(self) -> str:
        """Return the official text, with special tokens."""
        return f"{BOX_START}({self.x1},{self.y1}),({self.x2},{self.y2}){BOX_END}"


@dataclass(frozen=True, slots=True)
class Quad:
    """A quadrilateral for rotated text: four corners in order, in thousandths."""

    corners: tuple[Point, Point, Point, Point]

    @classmethod
    def from_pixels(cls, numbers: Sequence[float], size: Size) -> Quad:
        """Normalize (x1, y1, ..., x4, y4) given in pixels; values outside the image are clamped."""
        a, b, c, d = (Point(x, y) for x, y in _pairs_from_pixels(numbers, size, 4))
        return cls((a, b, c, d))

    def to_pixels(self, size: Size) -> tuple[float, ...]:
        """Scale to eight numbers, in pixels of an image of `size` (height, width)."""
        return tuple(v for corner in self.corners for v in corner.to_pixels(size))

    def to_text(self) -> str:
        """Return the four corners between the quad tokens."""
        return QUAD_START + ",".join(corner.to_text() for corner in self.corners) + QUAD_END


@dataclass(frozen=True, slots=True)
class ObjectRef:
    """A referring expression: a phrase that denotes an object in the image."""

    phrase: str

    def to_text(self) -> str:
        """Return the phrase between the object_ref tokens."""
        return f"{REF_START}{self.phrase}{REF_END}"


GroundingShape = Point | Box | Quad


@dataclass(frozen=True, slots=True)
class Grounding:
    """One shape of a completion, and the phrase that it refers to, if any."""

    shape: GroundingShape
    phrase: str | None = None


# A span ends at its end token, or else at the next special token, or else at the end of the text.
_SPAN = re.compile(r"<\|(?P<kind>object_ref|box|quad)_start\|>(?P<body>.*?)(?=<\||\Z)", re.DOTALL)
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
_PAIR = rf"\(\s*{_NUMBER.pattern}\s*,\s*{_NUMBER.pattern}\s*\)"
_SPAN_OR_BARE = re.compile(rf"{_SPAN.pattern}|(?P<bare>{_PAIR}(?:\s*,\s*{_PAIR})*)", re.DOTALL)


def parse(text: str, *, bare: bool = False) -> list[Grounding]:
    """Parse every box, quad and point in a completion, in order.

    A phrase applies to the shapes after it, until the next phrase. Errors typical of small models
    are tolerated: a missing end token, spaces, other brackets, decimals, corners in the wrong
    order, values outside [0, 1000). Spans with an unusable count of numbers are skipped.

    Args:
        text: the completion, with its grounding tokens.
        bare: also parse "(x,y)" and "(x1,y1),(x2,y2)" without special tokens, as in tool-call
            arguments, or in text whose special tokens were stripped.
    """
    groundings: list[Grounding] = []
    phrase: str | None = None
    for match in (_SPAN_OR_BARE if bare else _SPAN).finditer(text):
        kind, body = match["kind"], match["body"]
        if kind == "object_ref":
            phrase = body.strip() or None
        else:
            numbers = [_clamp(float(n)) for n in _NUMBER.findall(body or match[0])]
            groundings += [Grounding(shape, phrase) for shape in _shapes(kind, numbers)]
    return groundings


def check_pixels(numbers: Sequence[float], size: Size, name: str) -> None:
    """Check that a box, point or quad in pixels is in its image, but for MAX_OUTSIDE.

    Args:
        numbers: x, y, x, y, ...
        size: (height, width) of the image.
        name: of the shape, for errors.

    Raises:
        CoordinateError: it is not, or its numbers are fractions of width and height.
    """
    height, width = size
    where = f"{name} is {list(numbers)}, in an image of {width} x {height} (width x height)"
    if are_fractions(numbers):
        raise CoordinateError(
            f"{where}: these are fractions, less than one pixel; multiply x by {width} and y by "
            f"{height}"
        )
    if not all(
        -MAX_OUTSIDE <= x <= width + MAX_OUTSIDE and -MAX_OUTSIDE <= y <= height + MAX_OUTSIDE
        for x, y in _in_pairs(numbers)
    ):
        raise CoordinateError(
            f"{where}: more than {MAX_OUTSIDE} pixels outside; give pixels of this image, as it is "
            "stored and not as it is resized"
        )


def are_fractions(numbers: Sequence[float]) -> bool:
    """Return whether coordinates are all at most 1, with decimals, or the box [0, 0, 1, 1]."""
    return all(abs(n) <= 1 for n in numbers) and (
        any(n != int(n) for n in numbers) or list(numbers) == [0, 0, 1, 1]
    )


def check_normalized(text: str, name: str) -> None:
    """Check that the boxes and quads of text are in thousandths; 1000 itself is tolerated.

    Args:
        text: with grounding tokens.
        name: of the text, for errors.

    Raises:
        CoordinateError: a number is outside [0, 1000], as in boxes in pixels.
    """
    if BOX_START not in text and QUAD_START not in text:
        return
    for match in _SPAN.finditer(text):
        numbers = _NUMBER.findall(match["body"]) if match["kind"] != "object_ref" else []
        outside = [number for number in numbers if not 0 <= float(number) <= SCALE]
        if outside:
            raise CoordinateError(
                f"{name} has {outside[0]:.20} in {match[0]:.100}, where coordinates are "
                "thousandths of the image, from 0 to 999; give pixels as "
                '{"type": "box", "box": [x1, y1, x2, y2]}, or in objects'
            )


def _shapes(kind: str | None, numbers: list[int]) -> Iterator[GroundingShape]:
    """Yield the shapes of one span: a quad, or else a single point, or one or more boxes."""
    if kind == "quad" and len(numbers) == 8:
        a, b, c, d = (Point(x, y) for x, y in _in_pairs(numbers))
        yield Quad((a, b, c, d))
    elif kind != "quad" and len(numbers) == 2:
        yield Point(*numbers)
    elif kind != "quad" and len(numbers) % 4 == 0:
        for i in range(0, len(numbers), 4):
            xa, ya, xb, yb = numbers[i : i + 4]
            yield Box(min(xa, xb), min(ya, yb), max(xa, xb), max(ya, yb))


def _pairs_from_pixels(numbers: Sequence[float], size: Size, count: int) -> list[tuple[int, int]]:
    if len(numbers) != 2 * count or not all(math.isfinite(v) for v in numbers):
        raise InputError(f"expected {2 * count} finite numbers in pixels, got {list(numbers)!r}")
    height, width = size
    return [(_clamp(x * SCALE / width), _clamp(y * SCALE / height)) for x, y in _in_pairs(numbers)]


def _in_pairs(numbers: Sequence[T]) -> Iterator[tuple[T, T]]:
    return zip(numbers[::2], numbers[1::2], strict=True)


def _clamp(value: float) -> int:
    """Round half up (round() rounds half to even) and clamp to [0, 999]; accepts infinities."""
    return math.floor(max(0.0, min(SCALE - 1.0, value)) + 0.5)
