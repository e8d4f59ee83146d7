"""Sampling of scenes: positions, kinds and colors of shapes, and the phrases that identify them.

A scene has one to five shapes of at least 24 pixels a side, each pair overlapping by at most a
tenth of the smaller box; shapes that touch differ in color, or they would merge into one. A phrase
is used as a name only if it refers to exactly one shape. All task families with shapes sample
their scenes here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from random import Random

from qwen2vl.synth.colors import colors_on, sample_color, sample_ground
from qwen2vl.synth.shape_masks import SHAPE_KINDS
from qwen2vl.synth.spec import Box, Mixture, Scene, Shape

__all__ = [
    "MIN_SIDE",
    "NEAR_MIDDLE",
    "OFF_MIDDLE",
    "left_to_right",
    "overlap",
    "place_boxes",
    "region_of",
    "sample_scene",
    "unique_phrases",
]

MIN_SIDE = 24  # pixels of the smallest shape
# Offsets from the middle of a picture, as shares of its side: below, a position is in the middle;
# above, it is on a side.
NEAR_MIDDLE, OFF_MIDDLE = 0.1, 0.2
_MAX_OVERLAP = 0.1  # of the smaller box
_MIN_ORDER_GAP = 0.05  # of the width, between the centers of consecutive shapes of an ordered list
_MIN_AREA_PER_SHAPE = 2300  # pixels of canvas for each shape, so that placement succeeds


def sample_scene(
    rng: Random,
    mixture: Mixture,
    *,
    count: int | None = None,
    canvas: tuple[int, int] | None = None,
) -> Scene:
    """Sample a scene of `count` shapes (default: any number the mixture allows).

    The count is reduced where even the largest canvas is too small for it.
    """
    low, high = canvas or mixture.canvas
    count = rng.randint(*mixture.num_shapes) if count is None else count
    count = min(count, max(1, high * high // _MIN_AREA_PER_SHAPE))
    while True:
        width, height = rng.randint(low, high), rng.randint(low, high)
        boxes = place_boxes(rng, width, height, count)
        if boxes is not None:
            break
        low = min(low + 8, high)
    ground = sample_ground(rng)
    # Some scenes use few kinds and colors; otherwise counts by kind would nearly always be one.
    kinds = rng.sample(SHAPE_KINDS, rng.choice((1, 2, 3, 6)))
    colors = rng.sample(colors_on(ground), rng.choice((1, 2, 4, 7)))
    shapes: list[Shape] = []
    for box in boxes:
        # Shapes of one color that touch would merge into one.
        touched = {other.color for other in shapes if overlap(box, other.box) > 0}
        free = [c for c in colors_on(ground) if c not in touched]
        shapes.append(_sample_shape(rng, kinds, [c for c in colors if c in free] or free, box))
    texture = rng.randrange(1, 1_000_000) if rng.random() < mixture.textured_share else 0
    return Scene(width=width, height=height, ground=ground, shapes=tuple(shapes), texture=texture)


def place_boxes(rng: Random, width: int, height: int, count: int) -> list[Box] | None:
    """Sample boxes of `count` squares with little overlap; None if the canvas is too small."""
    if count > 1 and width * height < count * _MIN_AREA_PER_SHAPE:
        return None
    short = min(width, height) - 2
    max_side = (
        int(short * 0.9) if count == 1 else int(min(short * 0.7, (width * height / count) ** 0.5))
    )
    boxes: list[Box] = []
    for _ in range(count):
        box = _place_box(rng, width, height, max(max_side, MIN_SIDE), boxes)
        if box is None:
            return None
        boxes.append(box)
    return boxes


def overlap(a: Box, b: Box) -> float:
    """Return the intersection of two boxes as a fraction of the smaller one."""
    wide = min(a[2], b[2]) - max(a[0], b[0])
    high = min(a[3], b[3]) - max(a[1], b[1])
    if wide <= 0 or high <= 0:
        return 0.0
    smaller = min((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return wide * high / smaller


def region_of(dx: float, dy: float) -> str | None:
    """Return the region of a position: left, right, top, bottom or middle; None between two.

    Args:
        dx: offset of the position from the middle, as a share of the width.
        dy: the same, of the height.
    """
    if max(abs(dx), abs(dy)) < NEAR_MIDDLE:
        return "middle"
    if abs(dx) > OFF_MIDDLE and abs(dx) > abs(dy) + NEAR_MIDDLE:
        return "left" if dx < 0 else "right"
    if abs(dy) > OFF_MIDDLE and abs(dy) > abs(dx) + NEAR_MIDDLE:
        return "top" if dy < 0 else "bottom"
    return None


def unique_phrases(scene: Scene) -> dict[str, Shape]:
    """Return every phrase that refers to exactly one shape: "red circle", "circle", "red shape"."""
    names = [
        (name, shape)
        for shape in scene.shapes
        for name in (shape.phrase, shape.kind, f"{shape.color} shape")
    ]
    uses = Counter(name for name, _ in names)
    return {name: shape for name, shape in names if uses[name] == 1}


def left_to_right(scene: Scene) -> list[Shape] | None:
    """Return the shapes from left to right; None if two centers are less than 5 % apart."""
    ordered = sorted(scene.shapes, key=lambda shape: shape.center[0])
    gap = _MIN_ORDER_GAP * scene.width
    for left, right in pairwise(ordered):
        if right.center[0] - left.center[0] < gap:
            return None
    return ordered


def _sample_shape(rng: Random, kinds: Sequence[str], colors: Sequence[str], box: Box) -> Shape:
    color = rng.choice(colors)
    return Shape(kind=rng.choice(kinds), color=color, rgb=sample_color(rng, color), box=box)


def _place_box(
    rng: Random, width: int, height: int, max_side: int, placed: list[Box]
) -> Box | None:
    for attempt in range(24):
        side = rng.randint(
            MIN_SIDE, max(MIN_SIDE, max_side - attempt * (max_side - MIN_SIDE) // 16)
        )
        x, y = rng.randint(0, width - side), rng.randint(0, height - side)
        box = (x, y, x + side, y + side)
        if all(overlap(box, other) <= _MAX_OVERLAP for other in placed):
            return box
    return None
