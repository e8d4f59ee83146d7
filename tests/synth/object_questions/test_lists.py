"""Questions with several answers: in their order, and only where none is ambiguous."""

from __future__ import annotations

from qwen2vl.synth.object_questions import lists
from tests.synth.object_questions import make_scene, sample_many

PLACES = [(40 * i, 0, 40 * i + 20, 20) for i in (2, 0, 3, 1)]
SHAPES = make_scene(
    *zip(("red circle", "blue star", "red cross", "teal star"), PLACES, strict=True)
)
MIXED = make_scene(*zip(("red circle", "guitar", "blue circle"), PLACES, strict=False))


def test_a_list_is_from_left_to_right() -> None:
    (shapes,) = sample_many(lists.ask_list, SHAPES, 1)
    assert (shapes.task, shapes.answer) == ("list", "blue star, teal star, red circle, red cross")
    (mixed,) = sample_many(lists.ask_list, MIXED, 1)
    assert (mixed.task, mixed.answer) == ("list_objects", "guitar, red circle, blue circle")
    close = make_scene(("red circle", (10, 0, 30, 20)), ("owl", (12, 50, 32, 70)))
    assert not list(sample_many(lists.ask_list, close, 1))
    assert not list(sample_many(lists.ask_list, make_scene(("owl", PLACES[0])), 1))


def test_each_color_and_each_kind_are_of_unique_names() -> None:
    answers = {c.answer for c in sample_many(lists.ask_color_of_each, SHAPES, 30)}
    assert answers == {"circle: red, cross: red", "cross: red, circle: red"}
    answers = {c.answer for c in sample_many(lists.ask_kind_of_each, SHAPES, 30)}
    assert answers == {"blue: star, teal: star", "teal: star, blue: star"}
    assert not list(sample_many(lists.ask_kind_of_each, MIXED, 5))
    assert not list(sample_many(lists.ask_color_of_each, MIXED, 5))


def test_each_count_is_true() -> None:
    expected = {"circles": "1", "stars": "2", "crosses": "1", "red": "2", "blue": "1", "teal": "1"}
    tasks = set()
    for candidate in sample_many(lists.ask_count_of_each, SHAPES, 60):
        for part in candidate.answer.split(", "):
            name, count = part.split(": ")
            assert expected.get(name, "0") == count
        tasks.add(candidate.task)
    assert tasks == {"each_count", "each_color_count"}
    assert {c.task for c in sample_many(lists.ask_count_of_each, MIXED, 30)} == {"each_count"}
