"""Scenes: names and facts; questions of which none follows from the ones before."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest

from qwen2vl.synth.object_questions.scene import (
    Candidate,
    ObjectScene,
    choose_balanced,
    choose_questions,
    unique_values,
)
from tests.synth.object_questions import make_scene

SCENE = make_scene(
    ("red circle", (0, 0, 20, 20)),
    ("blue circle", (80, 40, 100, 60)),
    ("guitar", (150, 0, 190, 90)),
)


def test_names_refer_to_one_object() -> None:
    circles, guitar = SCENE.objects[:2], SCENE.objects[2]
    assert SCENE.shapes == [*circles] and SCENE.icons == [guitar]
    assert set(SCENE.names) == {"red circle", "blue circle", "red shape", "blue shape", "guitar"}
    assert set(SCENE.full_names) == {"red circle", "blue circle", "guitar"}
    assert SCENE.facts_of_name("blue circle") == {"1.color", "1.kind"}
    assert SCENE.facts_of_name("blue shape") == {"1.color"}
    assert SCENE.facts_of_name("guitar") == {"2.kind"}
    single = make_scene(("red star", (0, 0, 20, 20)))
    assert set(single.names) == {"red star", "star", "red shape", "shape", "object"}
    assert single.facts_of_name("shape") == set()
    assert "sunglasses" not in make_scene(("sunglasses", (0, 0, 20, 20))).names


def test_offsets_are_shares_of_the_picture() -> None:
    assert SCENE.offset(SCENE.objects[0]) == pytest.approx((-0.45, -0.4))
    assert SCENE.offset(SCENE.objects[1]) == pytest.approx((-0.05, 0.0))


def test_what_earlier_questions_reveal_is_not_asked() -> None:
    def color(rng: Random, scene: ObjectScene) -> Candidate:
        return Candidate(task="color", answer="red", asks={"0.color"})

    def name(rng: Random, scene: ObjectScene) -> Candidate:
        return Candidate(
            task="color_of_kind",
            fields=("circle",),
            answer="x",
            asks={"0.x"},
            reveals={"0.color"},
        )

    def compare(rng: Random, scene: ObjectScene) -> Candidate:
        return Candidate(task="count_all", answer="y", asks={"0.x", "1.x"}, result="x of 0 and 1")

    def nothing(rng: Random, scene: ObjectScene) -> None:
        return None

    orders = Counter(
        tuple(
            q.answer
            for q in choose_questions(
                Random(i), SCENE, {color: 1, name: 1, compare: 1, nothing: 9}, 5
            )
        )
        for i in range(200)
    )
    # "red" is revealed by the second sampler, but not the reverse; a comparison reveals no place.
    assert set(orders) == {
        *(("red", "x", "y"), ("red", "y", "x"), ("y", "red", "x")),
        *(("x", "y"), ("y", "x")),
    }
    assert len(choose_questions(Random(0), SCENE, {color: 1, name: 1, compare: 1}, 1)) == 1
    repeated = choose_questions(Random(0), SCENE, {compare: 5.0}, 5)
    assert [q.answer for q in repeated] == ["y"]


def test_weights_are_rates() -> None:
    def first(rng: Random, scene: ObjectScene) -> Candidate:
        return Candidate(task="color", answer="a", asks={"a"})

    def second(rng: Random, scene: ObjectScene) -> Candidate:
        return Candidate(task="color", answer="b", asks={"b"})

    answers = Counter(
        choose_questions(Random(i), SCENE, {first: 3.0, second: 1.0}, 1)[0].answer
        for i in range(400)
    )
    assert 260 < answers["a"] < 340


def test_answers_are_balanced() -> None:
    options = [*((i, "yes") for i in range(20)), (99, "no")]
    answers = Counter(choose_balanced(Random(i), options) for i in range(300))
    assert 120 < answers[99, "no"] < 180
    assert choose_balanced(Random(0), []) is None
    assert unique_values(["a", "b", "a", "c"]) == ["b", "c"]
