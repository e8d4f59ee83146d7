"""Counts: true, of everything that can be counted, and of all numbers."""

from __future__ import annotations

from collections import Counter
from random import Random

from qwen2vl.synth.object_questions import counting
from tests.synth.object_questions import make_scene, sample_many

PLACES = [(30 * i, 0, 30 * i + 20, 20) for i in range(6)]
SHAPES = make_scene(
    *zip(("red circle", "red circle", "blue circle", "red oval"), PLACES, strict=False)
)
MIXED = make_scene(
    *zip(("red star", "guitar", "guitar", "owl", "bread", "blue star"), PLACES, strict=True)
)


def test_counts_of_sorts_are_true() -> None:
    expected = {
        **{"circles": 3, "red shapes": 3, "blue shapes": 1, "red circles": 2, "blue circles": 1},
    }
    found = {c.fields[0]: int(c.answer) for c in sample_many(counting.ask_count_some, SHAPES, 600)}
    assert {name: n for name, n in found.items() if n} == expected
    absent = [name for name, n in found.items() if not n]
    assert "ovals" not in found and "hearts" in absent  # a circle is an oval, too
    assert not any("red" in name or "circle" in name or "blue" in name for name in absent)
    expected = {"stars": 2, "red shapes": 1, "blue shapes": 1, "red stars": 1, "blue stars": 1}
    expected |= {"guitars": 2, "owls": 1, "shapes": 2}
    found = {c.fields[0]: int(c.answer) for c in sample_many(counting.ask_count_some, MIXED, 900)}
    assert {name: n for name, n in found.items() if n} == expected


def test_large_numbers_are_preferred() -> None:
    numbers = Counter(c.answer for c in sample_many(counting.ask_count_some, SHAPES, 400))
    assert numbers["3"] > numbers["2"] > numbers["1"] > 5 and numbers["0"] > 5


def test_all_are_counted() -> None:
    for scene, task, count in ((SHAPES, "count_all", "4"), (MIXED, "count_objects", "6")):
        found = list(sample_many(counting.ask_count_all, scene, 40))
        assert {(c.task, c.answer) for c in found} == {(task, count)}
    single = make_scene(("red star", (0, 0, 20, 20)))
    assert 20 < sum(1 for _ in sample_many(counting.ask_count_all, single, 200)) < 110
    assert counting.ask_count_all(Random(0), MIXED) is not None
    assert counting.count_shapes_by(SHAPES, "color") == {"red": 3, "blue": 1}
