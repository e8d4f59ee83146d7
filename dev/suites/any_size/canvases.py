"""Canvases of `any-size`, and the placement of its items on them.

A canvas that holds several shapes is divided into cells, of which each has one. Shapes to find are
placed anywhere instead: boxes of cells would be guessed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from random import Random

from dev.suites.any_size.items import NUM_ITEMS, BaseItem
from qwen2vl.processor.image import smart_resize
from qwen2vl.synth.compositing import Composite, Text
from qwen2vl.synth.compositing.text import text_extent

__all__ = ["ABSOLUTE_SIDE", "CANVASES", "Box", "Canvas", "Placed", "place_items"]

Box = tuple[int, int, int, int]

ABSOLUTE_SIDE = 48  # pixels; of shapes to find, at most a third of the canvas's short side
MARGIN = 3  # pixels around each
FACTOR = 28  # pixels a side of a vision token

# Numbers of items of each kind: the first ones, of which the smaller numbers are parts.
SOME = {"shape": 12, "color": 16, "exists": 12, "count": 12, "object": 12}
FEWER = {"shape": 12, "color": 8, "exists": 8, "count": 12, "object": 8}
FEWEST = {"shape": 6, "color": 8, "exists": 6, "count": 8, "object": 4}


@dataclass(frozen=True, slots=True, kw_only=True)
class Canvas:
    """A size of picture, and which items are shown on it."""

    width: int
    height: int
    counts: Mapping[str, int] = field(default_factory=lambda: NUM_ITEMS)
    # Items that are shown without the default limit of 802,816 pixels of small models, too.
    unresized_counts: Mapping[str, int] = field(default_factory=dict)

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """An item on a canvas."""

    index: int  # among those of its kind
    base: BaseItem
    boxes: Sequence[Box]  # of its layers, in pixels
    picture: Composite


# Costly ones have fewer items: 2000x2000 has 5,041 tokens if it is not resized.
CANVASES = (
    Canvas(width=64, height=64),
    Canvas(width=112, height=112),
    Canvas(width=224, height=224),
    Canvas(width=448, height=448),
    Canvas(width=1024, height=768, counts={**SOME, "find": 24, "line": 16}),
    Canvas(
        width=1600,
        height=1200,
        counts={**FEWER, "find": 24, "line": 16},
        unresized_counts={**FEWEST, "find": 24, "line": 8},
    ),
    Canvas(
        width=2000,
        height=2000,
        counts={**FEWEST, "find": 24, "line": 8},
        unresized_counts={"shape": 6, "exists": 2, "count": 4, "find": 8, "line": 8},
    ),
    Canvas(width=100, height=1000),
    Canvas(width=200, height=2000, counts={**SOME, "find": 48, "line": 32}),
    Canvas(width=640, height=64),
    Canvas(width=1280, height=64),
    Canvas(width=2000, height=100),
)


def place_items(canvas: Canvas, bases: Sequence[BaseItem]) -> list[Placed]:
    """Place items of a kind on a canvas; those that it cannot hold are left out."""
    placed: list[Placed] = []
    for index, base in enumerate(bases):
        boxes = _place_line(base, canvas) if base.kind == "line" else _place(base, canvas)
        if boxes:
            picture = _picture(canvas, base, boxes)
            placed.append(Placed(index=index, base=base, boxes=boxes, picture=picture))
    return placed


def _picture(canvas: Canvas, base: BaseItem, boxes: Sequence[Box]) -> Composite:
    layers = tuple(named.at(box) for named, box in zip(base.layers, boxes, strict=True))
    return Composite(width=canvas.width, height=canvas.height, ground=base.ground, layers=layers)


def _place(base: BaseItem, canvas: Canvas) -> list[Box]:
    """Place the layers of an item into cells of the canvas; empty if they do not fit."""
    columns, rows = _grid(len(base.layers), canvas.width, canvas.height)
    cell = (canvas.width // columns, canvas.height // rows)
    side = _side(base, canvas, min(cell) - 2 * MARGIN)
    if not side:
        return []
    if base.kind == "find":
        return _scatter(base, canvas, side)
    used = [index for index in base.cells if index < columns * rows][: len(base.layers)]
    boxes: list[Box] = []
    for index, (u, v) in zip(used, base.places, strict=True):
        x = index % columns * cell[0] + MARGIN + round(u * (cell[0] - 2 * MARGIN - side))
        y = index // columns * cell[1] + MARGIN + round(v * (cell[1] - 2 * MARGIN - side))
        boxes.append((x, y, x + side, y + side))
    return boxes


def _scatter(base: BaseItem, canvas: Canvas, side: int) -> list[Box]:
    """Place the layers of an item anywhere, apart, so that no place is frequent."""
    rng = Random(f"{base.places}/{canvas.name}")
    while True:
        corners = [
            (
                rng.randint(MARGIN, canvas.width - MARGIN - side),
                rng.randint(MARGIN, canvas.height - MARGIN - side),
            )
            for _ in base.layers
        ]
        apart = side + MARGIN
        if all(max(abs(a - c), abs(b - d)) >= apart for (a, b), (c, d) in combinations(corners, 2)):
            return [(x, y, x + side, y + side) for x, y in corners]


def _side(base: BaseItem, canvas: Canvas, free: int) -> int:
    """Return the side of an item's layers in cells of a free side; 0 if they do not fit."""
    short = min(canvas.width, canvas.height)
    smallest = max(named.min_side for named in base.layers)
    if not base.is_absolute:
        side = min(max(smallest, round(base.share * short)), free)
    elif base.kind == "find":  # on all canvases, and never in nearly one place
        side = min(ABSOLUTE_SIDE, short // 3, free)
    elif base.kind == "count":  # on all or none: the answer would be known
        columns, rows = _grid(4, canvas.width, canvas.height)
        least = min(canvas.width // columns, canvas.height // rows) - 2 * MARGIN
        side = ABSOLUTE_SIDE if least >= ABSOLUTE_SIDE else 0
    else:
        side = ABSOLUTE_SIDE
    return side if smallest <= side <= free else 0


def _grid(count: int, width: int, height: int) -> tuple[int, int]:
    """Return the number of columns and rows of the cells of a canvas."""
    long = (1, 2, 4, 4)[count - 1]
    if long == 4 and max(width, height) < 2 * min(width, height):
        return 2, 2
    return (long, 1) if width >= height else (1, long)


def _place_line(base: BaseItem, canvas: Canvas) -> list[Box]:
    """Place a line of text anywhere on the canvas; empty if it does not fit."""
    (text,), ((u, v),) = base.layers, base.places
    assert isinstance(text.layer, Text), "a line is a text"
    left, top, right, bottom = text_extent(text.name, text.layer.font, text.layer.size)
    width, height = right - left, bottom - top
    free = (canvas.width - 2 * MARGIN - width, canvas.height - 2 * MARGIN - height)
    if min(free) < 0:
        return []
    x, y = MARGIN + round(u * free[0]), MARGIN + round(v * free[1])
    return [(x, y, x + width, y + height)]
