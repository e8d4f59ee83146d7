"""Questions with several answers: lists from left to right, and one answer for each of some names.

Answers are "name, name" and "name: value, name: value", in the order of the question.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from itertools import pairwise
from random import Random

from qwen2vl.synth.object_questions.counting import count_shapes_by
from qwen2vl.synth.object_questions.identity import ALL_COLORS, absent_kinds
from qwen2vl.synth.object_questions.names import join_names, plural
from qwen2vl.synth.object_questions.scene import Candidate, ObjectScene, unique_values
from qwen2vl.synth.objects import SceneObject

__all__ = [
    "ask_color_of_each",
    "ask_count_of_each",
    "ask_kind_of_each",
    "ask_list",
    "order_left_to_right",
]

_MIN_ORDER_GAP = 0.05  # of the width, between the centers of consecutive objects


def order_left_to_right(scene: ObjectScene) -> list[SceneObject] | None:
    """Return two objects or more from left to right; None where their order is ambiguous."""
    if len(scene.objects) < 2:
        return None
    ordered = sorted(scene.objects, key=lambda one: one.center[0])
    gap = _MIN_ORDER_GAP * scene.picture.width
    if any(right.center[0] - left.center[0] < gap for left, right in pairwise(ordered)):
        return None
    return ordered


def ask_list(rng: Random, scene: ObjectScene) -> Candidate | None:
    """Ask for all objects by name."""
    ordered = order_left_to_right(scene)
    if ordered is None:
        return None
    task = "list_objects" if scene.icons else "list"
    return Candidate(task=task, answer=", ".join(one.phrase for one in ordered), asks={"list"})


def ask_color_of_each(rng: Random, scene: ObjectScene) -> Candidate | None:
    """Ask for the colors of several shapes, called by their kinds."""
    color_of = {one.name: one.color for one in scene.shapes}
    kinds = unique_values([one.name for one in scene.shapes])
    values = {kind: color_of[kind] for kind in rng.sample(kinds, len(kinds))}
    return _enumerate("each_color", "the ", values)


def ask_kind_of_each(rng: Random, scene: ObjectScene) -> Candidate | None:
    """Ask for the kinds of several shapes, called by their colors, in a picture without icons."""
    if scene.icons:
        return None
    kind_of = {one.color: one.name for one in scene.shapes}
    colors = unique_values([one.color for one in scene.shapes])
    values = {color: kind_of[color] for color in rng.sample(colors, len(colors))}
    return _enumerate("each_kind", "", values)


def ask_count_of_each(rng: Random, scene: ObjectScene) -> Candidate | None:
    """Ask for the counts of several kinds, or colors; up to two of them may be absent."""
    if not scene.shapes:
        return None
    by_kind = bool(scene.icons) or rng.random() < 0.5  # icons have colors, too
    counts = count_shapes_by(scene, "name" if by_kind else "color")
    absent = absent_kinds(scene) if by_kind else [c for c in ALL_COLORS if c not in counts]
    names = [*counts, *rng.sample(absent, 2)]
    if by_kind and _has_two_names(counts):
        return None
    asked = rng.sample(names, rng.randint(2, len(names)))
    task = "each_count" if by_kind else "each_color_count"
    values = {plural(name) if by_kind else name: str(counts[name]) for name in asked}
    return _enumerate(task, "", values)


def _has_two_names(kinds: Counter[str]) -> bool:
    """Return whether some shapes belong to two of the kinds, as a circle is an oval."""
    return {"circle", "oval"} <= kinds.keys() or {"square", "rectangle"} <= kinds.keys()


def _enumerate(task: str, article: str, values: Mapping[str, str]) -> Candidate | None:
    """Build a question about several names, with "name: value, name: value" as its answer."""
    if len(values) < 2:
        return None
    return Candidate(
        task=task,
        fields=(join_names([article + name for name in values]),),
        answer=", ".join(f"{name}: {value}" for name, value in values.items()),
        asks={task},
    )
