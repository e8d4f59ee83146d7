"""Questions about places: in which part of the picture an object is, and what is in a part of it.

Objects near the boundary between two answers are not asked for.
"""

from __future__ import annotations

from random import Random

from qwen2vl.synth.object_questions.scene import Candidate, ObjectScene, choose_balanced
from qwen2vl.synth.objects import SceneObject
from qwen2vl.synth.scenes import NEAR_MIDDLE, OFF_MIDDLE, region_of

__all__ = ["SIDES", "ask_half", "ask_outermost", "ask_position", "ask_what_at"]

SIDES = {"left": (0, -1), "right": (0, 1), "top": (1, -1), "bottom": (1, 1)}  # axis, sign
_PLACES = {  # how a question names a part of the picture -> the signs of x and y there
    "on the left": (-1, 0),
    "on the right": (1, 0),
    "at the top": (0, -1),
    "at the bottom": (0, 1),
    "in the top left corner": (-1, -1),
    "in the top right corner": (1, -1),
    "in the bottom left corner": (-1, 1),
    "in the bottom right corner": (1, 1),
}
# Margins in shares of the picture, beside those of synth/scenes.py.
_IN_CORNER = 0.2  # smallest distance from the middle, in both directions
_MIN_GAP = 0.12  # to the next object


def ask_position(rng: Random, scene: ObjectScene) -> Candidate | None:
    """Ask for one of five regions."""
    chosen = choose_balanced(
        rng,
        (
            (name, region)
            for name, one in scene.names.items()
            if (region := region_of(*scene.offset(one))) is not None
        ),
    )
    if chosen is None:
        return None
    name, region = chosen
    axes = "xy" if region == "middle" else "xy"[SIDES[region][0]]
    return Candidate(
        task="position",
        fields=(name,),
        answer=region,
        asks=scene.facts(scene.names[name], *axes),
        reveals=scene.facts_of_name(name),
        choices=5,
    )


def ask_half(rng: Random, scene: ObjectScene) -> Candidate | None:
    """Ask left or right, or top or bottom, of an object that is not near the middle."""
    axis = rng.randrange(2)
    low, high = ("left", "right") if axis == 0 else ("top", "bottom")
    chosen = choose_balanced(
        rng,
        (
            (name, high if scene.offset(one)[axis] > 0 else low)
            for name, one in scene.names.items()
            if abs(scene.offset(one)[axis]) > NEAR_MIDDLE
        ),
    )
    if chosen is None:
        return None
    name, answer = chosen
    return Candidate(
        task=f"{low}_or_{high}",
        fields=(name,),
        answer=answer,
        asks=scene.facts(scene.names[name], "xy"[axis]),
        reveals=scene.facts_of_name(name),
        choices=2,
    )


def ask_what_at(rng: Random, scene: ObjectScene) -> Candidate | None:
    """Ask which object is at a side or in a corner, where exactly one is."""
    if len(scene.objects) < 2:
        return None
    options = [(place, one) for place in _PLACES if (one := _only_one_at(scene, *_PLACES[place]))]
    if not options:
        return None
    place, one = rng.choice(options)
    asks = scene.facts(one, "x", "y", "kind", "color" if one.color else "kind")
    return Candidate(task="what_at", fields=(place,), answer=one.phrase, asks=asks)


def ask_outermost(rng: Random, scene: ObjectScene) -> Candidate | None:
    """Ask for the leftmost, rightmost, topmost or bottommost object."""
    if len(scene.objects) < 2:
        return None
    side = rng.choice(list(SIDES))
    axis, sign = SIDES[side]
    first, second = sorted(scene.objects, key=lambda one: -sign * one.center[axis])[:2]
    if abs(scene.offset(first)[axis] - scene.offset(second)[axis]) < _MIN_GAP:
        return None
    return Candidate(
        task="outermost",
        fields=(f"{side}most",),
        answer=first.phrase,
        asks={f"{side}most", *scene.facts(first, "kind")},
        result=f"{side}most",
    )


def _only_one_at(scene: ObjectScene, x: int, y: int) -> SceneObject | None:
    """Return the object that is clearly at a side or in a corner, if no other might be meant."""
    offsets = [(one, scene.offset(one)) for one in scene.objects]
    others = [
        ((x1 + x2) / 2 / scene.picture.width - 0.5, (y1 + y2) / 2 / scene.picture.height - 0.5)
        for x1, y1, x2, y2 in scene.texts
    ]
    if x and y:
        there = [one for one, (dx, dy) in offsets if min(x * dx, y * dy) > _IN_CORNER]
        near = sum(min(x * dx, y * dy) > -0.02 for _, (dx, dy) in offsets)
        near += sum(min(x * dx, y * dy) > -0.02 for dx, dy in others)
    else:
        there = [one for one, (dx, dy) in offsets if x * dx + y * dy > OFF_MIDDLE]
        near = sum(x * dx + y * dy > 0.02 for _, (dx, dy) in offsets)
        near += sum(x * dx + y * dy > 0.02 for dx, dy in others)
    return there[0] if len(there) == 1 and near == 1 else None
