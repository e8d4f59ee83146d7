"""The family `grounding`: from a phrase to its box, and from a box to its phrase.

Two to five shapes; a phrase is used only if it means exactly one of them. Boxes are written in the
official format, in thousandths of the picture (qwen2vl.grounding). Each question about a picture is
about another shape, so that no answer can be copied from an earlier one. It must not know pixels.
Next room: pairs.py.
"""

from __future__ import annotations

from random import Random

from qwen2vl.grounding import Box, Ref
from qwen2vl.synth.families.shapes import enumerated
from qwen2vl.synth.scenes import from_the_left, phrases, sample_scene
from qwen2vl.synth.spec import Draft, Mixture, Question, Scene, Shape
from qwen2vl.synth.wordings import ask

__all__ = ["sample"]


def sample(rng: Random, mixture: Mixture) -> Draft:
    """Make up a scene with something to refer to, and ask both ways."""
    low, high = (max(2, limit) for limit in mixture.num_shapes)
    while True:
        scene = sample_scene(rng, mixture, count=rng.randint(low, high))
        names = _names_by_shape(scene)
        if names:
            break
    if mixture.list_share and rng.random() < mixture.list_share:
        if rng.random() < 0.3 and (listed := _find_all(rng, scene, mixture.split)) is not None:
            return Draft((listed,), (scene,))
        if len(names) > 1:
            return Draft((_find_each(rng, scene, names, mixture.split),), (scene,))
    shapes = rng.sample(list(names), min(mixture.questions, len(names)))
    questions = [
        _find(rng, scene, shape, names[shape], mixture.split)
        if rng.random() < 0.65
        else _name(rng, scene, shape, mixture.split)
        for shape in shapes
    ]
    return Draft(tuple(questions), (scene,))


def _names_by_shape(scene: Scene) -> dict[Shape, list[str]]:
    """List the unique phrases of each shape that has "color kind" to itself."""
    names: dict[Shape, list[str]] = {}
    for name, shape in phrases(scene).items():
        names.setdefault(shape, []).append(name)
    return {shape: own for shape, own in names.items() if shape.phrase in own}


def _find(rng: Random, scene: Scene, shape: Shape, names: list[str], split: str) -> Question:
    name = shape.phrase if rng.random() < 0.6 else rng.choice(names)
    text = ask(rng, "find", split, name)
    answer = Ref(name).to_text() + _box_text(scene, shape)
    return Question(task="find", text=text, answer=answer, box=shape.box)


def _find_each(rng: Random, scene: Scene, names: dict[Shape, list[str]], split: str) -> Question:
    """Ask for several shapes by name, in an order that says nothing about their places."""
    asked = {
        shape.phrase if rng.random() < 0.6 else rng.choice(names[shape]): shape
        for shape in rng.sample(list(names), len(names))
    }
    text = ask(rng, "find_each", split, enumerated([f"the {name}" for name in asked]))
    answer = "\n".join(Ref(n).to_text() + _box_text(scene, s) for n, s in asked.items())
    return Question(task="find_each", text=text, answer=answer)


def _find_all(rng: Random, scene: Scene, split: str) -> Question | None:
    """Ask for every shape with its box, where their order from left to right is beyond doubt."""
    shapes = from_the_left(scene)
    if shapes is None:
        return None
    answer = "\n".join(Ref(s.phrase).to_text() + _box_text(scene, s) for s in shapes)
    return Question(task="find_all", text=ask(rng, "find_all", split), answer=answer)


def _name(rng: Random, scene: Scene, shape: Shape, split: str) -> Question:
    text = ask(rng, "name_box", split, _box_text(scene, shape))
    return Question(task="name_box", text=text, answer=shape.phrase)


def _box_text(scene: Scene, shape: Shape) -> str:
    return Box.from_pixels(shape.box, (scene.height, scene.width)).to_text()
