"""Grounding: boxes are those of the objects, in the official format."""

from __future__ import annotations

from qwen2vl.grounding import Box, parse
from qwen2vl.synth.object_questions import boxes
from tests.synth.object_questions import make_scene, sample_many

SCENE = make_scene(
    ("red circle", (10, 20, 30, 40)),
    ("blue circle", (100, 0, 150, 50)),
    ("owl", (160, 50, 200, 100)),
)
EXPECTED = {
    "red circle": Box(50, 200, 150, 400),
    "blue circle": Box(500, 0, 750, 500),
    "owl": Box(800, 500, 999, 999),
}


def test_the_box_of_a_name() -> None:
    names = set()
    for candidate in sample_many(boxes.ask_box, SCENE, 80):
        (name,) = candidate.fields
        one = SCENE.names[name]
        (found,) = parse(candidate.answer)
        assert found.phrase == name and found.shape == EXPECTED[one.phrase]
        assert candidate.box == one.box and candidate.task == "find"
        names.add(name)
    assert names == {"red circle", "blue circle", "red shape", "blue shape", "owl"}


def test_the_name_of_a_box() -> None:
    for candidate in sample_many(boxes.ask_name_of_box, SCENE, 30):
        (found,) = parse(candidate.fields[0])
        assert EXPECTED[candidate.answer] == found.shape and candidate.task == "named_box"


def test_several_boxes_are_in_the_order_of_the_question_or_from_left_to_right() -> None:
    orders = set()
    for candidate in sample_many(boxes.ask_boxes_of_each, SCENE, 60):
        found = parse(candidate.answer)
        phrases = [one.phrase for one in found]
        asked = candidate.fields[0].replace(" and ", ", ").split(", ")
        assert [f"the {phrase}" for phrase in phrases] == asked and len(asked) >= 2
        orders.add(tuple(phrase[0] for phrase in asked if phrase))
        assert all(EXPECTED[SCENE.names[f.phrase or ""].phrase] == f.shape for f in found)
    (all_of_them,) = {c.answer for c in sample_many(boxes.ask_boxes_of_all, SCENE, 5)}
    assert [(f.phrase, f.shape) for f in parse(all_of_them)] == list(EXPECTED.items())
    close = make_scene(("red circle", (10, 0, 30, 20)), ("owl", (12, 50, 32, 70)))
    assert not list(sample_many(boxes.ask_boxes_of_all, close, 5))
