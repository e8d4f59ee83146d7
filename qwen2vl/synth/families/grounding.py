"""Task family `grounding`: referring expression -> bounding box, and bounding box -> phrase.

Scenes have two to five shapes; a phrase is used only if it refers to exactly one of them. Boxes are
written in the official format, in thousandths of the image (`qwen2vl.grounding`). Each question of
a conversation is about another shape, so that no answer can be copied from an earlier one.
"""

from __future__ import annotations

from random import Random

from qwen2vl.grounding import Box, ObjectRef
from qwen2vl.synth.families.shapes import join_names
from qwen2vl.synth.scenes import left_to_right, sample_scene, unique_phrases
from qwen2vl.synth.spec import FamilySample, Mixture, Question, Scene, Shape
from qwen2vl.synth.wordings import sample_question_text

__all__ = ["sample"]


def sample(rng: Random, mixture: Mixture) -> FamilySample:
    """Sample a scene with at least one unique phrase, and questions in both directions."""
    low, high = (max(2, limit) for limit in mixture.num_shapes)
    while True:
        scene = sample_scene(rng, mixture, count=rng.randint(low, high))
        names = _names_by_shape(scene)
        if names:
            break
    if mixture.list_share and rng.random() < mixture.list_share:
        if rng.random() < 0.3 and (listed := _find_all(rng, scene, mixture.split)) is not None:
            return FamilySample((listed,), (scene,))
        if len(names) > 1:
            return FamilySample((_find_each(rng, scene, names, mixture.split),), (scene,))
    shapes = rng.sample(list(names), min(mixture.max_questions, len(names)))
    questions = [
        _find_shape(rng, scene, shape, names[shape], mixture.split)
        if rng.random() < 0.65
        else _name_box(rng, scene, shape, mixture.split)
        for shape in shapes
    ]
    return FamilySample(tuple(questions), (scene,))


def _names_by_shape(scene: Scene) -> dict[Shape, list[str]]:
    """Return the unique phrases of each shape whose "color kind" is unique in the scene."""
    names: dict[Shape, list[str]] = {}
    for name, shape in unique_phrases(scene).items():
        names.setdefault(shape, []).append(name)
    return {shape: own for shape, own in names.items() if shape.phrase in own}


def _find_shape(rng: Random, scene: Scene, shape: Shape, names: list[str], split: str) -> Question:
    name = shape.phrase if rng.random() < 0.6 else rng.choice(names)
    text = sample_question_text(rng, "find", split, name)
    answer = ObjectRef(name).to_text() + _box_text(scene, shape)
    return Question(task="find", text=text, answer=answer, box=shape.box)


def _find_each(rng: Random, scene: Scene, names: dict[Shape, list[str]], split: str) -> Question:
    """Ask for several shapes by name, in an order independent of their positions."""
    asked = {
        shape.phrase if rng.random() < 0.6 else rng.choice(names[shape]): shape
        for shape in rng.sample(list(names), len(names))
    }
    text = sample_question_text(
        rng, "find_each", split, join_names([f"the {name}" for name in asked])
    )
    answer = "\n".join(ObjectRef(n).to_text() + _box_text(scene, s) for n, s in asked.items())
    return Question(task="find_each", text=text, answer=answer)


def _find_all(rng: Random, scene: Scene, split: str) -> Question | None:
    """Ask for every shape with its box; None where their left-to-right order is ambiguous."""
    shapes = left_to_right(scene)
    if shapes is None:
        return None
    answer = "\n".join(ObjectRef(s.phrase).to_text() + _box_text(scene, s) for s in shapes)
    return Question(
        task="find_all", text=sample_question_text(rng, "find_all", split), answer=answer
    )


def _name_box(rng: Random, scene: Scene, shape: Shape, split: str) -> Question:
    text = sample_question_text(rng, "name_box", split, _box_text(scene, shape))
    return Question(task="name_box", text=text, answer=shape.phrase)


def _box_text(scene: Scene, shape: Shape) -> str:
    return Box.from_pixels(shape.box, (scene.height, scene.width)).to_text()
