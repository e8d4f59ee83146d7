"""Selection of questions: shares, groups, answers that another question would tell."""

from __future__ import annotations

from collections import Counter
from random import Random

from qwen2vl.synth.clips.offers import Offer, select_offers


def _tasks(offers: list[Offer], count: int, seed: int) -> list[str]:
    return [offer.task for offer in select_offers(Random(seed), offers, count)]


def test_one_of_a_group_is_selected() -> None:
    offers = [Offer("a", "1", group="x"), Offer("b", "2", group="x"), Offer("c", "3")]
    for seed in range(20):
        tasks = _tasks(offers, 3, seed)
        assert len(tasks) == 2
        assert "c" in tasks


def test_weights_are_relative_frequencies() -> None:
    offers = [Offer("a", "1", weight=3), Offer("b", "2")]
    first = Counter(_tasks(offers, 1, seed)[0] for seed in range(800))
    assert 0.69 < first["a"] / first.total() < 0.81


def test_a_share_is_a_probability_and_does_not_depend_on_the_other_offers() -> None:
    for num_others in (1, 6):
        offers = [Offer(f"b{i}", "x", weight=9, choices=2) for i in range(num_others)]
        offers.append(Offer("a", "yes", (), 2, share=0.2))
        for count in (1, 3):
            selected = [_tasks(offers, count, seed) for seed in range(800)]
            share = sum("a" in tasks for tasks in selected) / len(selected)
            assert 0.15 < share < 0.25


def test_order_is_random() -> None:
    offers = [Offer("a", "1", weight=100), Offer("b", "2")]
    assert {tuple(_tasks(offers, 2, seed)) for seed in range(20)} == {("a", "b"), ("b", "a")}


def test_no_question_has_the_answer_to_another() -> None:
    color = Offer("color", "red", ("circle",), 12)
    order = Offer("order", "guitar, red circle")
    direction = Offer("direction", "left", ("red circle",), 4)
    other = Offer("direction_2", "up", ("green star",), 4)
    assert direction.excludes(color)
    assert color.excludes(direction)
    assert order.excludes(color)
    assert not other.excludes(color)
    assert not other.excludes(direction)
    for seed in range(10):
        assert set(_tasks([color, direction], 2, seed)) in ({"color"}, {"direction"})
