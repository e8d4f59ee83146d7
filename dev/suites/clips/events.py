"""Clips in which objects come and go: order, appearance, counts over time, text over time.

A clip of `order` and of `appearance` has a twin with its frames reversed, whose answer is another
one, so that the frames without their order do not give it.
"""

from __future__ import annotations

from collections.abc import Collection
from itertools import pairwise
from random import Random

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
    place_in,
    place_in_cells,
    sample_objects,
    sample_placed,
    whole,
)
from dev.suites.sampling import (
    FONTS,
    NUMBERS,
    NamedLayer,
    deal,
    sample_shape,
    sample_text,
    sample_textured,
)
from qwen2vl.eval.suites.frozen_suite import FrozenItem
from qwen2vl.synth.compositing import Ground, Text
from qwen2vl.synth.compositing.text import text_extent

__all__ = [
    "QUESTIONS",
    "sample_appearances",
    "sample_counts",
    "sample_orders",
    "sample_texts",
]

QUESTIONS = {
    "order": (
        "Which comes {2}, the {0} or the {1}?",
        "Which of the two is shown {2}: the {0} or the {1}?",
    ),
    "appearance": (
        "Which of these {4} during the video: the {0}, the {1}, the {2} or the {3}?",
        "What {4} in the course of the clip: the {0}, the {1}, the {2} or the {3}?",
    ),
    "objects": (
        "Different objects are shown one after another. How many are they? Answer with a number.",
        "How many different objects does the clip show in turn? Answer with a number.",
    ),
    "flashes": (
        "How many times does the {0} flash up? Answer with a number.",
        "How often is the {0} shown? Answer with the number of times.",
    ),
    "text_over_time": (
        "What text is shown in the video? Answer with the text only.",
        "A text is visible for a moment. Copy it.",
    ),
}


