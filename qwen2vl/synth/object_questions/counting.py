"""Questions about numbers of objects: of all, of a kind, of a color, or of a name.

Small numbers are possible in every scene, so that they are asked for less often where they are.
"""

from __future__ import annotations

from collections import Counter
from random import Random

from qwen2vl.synth.object_questions.identity import ALL_COLORS, absent_kinds, absent_names
from qwen2vl.synth.object_questions.names import is_countable, plural
from qwen2vl.synth.object_questions.scene import Candidate, ObjectScene

__all__ = ["MAX_OBJECTS", "ask_count_all", "ask_count_some", "count_shapes_by"]

MAX_OBJECTS = 6  # in one scene
# How much more often a number is asked for where it is possible: large ones rarely are.
_WEIGHTS = (1, 1, 4, 10, 20, 35, 50)
# Share of the questions that are kept, by number.
_KEPT = (0.35, 0.35, 0.9, 1, 1, 1, 1)
_KEPT_OF_ALL = (0, 0.3, 0.7, 0.8, 0.9, 1, 1)

_Option = tuple[str, str]  # task, plural


def ask_count_all(rng: Random, scene: ObjectScene) -> Candidate | None:
    """Ask for the number of objects, or of shapes where there are no others."""
    count = len(scene.objects)
    if rng.random() >= _KEPT_OF_ALL[count]:
        return None
    task = "count_objects" if scene.icons else "count_all"
    return Candidate(task=task, answer=str(count), asks={"count"}, choices=MAX_OBJECTS)


def ask_count_some(rng: Random, scene: ObjectScene) -> Candidate | None:
    """Ask for the number of shapes of a kind or color or both, of all shapes, or of one icon."""
    options = _present(scene)
    counts = sorted({0, *options.values()})
    (number,) = rng.choices(counts, [_WEIGHTS[count] for count in counts])
    if rng.random() >= _KEPT[number]:
        return None
    if number:
        task, names = rng.choice([option for option, n in options.items() if n == number])
    else:
        task, names = _sample_absent(rng, scene)
    return Candidate(
        task=task,
        fields=(names,),
        answer=str(number),
        asks={f"count {names}"},
        wording="count_some",
    )


def count_shapes_by(scene: ObjectScene, attribute: str) -> Counter[str]:
    """Count the shapes by `color`, `name` or `phrase`."""
    return Counter(getattr(one, attribute) for one in scene.shapes)


def _present(scene: ObjectScene) -> dict[_Option, int]:
    """Count the objects of each sort."""
    kinds = count_shapes_by(scene, "name")
    options: dict[_Option, int] = {}
    for kind, count in kinds.items():
        if not _is_ambiguous(kind, kinds):
            options["count_kind", plural(kind)] = count
    for color, count in count_shapes_by(scene, "color").items():
        options["count_color", f"{color} shapes"] = count
    for phrase, count in count_shapes_by(scene, "phrase").items():
        if not _is_ambiguous(phrase.split()[1], kinds):
            options["count_phrase", plural(phrase)] = count
    if scene.icons and scene.shapes:
        options["count_shapes", "shapes"] = len(scene.shapes)
    for name, count in Counter(one.name for one in scene.icons).items():
        if is_countable(name) and plural(name):
            options["count_name", plural(name)] = count
    return options


def _is_ambiguous(kind: str, kinds: Counter[str]) -> bool:
    """Return whether there are shapes that belong to this kind, too, as a circle is an oval."""
    return (kind == "oval" and "circle" in kinds) or (kind == "rectangle" and "square" in kinds)


def _sample_absent(rng: Random, scene: ObjectScene) -> _Option:
    """Sample something of which there is none."""
    how = rng.randrange(6)
    if scene.icons and how < 3:
        while not (names := plural(absent_names(rng, scene, 1)[0])):
            pass
        return "count_name", names
    if how == 3 and not scene.shapes:
        return "count_shapes", "shapes"
    if how < 5:
        return "count_kind", plural(rng.choice(absent_kinds(scene)))
    colors = {one.color for one in scene.shapes}
    color = rng.choice([color for color in ALL_COLORS if color not in colors])
    return "count_color", f"{color} shapes"
