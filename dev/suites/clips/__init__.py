"""Sampling of the frozen suite `clips`: python -m dev.suites.clips.

Clips of 4 to 16 frames, even and odd counts, 64 to 448 pixels a side, of several aspect ratios; of
shapes, icons of held-out styles, and text. `motion` has clips in which objects move, `events` those
in which they come and go. `direction_shuffled` is a control: the clips of `direction` with their
frames in another order, where the axis of the motion leaves two answers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random

from dev.suites import FROZEN
from dev.suites.clips import events, motion
from dev.suites.clips.scenes import number_items
from dev.suites.sampling import FONTS
from qwen2vl.eval.suites.frozen_suite import FrozenHeader, FrozenItem, Part, write_frozen_suite
from qwen2vl.synth.compositing.icons import HELD_OUT_STYLES

__all__ = ["FILE", "SEED", "freeze"]

SEED = "clips/1"
FILE = FROZEN / "clips.jsonl"

MAX_TOKENS = 32  # of an answer
NUM_ITEMS = 64  # of a part: 4 directions, 4 cases, 4 counts of 2 kinds, and twins
SAMPLERS: Mapping[str, Callable[[Random, int], list[FrozenItem]]] = {
    "direction": motion.sample_directions,
    "still": motion.sample_stills,
    "order": events.sample_orders,
    "appearance": events.sample_appearances,
    "count_over_time": events.sample_counts,
    "text_over_time": events.sample_texts,
    "speed": motion.sample_speeds,
}
PARTS = {
    "direction": Part(),
    "direction_shuffled": Part(
        note="control: the frames are in another order",
        is_control=True,
        has_blind_control=False,
        compared_with="direction",
    ),
    "still": Part(note="half of those that are asked about do not move"),
    "order": Part(note="each clip is also shown backward"),
    "appearance": Part(note="each clip is also shown backward"),
    "count_over_time": Part(),
    "text_over_time": Part(note="the text is in one frame"),
    "speed": Part(note="each clip is also shown with the objects exchanged"),
}


def freeze(path: Path = FILE, num_items: int = NUM_ITEMS) -> None:
    """Write the file of the suite.

    Args:
        path: of the file.
        num_items: number of items of each part, a multiple of 8.

    Raises:
        FontError: a font that comes with the package is absent.
    """
    items: list[FrozenItem] = []
    for part, sampler in SAMPLERS.items():
        sampled = sampler(Random(f"{SEED}/{part}"), num_items)
        items += number_items(part, sampled)
        if part == "direction":
            shuffled = motion.shuffled(Random(f"{SEED}/shuffled"), sampled)
            items += number_items("direction_shuffled", shuffled)
    questions = motion.QUESTIONS | events.QUESTIONS
    header = FrozenHeader(
        suite="clips",
        parts=PARTS,
        max_tokens=MAX_TOKENS,
        held_out={
            "styles": HELD_OUT_STYLES,
            "fonts": FONTS,
            "patterns": tuple(one for asked in questions.values() for one in asked),
        },
    )
    write_frozen_suite(path, header, items)
