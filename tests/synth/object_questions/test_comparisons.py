"""Comparisons: answers agree with sizes and places, and each answer is about equally frequent."""

from __future__ import annotations

from collections import Counter
from random import Random

from qwen2vl.synth.object_questions import comparisons
from qwen2vl.synth.object_questions.scene import Candidate, ObjectScene
from tests.synth.object_questions import make_scene, sample_many

SAMPLERS = (
    comparisons.ask_size,
    comparisons.ask_is_larger,
    comparisons.ask_largest,
    comparisons.ask_further,
    comparisons.ask_closer_to_side,
    comparisons.ask_relation,
    comparisons.ask_is_relation,
)
AXES = {
    **{"left": (0, -1), "right": (0, 1), "top": (1, -1), "bottom": (1, 1)},
    **{"up": (1, -1), "down": (1, 1), "above": (1, -1), "below": (1, 1)},
    **{"to the left of": (0, -1), "to the right of": (0, 1)},
}


def random_scenes(count: int) -> list[ObjectScene]:
    scenes = []
    for seed in range(count):
        rng = Random(seed)
        named = []
        for name in ("red circle", "guitar", "blue star")[: rng.randint(2, 3)]:
            side = rng.randint(8, 60)
            x, y = rng.randint(0, 200 - side), rng.randint(0, 100 - side)
            named.append((name, (x, y, x + side, y + side)))
        scenes.append(make_scene(*named))
    return scenes


def is_further(scene: ObjectScene, first: str, second: str, word: str) -> bool:
    axis, sign = AXES[word]
    a, b = (scene.names[name].center[axis] for name in (first, second))
    return sign * (a - b) > 0.1 * (200, 100)[axis]


def sides_of(scene: ObjectScene) -> dict[str, int]:
    return {one.phrase: one.box[2] - one.box[0] for one in scene.objects}


def assert_size_is_true(scene: ObjectScene, c: Candidate) -> None:
    sides = sides_of(scene)
    if c.task == "is_larger":
        first, word, second = c.fields
        is_true = (sides[first] > sides[second]) == (word == "larger")
        assert c.answer == ("yes" if is_true else "no")
    elif c.task in ("larger", "smaller"):
        small, large = sorted(c.fields, key=sides.__getitem__)
        assert c.answer == (large if c.task == "larger" else small)
        assert sides[large] >= 1.3 * sides[small]
    else:
        best = max if c.task == "largest_object" else min
        assert sides[c.answer] == best(sides.values()) and len(sides) > 2


def assert_place_is_true(scene: ObjectScene, c: Candidate) -> None:
    if c.task == "relation":
        first, second = c.fields
        assert is_further(scene, first, second, c.answer)
        return
    first, second, word = c.fields
    if c.task == "is_relation":
        second, word = word, second
        is_true = is_further(scene, first, second, word)
        assert c.answer == ("yes" if is_true else "no")
        assert is_true or is_further(scene, second, first, word)
    else:
        assert is_further(scene, c.answer, second if c.answer == first else first, word)


def test_answers_are_true_clear_and_balanced() -> None:
    answers: Counter[str] = Counter()
    for scene in random_scenes(60):
        for number, sampler in enumerate(SAMPLERS):
            for candidate in sample_many(sampler, scene, 16):
                if number < 3:
                    assert_size_is_true(scene, candidate)
                else:
                    assert_place_is_true(scene, candidate)
                is_first = candidate.answer == (*candidate.fields, "")[0]
                if candidate.answer in sides_of(scene):
                    answers[f"{candidate.task} {'first' if is_first else 'other'}"] += 1
                else:
                    answers[f"{candidate.task} {candidate.answer}"] += 1
    for task, one, other in (
        *(("larger", "first", "other"), ("smaller", "first", "other")),
        *(("further", "first", "other"), ("closer_to_side", "first", "other")),
        *(("is_larger", "yes", "no"), ("is_relation", "yes", "no")),
    ):
        assert 0.6 < answers[f"{task} {one}"] / answers[f"{task} {other}"] < 1.6, (task, answers)
    assert {f"relation {a}" for a in ("left", "right", "above", "below")} <= answers.keys()
    assert {"largest_object other", "smallest_object other"} <= answers.keys()


def test_similar_sizes_and_places_are_not_compared() -> None:
    scene = make_scene(("red circle", (50, 40, 70, 60)), ("guitar", (60, 45, 84, 69)))
    for sampler in SAMPLERS:
        assert not list(sample_many(sampler, scene, 20)), sampler


def test_what_is_diagonal_has_no_direction() -> None:
    scene = make_scene(("red circle", (0, 0, 20, 20)), ("guitar", (70, 70, 90, 90)))
    assert not list(sample_many(comparisons.ask_relation, scene, 20))
    assert list(sample_many(comparisons.ask_is_relation, scene, 20))
