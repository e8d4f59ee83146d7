"""Seven-segment digits as rectangles: square or pointed segments, upright or slanted.

    layers, width = draw_segments("-12.5", (0, 0), shape, lit=(255, 0, 0), unlit=None)

The characters are the digits, minus and space, which are one digit wide, and colon and point. A
pointed or slanted segment is a stack of rectangles, one for each run of equal rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from random import Random

from qwen2vl.synth.compositing.layers import Layer, Rect
from qwen2vl.synth.spec import RGB, Box

__all__ = ["SEGMENTS", "SegmentShape", "draw_segments", "sample_segment_shape", "segments_width"]

# a: top, b: upper right, c: lower right, d: bottom, e: lower left, f: upper left, g: middle.
SEGMENTS = {
    "0": "abcdef",
    "1": "bc",
    "2": "abged",
    "3": "abgcd",
    "4": "fgbc",
    "5": "afgcd",
    "6": "afgecd",
    "7": "abc",
    "8": "abcdefg",
    "9": "abcdfg",
    "-": "g",
    " ": "",
}
_WITHOUT_TAILS = {"6": "fgecd", "9": "abcfg"}


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentShape:
    """The form of the digits, in pixels."""

    height: int
    width: int  # of a digit, without slant
    thickness: int
    gap: int  # between neighboring segments
    space: int  # between characters
    is_pointed: bool = False
    slant: float = 0.0  # pixels to the right for each pixel of height
    has_tails: bool = True  # of 6 and 9

    @property
    def overhang(self) -> int:
        """Pixels by which the slant moves the top to the right."""
        return round(self.slant * self.height)


def sample_segment_shape(rng: Random, height: int) -> SegmentShape:
    """Sample the form of digits of a height of 12 pixels or more."""
    gap = rng.choice((0, 1, 1, 2)) * max(1, height // 60) if height >= 28 else 0
    is_pointed = height >= 28 and rng.random() < 0.5
    thickness = max(2, round(height * rng.uniform(0.09, 0.13 if gap else 0.17)))
    # Between the vertical segments, the horizontal ones must be long enough to be seen.
    least = 2 * gap + (5 if gap or is_pointed else 3) * thickness
    return SegmentShape(
        height=height,
        width=max(least, round(height * rng.uniform(0.45, 0.65))),
        thickness=thickness,
        gap=gap,
        space=max(2, thickness, round(height * rng.uniform(0.12, 0.3))),
        is_pointed=is_pointed,
        slant=rng.uniform(0.05, 0.18) if rng.random() < 0.3 else 0.0,
        has_tails=rng.random() < 0.8,
    )


def segments_width(text: str, shape: SegmentShape) -> int:
    """Compute the width of a text, in pixels."""
    return sum(_advance(char, shape) for char in text) - shape.space + shape.overhang


def draw_segments(
    text: str, at: tuple[int, int], shape: SegmentShape, *, lit: RGB, unlit: RGB | None = None
) -> list[Layer]:
    """Draw a text with its top left corner at `at`.

    Args:
        text: digits, minus, colon, point and space.
        at: (x, y) in pixels.
        shape: form of the digits.
        lit: color.
        unlit: color of the other segments of each digit; None: they are not drawn.
    """
    x, y = at
    layers: list[Layer] = []
    for char in text:
        if char in ":.":
            boxes = _dots(char, shape)
            layers += [Rect(rgb=lit, box=_move(box, x, y)) for box in boxes]
        else:
            names = SEGMENTS[char] if shape.has_tails else _WITHOUT_TAILS.get(char, SEGMENTS[char])
            for name in "abcdefg":
                rgb = lit if name in names else unlit
                if rgb is not None:
                    layers += [
                        Rect(rgb=rgb, box=_move(box, x, y)) for box in _segment_boxes(name, shape)
                    ]
        x += _advance(char, shape)
    return layers


def _move(box: Box, x: int, y: int) -> Box:
    return box[0] + x, box[1] + y, box[2] + x, box[3] + y


def _advance(char: str, shape: SegmentShape) -> int:
    return (shape.thickness if char in ":." else shape.width) + shape.space


def _dots(char: str, shape: SegmentShape) -> list[Box]:
    side, height = shape.thickness, shape.height
    if char == ".":
        return [(0, height - side, side, height)]
    tops = (round(height * 0.3) - side // 2, round(height * 0.7) - side // 2)
    shifts = [round(shape.slant * (height - top)) for top in tops]
    return [(shift, top, shift + side, top + side) for shift, top in zip(shifts, tops, strict=True)]


@lru_cache(maxsize=1024)
def _segment_boxes(name: str, shape: SegmentShape) -> tuple[Box, ...]:
    """Return the rectangles of a segment, relative to the top left corner of its digit."""
    boxes: list[Box] = []
    rows = _horizontal_rows(name, shape) if name in "agd" else _vertical_rows(name, shape)
    slanted = [
        (y, left + shift, right + shift)
        for y, left, right in rows
        if (shift := round(shape.slant * (shape.height - y))) >= 0 and right > left
    ]
    for (left, right), run in groupby(slanted, key=lambda row: row[1:]):
        ys = [y for y, _, _ in run]
        boxes.append((left, ys[0], right, ys[-1] + 1))
    return tuple(boxes)


def _horizontal_rows(name: str, shape: SegmentShape) -> Iterator[tuple[int, int, int]]:
    """Yield (y, first column, last column + 1) of each row of segment a, g or d."""
    thick = shape.thickness
    top = {"a": 0, "g": (shape.height - thick) // 2, "d": shape.height - thick}[name]
    inset = shape.gap + (thick // 2 if shape.is_pointed else thick)
    if not shape.is_pointed and shape.gap == 0:
        inset = 0
    for row in range(thick):
        cut = abs(2 * row + 1 - thick) // 2 if shape.is_pointed else 0
        yield top + row, inset + cut, shape.width - inset - cut


def _vertical_rows(name: str, shape: SegmentShape) -> Iterator[tuple[int, int, int]]:
    """Yield (y, first column, last column + 1) of each row of segment b, c, e or f."""
    thick, middle = shape.thickness, shape.height // 2
    left = 0 if name in "ef" else shape.width - thick
    inset = shape.gap + (thick // 2 if shape.is_pointed else 0)
    top, bottom = (
        (inset, middle - shape.gap) if name in "bf" else (middle + shape.gap, shape.height - inset)
    )
    for y in range(top, bottom):
        near = min(y - top, bottom - 1 - y)
        cut = max(0, thick // 2 - near) if shape.is_pointed else 0
        yield y, left + cut, left + thick - cut
