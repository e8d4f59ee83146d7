"""Paired comparison of two runs of one suite, or of two parts: differences, and exact tests.

Answers are paired by the id of their question, so that questions which are hard for both runs
cancel out. Accuracies are compared by McNemar's exact test, character error rates by the sign
test over questions: both ask whether one run is better on more questions than chance explains.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import comb, fsum, sqrt
from typing import Literal

from qwen2vl.eval.suites.suite import Suite
from qwen2vl.eval.suites.thresholds import CHANCE
from qwen2vl.eval.task import ExampleResult

__all__ = [
    "PairedComparison",
    "binary_difference_interval",
    "compare_parts",
    "compare_results",
    "pooled_parts",
    "sign_test",
]


Z = 1.96  # standard deviations on either side that hold 95 % of a normal distribution


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedComparison:
    """One part of two runs, over the questions that both answered."""

    part: str
    metric: Literal["accuracy", "character error rate"]
    count: int  # pairs
    score: float  # of the new run
    other_score: float  # of the one it is compared with
    difference: float  # score - other_score
    interval: tuple[float, float]  # 95 % confidence interval of the difference
    num_better: int  # questions that only the new run has right, or with fewer errors
    num_worse: int
    p_value: float  # two-sided


def compare_results(
    new: Mapping[str, ExampleResult],
    other: Mapping[str, ExampleResult],
    parts: Sequence[str],
    pooled: Collection[str],
) -> list[PairedComparison]:
    """Compare two runs by part; the last row, "all", compares accuracies of several parts together.

    Args:
        new: id -> result of one run.
        other: the same of the run that it is compared with; ids that one of them lacks are left
            out.
        parts: names of them, in the order of the rows; those without a pair have none.
        pooled: parts of the row "all", which there is if two of them have a pair. The tests of the
            row require independent questions, and its difference is one of ability only without
            controls: `pooled_parts` returns those of a suite.
    """
    by_part: dict[str, list[_Pair]] = {part: [] for part in parts}
    for id, result in new.items():
        if id in other:
            by_part[result.part].append((result, other[id]))
    by_part = {part: pairs for part, pairs in by_part.items() if pairs}
    rows = [_compare_part(part, pairs) for part, pairs in by_part.items()]
    together = [pairs for part, pairs in by_part.items() if part in pooled]
    if len(together) > 1:
        rows.append(_compare_accuracy("all", [pair for pairs in together for pair in pairs]))
    return rows


def pooled_parts(suite: Suite) -> list[str]:
    """Return the parts of a suite that the row "all" of a comparison has.

    They are those that are no controls; none where parts ask the same questions several times,
    which are not independent.
    """
    if suite.paired_parts:
        return []
    return [part for part in suite.parts if suite.threshold(part) != CHANCE]


def compare_parts(
    results: Sequence[ExampleResult], part: str, other: str
) -> PairedComparison | None:
    """Compare two parts of one run, whose items are the same, asked or shown in two ways.

    Items are paired by what follows the part in their ids: "held_out/017" and "trained/017".

    Returns:
        The comparison of `part` with `other`; None if they have no pair.
    """
    by_part = {
        name: {r.name.removeprefix(f"{name}/"): r for r in results if r.part == name}
        for name in (part, other)
    }
    pairs = [
        (result, by_part[other][id]) for id, result in by_part[part].items() if id in by_part[other]
    ]
    return _compare_part(part, pairs) if pairs else None


def sign_test(num_better: int, num_worse: int) -> float:
    """Return the two-sided p-value of the exact sign test; ties are left out before.

    With the numbers of questions that only one of two runs has right it is McNemar's exact test:
    twice the binomial probability, at 1/2, of a split as uneven, and at most 1.
    """
    count = num_better + num_worse
    tail = sum(comb(count, k) for k in range(min(num_better, num_worse) + 1))
    return min(1.0, 2 * tail / 2**count)


def binary_difference_interval(num_better: int, num_worse: int, count: int) -> tuple[float, float]:
    """Return the 95 % confidence interval of the difference of two paired accuracies.

    Half a pair is added to each of the four outcomes, so that runs which never differ have a width
    too. (Agresti and Min 2005.)

    Args:
        num_better: pairs that only the first has right.
        num_worse: pairs that only the second has right.
        count: all pairs.
    """
    better, worse, total = num_better + 0.5, num_worse + 0.5, count + 2
    difference = (better - worse) / total
    variance = ((better + worse) - (better - worse) ** 2 / total) / total**2
    half = Z * sqrt(variance)
    return max(-1.0, difference - half), min(1.0, difference + half)


_Pair = tuple[ExampleResult, ExampleResult]


def _compare_part(part: str, pairs: Sequence[_Pair]) -> PairedComparison:
    if all(result.edits is not None and result.length for pair in pairs for result in pair):
        return _compare_edits(part, pairs)
    return _compare_accuracy(part, pairs)


def _compare_accuracy(part: str, pairs: Sequence[_Pair]) -> PairedComparison:
    count = len(pairs)
    num_better = sum(a.score > b.score for a, b in pairs)
    num_worse = sum(a.score < b.score for a, b in pairs)
    score, other_score = fsum(a.score for a, _ in pairs), fsum(b.score for _, b in pairs)
    return PairedComparison(
        part=part,
        metric="accuracy",
        count=count,
        score=score / count,
        other_score=other_score / count,
        difference=(score - other_score) / count,
        interval=binary_difference_interval(num_better, num_worse, count),
        num_better=num_better,
        num_worse=num_worse,
        p_value=sign_test(num_better, num_worse),
    )


def _compare_edits(part: str, pairs: Sequence[_Pair]) -> PairedComparison:
    """Compare character error rates; the interval is that of a ratio, linearized."""
    edits = [(a.edits or 0, b.edits or 0) for a, b in pairs]
    lengths = [a.length or 0 for a, _ in pairs]
    count, total = len(pairs), sum(lengths)
    difference = sum(a - b for a, b in edits) / total
    squares = fsum(
        (a - b - difference * length) ** 2 for (a, b), length in zip(edits, lengths, strict=True)
    )
    half = Z * sqrt(squares * count / (count - 1)) / total if count > 1 else 0.0
    num_better, num_worse = sum(a < b for a, b in edits), sum(a > b for a, b in edits)
    return PairedComparison(
        part=part,
        metric="character error rate",
        count=count,
        score=sum(a for a, _ in edits) / total,
        other_score=sum(b for _, b in edits) / total,
        difference=difference,
        interval=(difference - half, difference + half),
        num_better=num_better,
        num_worse=num_worse,
        p_value=sign_test(num_better, num_worse),
    )
