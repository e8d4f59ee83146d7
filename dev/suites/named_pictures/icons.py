"""Icons of one style, each alone on white: an open question, and one with four options."""

from __future__ import annotations

from functools import cache
from itertools import combinations, product
from random import Random

import numpy as np
from numpy.typing import NDArray

from dev.suites.named_pictures.drafts import Draft
from dev.suites.named_pictures.names import accepted_answers, are_confusable
from dev.suites.sampling import deal
from qwen2vl.eval.suites.frozen_suite import FrozenItem
from qwen2vl.synth.compositing import Composite, Icon, draw_composite, icon_names

__all__ = [
    "CHOICES",
    "WRONG_DRAWINGS",
    "draw_choices",
    "draw_open",
    "icon_picture",
    "part_of",
    "tested_names",
]

CANVAS = 224  # pixels a side
ICON_BOX = (8, 8, 216, 216)
CHOICES = 4
ALIKE = 0.85  # correlation of two drawings from which they are never options of one question
ALIKE_SIDE = 32  # pixels at which drawings are compared

OPEN_QUESTIONS = (
    "What is this? Answer with its name only.",
    "What does the picture show? Answer with its name only.",
    "Name the thing in this picture.",
    "What is drawn here? Answer in one or two words.",
)

# Icons that do not draw what names.tsv says: the scroller of a mouse, a cricket bat, a window of a
# program.
WRONG_DRAWINGS = {"openmoji": {"scroll"}, "emojione": {"cricket"}, "emojione-v1": {"window"}}


def part_of(style: str) -> str:
    """Return the part of a style: its name, with underscores."""
    return style.replace("-", "_")


def tested_names(style: str) -> list[str]:
    """Return the basic names that a style draws, in the order of names.tsv."""
    return [
        icon.name
        for icon in icon_names().values()
        if icon.is_basic and style in icon.icons and icon.name not in WRONG_DRAWINGS[style]
    ]


def icon_picture(style: str, name: str) -> Composite:
    """Return the picture of one icon on white."""
    icon = Icon(style=style, name=name, box=ICON_BOX)
    return Composite(width=CANVAS, height=CANVAS, layers=(icon,))


def draw_open(part: str, rng: Random, limit: int | None = None) -> list[Draft]:
    """Ask openly for each name that a style draws."""
    style = part.replace("_", "-")
    names = _spread(tested_names(style), limit)
    questions = deal(rng, OPEN_QUESTIONS, len(names))
    return [
        Draft(
            item=FrozenItem(
                id=f"{part}/{index:03d}",
                part=part,
                kind="open",
                question=question,
                answers=accepted_answers(name),
                pictures=(icon_picture(style, name),),
            ),
            asked=(name,),
        )
        for index, (name, question) in enumerate(zip(names, questions, strict=True))
    ]


def draw_choices(part: str, rng: Random, limit: int | None = None) -> list[Draft]:
    """Ask for each name with three others, of the same group for half of them."""
    style = part.removesuffix("_choice").replace("_", "-")
    names = _spread(tested_names(style), limit)
    variants = deal(rng, tuple(product((True, False), range(CHOICES))), len(names))
    drafts: list[Draft] = []
    for index, (name, (is_near, position)) in enumerate(zip(names, variants, strict=True)):
        options = _sample_distractors(style, name, is_near, rng)
        options.insert(position, name)
        drafts.append(
            Draft(
                item=FrozenItem(
                    id=f"{part}/{index:03d}",
                    part=part,
                    kind="same_group" if is_near else "other_group",
                    question=f"Which of these is it: {', '.join(options[:-1])} or {options[-1]}?",
                    answers=accepted_answers(name),
                    pictures=(icon_picture(style, name),),
                    choices=CHOICES,
                ),
                asked=tuple(options),
            )
        )
    return drafts


def _spread(names: list[str], limit: int | None) -> list[str]:
    """Return all names, or `limit` of them from all over the list: neighbors are much alike."""
    return names if limit is None else names[:: len(names) // limit][:limit]


def _sample_distractors(style: str, name: str, is_near: bool, rng: Random) -> list[str]:
    """Sample names which cannot be confused with the answer, nor with each other."""
    groups = icon_names()
    candidates = [
        other
        for other in tested_names(style)
        if (groups[other].group == groups[name].group) == is_near
        and not _are_alike(style, name, other)
    ]
    while True:
        chosen = rng.sample(candidates, CHOICES - 1)
        if not any(_are_alike(style, *pair) for pair in combinations(chosen, 2)):
            return chosen


def _are_alike(style: str, name: str, other: str) -> bool:
    """Return whether two names, or their drawings, may be taken for each other."""
    if are_confusable(name, other):
        return True
    drawings = _drawings(style)
    return float(drawings[name] @ drawings[other]) >= ALIKE


@cache
def _drawings(style: str) -> dict[str, NDArray[np.float32]]:
    """Return each icon of a style on white as a small picture, of mean 0 and norm 1."""
    side = ALIKE_SIDE
    vectors: dict[str, NDArray[np.float32]] = {}
    for name in tested_names(style):
        icon = Icon(style=style, name=name, box=(0, 0, side, side))
        pixels = draw_composite(Composite(width=side, height=side, layers=(icon,)))
        centered = pixels.astype(np.float32).ravel() - pixels.mean()
        vectors[name] = centered / np.linalg.norm(centered)
    return vectors
