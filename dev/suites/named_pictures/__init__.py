"""Sampling of the frozen suite `named-pictures`: python -m dev.suites.named_pictures.

Icons of styles that are held out of training, of the 719 objects of names.tsv with names of at most
two words: each alone on white, asked openly and with four options, and several in one scene. The
file has every accepted answer; scoring needs no dataset, drawing needs named-pictures.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from random import Random

from dev.suites import FROZEN
from dev.suites.named_pictures.drafts import Draft, order_for_blind_control
from dev.suites.named_pictures.icons import CHOICES, draw_choices, draw_open, part_of
from dev.suites.named_pictures.scenes import SCENE_PARTS, STYLES, draw_scenes
from qwen2vl.eval.suites.frozen_suite import FrozenHeader, FrozenItem, Part, write_frozen_suite

__all__ = ["FILE", "NUM_SCENES", "PARTS", "SEED", "draw_part", "freeze"]

SEED = "named-pictures/1"
FILE = FROZEN / "named-pictures.jsonl"
NUM_SCENES = 200  # of each part

_ALONE = "one icon of a style that is held out of training, on white; "
_SCENE = "icons of styles that are held out of training, in pictures of many sizes; "
PARTS = {
    **{part_of(style): Part(note=f"{_ALONE}its name or a synonym") for style in STYLES},
    **{
        f"{part_of(style)}_choice": Part(note=f"{_ALONE}one of {CHOICES} names in the question")
        for style in STYLES
    },
    "scene_position": Part(note=f"{_SCENE}which of two is further to one side"),
    "scene_count": Part(note=f"{_SCENE}1 to 5 icons of a kind among others"),
    "scene_box": Part(note=f"{_SCENE}bounding box, correct from an IoU of 0.5 on"),
    "scene_name": Part(note=f"{_SCENE}the name of what is at a side or in a corner"),
}


def freeze(path: Path = FILE) -> None:
    """Write the file of the suite.

    Raises:
        DatasetNotFoundError: the dataset named-pictures is not on this machine.
    """
    header = FrozenHeader(suite="named-pictures", parts=PARTS, held_out={"styles": STYLES})
    write_frozen_suite(path, header, [item for part in PARTS for item in draw_part(part)])


def draw_part(part: str, limit: int | None = None) -> list[FrozenItem]:
    """Sample the items of a part: all of them, or `limit`, which are other ones."""
    rng = Random(f"{SEED}/{part}")
    if part in SCENE_PARTS:
        drafts = draw_scenes(part, rng, NUM_SCENES if limit is None else limit)
    else:
        draw = draw_choices if part.endswith("_choice") else draw_open
        drafts = draw(part, rng, limit)
    return [
        item if item.id else replace(item, id=f"{part}/{index:03d}")
        for index, item in enumerate(_in_order(drafts, rng))
    ]


def _in_order(drafts: list[Draft], rng: Random) -> list[FrozenItem]:
    """Order the items of each kind for the blind control, and alternate between the kinds."""
    kinds = sorted({draft.item.kind for draft in drafts})
    columns = [
        order_for_blind_control(rng, [draft for draft in drafts if draft.item.kind == kind])
        for kind in kinds
    ]
    rows = zip_longest(*columns)
    return [draft.item for row in rows for draft in row if draft is not None]
