"""Boxes and points: text of the model <-> numbers in [0, 1000) <-> pixels of the picture as given.

The model never learns how large a picture was: every coordinate is x * 1000 / width (or height),
rounded, independent of resizing, and written inside special tokens:

    <|object_ref_start|>the cat<|object_ref_end|><|box_start|>(176,106),(232,160)<|box_end|>

Shapes here hold the model's integers; pixels are floats and go with a size (height, width). This
room knows no tensor and no picture: standard library only. (Qwen2-VL sec. 2.2.1.)
Who calls it: processor/chat_template.py on the way in, the command line and agents on the way out.
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
    "Grounding",
    "Point",
    "Quad",
    "Ref",
    "Shape",
    "Size",
    "parse",
]

REF_START, REF_END = "<|object_ref_start|>", "<|object_ref_end|>"
BOX_START, BOX_END = "<|box_start|>", "<|box_end|>"
QUAD_START, QUAD_END = "<|quad_start|>", "<|quad_end|>"
GROUNDING_TOKENS = (REF_START, REF_END, BOX_START, BOX_END, QUAD_START, QUAD_END)

SCALE = 1000  # coordinates live in [0, 1000)

T = TypeVar("T")
Size = tuple[int, int]  # (height, width) of the picture as given, in pixels


@dataclass(frozen=True, slots=True)
class Point:
    """A place, in thousandths of the picture's width and height."""

    x: int
    y: int

    @classmethod
    def from_pixels(cls, numbers: Sequence[float], size: Size) -> Point:
        """Scale (x, y) in pixels; what lies outside the picture is moved to its border."""
        (xy,) = _pairs_from_pixels(numbers, size, 1)
        return cls(*xy)

    def to_pixels(self, size: Size) -> tuple[float, float]:
        """Scale to pixels of a picture of `size` (height, width)."""
        height, width = size
        return self.x * width / SCALE, self.y * height / SCALE

    def to_text(self) -> str:
        """Write "(x,y)", as the model's tool arguments do; a point has no special tokens."""
        return f"({self.x},{self.y})"


@dataclass(frozen=True, slots=True)
class Box:
    """An upright rectangle from its top left to its bottom right corner, in thousandths."""

    x1: int
    y1: int
    x2: int
    y2: int

    @classmethod
    def from_pixels(cls, numbers: Sequence[float], size: Size) -> Box:
        """Scale (x1, y1, x2, y2) in pixels; what lies outside is moved to the border."""
        (x1, y1), (x2, y2) = _pairs_from_pixels(numbers, size, 2)
        return cls(x1, y1, x2, y2)

    def to_pixels(self, size: Size) -> tuple[float, float, float, float]:
        """Scale to pixels of a picture of `size` (height, width)."""
        return (*Point(self.x1, self.y1).to_pixels(size), *Point(self.x2, self.y2).to_pixels(size))

    def to_text(self) -> str:
        """Write the official text, special tokens included."""
        return f"{BOX_START}({self.x1},{self.y1}),({self.x2},{self.y2}){BOX_END}"


@dataclass(frozen=True, slots=True)
class Quad:
    """Four corners in order, for text that is not upright, in thousandths."""

    corners: tuple[Point, Point, Point, Point]

    @classmethod
    def from_pixels(cls, numbers: Sequence[float], size: Size) -> Quad:
        """Scale (x1, y1, ..., x4, y4) in pixels; what lies outside is moved to the border."""
        a, b, c, d = (Point(x, y) for x, y in _pairs_from_pixels(numbers, size, 4))
        return cls((a, b, c, d))

    def to_pixels(self, size: Size) -> tuple[float, ...]:
        """Scale to eight numbers, in pixels of a picture of `size` (height, width)."""
        return tuple(v for corner in self.corners for v in corner.to_pixels(size))

    def to_text(self) -> str:
        """Write the four corners between the quad tokens."""
        return QUAD_START + ",".join(corner.to_text() for corner in self.corners) + QUAD_END


@dataclass(frozen=True, slots=True)
class Ref:
    """A phrase that names something in the picture."""

    phrase: str

    def to_text(self) -> str:
        """Write the phrase between the object_ref tokens."""
        return f"{REF_START}{self.phrase}{REF_END}"


Shape = Point | Box | Quad


@dataclass(frozen=True, slots=True)
class Grounding:
    """One shape that the model wrote, and the phrase it belongs to, if it named one."""

    shape: Shape
    phrase: str | None = None


# A span runs to its own end token, else to whatever special token comes next, else to the end.
_SPAN = re.compile(r"<\|(?P<kind>object_ref|box|quad)_start\|>(?P<body>.*?)(?=<\||\Z)", re.DOTALL)
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
_PAIR = rf"\(\s*{_NUMBER.pattern}\s*,\s*{_NUMBER.pattern}\s*\)"
_SPAN_OR_BARE = re.compile(rf"{_SPAN.pattern}|(?P<bare>{_PAIR}(?:\s*,\s*{_PAIR})*)", re.DOTALL)


def parse(text: str, *, bare: bool = False) -> list[Grounding]:
    """Find every box, quad and point in a model's answer, in order.

    A phrase holds for the shapes after it, until the next phrase. What a small model gets wrong
    is forgiven: a missing end token, spaces, brackets of another kind, decimals, corners in the
    wrong order, values outside [0, 1000). What holds no usable count of numbers is left out.

    Args:
        text: the answer, with its grounding tokens.
        bare: read "(x,y)" and "(x1,y1),(x2,y2)" without tokens too, as in the arguments of a
            tool, or after another program has dropped the tokens.
    """
    found: list[Grounding] = []
    phrase: str | None = None
    for match in (_SPAN_OR_BARE if bare else _SPAN).finditer(text):
        kind, body = match["kind"], match["body"]
        if kind == "object_ref":
            phrase = body.strip() or None
        else:
            numbers = [_clamp(float(n)) for n in _NUMBER.findall(body or match[0])]
            found += [Grounding(shape, phrase) for shape in _shapes(kind, numbers)]
    return found


def _shapes(kind: str | None, numbers: list[int]) -> Iterator[Shape]:
    """Read the numbers of one span; all but a quad's may be several boxes, or a single point."""
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
    """Round half up (Python's round() goes to even) into [0, 999]; infinities have a place, too."""
    return math.floor(max(0.0, min(SCALE - 1.0, value)) + 0.5)
