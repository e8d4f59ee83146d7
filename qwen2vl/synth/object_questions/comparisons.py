"""Questions that compare two objects: sizes, places, and where one is relative to the other.

Objects of similar sizes, or at similar places, are not compared.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations
from random import Random

from qwen2vl.synth.object_questions.places import SIDES
from qwen2vl.synth.object_questions.scene import Candidate, ObjectScene, choose_balanced
from qwen2vl.synth.objects import SceneObject

__all__ = [
    "ask_closer_to_side",
    "ask_further",
    "ask_is_larger",
    "ask_is_relation",
    "ask_largest",
    "ask_relation",
    "ask_size",
]

_CLEARLY_LARGER = 1.4  # ratio of sides
_CLEARLY_APART = 0.15  # of the picture
_TOWARD = {"left": "left", "right": "right", "top": "up", "bottom": "down"}
_RELATIONS = {
    **{"left": "to the left of", "right": "to the right of"},
    **{"top": "above", "bottom": "below"},
}
_ANSWERS = {"left": "left", "right": "right", "top": "above", "bottom": "below"}

_Holds = Callable[[SceneObject, SceneObject], bool]


def ask_size(rng: Random, scene: ObjectScene) -> Candidate | None:
    """Ask which of two objects is larger, or smaller."""
    pair = _choose_pair(rng, scene, _is_larger)
    if pair is None:
        return None
    task, answer = ("larger", pair[0]) if rng.random() < 0.6 else ("smaller", pair[1])
    return _about_pair(scene, pair, ("size",), task, tuple(rng.sample(pair, 2)), answer)


def ask_is_larger(rng: Random, scene: ObjectScene) -> Candidate | None:
    """Ask whether one object is larger, or smaller, than another."""
    pair = _choose_pair(rng, scene, _is_larger)
    if pair is None:
        return None
    is_reversed, word = rng.random() < 0.5, rng.choice(("larger", "smaller"))
    first, second = reversed(pair) if is_reversed else pair
    answer = "yes" if (word == "larger") != is_reversed else "no"
    return _about_pair(scene, pair, ("size",), "is_larger", (first, word, second), answer)


def ask_largest(rng: Random, scene: ObjectScene) -> Candidate | None:
    """Ask for the largest, or smallest, of three objects or more."""
    ordered = sorted(scene.objects, key=lambda one: one.side)
    word = rng.choice(("largest", "smallest"))
    if word == "largest":
        ordered.reverse()
    if len(ordered) < 3 or not _differ(ordered[0], ordered[1]):
        return None
    return Candidate(
        task=f"{word}_object",
        answer=ordered[0].phrase,
        asks={word, *scene.facts(ordered[0], "kind")},
        result=word,
    )


def ask_further(rng: Random, scene: ObjectScene) -> Candidate | None:
    """Ask which of two objects is further left, right, up or down."""
    side = rng.choice(list(SIDES))
    pair = _choose_pair(rng, scene, _is_toward(scene, side))
    if pair is None:
        return None
    fields = (*rng.sample(pair, 2), _TOWARD[side])
    return _about_pair(scene, pair, _axis(side), "further", fields, pair[0])


def ask_closer_to_side(rng: Random, scene: ObjectScene) -> Candidate | None:
    """Ask which of two objects is closer to a side of the picture."""
    side = rng.choice(list(SIDES))
    pair = _choose_pair(rng, scene, _is_toward(scene, side))
    if pair is None:
        return None
    fields = (*rng.sample(pair, 2), side)
    return _about_pair(scene, pair, _axis(side), "closer_to_side", fields, pair[0])


def ask_relation(rng: Random, scene: ObjectScene) -> Candidate | None:
    """Ask where one object is relative to another, where it is clearly in one direction."""
    options = [(pair, side) for side in SIDES for pair in _pairs(scene, _is_straight(side))]
    chosen = choose_balanced(rng, options)
    if chosen is None:
        return None
    pair, side = chosen
    return _about_pair(scene, pair, ("x", "y"), "relation", pair, _ANSWERS[side], choices=4)


def ask_is_relation(rng: Random, scene: ObjectScene) -> Candidate | None:
    """Ask whether one object is left of, right of, above or below another."""
    side = rng.choice(list(SIDES))
    pair = _choose_pair(rng, scene, _is_toward(scene, side))
    if pair is None:
        return None
    is_true = rng.random() < 0.5
    first, second = pair if is_true else reversed(pair)
    fields, answer = (first, _RELATIONS[side], second), "yes" if is_true else "no"
    return _about_pair(scene, pair, _axis(side), "is_relation", fields, answer)


def _axis(side: str) -> tuple[str]:
    return ("x",) if side in ("left", "right") else ("y",)


def _pairs(scene: ObjectScene, holds: _Holds) -> list[tuple[str, str]]:
    """Return the pairs of full names of objects for which `holds` is true."""
    return [
        (a, b)
        for (a, first), (b, second) in permutations(scene.full_names.items(), 2)
        if holds(first, second)
    ]


def _choose_pair(rng: Random, scene: ObjectScene, holds: _Holds) -> tuple[str, str] | None:
    pairs = _pairs(scene, holds)
    return rng.choice(pairs) if pairs else None


def _is_larger(a: SceneObject, b: SceneObject) -> bool:
    return a.side > b.side and _differ(a, b)


def _differ(a: SceneObject, b: SceneObject) -> bool:
    """Return whether sizes differ clearly, by area and by extent."""
    extents = [max(one.box[2] - one.box[0], one.box[3] - one.box[1]) for one in (a, b)]
    ratio, extent = a.side / b.side, extents[0] / extents[1]
    if ratio < 1:
        ratio, extent = 1 / ratio, 1 / extent
    return ratio >= _CLEARLY_LARGER and extent >= 1.2


def _is_toward(scene: ObjectScene, side: str) -> _Holds:
    """Return whether the first of two objects is clearly further toward a side."""
    axis, sign = SIDES[side]
    gap = _CLEARLY_APART * (scene.picture.width, scene.picture.height)[axis]
    return lambda a, b: sign * (a.center[axis] - b.center[axis]) >= gap


def _is_straight(side: str) -> _Holds:
    """Return whether the first of two objects is in one direction of the second, in pixels."""
    axis, sign = SIDES[side]

    def holds(a: SceneObject, b: SceneObject) -> bool:
        along = sign * (a.center[axis] - b.center[axis])
        across = abs(a.center[1 - axis] - b.center[1 - axis])
        near, far = (b, a) if sign > 0 else (a, b)
        is_apart = near.box[axis + 2] <= far.box[axis]
        return is_apart and along >= 2 * across

    return holds


def _about_pair(
    scene: ObjectScene,
    pair: tuple[str, str],
    facts: tuple[str, ...],
    task: str,
    fields: tuple[str, ...],
    answer: str,
    choices: int = 2,
) -> Candidate:
    """Build a question whose answer follows from the same facts about both objects."""
    first, second = (scene.names[name] for name in pair)
    numbers = sorted((scene.index(first), scene.index(second)))
    return Candidate(
        task=task,
        fields=fields,
        answer=answer,
        asks=scene.facts(first, *facts) | scene.facts(second, *facts),
        reveals=scene.facts_of_name(pair[0]) | scene.facts_of_name(pair[1]),
        result=f"{facts} of {numbers}",
        choices=choices,
    )
