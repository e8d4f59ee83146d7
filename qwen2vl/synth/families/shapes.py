"""Task family `shapes`: recognition, color, counting, position and comparison of 1 to 5 shapes.

A scene is sampled first, then a task among those that have an unambiguous answer in it (a shape is
called "the star" only where there is one star; positions near a boundary between two answers are
not asked). Several questions about one image amortize its vision tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from random import Random

from qwen2vl.synth.colors import COLORS, colors_on
from qwen2vl.synth.scenes import (
    NEAR_MIDDLE,
    left_to_right,
    region_of,
    sample_scene,
    unique_phrases,
)
from qwen2vl.synth.shape_masks import SHAPE_KINDS
from qwen2vl.synth.spec import MAX_SHAPES, FamilySample, Mixture, Question, Scene, Shape
from qwen2vl.synth.wordings import sample_question_text

__all__ = ["join_names", "plural", "sample"]

# Margins at which a comparison or a position is unambiguous.
_CLEARLY_LARGER = 1.35  # ratio of sides
_CLEARLY_APART = 0.15  # of the canvas

_QuestionSampler = Callable[[Random, Scene, str], Question | None]


def sample(rng: Random, mixture: Mixture) -> FamilySample:
    """Sample a scene and questions about it."""
    scene = sample_scene(rng, mixture)
    if mixture.list_share and rng.random() < mixture.list_share:
        multi_answer = rng.choice(_MULTI_ANSWER_SAMPLERS)(rng, scene, mixture.split)
        if multi_answer is not None:
            return FamilySample((multi_answer,), (scene,))
    tasks = _SINGLE_SHAPE_SAMPLERS if len(scene.shapes) == 1 else _MULTI_SHAPE_SAMPLERS
    return FamilySample(_sample_questions(rng, tasks, scene, mixture), (scene,))


def join_names(names: Sequence[str]) -> str:
    """Join names as in "the star, the cross and the circle"."""
    return " and ".join((", ".join(names[:-1]), names[-1])) if len(names) > 1 else names[0]


def plural(phrase: str) -> str:
    """Return the plural of a phrase: "red cross" -> "red crosses"."""
    return phrase + ("es" if phrase.endswith("s") else "s")


def _sample_questions(
    rng: Random, tasks: tuple[_QuestionSampler, ...], scene: Scene, mixture: Mixture
) -> tuple[Question, ...]:
    """Sample distinct questions in random task order; `_count_all` is possible in every scene."""
    questions: dict[str, Question] = {}
    order = list(tasks)
    rng.shuffle(order)
    for task in order:
        question = task(rng, scene, mixture.split)
        if question is not None:
            questions.setdefault(question.text, question)
        if len(questions) == mixture.max_questions:
            break
    return tuple(questions.values())


def _list_shapes(rng: Random, scene: Scene, split: str) -> Question | None:
    """Ask for all shapes by name; None where their left-to-right order is ambiguous."""
    shapes = left_to_right(scene)
    if shapes is None:
        return None
    text = sample_question_text(rng, "list", split)
    return Question(task="list", text=text, answer=", ".join(s.phrase for s in shapes))


def _each_color(rng: Random, scene: Scene, split: str) -> Question | None:
    """Ask for the colors of several kinds, in an order independent of their positions."""
    kinds = _unique(shape.kind for shape in scene.shapes)
    color_of = {shape.kind: shape.color for shape in scene.shapes}
    asked = rng.sample(kinds, len(kinds))
    return _enumerated_question(
        rng, "each_color", "the ", {kind: color_of[kind] for kind in asked}, split
    )


def _each_kind(rng: Random, scene: Scene, split: str) -> Question | None:
    colors = _unique(shape.color for shape in scene.shapes)
    kind_of = {shape.color: shape.kind for shape in scene.shapes}
    asked = rng.sample(colors, len(colors))
    return _enumerated_question(
        rng, "each_kind", "", {color: kind_of[color] for color in asked}, split
    )


def _each_count(rng: Random, scene: Scene, split: str) -> Question | None:
    """Ask for the counts of several kinds, or colors; up to two of them may have count 0."""
    by_kind = rng.random() < 0.5
    counts = Counter(s.kind if by_kind else s.color for s in scene.shapes)
    names = [*counts, *rng.sample(SHAPE_KINDS if by_kind else colors_on(scene.ground), 2)]
    asked = rng.sample(names, rng.randint(2, len(names)))
    if by_kind:
        answers = {plural(name): str(counts[name]) for name in asked}
    else:
        answers = {name: str(counts[name]) for name in asked}
    return _enumerated_question(
        rng, "each_count" if by_kind else "each_color_count", "", answers, split
    )


def _enumerated_question(
    rng: Random, task: str, article: str, answers: dict[str, str], split: str
) -> Question | None:
    """Build a question about several names; the answer is "name: value, name: value"."""
    if len(answers) < 2:
        return None
    text = sample_question_text(rng, task, split, join_names([article + name for name in answers]))
    answer = ", ".join(f"{name}: {value}" for name, value in answers.items())
    return Question(task=task, text=text, answer=answer)


def _unique(names: Iterable[str]) -> list[str]:
    return [name for name, uses in Counter(names).items() if uses == 1]


def _name_shape(rng: Random, scene: Scene, split: str) -> Question:
    (shape,) = scene.shapes
    text = sample_question_text(rng, "name_shape", split)
    return Question(task="name_shape", text=text, answer=shape.kind, choices=len(SHAPE_KINDS))


def _describe(rng: Random, scene: Scene, split: str) -> Question:
    (shape,) = scene.shapes
    choices = len(SHAPE_KINDS) * len(colors_on(scene.ground))
    text = sample_question_text(rng, "describe", split)
    return Question(task="describe", text=text, answer=shape.phrase, choices=choices)


def _color(rng: Random, scene: Scene, split: str) -> Question:
    (shape,) = scene.shapes
    text = sample_question_text(rng, "color", split)
    return Question(
        task="color", text=text, answer=shape.color, choices=len(colors_on(scene.ground))
    )


def _name_shape_of_color(rng: Random, scene: Scene, split: str) -> Question | None:
    colors = Counter(shape.color for shape in scene.shapes)
    unique = [shape for shape in scene.shapes if colors[shape.color] == 1]
    if not unique:
        return None
    shape = rng.choice(unique)
    text = sample_question_text(rng, "name_shape_of_color", split, shape.color)
    return Question(
        task="name_shape_of_color", text=text, answer=shape.kind, choices=len(SHAPE_KINDS)
    )


def _color_of_kind(rng: Random, scene: Scene, split: str) -> Question | None:
    kinds = Counter(shape.kind for shape in scene.shapes)
    unique = [shape for shape in scene.shapes if kinds[shape.kind] == 1]
    if not unique:
        return None
    shape = rng.choice(unique)
    text = sample_question_text(rng, "color_of_kind", split, shape.kind)
    return Question(
        task="color_of_kind", text=text, answer=shape.color, choices=len(colors_on(scene.ground))
    )


def _count_all(rng: Random, scene: Scene, split: str) -> Question:
    text = sample_question_text(rng, "count_all", split)
    return Question(task="count_all", text=text, answer=str(len(scene.shapes)), choices=MAX_SHAPES)


def _count_kind(rng: Random, scene: Scene, split: str) -> Question:
    present = rng.random() < 0.85
    kind = rng.choice(scene.shapes).kind if present else rng.choice(SHAPE_KINDS)
    count = sum(shape.kind == kind for shape in scene.shapes)
    text = sample_question_text(rng, "count_some", split, plural(kind))
    return Question(task="count_kind", text=text, answer=str(count))


def _count_color(rng: Random, scene: Scene, split: str) -> Question:
    present = rng.random() < 0.85
    color = rng.choice(scene.shapes).color if present else rng.choice(colors_on(scene.ground))
    count = sum(shape.color == color for shape in scene.shapes)
    text = sample_question_text(rng, "count_some", split, f"{color} shapes")
    return Question(task="count_color", text=text, answer=str(count))


def _position(rng: Random, scene: Scene, split: str) -> Question | None:
    """Ask for one of five regions; None where no shape is clearly in one of them."""
    named = [
        (name, region)
        for name, shape in _shape_names(scene).items()
        if (region := region_of(*_offset(scene, shape))) is not None
    ]
    if not named:
        return None
    name, region = rng.choice(named)
    text = sample_question_text(rng, "position", split, name)
    return Question(task="position", text=text, answer=region, choices=5)


def _half_of_image(rng: Random, scene: Scene, split: str) -> Question | None:
    """Ask left or right, or top or bottom, of a shape that is not near the middle."""
    across = rng.random() < 0.5
    task, low, high = (
        ("left_or_right", "left", "right") if across else ("top_or_bottom", "top", "bottom")
    )
    offsets = [
        (name, _offset(scene, shape)[0 if across else 1])
        for name, shape in _shape_names(scene).items()
    ]
    clear = [(name, offset) for name, offset in offsets if abs(offset) > NEAR_MIDDLE]
    if not clear:
        return None
    name, offset = rng.choice(clear)
    text = sample_question_text(rng, task, split, name)
    return Question(task=task, text=text, answer=low if offset < 0 else high, choices=2)


def _compare_size(rng: Random, scene: Scene, split: str) -> Question | None:
    pairs = _pairs(scene, lambda a, b: a.side >= _CLEARLY_LARGER * b.side)
    if not pairs:
        return None
    large, small = rng.choice(pairs)
    task, answer = ("larger", large) if rng.random() < 0.7 else ("smaller", small)
    names = rng.sample((large, small), 2)
    text = sample_question_text(rng, task, split, *names)
    return Question(task=task, text=text, answer=answer, choices=2)


def _compare_place(rng: Random, scene: Scene, split: str) -> Question | None:
    axis = rng.randrange(2)
    gap = _CLEARLY_APART * (scene.width, scene.height)[axis]
    pairs = _pairs(scene, lambda a, b: a.center[axis] + gap <= b.center[axis])
    if not pairs:
        return None
    first, second = rng.choice(pairs)
    words = (("left", "right"), ("up", "down"))[axis]
    toward, answer = rng.choice(((words[0], first), (words[1], second)))
    names = rng.sample((first, second), 2)
    text = sample_question_text(rng, "further", split, *names, toward)
    return Question(task="further", text=text, answer=answer, choices=2)


def _is_present(rng: Random, scene: Scene, split: str) -> Question:
    """Ask whether a phrase is present (half yes); half of the absent ones share a shape's word."""
    present = {shape.phrase for shape in scene.shapes}
    if rng.random() < 0.5:
        name = rng.choice(sorted(present))
    else:
        near = rng.choice(scene.shapes)
        absent = [f"{near.color} {kind}" for kind in SHAPE_KINDS]
        absent += [f"{color} {near.kind}" for color in colors_on(scene.ground)]
        absent = absent if rng.random() < 0.5 else [f"{c} {k}" for c in COLORS for k in SHAPE_KINDS]
        name = rng.choice([phrase for phrase in absent if phrase not in present])
    text = sample_question_text(rng, "exists", split, name, article=True)
    answer = "yes" if name in present else "no"
    return Question(task="exists", text=text, answer=answer, choices=2)


