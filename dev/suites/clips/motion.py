"""Clips in which objects move: direction, frames in another order, whether they move, speed.

Paths are straight, and of constant speed. A clip of `speed` has a twin in which the two objects
have changed places; the answer is then the other one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from random import Random
from typing import NamedTuple

from dev.suites.clips.scenes import (
    LARGE_SIZES,
    MARGIN,
    SIZES,
    Box,
    Size,
    build_frames,
    clip_item,
    deal_frame_counts,
    lanes,
    sample_objects,
    sample_side,
    whole,
)
from dev.suites.sampling import FONTS, NamedLayer, deal, sample_text, sample_textured
from qwen2vl.eval.suites.frozen_suite import FrozenItem
from qwen2vl.synth.compositing import Ground, Text
from qwen2vl.synth.compositing.text import text_extent

__all__ = ["QUESTIONS", "sample_directions", "sample_speeds", "sample_stills", "shuffled"]

DIRECTIONS = ("left", "right", "up", "down")
DIRECTION_ANSWERS = {
    "left": ("left", "to the left", "leftward", "leftwards"),
    "right": ("right", "to the right", "rightward", "rightwards"),
    "up": ("up", "upward", "upwards", "to the top"),
    "down": ("down", "downward", "downwards", "to the bottom"),
}
QUESTIONS = {
    "direction": (
        "In which direction does the {0} travel: left, right, up or down?",
        "Toward which side does the {0} move: up, down, left or right?",
    ),
    "still": (
        "Does the {0} move? Answer yes or no.",
        "Is the {0} in motion? Answer yes or no.",
    ),
    "speed": (
        "Which moves {2}, the {0} or the {1}?",
        "Which of the two is {2}: the {0} or the {1}?",
    ),
}
MIN_TRAVEL = 0.4  # of the free distance
MIN_STEP = 1.5  # pixels a frame
MIN_RATIO = 2.2  # of the faster speed to the slower one


class _Mover(NamedTuple):
    ground: Ground
    layer: NamedLayer
    name: str  # in the question
    extent: Size


def sample_directions(rng: Random, count: int) -> list[FrozenItem]:
    """Sample clips of one object that moves; all four directions are as frequent."""
    items: list[FrozenItem] = []
    answers, sizes = deal(rng, DIRECTIONS, count), deal(rng, SIZES, count)
    forms = deal(rng, ("object", "object", "object", "text"), count)
    counts = deal_frame_counts(rng, count)
    for answer, size, form, num_frames in zip(answers, sizes, forms, counts, strict=True):
        axis = 0 if answer in ("left", "right") else 1
        mover, boxes = _sample_moving(rng, size, axis, num_frames, is_text=form == "text")
        if answer in ("left", "up"):
            boxes.reverse()
        items.append(
            clip_item(
                "direction",
                QUESTIONS["direction"][len(items) % 2].format(mover.name),
                DIRECTION_ANSWERS[answer],
                build_frames(size, mover.ground, [(mover.layer, boxes)]),
                len(DIRECTIONS),
            )
        )
    return items


def shuffled(rng: Random, items: Sequence[FrozenItem]) -> list[FrozenItem]:
    """Return the same clips with their frames in an order that has no direction.

    As many pairs of frames are in order as are reversed, up to one pair; in half of the clips of
    each direction the last frame is later than the first. Frames still show the axis of the motion,
    which leaves two answers.
    """
    result: list[FrozenItem] = []
    num_of_answer: Counter[str] = Counter()
    for item in items:
        answer = item.answers[0]
        ends_later = num_of_answer[answer] % 2 == 0
        order = _balanced_order(rng, len(item.pictures), ends_later=ends_later)
        frames = tuple(item.pictures[index] for index in order)
        result.append(replace(item, pictures=frames, choices=2))
        num_of_answer[answer] += 1
    return result


def sample_stills(rng: Random, count: int) -> list[FrozenItem]:
    """Sample clips of one or two objects; half of those that are asked about do not move."""
    items: list[FrozenItem] = []
    cases = deal(rng, [(a, b) for a in (True, False) for b in (None, True)], count)
    counts, sizes = deal_frame_counts(rng, count), deal(rng, LARGE_SIZES, count)
    for (moves, other), size, num_frames in zip(cases, sizes, counts, strict=True):
        # The other object does what the first one does not.
        moving = [moves] if other is None else [moves, not moves]
        areas = [whole(size)] if other is None else rng.sample(lanes(size), 2)
        ground, tracks = _sample_tracks(rng, areas, moving, num_frames)
        items.append(
            clip_item(
                "still",
                QUESTIONS["still"][len(items) % 2].format(tracks[0][0].name),
                ["yes" if moves else "no"],
                build_frames(size, ground, rng.sample(tracks, len(tracks))),
                2,
            )
        )
    return items


def sample_speeds(rng: Random, count: int) -> list[FrozenItem]:
    """Sample pairs of clips of two objects, of which one is at least twice as fast."""
    items: list[FrozenItem] = []
    words = deal(rng, ("faster", "slower"), count // 2)
    counts = deal_frame_counts(rng, count // 2, high=9)
    for word, size, num_frames in zip(
        words, deal(rng, LARGE_SIZES, count // 2), counts, strict=True
    ):
        ground, pair, paths = _sample_race(rng, size, num_frames)
        named = rng.sample(pair, 2)
        question = QUESTIONS["speed"][len(items) // 2 % 2]
        for fast, slow in (pair, pair[::-1]):
            tracks = list(zip((fast, slow), paths, strict=True))
            items.append(
                clip_item(
                    "speed",
                    question.format(named[0].name, named[1].name, word),
                    (fast if word == "faster" else slow).answers,
                    build_frames(size, ground, tracks),
                    2,
                )
            )
    rng.shuffle(items)
    return items


def _sample_moving(
    rng: Random, size: Size, axis: int, num_frames: int, *, is_text: bool
) -> tuple[_Mover, list[Box]]:
    """Sample an object, and its path to the right or downward."""
    while True:
        mover = _sample_text(rng) if is_text else _sample_object(rng, min(size) // 2)
        boxes = _sample_path(rng, whole(size), mover.extent, axis, num_frames)
        if boxes:
            return mover, boxes


def _sample_object(rng: Random, available: int) -> _Mover:
    ground, (one,) = sample_objects(rng, 1)
    side = sample_side(rng, [one], max(available, one.min_side + 2 * MARGIN))
    return _Mover(ground, one, one.name, (side, side))


def _sample_text(rng: Random) -> _Mover:
    ground = sample_textured(rng, "plain")
    text = sample_text(rng, ground, rng.choice(FONTS), rng.randint(16, 28), rng.randint(2, 4))
    assert isinstance(text.layer, Text), "it is a text"
    left, top, right, bottom = text_extent(text.name, text.layer.font, text.layer.size)
    return _Mover(ground, text, "text", (right - left, bottom - top))


def _sample_path(
    rng: Random, area: Box, extent: Size, axis: int, num_frames: int, shortest: float = 0.0
) -> list[Box]:
    """Sample a path to the right or downward within an area; empty if it is too short.

    Args:
        rng: source of the choices.
        area: that the object does not leave.
        extent: width and height of the object.
        axis: 0 to the right, 1 downward.
        num_frames: number of boxes.
        shortest: distance, pixels.
    """
    free = [area[i + 2] - area[i] - extent[i] - 2 * MARGIN for i in (0, 1)]
    low = max(MIN_TRAVEL * free[axis], MIN_STEP * (num_frames - 1), shortest)
    if min(free) < 0 or low > free[axis]:
        return []
    travel = rng.randint(round(low), free[axis])
    start = [
        area[i] + MARGIN + rng.randint(0, free[i] - (travel if i == axis else 0)) for i in (0, 1)
    ]
    return _straight(start, extent, axis, travel, num_frames)


def _straight(
    start: Sequence[int], extent: Size, axis: int, travel: int, num_frames: int
) -> list[Box]:
    boxes: list[Box] = []
    for frame in range(num_frames):
        moved = round(travel * frame / (num_frames - 1))
        x, y = start[0] + (moved if axis == 0 else 0), start[1] + (moved if axis == 1 else 0)
        boxes.append((x, y, x + extent[0], y + extent[1]))
    return boxes


def _sample_tracks(
    rng: Random, areas: Sequence[Box], moving: Sequence[bool], num_frames: int
) -> tuple[Ground, list[tuple[NamedLayer, list[Box]]]]:
    """Sample an object for each area, and its path there, or its place if it does not move."""
    while True:
        ground, objects = sample_objects(rng, len(areas))
        tracks: list[tuple[NamedLayer, list[Box]]] = []
        for one, area, moves in zip(objects, areas, moving, strict=True):
            side = sample_side(rng, [one], min(area[2] - area[0], area[3] - area[1]))
            boxes = _sample_path(rng, area, (side, side), rng.randrange(2), num_frames)
            if not side or not boxes:
                break
            boxes = rng.choice((boxes, boxes[::-1]))
            tracks.append((one, boxes if moves else [boxes[0]] * num_frames))
        else:
            return ground, tracks


def _sample_race(
    rng: Random, size: Size, num_frames: int
) -> tuple[Ground, list[NamedLayer], list[list[Box]]]:
    """Sample two objects of equal size, and the paths of a faster and of a slower one."""
    axis = 0 if size[0] >= size[1] else 1
    while True:
        ground, pair = sample_objects(rng, 2)
        first, second = rng.sample(lanes(size), 2)
        side = sample_side(rng, pair, min(size) // 2)
        slow = _sample_slow_path(rng, second, side, axis, num_frames) if side else []
        if not slow:
            continue
        distance = abs(slow[-1][axis] - slow[0][axis])
        fast = _sample_path(rng, first, (side, side), axis, num_frames, MIN_RATIO * distance)
        if fast:
            return ground, pair, [rng.choice((path, path[::-1])) for path in (fast, slow)]


def _sample_slow_path(rng: Random, area: Box, side: int, axis: int, num_frames: int) -> list[Box]:
    """Sample a path of at most a third of the area's length."""
    length = (area[axis + 2] - area[axis]) // 3 + side
    free = area[axis + 2] - area[axis] - length
    if free < 0:
        return []
    offset = rng.randint(0, free)
    part = list(area)
    part[axis] += offset
    part[axis + 2] = part[axis] + length
    return _sample_path(rng, (part[0], part[1], part[2], part[3]), (side, side), axis, num_frames)


def _balanced_order(rng: Random, count: int, *, ends_later: bool) -> list[int]:
    """Return a permutation with half of all inversions, whose last index exceeds the first or not.

    The number of inversions of an odd number of pairs is either of the two nearest to half.
    """
    pairs = count * (count - 1) // 2
    while True:
        order = rng.sample(range(count), count)
        inversions = sum(order[i] > order[j] for i in range(count) for j in range(i + 1, count))
        is_balanced = abs(2 * inversions - pairs) <= pairs % 2
        if is_balanced and (order[-1] > order[0]) == ends_later:
            return order
