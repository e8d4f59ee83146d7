"""Edit distance, IoU, confidence intervals and the chance level: known values and properties."""

from __future__ import annotations

from math import comb

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen2vl.eval.metrics import (
    chance_upper_bound,
    edit_distance,
    iou,
    normalize_answer,
    ratio_interval,
    wilson_interval,
)

TEXTS = st.text("abcde ", max_size=12)
BOXES = st.tuples(*[st.integers(0, 50)] * 4).map(
    lambda v: (min(v[0], v[2]), min(v[1], v[3]), max(v[0], v[2]) + 1, max(v[1], v[3]) + 1)
)


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [
        ("", "", 0),
        ("", "abc", 3),
        ("kitten", "sitting", 3),
        ("flaw", "lawn", 2),
        ("intention", "execution", 5),
        ("saturday", "sunday", 3),
        ("ab", "ba", 2),
        ("A", "a", 1),
        ("Caf\u00e9", "Cafe", 1),
    ],
)
def test_known_edit_distances(a: str, b: str, distance: int) -> None:
    assert edit_distance(a, b) == distance


@given(TEXTS, TEXTS, TEXTS)
def test_edit_distance_is_a_metric(a: str, b: str, c: str) -> None:
    distance = edit_distance(a, b)
    assert distance == edit_distance(b, a)
    assert (distance == 0) == (a == b)
    assert abs(len(a) - len(b)) <= distance <= max(len(a), len(b))
    assert edit_distance(a, c) <= distance + edit_distance(b, c)


@given(TEXTS, TEXTS)
def test_common_suffix_does_not_change_the_distance(a: str, b: str) -> None:
    assert edit_distance(a + "xyz", b + "xyz") == edit_distance(a, b)


@pytest.mark.parametrize(
    ("answer", "normalized"),
    [
        ("Red circle. ", "red circle"),
        ("<|object_ref_start|>the star<|object_ref_end|>", "star"),
        ("An orange cross", "orange cross"),
        ("a", "a"),
        ("another star", "another star"),
        ("red\n  circle", "red circle"),
        ("Yes.", "yes"),
        ("2", "2"),
        ("...", ".."),
        ("", ""),
    ],
)
def test_normalize_answer(answer: str, normalized: str) -> None:
    assert normalize_answer(answer) == normalized


@pytest.mark.parametrize(
    ("a", "b", "overlap"),
    [
        ((0, 0, 10, 10), (0, 0, 10, 10), 1),
        ((0, 0, 10, 10), (5, 0, 15, 10), 1 / 3),
        ((0, 0, 10, 10), (0, 0, 10, 5), 1 / 2),
        ((0, 0, 10, 10), (10, 0, 20, 10), 0),
        ((0, 0, 10, 10), (20, 20, 30, 30), 0),
        ((3, 3, 3, 3), (3, 3, 3, 3), 0),
    ],
)
def test_known_ious(a: tuple[int, ...], b: tuple[int, ...], overlap: float) -> None:
    assert iou(a, b) == pytest.approx(overlap)


@given(BOXES, BOXES, st.integers(1, 9), st.integers(1, 9))
def test_iou_is_invariant_to_scale(
    a: tuple[int, ...], b: tuple[int, ...], scale_x: int, scale_y: int
) -> None:
    factors = (scale_x, scale_y, scale_x, scale_y)
    scaled_a, scaled_b = ([v * k for v, k in zip(box, factors, strict=True)] for box in (a, b))
    assert iou(a, b) == pytest.approx(iou(b, a)) == pytest.approx(iou(scaled_a, scaled_b))
    assert 0 <= iou(a, b) <= 1
    assert (iou(a, b) == 1) == (a == b)


def test_published_values_of_the_wilson_interval() -> None:
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson_interval(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert wilson_interval(50, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)


def test_ratio_interval_is_that_of_a_mean_where_all_denominators_are_one() -> None:
    parts = [0, 0, 1, 0, 1, 0, 0, 0]
    variance = sum((p - 0.25) ** 2 for p in parts) / 7
    half = 1.96 * (variance / 8) ** 0.5
    assert ratio_interval(parts, [1] * 8) == pytest.approx((max(0, 0.25 - half), 0.25 + half))
    assert ratio_interval([1], [4]) == (0.25, 0.25)
    assert ratio_interval([1, 2, 3], [2, 4, 6]) == pytest.approx((0.5, 0.5))


@pytest.mark.parametrize(("chance", "count"), [(0.5, 100), (0.2, 50), (1 / 6, 150)])
def test_guessing_rarely_exceeds_the_upper_bound(chance: float, count: int) -> None:
    limit = chance_upper_bound([chance] * count)
    above = sum(
        comb(count, right) * chance**right * (1 - chance) ** (count - right)
        for right in range(count + 1)
        if right / count > limit
    )
    assert limit == pytest.approx(chance + 3 * (chance * (1 - chance) / count) ** 0.5)
    assert above < 0.004


def test_chance_levels_may_differ_between_questions() -> None:
    assert chance_upper_bound([0.5, 0.1], sigmas=0) == pytest.approx(0.3)
    assert chance_upper_bound([0.5, 0.1], sigmas=1) == pytest.approx(0.3 + (0.25 + 0.09) ** 0.5 / 2)
    assert chance_upper_bound([0.9]) == 1
    assert chance_upper_bound([0.0, 0.0]) == 0
