"""Objects, positions and frames of the clips.

An object is visible in those frames in which it has a box. Names of the objects of a clip are
distinct, and so are the kinds and the colors of its shapes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from random import Random

from dev.suites.sampling import (
    OBJECTS,
    PLURALS,
    NamedLayer,
    deal,
    sample_icon,
    sample_shape,
    sample_textured,
    visible_colors,
)
from qwen2vl.eval.suites.frozen_suite import FrozenItem
from qwen2vl.synth.compositing import Composite, Ground
from qwen2vl.synth.shape_masks import SHAPE_KINDS

__all__ = [
    "LARGE_SIZES",
    "MARGIN",
    "SIZES",
    "Box",
    "Size",
    "build_frames",
    "clip_item",
    "deal_frame_counts",
    "lanes",
    "number_items",
    "place_in",
    "place_in_cells",
    "sample_objects",
    "sample_placed",
    "sample_side",
    "whole",
]

Box = tuple[int, int, int, int]
Size = tuple[int, int]  # width, height

SIZES: Sequence[Size] = (
    *((64, 64), (96, 64), (112, 112), (160, 96), (128, 224), (224, 224), (336, 112)),
    *((320, 180), (180, 320), (320, 240), (448, 112), (448, 448)),
)
LARGE_SIZES = SIZES[2:]  # large enough for several icons
MARGIN = 2  # pixels between an object and what bounds its place
MAX_SIDE = 160  # pixels
GRADIENT_SHARE = 0.15


def deal_frame_counts(rng: Random, count: int, *, low: int = 4, high: int = 16) -> list[int]:
    """Return numbers of frames in random order, as many even as odd ones; long ones are rare."""
    short = [number for number in range(low, 10) if number <= high]
    long = [number for number in (10, 11, 12, 13, 15, 16) if low <= number <= high]
    return deal(rng, [*short, *short, *long], count)


def sample_objects(rng: Random, count: int) -> tuple[Ground, list[NamedLayer]]:
    """Sample a ground and objects on it: each is a shape or an icon, as likely as not."""
    num_icons = sum(rng.random() < 0.5 for _ in range(count))
    kind = "gradient" if rng.random() < GRADIENT_SHARE else "plain"
    ground = sample_textured(rng, kind, light=num_icons > 0)
    num_shapes = count - num_icons
    kinds = rng.sample(SHAPE_KINDS, num_shapes)
    colors = rng.sample(visible_colors(ground), num_shapes)
    objects = [
        sample_shape(rng, ground, kind=kind, color=color)
        for kind, color in zip(kinds, colors, strict=True)
    ]
    names = rng.sample([name for name in OBJECTS if name not in PLURALS], num_icons)
    objects += [sample_icon(rng, name) for name in names]
    rng.shuffle(objects)
    return ground, objects


def sample_side(rng: Random, objects: Sequence[NamedLayer], available: int) -> int:
    """Sample the side of objects of equal size, pixels; 0 if they do not fit."""
    low = max(one.min_side for one in objects)
    high = min(available - 2 * MARGIN, MAX_SIDE)
    return rng.randint(low, high) if low <= high else 0


def whole(size: Size) -> Box:
    """Return the area of a whole frame."""
    return (0, 0, size[0], size[1])


def lanes(size: Size) -> list[Box]:
    """Split a canvas along its longer side into two lanes."""
    width, height = size
    if width >= height:
        return [(0, 0, width, height // 2), (0, height // 2, width, height)]
    return [(0, 0, width // 2, height), (width // 2, 0, width, height)]


def place_in_cells(rng: Random, size: Size, objects: Sequence[NamedLayer]) -> list[Box]:
    """Place objects into four cells of a canvas, each in its own; empty if they do not fit."""
    width, height = size
    columns, rows = (2, 2) if max(size) < 2 * min(size) else (4, 1) if width > height else (1, 4)
    cell = (width // columns, height // rows)
    boxes: list[Box] = []
    for index, one in zip(rng.sample(range(4), len(objects)), objects, strict=True):
        side = sample_side(rng, [one], min(cell))
        if not side:
            return []
        x = index % columns * cell[0] + rng.randint(MARGIN, cell[0] - MARGIN - side)
        y = index // columns * cell[1] + rng.randint(MARGIN, cell[1] - MARGIN - side)
        boxes.append((x, y, x + side, y + side))
    return boxes


def build_frames(
    size: Size, ground: Ground, tracks: Sequence[tuple[NamedLayer, Sequence[Box | None]]]
) -> tuple[Composite, ...]:
    """Build the frames of a clip.

    Args:
        size: of a frame.
        ground: of every frame.
        tracks: objects, each with its box in every frame; None where it is not visible.
    """
    return tuple(
        Composite(
            width=size[0],
            height=size[1],
            ground=ground,
            layers=tuple(
                named.at(box) for named, boxes in tracks if (box := boxes[frame]) is not None
            ),
        )
        for frame in range(len(tracks[0][1]))
    )


def sample_placed(rng: Random, area: Box, count: int) -> tuple[Ground, list[NamedLayer], list[Box]]:
    """Sample a ground and objects that fit into an area, each by itself, and their places."""
    while True:
        ground, objects = sample_objects(rng, count)
        boxes = place_in(rng, area, objects)
        if boxes:
            return ground, objects, boxes


def place_in(rng: Random, area: Box, objects: Sequence[NamedLayer]) -> list[Box]:
    """Place objects anywhere in an area, each by itself; empty if one does not fit."""
    boxes: list[Box] = []
    for one in objects:
        side = sample_side(rng, [one], min(area[2] - area[0], area[3] - area[1]))
        if not side:
            return []
        x = rng.randint(area[0] + MARGIN, area[2] - MARGIN - side)
        y = rng.randint(area[1] + MARGIN, area[3] - MARGIN - side)
        boxes.append((x, y, x + side, y + side))
    return boxes


def clip_item(
    kind: str,
    question: str,
    answers: Sequence[str],
    frames: Sequence[Composite],
    choices: int = 0,
) -> FrozenItem:
    """Create an item that `number_items` gives its part and id.

    Args:
        kind: of question.
        question: its text.
        answers: accepted ones.
        frames: of the clip.
        choices: number of equally likely answers; 0: the answer is a text that is read.
    """
    return FrozenItem(
        id="",
        part="",
        kind=kind,
        question=question,
        answers=tuple(answers),
        metric="exact_match" if choices else "edit_distance",
        pictures=tuple(frames),
        clip=True,
        choices=choices,
    )


def number_items(part: str, items: Sequence[FrozenItem]) -> list[FrozenItem]:
    """Give items a part, and its numbers as their ids."""
    return [replace(item, id=f"{part}/{index:03d}", part=part) for index, item in enumerate(items)]
