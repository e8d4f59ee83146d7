"""Grounding questions: from names to boxes in the official format, and from a box to its name.

Boxes are those of the ink.
"""

from __future__ import annotations

from random import Random

from qwen2vl.grounding import Box, ObjectRef
from qwen2vl.synth.object_questions.lists import order_left_to_right
from qwen2vl.synth.object_questions.names import join_names
from qwen2vl.synth.object_questions.scene import Candidate, ObjectScene
from qwen2vl.synth.objects import SceneObject

__all__ = ["ask_box", "ask_boxes_of_all", "ask_boxes_of_each", "ask_name_of_box"]

_FULL_NAME_SHARE = 0.6  # "red circle" in place of "circle"


def ask_box(rng: Random, scene: ObjectScene) -> Candidate | None:
    """Ask for the box of an object."""
    named = scene.full_names if rng.random() < _FULL_NAME_SHARE else scene.names
    if not named:
        return None
    name, one = rng.choice(list(named.items()))
    return Candidate(
        task="find",
        fields=(name,),
        answer=ObjectRef(name).to_text() + _box_text(scene, one),
        asks=scene.facts(one, "x", "y", "size"),
        reveals=scene.facts_of_name(name),
        box=one.box,
    )


def ask_name_of_box(rng: Random, scene: ObjectScene) -> Candidate:
    """Ask what is in a box."""
    one = rng.choice(scene.objects)
    return Candidate(
        task="named_box" if scene.icons else "name_box",
        fields=(_box_text(scene, one),),
        answer=one.phrase,
        asks=scene.facts(one, "kind", "color" if one.color else "kind"),
        reveals=scene.facts(one, "x", "y", "size"),
    )


def ask_boxes_of_each(rng: Random, scene: ObjectScene) -> Candidate | None:
    """Ask for the boxes of several objects by name, in an order that is independent of places."""
    names: dict[int, list[str]] = {}
    for name, one in scene.names.items():
        names.setdefault(scene.index(one), []).append(name)
    if len(names) < 2:
        return None
    numbers = rng.sample(list(names), rng.randint(2, len(names)))
    asked = [rng.choice(names[number]) for number in numbers]
    return Candidate(
        task="find_each",
        fields=(join_names([f"the {name}" for name in asked]),),
        answer="\n".join(
            ObjectRef(name).to_text() + _box_text(scene, scene.names[name]) for name in asked
        ),
        asks={"boxes"},
    )


def ask_boxes_of_all(rng: Random, scene: ObjectScene) -> Candidate | None:
    """Ask for all objects with their boxes, from left to right."""
    ordered = order_left_to_right(scene)
    if ordered is None:
        return None
    answer = "\n".join(ObjectRef(one.phrase).to_text() + _box_text(scene, one) for one in ordered)
    return Candidate(
        task="find_objects" if scene.icons else "find_all", answer=answer, asks={"boxes"}
    )


def _box_text(scene: ObjectScene, one: SceneObject) -> str:
    return Box.from_pixels(one.box, (scene.picture.height, scene.picture.width)).to_text()