def sample_orders(rng: Random, count: int) -> list[FrozenItem]:
    """Sample pairs of clips of two objects that are shown one after the other."""
    items: list[FrozenItem] = []
    words = deal(rng, ("first", "last"), count // 2)
    counts = deal_frame_counts(rng, count // 2)
    for word, size, num_frames in zip(words, deal(rng, SIZES, count // 2), counts, strict=True):
        ground, pair, boxes = sample_placed(rng, whole(size), 2)
        starts = _split(rng, num_frames, 2)
        tracks = [
            (one, _visible_in(box, range(start, end), num_frames))
            for one, box, (start, end) in zip(pair, boxes, starts, strict=True)
        ]
        frames = build_frames(size, ground, tracks)
        named = rng.sample(pair, 2)
        question = QUESTIONS["order"][len(items) // 2 % 2].format(
            named[0].name, named[1].name, word
        )
        answer, other = pair if word == "first" else pair[::-1]
        items += [
            clip_item("order", question, answer.answers, frames, 2),
            clip_item("order", question, other.answers, frames[::-1], 2),
        ]
    rng.shuffle(items)
    return items


def sample_appearances(rng: Random, count: int) -> list[FrozenItem]:
    """Sample pairs of clips of three objects: one appears, one disappears, one stays."""
    items: list[FrozenItem] = []
    words = deal(rng, ("appears", "disappears"), count // 2)
    counts = deal_frame_counts(rng, count // 2, high=9)
    for word, size, num_frames in zip(
        words, deal(rng, LARGE_SIZES, count // 2), counts, strict=True
    ):
        ground, objects, boxes = _sample_in_cells(rng, size)
        comes, goes = rng.randint(1, num_frames - 1), rng.randint(1, num_frames - 1)
        visible = [range(comes, num_frames), range(goes), range(num_frames)]
        tracks = [
            (one, _visible_in(box, frames, num_frames))
            for one, box, frames in zip(objects[:3], boxes, visible, strict=True)
        ]
        frames = build_frames(size, ground, rng.sample(tracks, 3))
        named = [one.name for one in rng.sample(objects, 4)]
        question = QUESTIONS["appearance"][len(items) // 2 % 2].format(*named, word)
        answer, other = objects[:2] if word == "appears" else objects[1::-1]
        items += [
            clip_item("appearance", question, answer.answers, frames, 4),
            clip_item("appearance", question, other.answers, frames[::-1], 4),
        ]
    rng.shuffle(items)
    return items


def sample_counts(rng: Random, count: int) -> list[FrozenItem]:
    """Sample clips of one to four different objects, and of a shape that flashes as often."""
    half = count // 2
    items = [
        _sample_objects_in_turn(rng, number, size, num_frames, index)
        for index, (number, size, num_frames) in enumerate(
            zip(
                deal(rng, tuple(NUMBERS), half),
                deal(rng, SIZES, half),
                deal_frame_counts(rng, half, low=5),
                strict=True,
            )
        )
    ]
    items += [
        _sample_flashes(rng, number, size, num_frames, index)
        for index, (number, size, num_frames) in enumerate(
            zip(
                deal(rng, tuple(NUMBERS), half),
                deal(rng, SIZES, half),
                deal(rng, (9, 10, 11, 12, 13, 16), half),
                strict=True,
            )
        )
    ]
    rng.shuffle(items)
    return items


def sample_texts(rng: Random, count: int) -> list[FrozenItem]:
    """Sample clips with a text in one frame; in half of them a shape is in all frames."""
    items: list[FrozenItem] = []
    has_shape = deal(rng, (True, False), count)
    counts = deal_frame_counts(rng, count)
    for with_shape, size, num_frames in zip(
        has_shape, deal(rng, LARGE_SIZES, count), counts, strict=True
    ):
        ground = sample_textured(rng, "plain")
        area, other = rng.sample(lanes(size), 2) if with_shape else (whole(size), None)
        text, box = _sample_fitting_text(rng, ground, area)
        when = rng.randrange(num_frames)
        tracks: list[tuple[NamedLayer, list[Box | None]]] = [
            (text, _visible_in(box, [when], num_frames))
        ]
        if other is not None:
            shape = sample_shape(rng, ground)
            (placed,) = place_in(rng, other, [shape])
            tracks.append((shape, [placed] * num_frames))
        question = QUESTIONS["text_over_time"][len(items) % 2]
        frames = build_frames(size, ground, tracks)
        items.append(clip_item("text", question, text.answers, frames))
    return items


def _sample_in_cells(rng: Random, size: Size) -> tuple[Ground, list[NamedLayer], list[Box]]:
    """Sample four objects, and places of the first three; the fourth is only named."""
    while True:
        ground, objects = sample_objects(rng, 4)
        boxes = place_in_cells(rng, size, objects[:3])
        if boxes:
            return ground, objects, boxes


def _sample_objects_in_turn(
    rng: Random, number: int, size: Size, num_frames: int, index: int
) -> FrozenItem:
    ground, objects, boxes = sample_placed(rng, whole(size), number)
    tracks = [
        (one, _visible_in(box, range(start, end), num_frames))
        for one, box, (start, end) in zip(
            objects, boxes, _split(rng, num_frames, number), strict=True
        )
    ]
    frames = build_frames(size, ground, tracks)
    question = QUESTIONS["objects"][index % 2]
    return clip_item("objects", question, _number_answers(number), frames, len(NUMBERS))


def _sample_flashes(
    rng: Random, number: int, size: Size, num_frames: int, index: int
) -> FrozenItem:
    """Sample a shape that is shown `number` times, for one or two frames; first it is absent."""
    ground = sample_textured(rng, "plain")
    shape = sample_shape(rng, ground)
    (box,) = place_in(rng, whole(size), [shape])
    lengths = [0]
    while not number <= sum(lengths) <= num_frames - number:
        lengths = [rng.randint(1, 2) for _ in range(number)]
    # Frames without it: one before each time, and the others anywhere.
    gaps = [1] * number + [0]
    for _ in range(num_frames - sum(lengths) - number):
        gaps[rng.randrange(number + 1)] += 1
    shown: list[int] = []
    frame = 0
    for gap, length in zip(gaps, lengths, strict=False):  # the last gap is after the last time
        shown += range(frame + gap, frame + gap + length)
        frame += gap + length
    frames = build_frames(size, ground, [(shape, _visible_in(box, shown, num_frames))])
    question = QUESTIONS["flashes"][index % 2].format(shape.name)
    return clip_item("flashes", question, _number_answers(number), frames, len(NUMBERS))


def _sample_fitting_text(rng: Random, ground: Ground, area: Box) -> tuple[NamedLayer, Box]:
    """Sample a text of three to six characters that fits into an area, and its place."""
    while True:
        text = sample_text(rng, ground, rng.choice(FONTS), rng.randint(18, 36), rng.randint(3, 6))
        assert isinstance(text.layer, Text), "it is a text"
        left, top, right, bottom = text_extent(text.name, text.layer.font, text.layer.size)
        width, height = right - left, bottom - top
        free_x = area[2] - area[0] - width - 2 * MARGIN
        free_y = area[3] - area[1] - height - 2 * MARGIN
        if free_x >= 0 and free_y >= 0:
            x = area[0] + MARGIN + rng.randint(0, free_x)
            y = area[1] + MARGIN + rng.randint(0, free_y)
            return text, (x, y, x + width, y + height)


def _split(rng: Random, num_frames: int, count: int) -> list[tuple[int, int]]:
    """Split a clip into `count` intervals, one after the other; it may begin and end empty."""
    cuts = sorted(rng.sample(range(num_frames + 1), count + 1))
    return list(pairwise(cuts))


def _visible_in(box: Box, frames: Collection[int], num_frames: int) -> list[Box | None]:
    return [box if frame in frames else None for frame in range(num_frames)]


def _number_answers(number: int) -> tuple[str, str]:
    return str(number), NUMBERS[number]
