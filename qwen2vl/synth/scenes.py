"""Scenes: where the shapes of a picture stand, and what they may be called.

One to five shapes of at least 24 pixels a side that hardly overlap; neighbors that touch differ
in color, or they would melt into one. A phrase is a name only if it means exactly one shape. All
families with shapes take their scenes here; what is asked is theirs. It must not know pixels or
questions. Next room: shapes.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from random import Random

from qwen2vl.synth.colors import colors_on, sample_color, sample_ground
from qwen2vl.synth.draw import KINDS
from qwen2vl.synth.spec import Box, Mixture, Scene, Shape

__all__ = ["MIN_SIDE", "from_the_left", "overlap", "phrases", "place", "sample_scene"]

MIN_SIDE = 24  # pixels of the smallest shape
_MAX_OVERLAP = 0.1  # of the smaller box
_CLEARLY_FURTHER = 0.05  # of the width, between the centers of neighbors in an ordered list
_AREA_EACH = 2300  # pixels of canvas for each shape, so that they find room


def sample_scene(
    rng: Random,
    mixture: Mixture,
    *,
    count: int | None = None,
    canvas: tuple[int, int] | None = None,
) -> Scene:
    """Make up a scene of `count` shapes (default: any number the mixture allows).

    There are fewer where even the largest canvas has no room for so many.
    """
    low, high = canvas or mixture.canvas
    count = rng.randint(*mixture.num_shapes) if count is None else count
    count = min(count, max(1, high * high // _AREA_EACH))
    while True:
        width, height = rng.randint(low, high), rng.randint(low, high)
        boxes = place(rng, width, height, count)
        if boxes is not None:
            break
        low = min(low + 8, high)
    ground = sample_ground(rng)
    # Few kinds and colors now and then, or counts by kind would nearly always be one.
    kinds = rng.sample(KINDS, rng.choice((1, 2, 3, 6)))
    colors = rng.sample(colors_on(ground), rng.choice((1, 2, 4, 7)))
    shapes: list[Shape] = []
    for box in boxes:
        # Neighbors of one color that touch would melt into one shape.
        touched = {other.color for other in shapes if overlap(box, other.box) > 0}
        free = [c for c in colors_on(ground) if c not in touched]
        shapes.append(_sample_shape(rng, kinds, [c for c in colors if c in free] or free, box))
    texture = rng.randrange(1, 1_000_000) if rng.random() < mixture.textured_share else 0
    return Scene(width=width, height=height, ground=ground, shapes=tuple(shapes), texture=texture)


def place(rng: Random, width: int, height: int, count: int) -> list[Box] | None:
    """Find room for `count` squares that hardly overlap; None when the canvas is too small."""
    if count > 1 and width * height < count * _AREA_EACH:
        return None
    short = min(width, height) - 2
    most = (
        int(short * 0.9) if count == 1 else int(min(short * 0.7, (width * height / count) ** 0.5))
    )
    boxes: list[Box] = []
    for _ in range(count):
        box = _find_room(rng, width, height, max(most, MIN_SIDE), boxes)
        if box is None:
            return None
        boxes.append(box)
    return boxes


def overlap(a: Box, b: Box) -> float:
    """Share of the smaller box that both cover."""
    wide = min(a[2], b[2]) - max(a[0], b[0])
    high = min(a[3], b[3]) - max(a[1], b[1])
    if wide <= 0 or high <= 0:
        return 0.0
    smaller = min((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return wide * high / smaller


def phrases(scene: Scene) -> dict[str, Shape]:
    """List every phrase that means exactly one shape: "red circle", "circle", "red shape"."""
    names = [
        (name, shape)
        for shape in scene.shapes
        for name in (shape.phrase, shape.kind, f"{shape.color} shape")
    ]
    uses = Counter(name for name, _ in names)
    return {name: shape for name, shape in names if uses[name] == 1}


def from_the_left(scene: Scene) -> list[Shape] | None:
    """Order the shapes from left to right; None when two of them are not clearly apart."""
    ordered = sorted(scene.shapes, key=lambda shape: shape.center[0])
    gap = _CLEARLY_FURTHER * scene.width
    for left, right in pairwise(ordered):
        if right.center[0] - left.center[0] < gap:
            return None
    return ordered


def _sample_shape(rng: Random, kinds: Sequence[str], colors: Sequence[str], box: Box) -> Shape:
    color = rng.choice(colors)
    return Shape(kind=rng.choice(kinds), color=color, rgb=sample_color(rng, color), box=box)


def _find_room(rng: Random, width: int, height: int, most: int, taken: list[Box]) -> Box | None:
    for attempt in range(24):
        side = rng.randint(MIN_SIDE, max(MIN_SIDE, most - attempt * (most - MIN_SIDE) // 16))
        x, y = rng.randint(0, width - side), rng.randint(0, height - side)
        box = (x, y, x + side, y + side)
        if all(overlap(box, other) <= _MAX_OVERLAP for other in taken):
            return box
    return None
