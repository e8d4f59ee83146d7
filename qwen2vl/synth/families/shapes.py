"""The family `shapes`: one to five shapes, and what anybody would ask about them.

A scene is made first, then a question is drawn from the tasks that it can answer without doubt
(a shape is only called "the star" when there is one star; positions near a border are not asked).
Several questions about one picture make its cost pay several times. It must not know pixels or
other families. Next room: boxes.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from random import Random

from qwen2vl.synth.colors import COLORS, colors_on
from qwen2vl.synth.draw import KINDS
from qwen2vl.synth.scenes import from_the_left, phrases, sample_scene
from qwen2vl.synth.spec import MAX_SHAPES, Draft, Mixture, Question, Scene, Shape
from qwen2vl.synth.wordings import ask

__all__ = ["enumerated", "plural", "sample"]

# What makes a comparison or a position beyond doubt.
_CLEARLY_LARGER = 1.35  # ratio of sides
_CLEARLY_APART = 0.15  # of the canvas
_NEAR_MIDDLE = 0.1  # of the canvas
_OFF_MIDDLE = 0.2

_Asker = Callable[[Random, Scene, str], Question | None]


def sample(rng: Random, mixture: Mixture) -> Draft:
    """Make up a scene and ask about it."""
    scene = sample_scene(rng, mixture)
    if mixture.list_share and rng.random() < mixture.list_share:
        at_once = rng.choice(_AT_ONCE)(rng, scene, mixture.split)
        if at_once is not None:
            return Draft((at_once,), (scene,))
    tasks = _SINGLE if len(scene.shapes) == 1 else _SEVERAL
    return Draft(_pick(rng, tasks, scene, mixture), (scene,))


def enumerated(names: Sequence[str]) -> str:
    """Put "the star", "the cross" and more into "the star, the cross and the circle"."""
    return " and ".join((", ".join(names[:-1]), names[-1])) if len(names) > 1 else names[0]


def plural(phrase: str) -> str:
    """Put "red cross" into "red crosses"."""
    return phrase + ("es" if phrase.endswith("s") else "s")


def _pick(
    rng: Random, tasks: tuple[_Asker, ...], scene: Scene, mixture: Mixture
) -> tuple[Question, ...]:
    """Ask different tasks in random order; counting all can always be asked, others need luck."""
    questions: dict[str, Question] = {}
    order = list(tasks)
    rng.shuffle(order)
    for task in order:
        question = task(rng, scene, mixture.split)
        if question is not None:
            questions.setdefault(question.text, question)
        if len(questions) == mixture.questions:
            break
    return tuple(questions.values())


def _list(rng: Random, scene: Scene, split: str) -> Question | None:
    """Ask for all shapes by name, where their order from left to right is beyond doubt."""
    shapes = from_the_left(scene)
    if shapes is None:
        return None
    text = ask(rng, "list", split)
    return Question(task="list", text=text, answer=", ".join(s.phrase for s in shapes))


def _each_color(rng: Random, scene: Scene, split: str) -> Question | None:
    """Ask for the colors of several kinds, in an order that says nothing about their places."""
    kinds = _used_once(shape.kind for shape in scene.shapes)
    color_of = {shape.kind: shape.color for shape in scene.shapes}
    asked = rng.sample(kinds, len(kinds))
    return _each(rng, "each_color", "the ", {kind: color_of[kind] for kind in asked}, split)


def _each_kind(rng: Random, scene: Scene, split: str) -> Question | None:
    colors = _used_once(shape.color for shape in scene.shapes)
    kind_of = {shape.color: shape.kind for shape in scene.shapes}
    asked = rng.sample(colors, len(colors))
    return _each(rng, "each_kind", "", {color: kind_of[color] for color in asked}, split)


def _each_count(rng: Random, scene: Scene, split: str) -> Question | None:
    """Ask how many there are of several kinds, or colors; one of them may be missing."""
    by_kind = rng.random() < 0.5
    counts = Counter(s.kind if by_kind else s.color for s in scene.shapes)
    names = [*counts, *rng.sample(KINDS if by_kind else colors_on(scene.ground), 2)]
    asked = rng.sample(names, rng.randint(2, len(names)))
    if by_kind:
        answers = {plural(name): str(counts[name]) for name in asked}
    else:
        answers = {name: str(counts[name]) for name in asked}
    return _each(rng, "each_count" if by_kind else "each_color_count", "", answers, split)


def _each(
    rng: Random, task: str, article: str, answers: dict[str, str], split: str
) -> Question | None:
    """Ask for several things by name: every answer stands behind the name that it belongs to."""
    if len(answers) < 2:
        return None
    text = ask(rng, task, split, enumerated([article + name for name in answers]))
    answer = ", ".join(f"{name}: {value}" for name, value in answers.items())
    return Question(task=task, text=text, answer=answer)


def _used_once(names: Iterable[str]) -> list[str]:
    return [name for name, uses in Counter(names).items() if uses == 1]


def _name_shape(rng: Random, scene: Scene, split: str) -> Question:
    (shape,) = scene.shapes
    text = ask(rng, "name_shape", split)
    return Question(task="name_shape", text=text, answer=shape.kind, choices=len(KINDS))


def _describe(rng: Random, scene: Scene, split: str) -> Question:
    (shape,) = scene.shapes
    choices = len(KINDS) * len(colors_on(scene.ground))
    text = ask(rng, "describe", split)
    return Question(task="describe", text=text, answer=shape.phrase, choices=choices)


def _color(rng: Random, scene: Scene, split: str) -> Question:
    (shape,) = scene.shapes
    text = ask(rng, "color", split)
    return Question(
        task="color", text=text, answer=shape.color, choices=len(colors_on(scene.ground))
    )


def _name_shape_of_color(rng: Random, scene: Scene, split: str) -> Question | None:
    colors = Counter(shape.color for shape in scene.shapes)
    alone = [shape for shape in scene.shapes if colors[shape.color] == 1]
    if not alone:
        return None
    shape = rng.choice(alone)
    text = ask(rng, "name_shape_of_color", split, shape.color)
    return Question(task="name_shape_of_color", text=text, answer=shape.kind, choices=len(KINDS))


def _color_of_kind(rng: Random, scene: Scene, split: str) -> Question | None:
    kinds = Counter(shape.kind for shape in scene.shapes)
    alone = [shape for shape in scene.shapes if kinds[shape.kind] == 1]
    if not alone:
        return None
    shape = rng.choice(alone)
    text = ask(rng, "color_of_kind", split, shape.kind)
    return Question(
        task="color_of_kind", text=text, answer=shape.color, choices=len(colors_on(scene.ground))
    )


def _count_all(rng: Random, scene: Scene, split: str) -> Question:
    text = ask(rng, "count_all", split)
    return Question(task="count_all", text=text, answer=str(len(scene.shapes)), choices=MAX_SHAPES)


def _count_kind(rng: Random, scene: Scene, split: str) -> Question:
    present = rng.random() < 0.85
    kind = rng.choice(scene.shapes).kind if present else rng.choice(KINDS)
    count = sum(shape.kind == kind for shape in scene.shapes)
    text = ask(rng, "count_some", split, plural(kind))
    return Question(task="count_kind", text=text, answer=str(count))


def _count_color(rng: Random, scene: Scene, split: str) -> Question:
    present = rng.random() < 0.85
    color = rng.choice(scene.shapes).color if present else rng.choice(colors_on(scene.ground))
    count = sum(shape.color == color for shape in scene.shapes)
    text = ask(rng, "count_some", split, f"{color} shapes")
    return Question(task="count_color", text=text, answer=str(count))


def _position(rng: Random, scene: Scene, split: str) -> Question | None:
    """Ask for one of five places, if the shape is clearly in one of them."""
    named = [
        (name, part)
        for name, shape in _called(scene).items()
        if (part := _part(*_offset(scene, shape))) is not None
    ]
    if not named:
        return None
    name, part = rng.choice(named)
    text = ask(rng, "position", split, name)
    return Question(task="position", text=text, answer=part, choices=5)


def _half(rng: Random, scene: Scene, split: str) -> Question | None:
    """Ask left or right, or top or bottom, of a shape that is clear of the middle."""
    across = rng.random() < 0.5
    task, low, high = (
        ("left_or_right", "left", "right") if across else ("top_or_bottom", "top", "bottom")
    )
    offsets = [
        (name, _offset(scene, shape)[0 if across else 1]) for name, shape in _called(scene).items()
    ]
    clear = [(name, offset) for name, offset in offsets if abs(offset) > _NEAR_MIDDLE]
    if not clear:
        return None
    name, offset = rng.choice(clear)
    text = ask(rng, task, split, name)
    return Question(task=task, text=text, answer=low if offset < 0 else high, choices=2)


def _compare_size(rng: Random, scene: Scene, split: str) -> Question | None:
    pairs = _pairs(scene, lambda a, b: a.side >= _CLEARLY_LARGER * b.side)
    if not pairs:
        return None
    large, small = rng.choice(pairs)
    task, answer = ("larger", large) if rng.random() < 0.7 else ("smaller", small)
    names = rng.sample((large, small), 2)
    text = ask(rng, task, split, *names)
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
    text = ask(rng, "further", split, *names, toward)
    return Question(task="further", text=text, answer=answer, choices=2)


def _exists(rng: Random, scene: Scene, split: str) -> Question:
    """Ask yes or no, half of each; half of the absent ones share a word with a present one."""
    present = {shape.phrase for shape in scene.shapes}
    if rng.random() < 0.5:
        name = rng.choice(sorted(present))
    else:
        near = rng.choice(scene.shapes)
        absent = [f"{near.color} {kind}" for kind in KINDS]
        absent += [f"{color} {near.kind}" for color in colors_on(scene.ground)]
        absent = absent if rng.random() < 0.5 else [f"{c} {k}" for c in COLORS for k in KINDS]
        name = rng.choice([phrase for phrase in absent if phrase not in present])
    text = ask(rng, "exists", split, name, article=True)
    answer = "yes" if name in present else "no"
    return Question(task="exists", text=text, answer=answer, choices=2)


def _called(scene: Scene) -> dict[str, Shape]:
    """How a question calls each shape; in a scene of one shape simply "shape"."""
    if len(scene.shapes) == 1:
        return {"shape": scene.shapes[0]}
    return phrases(scene)


def _pairs(scene: Scene, holds: Callable[[Shape, Shape], bool]) -> list[tuple[str, str]]:
    """List phrases (a, b) of two shapes that stand in a relation, both in the same form."""
    names = [(name, shape) for name, shape in phrases(scene).items() if name == shape.phrase]
    return [(a, b) for a, first in names for b, second in names if holds(first, second)]


def _offset(scene: Scene, shape: Shape) -> tuple[float, float]:
    """Where the center stands, from -0.5 (left, top) to 0.5 (right, bottom)."""
    x, y = shape.center
    return x / scene.width - 0.5, y / scene.height - 0.5


def _part(dx: float, dy: float) -> str | None:
    if max(abs(dx), abs(dy)) < _NEAR_MIDDLE:
        return "middle"
    if abs(dx) > _OFF_MIDDLE and abs(dx) > abs(dy) + _NEAR_MIDDLE:
        return "left" if dx < 0 else "right"
    if abs(dy) > _OFF_MIDDLE and abs(dy) > abs(dx) + _NEAR_MIDDLE:
        return "top" if dy < 0 else "bottom"
    return None


_AT_ONCE: tuple[_Asker, ...] = (_list, _each_color, _each_kind, _each_count)
_SINGLE: tuple[_Asker, ...] = (
    _name_shape,
    _describe,
    _color,
    _count_all,
    _position,
    _half,
    _exists,
)
# Twice what was learned last: numbers of one kind or color, and yes or no.
_SEVERAL: tuple[_Asker, ...] = (
    _name_shape_of_color,
    _color_of_kind,
    _count_all,
    _count_kind,
    _count_kind,
    _count_color,
    _count_color,
    _position,
    _half,
    _compare_size,
    _compare_place,
    _exists,
    _exists,
)