def _shape_names(scene: Scene) -> dict[str, Shape]:
    """Return a question's name for each shape; "shape" in a scene of one shape."""
    if len(scene.shapes) == 1:
        return {"shape": scene.shapes[0]}
    return unique_phrases(scene)


def _pairs(scene: Scene, holds: Callable[[Shape, Shape], bool]) -> list[tuple[str, str]]:
    """Return the pairs of full phrases ("color kind") of two shapes for which `holds` is true."""
    names = [(name, shape) for name, shape in unique_phrases(scene).items() if name == shape.phrase]
    return [(a, b) for a, first in names for b, second in names if holds(first, second)]


def _offset(scene: Scene, shape: Shape) -> tuple[float, float]:
    """Return the position of the center, from -0.5 (left, top) to 0.5 (right, bottom)."""
    x, y = shape.center
    return x / scene.width - 0.5, y / scene.height - 0.5


_MULTI_ANSWER_SAMPLERS: tuple[_QuestionSampler, ...] = (
    _list_shapes,
    _each_color,
    _each_kind,
    _each_count,
)
_SINGLE_SHAPE_SAMPLERS: tuple[_QuestionSampler, ...] = (
    _name_shape,
    _describe,
    _color,
    _count_all,
    _position,
    _half_of_image,
    _is_present,
)
# The tasks that nano learns last are listed twice: counts of a kind or color, and yes or no.
_MULTI_SHAPE_SAMPLERS: tuple[_QuestionSampler, ...] = (
    _name_shape_of_color,
    _color_of_kind,
    _count_all,
    _count_kind,
    _count_kind,
    _count_color,
    _count_color,
    _position,
    _half_of_image,
    _compare_size,
    _compare_place,
    _is_present,
    _is_present,
)
