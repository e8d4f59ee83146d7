"""Confidence intervals of scores: Wilson, linearized ratio, bootstrap; and what guessing explains.

`wilson_interval` is for shares of right answers, `ratio_interval` for sums over sums, as error
rates are, and `bootstrap_interval` for any mean. All are 95 % intervals, and NaN for empty sets.
Standard library only.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import nan, sqrt
from random import Random

__all__ = ["bootstrap_interval", "chance_upper_bound", "ratio_interval", "wilson_interval"]

Z = 1.96  # standard deviations on either side that hold 95 % of a normal distribution


def wilson_interval(correct: float, count: int) -> tuple[float, float]:
    """Return the 95 % confidence interval of `correct` / `count` (Wilson score interval).

    Unlike the normal approximation it has a width at proportions of 0 and 1.
    """
    if not count:
        return nan, nan
    p, z2 = correct / count, Z * Z
    center = (p + z2 / (2 * count)) / (1 + z2 / count)
    half = Z * sqrt(p * (1 - p) / count + z2 / (4 * count * count)) / (1 + z2 / count)
    return max(0.0, center - half), min(1.0, center + half)


def ratio_interval(
    numerators: Sequence[float], denominators: Sequence[float]
) -> tuple[float, float]:
    """Return the 95 % confidence interval of sum(numerators) / sum(denominators).

    Linearized ratio estimator over independent pairs: a long line with many errors weighs more
    than a short one. With one pair the variance is unknown, and both bounds are the ratio.
    """
    count, total = len(numerators), sum(denominators)
    if not total:
        return nan, nan
    ratio = sum(numerators) / total
    if count < 2:
        return ratio, ratio
    squares = sum((n - ratio * d) ** 2 for n, d in zip(numerators, denominators, strict=True))
    half = Z * sqrt(squares * count / (count - 1)) / total
    return max(0.0, ratio - half), ratio + half


def bootstrap_interval(
    values: Sequence[float], *, num_samples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Return the 95 % confidence interval of the mean by the percentile bootstrap.

    Args:
        values: one score per independent item, or one mean per cluster (the questions of one video
            are not independent).
        num_samples: how often the values are drawn with replacement.
        seed: makes the interval reproducible; the values are sorted first, so that their order
            has no effect.
    """
    if not values:
        return nan, nan
    ordered, generator = sorted(values), Random(seed)
    count = len(ordered)
    means = sorted(sum(generator.choices(ordered, k=count)) / count for _ in range(num_samples))
    tail = num_samples * 25 // 1000
    return means[tail], means[-1 - tail]


def chance_upper_bound(chances: Sequence[float], *, sigmas: float = 3.0) -> float:
    """Return the accuracy that guessing exceeds in about one of a thousand runs.

    Args:
        chances: chance level of each question: probability that a random answer is right.
        sigmas: standard deviations above the expected accuracy; three leave 0.13 %.
    """
    count = len(chances)
    if not count:
        return nan
    deviation = sqrt(sum(p * (1 - p) for p in chances)) / count
    return min(1.0, sum(chances) / count + sigmas * deviation)
