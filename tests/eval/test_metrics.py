"""Distances, overlaps, intervals and the limit of chance: known values and laws."""

from __future__ import annotations

from math import comb

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen2vl.eval.metrics import (
    chance_limit,
    edit_distance,
    iou,
    normalize,
    ratio_interval,
    wilson_interval,
)

WORDS = st.text("abcde ", max_size=12)
CORNERS = st.tuples(*[st.integers(0, 50)] * 4).map(
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
def test_known_distances(a: str, b: str, distance: int) -> None:
    assert edit_distance(a, b) == distance


@given(WORDS, WORDS, WORDS)
def test_a_distance_is_a_metric(a: str, b: str, c: str) -> None:
    between = edit_distance(a, b)
    assert between == edit_distance(b, a)
    assert (between == 0) == (a == b)
    assert abs(len(a) - len(b)) <= between <= max(len(a), len(b))
    assert edit_distance(a, c) <= between + edit_distance(b, c)


@given(WORDS, WORDS)
def test_a_common_end_changes_nothing(a: str, b: str) -> None:
    assert edit_distance(a + "xyz", b + "xyz") == edit_distance(a, b)


@pytest.mark.parametrize(
    ("answer", "reduced"),
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
def test_what_does_not_count_in_words(answer: str, reduced: str) -> None:
    assert normalize(answer) == reduced


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
def test_known_overlaps(a: tuple[int, ...], b: tuple[int, ...], overlap: float) -> None:
    assert iou(a, b) == pytest.approx(overlap)


@given(CORNERS, CORNERS, st.integers(1, 9), st.integers(1, 9))
def test_overlap_knows_no_scale(
    a: tuple[int, ...], b: tuple[int, ...], across: int, down: int
) -> None:
    factors = (across, down, across, down)
    wide_a, wide_b = ([v * k for v, k in zip(box, factors, strict=True)] for box in (a, b))
    assert iou(a, b) == pytest.approx(iou(b, a)) == pytest.approx(iou(wide_a, wide_b))
    assert 0 <= iou(a, b) <= 1
    assert (iou(a, b) == 1) == (a == b)


def test_wilson_s_interval_has_its_published_values() -> None:
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson_interval(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert wilson_interval(50, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)


def test_the_interval_of_a_ratio_is_that_of_a_mean_where_all_wholes_are_one() -> None:
    parts = [0, 0, 1, 0, 1, 0, 0, 0]
    variance = sum((p - 0.25) ** 2 for p in parts) / 7
    half = 1.96 * (variance / 8) ** 0.5
    assert ratio_interval(parts, [1] * 8) == pytest.approx((max(0, 0.25 - half), 0.25 + half))
    assert ratio_interval([1], [4]) == (0.25, 0.25)
    assert ratio_interval([1, 2, 3], [2, 4, 6]) == pytest.approx((0.5, 0.5))


@pytest.mark.parametrize(("chance", "count"), [(0.5, 100), (0.2, 50), (1 / 6, 150)])
def test_luck_stays_under_the_limit(chance: float, count: int) -> None:
    limit = chance_limit([chance] * count)
    above = sum(
        comb(count, right) * chance**right * (1 - chance) ** (count - right)
        for right in range(count + 1)
        if right / count > limit
    )
    assert limit == pytest.approx(chance + 3 * (chance * (1 - chance) / count) ** 0.5)
    assert above < 0.004


def test_chances_may_differ_from_question_to_question() -> None:
    assert chance_limit([0.5, 0.1], sigmas=0) == pytest.approx(0.3)
    assert chance_limit([0.5, 0.1], sigmas=1) == pytest.approx(0.3 + (0.25 + 0.09) ** 0.5 / 2)
    assert chance_limit([0.9]) == 1
    assert chance_limit([0.0, 0.0]) == 0
