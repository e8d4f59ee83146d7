"""Places: answers agree with the picture, and what is near a boundary is not asked for."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from random import Random

import pytest

from qwen2vl.synth.object_questions import places
from qwen2vl.synth.object_questions.scene import ObjectScene
from tests.synth.object_questions import make_scene, sample_many


def at(x: int, y: int) -> tuple[int, int, int, int]:
    return (x - 5, y - 5, x + 5, y + 5)


CORNERS = make_scene(
    ("red circle", at(20, 10)),
    ("guitar", at(180, 15)),
    ("blue star", at(15, 85)),
    ("owl", at(190, 90)),
)
SIDES = make_scene(("red circle", at(15, 50)), ("owl", at(100, 8)), ("blue star", at(100, 51)))


def random_scenes(count: int) -> list[ObjectScene]:
    scenes = []
    for seed in range(count):
        rng = Random(seed)
        names = ("red circle", "guitar", "blue star", "owl")[: rng.randint(1, 4)]
        boxes = [at(rng.randint(5, 195), rng.randint(5, 95)) for _ in names]
        scenes.append(make_scene(*zip(names, boxes, strict=True)))
    return scenes


def test_positions_are_clear_and_all_occur() -> None:
    answers: Counter[str] = Counter()
    for scene in random_scenes(300):
        for sampler in (places.ask_position, places.ask_half):
            for candidate in sample_many(sampler, scene, 2):
                dx, dy = scene.offset(scene.names[candidate.fields[0]])
                holds = {
                    "left": dx < -0.1,
                    "right": dx > 0.1,
                    "top": dy < -0.1,
                    "bottom": dy > 0.1,
                    "middle": max(abs(dx), abs(dy)) < 0.1,
                }
                assert holds[candidate.answer]
                if candidate.task == "position" and candidate.answer in ("left", "right"):
                    assert abs(dx) > abs(dy)
                answers[f"{candidate.task} {candidate.answer}"] += 1
    assert len(answers) == 9 and min(answers.values()) > 15


def test_what_is_in_a_corner_or_at_a_side() -> None:
    found = {c.fields[0]: c.answer for c in sample_many(places.ask_what_at, CORNERS, 80)}
    assert found == {
        "in the top left corner": "red circle",
        "in the top right corner": "guitar",
        "in the bottom left corner": "blue star",
        "in the bottom right corner": "owl",
    }
    found = {c.fields[0]: c.answer for c in sample_many(places.ask_what_at, SIDES, 40)}
    assert found == {"on the left": "red circle", "at the top": "owl"}


def test_a_text_at_the_place_makes_the_question_ambiguous() -> None:
    scene = replace(CORNERS, texts=((5, 30, 60, 45),))
    found = {c.fields[0] for c in sample_many(places.ask_what_at, scene, 80)}
    assert "in the top left corner" not in found and "in the top right corner" in found


@pytest.mark.parametrize("word", ["leftmost", "rightmost", "topmost", "bottommost"])
def test_the_outermost_object(word: str) -> None:
    asked = 0
    for scene in random_scenes(60):
        for candidate in sample_many(places.ask_outermost, scene, 16):
            if candidate.fields == (word,):
                axis = 0 if word[0] in "lr" else 1
                sign = 1 if word[0] in "rb" else -1
                best = max(scene.objects, key=lambda one: sign * one.center[axis])
                assert candidate.answer == best.phrase and len(scene.objects) > 1
                asked += 1
    assert asked > 20
