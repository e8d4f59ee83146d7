"""Sampling of the frozen suite `any-size`: python -m dev.suites.any_size.

The same items on canvases from 64 to 2,000 pixels a side, of aspect ratios from 1:10 to 20:1. A
canvas has three parts: questions about shapes and objects, shapes to find (boxes), and lines of
text (edits). Where a small model's limit of pixels shrinks the canvas, parts of some of the same
items have a limit that does not. What is shown is a fixed share of the canvas's short side, or 48
pixels; lines have the same height in pixels everywhere. What a canvas cannot hold is absent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from dev.suites import FROZEN
from dev.suites.any_size.canvases import CANVASES, Placed, place_items
from dev.suites.any_size.items import HELD_OUT_QUESTIONS, KINDS, NUM_ITEMS, sample_items
from dev.suites.sampling import FONTS
from qwen2vl.eval.suites.frozen_suite import FrozenHeader, FrozenItem, Part, write_frozen_suite
from qwen2vl.grounding import Box, ObjectRef
from qwen2vl.synth.compositing.icons import HELD_OUT_STYLES

__all__ = ["FILE", "SEED", "freeze"]

SEED = "any-size/1"
FILE = FROZEN / "any-size.jsonl"

MAX_TOKENS = 64  # of an answer: a phrase and its box have about 50 where digits are tokens
PROMPT_TOKENS = 64  # of the chat template, byte by byte

GROUPS = {"": KINDS, "find_": ("find",), "line_": ("line",)}  # prefix of a part -> its kinds
# A kind's items are numbered from this one on.
FIRST_NUMBERS = {
    **{kind: sum(NUM_ITEMS[one] for one in KINDS[:n]) for n, kind in enumerate(KINDS)},
    **{"find": 0, "line": 0},
}
NOTES = {
    "64x64": "the processor enlarges the pictures to 112 x 112",
    "line_64x64": "the lines that fit: short ones",
    "line_112x112": "the lines that fit: short ones",
    "line_100x1000": "the lines that fit: short ones",
}


def freeze(path: Path = FILE) -> None:
    """Write the file of the suite.

    Raises:
        FontError: a font that comes with the package is absent.
    """
    bases = sample_items(SEED)
    parts: dict[str, Part] = {}
    items: list[FrozenItem] = []
    for canvas in CANVASES:
        placed = {kind: place_items(canvas, listed) for kind, listed in bases.items()}
        for prefix, kinds in GROUPS.items():
            shown = [one for kind in kinds for one in placed[kind]]
            name = f"{prefix}{canvas.name}"
            parts[name] = Part(note=NOTES.get(name, ""))
            items += [_item(name, one) for one in shown if one.index < canvas.counts[one.base.kind]]
            if not canvas.unresized_counts:
                continue
            unresized = f"{name}_unresized"
            parts[unresized] = Part(
                note="the same pictures, not shrunk",
                compared_with=name,
                has_blind_control=False,  # it costs minutes; the shrunk part has one
            )
            items += [
                replace(_item(unresized, one), max_pixels=canvas.max_pixels)
                for one in shown
                if one.index < canvas.unresized_counts.get(one.base.kind, 0)
            ]
    write_frozen_suite(path, _header(parts, items), items)


def _header(parts: dict[str, Part], items: Sequence[FrozenItem]) -> FrozenHeader:
    longest = max(canvas.tokens for canvas in CANVASES) + PROMPT_TOKENS + MAX_TOKENS
    longest += max(len(item.question.encode()) for item in items)  # at most a token a byte
    return FrozenHeader(
        suite="any-size",
        parts=parts,
        max_tokens=MAX_TOKENS,
        max_model_len=-(-longest // 64) * 64,
        held_out={
            "styles": HELD_OUT_STYLES,
            "fonts": FONTS,
            "patterns": tuple(q for asked in HELD_OUT_QUESTIONS.values() for q in asked),
        },
    )


def _item(part: str, placed: Placed) -> FrozenItem:
    base = placed.base
    item = FrozenItem(
        id=f"{part}/{placed.index + FIRST_NUMBERS[base.kind]:03d}",
        part=part,
        kind=base.kind,
        question=base.question,
        answers=base.answers,
        metric="edit_distance" if base.kind == "line" else "exact_match",
        pictures=(placed.picture,),
        choices=base.choices,
    )
    return _with_box(item, placed) if base.kind == "find" else item


def _with_box(item: FrozenItem, placed: Placed) -> FrozenItem:
    """Add the box of the first layer, which is the shape to find."""
    width, height = placed.picture.width, placed.picture.height
    x1, y1, x2, y2 = placed.boxes[0]
    answer = Box.from_pixels((x1, y1, x2, y2), (height, width))
    phrase = ObjectRef(f"the {placed.base.answers[0]}")
    return replace(
        item,
        metric="box_iou",
        answers=(phrase.to_text() + answer.to_text(),),
        box=(
            *(round(x1 / width, 4), round(y1 / height, 4)),
            *(round(x2 / width, 4), round(y2 / height, 4)),
        ),
    )
