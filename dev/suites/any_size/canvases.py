"""Canvases of `any-size`, and the placement of its items on them.

A canvas that holds several shapes is divided into cells, of which each has one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dev.suites.any_size.items import KINDS, LINES, NUM_ITEMS, BaseItem
from qwen2vl.processor.image import smart_resize
from qwen2vl.synth.compositing import Composite, Text
from qwen2vl.synth.compositing.text import text_extent

__all__ = ["ABSOLUTE_SIDE", "CANVASES", "Canvas", "line_pictures", "pictures"]

Box = tuple[int, int, int, int]

ABSOLUTE_SIDE = 48  # pixels
MARGIN = 3  # pixels around each
FACTOR = 28  # pixels a side of a vision token


@dataclass(frozen=True, slots=True, kw_only=True)
class Canvas:
    """A size of picture, and which items are shown on it."""

    width: int
    height: int
    has_both_sizes: bool = True  # else each item is relative or absolute, in turn
    kinds: Sequence[str] = KINDS
    lines: Sequence[int] = tuple(range(len(LINES)))
    is_shrunk: bool = False  # by the default limit of 802,816 pixels of small models

    @property
    def name(self) -> str:
        """Name of its part."""
        return f"{self.width}x{self.height}"

    @property
    def tokens(self) -> int:
        """Vision tokens of a picture that is not shrunk: one for 28 x 28 pixels."""
        rows, columns = smart_resize(
            self.height, self.width, factor=FACTOR, min_pixels=1, max_pixels=math.inf
        )
        return rows * columns // FACTOR**2

    @property
    def max_pixels(self) -> int:
        """Limit that does not shrink it: sides are rounded to multiples of 28 before."""
        return max(self.width * self.height, self.tokens * FACTOR**2)


# Costly ones have fewer items: 2000x2000 has 5,041 tokens if it is not resized.
CANVASES = (
    Canvas(width=64, height=64),
    Canvas(width=112, height=112),
    Canvas(width=224, height=224),
    Canvas(width=448, height=448),
    Canvas(width=1024, height=768, has_both_sizes=False),
    Canvas(width=1600, height=1200, has_both_sizes=False, is_shrunk=True),
    Canvas(
        width=2000,
        height=2000,
        has_both_sizes=False,
        kinds=("shape", "count", "object"),
        lines=(0, 3, 5, 7),
        is_shrunk=True,
    ),
    Canvas(width=100, height=1000),
    Canvas(width=200, height=2000),
    Canvas(width=640, height=64),
    Canvas(width=1280, height=64),
    Canvas(width=2000, height=100),
)


def pictures(
    canvas: Canvas, bases: Mapping[str, Sequence[BaseItem]]
) -> list[tuple[int, BaseItem, Composite]]:
    """Draw up the items of a canvas, with their numbers; those it cannot hold are left out."""
    numbered: list[tuple[int, BaseItem, Composite]] = []
    for kind in canvas.kinds:
        for is_absolute in (False, True):
            boxes = {
                index: placed
                for index, base in enumerate(bases[kind])
                if (canvas.has_both_sizes or index % 2 == is_absolute)
                and (placed := _place(base, canvas, is_absolute))
            }
            if len(boxes) < 2:  # a single one would keep its picture in the blind control
                continue
            first = (2 * KINDS.index(kind) + is_absolute) * NUM_ITEMS
            for index, placed in boxes.items():
                base = bases[kind][index]
                numbered.append((first + index, base, _picture(canvas, base, placed)))
    return numbered


def _picture(canvas: Canvas, base: BaseItem, boxes: Sequence[Box]) -> Composite:
    layers = tuple(named.at(box) for named, box in zip(base.layers, boxes, strict=True))
    return Composite(width=canvas.width, height=canvas.height, ground=base.ground, layers=layers)


def _place(base: BaseItem, canvas: Canvas, is_absolute: bool) -> list[Box]:
    """Place the layers of an item into cells of the canvas; empty if they do not fit."""
    width, height, count = canvas.width, canvas.height, len(base.layers)
    columns, rows = _grid(count, width, height)
    cell = (width // columns, height // rows)
    free = min(cell) - 2 * MARGIN
    smallest = max(named.min_side for named in base.layers)
    side = min(max(smallest, round(base.share * min(width, height))), free)
    if is_absolute:
        side = smallest = ABSOLUTE_SIDE
    if smallest > free:
        return []
    used = [index for index in base.cells if index < columns * rows][:count]
    boxes: list[Box] = []
    for index, (u, v) in zip(used, base.places, strict=True):
        x = index % columns * cell[0] + MARGIN + round(u * (cell[0] - 2 * MARGIN - side))
        y = index // columns * cell[1] + MARGIN + round(v * (cell[1] - 2 * MARGIN - side))
        boxes.append((x, y, x + side, y + side))
    return boxes


def _grid(count: int, width: int, height: int) -> tuple[int, int]:
    """Return the number of columns and rows of the cells of a canvas."""
    long = (1, 2, 4, 4)[count - 1]
    if long == 4 and max(width, height) < 2 * min(width, height):
        return 2, 2
    return (long, 1) if width >= height else (1, long)


def line_pictures(
    canvas: Canvas, lines: Sequence[BaseItem]
) -> list[tuple[int, BaseItem, Composite]]:
    """Draw up the lines of a canvas, with their numbers; those it cannot hold are left out."""
    numbered: list[tuple[int, BaseItem, Composite]] = []
    for index in canvas.lines:
        base, (text,), ((u, v),) = lines[index], lines[index].layers, lines[index].places
        assert isinstance(text.layer, Text), "a line is a text"
        left, top, right, bottom = text_extent(text.name, text.layer.font, text.layer.size)
        free = (
            canvas.width - 2 * MARGIN - (right - left),
            canvas.height - 2 * MARGIN - (bottom - top),
        )
        if min(free) < 0:
            continue
        x, y = MARGIN + round(u * free[0]), MARGIN + round(v * free[1])
        picture = _picture(canvas, base, [(x, y, x + right - left, y + bottom - top)])
        numbered.append((index, base, picture))
    return numbered
