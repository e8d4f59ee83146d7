"""Sampling of the frozen suite `named-pictures`: python -m qwen2vl.eval.freeze.named_pictures.

Icons of styles that are held out of training, of the 719 objects of names.tsv with names of at most
two words: each alone on white, asked openly and with four options, and several in one scene. The
file has every accepted answer; scoring needs no dataset, drawing needs named-pictures.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from itertools import combinations, zip_longest
from pathlib import Path
from random import Random

import numpy as np
from numpy.typing import NDArray

from qwen2vl.eval.freeze.named_pictures_names import accepted_answers, are_confusable
from qwen2vl.eval.freeze.named_pictures_scenes import SCENE_PARTS, STYLES, Draft, draw_scenes
from qwen2vl.eval.freeze.sampling import deal
from qwen2vl.eval.suites.frozen_suite import FrozenHeader, FrozenItem, Part, write_frozen_suite
from qwen2vl.synth.compositing import Composite, Icon, draw_composite, icon_names

__all__ = [
    "CANVAS",
    "CHOICES",
    "ICON_BOX",
    "SEED",
    "draw_choices",
    "draw_open",
    "freeze",
    "icon_picture",
    "order_for_blind_control",
    "tested_names",
]

SEED = 20250214
FILE = Path(__file__).parent.parent / "suites" / "frozen" / "named-pictures.jsonl"
CANVAS = 224  # pixels a side
ICON_BOX = (8, 8, 216, 216)
CHOICES = 4
NUM_SCENES = 200  # of each part
ALIKE = 0.85  # correlation of two drawings from which they are never options of one question
ALIKE_SIDE = 32  # pixels at which drawings are compared

OPEN_QUESTIONS = (
    "What is this? Answer with its name only.",
    "What does the picture show? Answer with its name only.",
    "Name the thing in this picture.",
    "What is drawn here? Answer in one or two words.",
)

# Icons that do not draw what names.tsv says: the wheel of a mouse, a cricket bat, a window of a
# program.
WRONG_DRAWINGS = {"openmoji": {"scroll"}, "emojione": {"cricket"}, "emojione-v1": {"window"}}


def freeze(path: Path = FILE) -> None:
    """Write all parts.

    Raises:
        DatasetNotFoundError: the dataset named-pictures is not on this machine.
    """
    parts = {name: _draw_part(name) for name in _parts()}
    header = FrozenHeader(suite="named-pictures", parts=_parts(), held_out={"styles": STYLES})
    write_frozen_suite(path, header, [item for items in parts.values() for item in items])


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


def draw_open(style: str, names: Sequence[str], rng: Random) -> list[Draft]:
    """Ask openly for each name."""
    part = _part_of(style)
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


def draw_choices(style: str, names: Sequence[str], rng: Random) -> list[Draft]:
    """Ask for each name with three others, of the same group for half of them."""
    part = f"{_part_of(style)}_choice"
    variants = deal(rng, [(near, at) for near in (True, False) for at in range(CHOICES)], len(names))
    drafts: list[Draft] = []
    for index, (name, (is_near, position)) in enumerate(zip(names, variants, strict=True)):
        options = _sample_distractors(style, names, name, is_near, rng)
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


def order_for_blind_control(rng: Random, drafts: Sequence[Draft]) -> list[Draft]:
    """Shuffle items of one kind so that no picture shows what the question before it asks about.

    The blind control asks each question about the picture of the next item of its kind.
    """
    while True:
        remaining = rng.sample(drafts, len(drafts))
        ordered = [remaining.pop()]
        while remaining:
            fitting = (d for d in reversed(remaining) if not _shows(d, ordered[-1].asked))
            following = next(fitting, None)
            if following is None:
                break
            remaining.remove(following)
            ordered.append(following)
        if not remaining and not _shows(ordered[0], ordered[-1].asked):
            return ordered


def _parts() -> dict[str, Part]:
    alone = "one icon of a style that is held out of training, on white; "
    scenes = "icons of styles that are held out of training, in pictures of many sizes; "
    open_note = alone + "its name or a synonym"
    choice_note = alone + f"{CHOICES} names in the question, of which the answer is one"
    return {
        **{_part_of(style): Part(note=open_note) for style in STYLES},
        **{f"{_part_of(style)}_choice": Part(note=choice_note) for style in STYLES},
        "scene_position": Part(note=scenes + "which of two is further to one side"),
        "scene_count": Part(note=scenes + "1 to 5 icons of a kind among others"),
        "scene_box": Part(note=scenes + "bounding box, correct from an IoU of 0.5 on"),
        "scene_name": Part(note=scenes + "the name of what is at a side or in a corner"),
    }


def _draw_part(part: str) -> list[FrozenItem]:
    rng = Random(f"{SEED} {part}")
    if part in SCENE_PARTS:
        drafts = draw_scenes(part, rng, NUM_SCENES)
    else:
        style = part.removesuffix("_choice").replace("_", "-")
        draw = draw_choices if part.endswith("_choice") else draw_open
        drafts = draw(style, tested_names(style), rng)
    kinds = sorted({draft.item.kind for draft in drafts})
    by_kind = [[d for d in drafts if d.item.kind == kind] for kind in kinds]
    columns = [order_for_blind_control(rng, own) for own in by_kind]
    items = [draft.item for row in zip_longest(*columns) for draft in row if draft is not None]
    return [
        item if item.id else replace(item, id=f"{part}/{index:03d}")
        for index, item in enumerate(items)
    ]


def _part_of(style: str) -> str:
    return style.replace("-", "_")


def _sample_distractors(
    style: str, names: Sequence[str], name: str, is_near: bool, rng: Random
) -> list[str]:
    """Sample names which cannot be confused with the answer, nor with each other."""
    groups = icon_names()
    candidates = [
        other
        for other in names
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


def _shows(draft: Draft, names: Sequence[str]) -> bool:
    """Return whether a picture shows anything that one of the names may mean."""
    return any(are_confusable(name, shown) for name in names for shown in _names_shown(draft))


def _names_shown(draft: Draft) -> Iterator[str]:
    for picture in draft.item.pictures:
        assert isinstance(picture, Composite)
        yield from (layer.name for layer in picture.layers if isinstance(layer, Icon))


if __name__ == "__main__":
    freeze()
