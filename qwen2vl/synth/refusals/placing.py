"""Placing of objects in scenes, and the questions where they are, or where others would be.

Absent names are of the same sorts as names of what is there: kinds of shapes, colors with kinds,
and objects. No absent name could be used for something that is there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from random import Random
from typing import Literal

from qwen2vl.grounding import Box as NormalizedBox
from qwen2vl.grounding import ObjectRef
from qwen2vl.synth.compositing.layers import Composite
from qwen2vl.synth.objects import SceneObject, sample_icon, sample_shape
from qwen2vl.synth.refusals.drafts import REFUSAL, Draft
from qwen2vl.synth.refusals.pictures import cells_of, pick_colors
from qwen2vl.synth.refusals.vocabulary import ALL_KINDS, THINGS

__all__ = [
    "Axis",
    "ask_absent",
    "ask_place",
    "is_confusable",
    "list_absent_kinds",
    "paint_objects",
    "place_objects",
    "sample_absent_names",
]

Axis = Literal["x", "y"]

_ALIKE = ({"circle", "oval"}, {"square", "rectangle"}, {"square", "diamond"}, {"star", "cross"})
_OFF_MIDDLE = 0.08  # of the picture's side: distance from the middle that is clearly one side


def place_objects(
    rng: Random,
    canvas: Composite,
    count: int,
    *,
    icons: float = 0.0,
    axis: Axis | None = None,
    share: tuple[float, float] = (0.4, 0.95),
) -> list[SceneObject]:
    """Sample objects of different names, shapes of different kinds and colors, in cells."""
    if not count:
        return []
    colors = list(pick_colors(rng, canvas.ground, count))
    objects: list[SceneObject] = []
    for box in cells_of(rng, canvas, count, axis=axis, share=share):
        shown = [one.name for one in objects]
        if not icons and not colors:
            break
        if rng.random() < icons or not colors:
            name = _sample_thing(rng, shown)
            objects.append(sample_icon(rng, name, box, ground=canvas.ground))
        else:
            kind = rng.choice(list_absent_kinds(shown))
            objects.append(sample_shape(rng, kind, colors.pop(), box))
    return objects


def paint_objects(canvas: Composite, objects: Sequence[SceneObject]) -> Composite:
    """Paint objects on a canvas."""
    return replace(canvas, layers=(*canvas.layers, *(one.layer for one in objects)))


def ask_place(
    canvas: Composite, one: SceneObject, name: str, about: tuple[str, ...]
) -> list[Draft]:
    """Ask where something is that is there, and whether it is."""
    (x, y), (width, height) = one.center, (canvas.width, canvas.height)
    box = NormalizedBox.from_pixels(one.box, (height, width)).to_text()
    drafts = [
        Draft("asked_exists", (name,), "yes", about, choices=2),
        Draft("asked_box", (name,), ObjectRef(name).to_text() + box, about, box=one.box),
    ]
    if abs(x / width - 0.5) > _OFF_MIDDLE:
        side = "left" if x < width / 2 else "right"
        drafts.append(Draft("asked_side", (name,), side, about, choices=2))
    if abs(y / height - 0.5) > _OFF_MIDDLE:
        level = "top" if y < height / 2 else "bottom"
        drafts.append(Draft("asked_level", (name,), level, about, choices=2))
    return drafts


def ask_absent(name: str, about: tuple[str, ...]) -> list[Draft]:
    """Ask where something is that is not there, and whether it is."""
    return [
        Draft("asked_exists", (name,), "no", about, choices=2),
        *(Draft(f"asked_{what}", (name,), REFUSAL, about) for what in ("box", "side", "level")),
    ]


def sample_absent_names(
    rng: Random, objects: Sequence[SceneObject], names: Sequence[str]
) -> list[str]:
    """Sample a name of something absent for each object, of the same sort as its own name."""
    shown = [one.name for one in objects]
    absent: list[str] = []
    for one, name in zip(objects, names, strict=True):
        if not one.color:
            absent.append(_sample_thing(rng, shown))
            continue
        kind = rng.choice(list_absent_kinds(shown))
        absent.append(kind if name == one.name else f"{one.color} {kind}")
    return list(dict.fromkeys(absent))


def list_absent_kinds(shown: Sequence[str]) -> list[str]:
    """List the kinds of shapes that none of the shown names could be called."""
    return [k for k in ALL_KINDS if not any(_is_alike(k, name) for name in shown)]


def is_confusable(name: str, shown: Sequence[str]) -> bool:
    """Return whether one of the shown objects, or a part of it, could be called `name`."""
    words = set(name.split())
    return any(words & set(other.split()) for other in shown)


def _sample_thing(rng: Random, shown: Sequence[str]) -> str:
    while is_confusable(thing := rng.choice(THINGS), shown):
        pass
    return thing


def _is_alike(kind: str, other: str) -> bool:
    """Return whether a shape of one kind could be called one of the other."""
    return kind == other or {kind, other} in _ALIKE
