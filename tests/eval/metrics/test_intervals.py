"""Confidence intervals and the chance level: known values and properties."""

from __future__ import annotations

from math import comb, isnan

import pytest

from qwen2vl.eval.metrics.intervals import (
    bootstrap_interval,
    chance_upper_bound,
    ratio_interval,
    wilson_interval,
)


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


def test_the_bootstrap_agrees_with_the_normal_approximation_of_a_mean() -> None:
    values = [0.0, 0.5, 1.0] * 40
    deviation = (sum((v - 0.5) ** 2 for v in values) / len(values)) ** 0.5
    half = 1.96 * deviation / len(values) ** 0.5
    assert bootstrap_interval(values) == pytest.approx((0.5 - half, 0.5 + half), abs=0.01)
    assert bootstrap_interval(values) == bootstrap_interval(values[::-1])
    assert bootstrap_interval([0.25]) == (0.25, 0.25)


def test_intervals_of_nothing_are_nan() -> None:
    for low, high in (wilson_interval(0, 0), ratio_interval([], []), bootstrap_interval([])):
        assert isnan(low) and isnan(high)
    assert isnan(chance_upper_bound([]))
