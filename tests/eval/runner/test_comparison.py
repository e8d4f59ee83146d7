"""Paired comparison: p-values and intervals, against values computed by hand."""

from __future__ import annotations

from math import sqrt

import pytest

from qwen2vl.eval.runner.comparison import (
    binary_difference_interval,
    compare_results,
    pooled_parts,
    sign_test,
)
from qwen2vl.eval.suites.registry import open_suite
from qwen2vl.eval.task import ExampleResult

PARTS = ("text", "a", "b")


def result(id: str, part: str, score: float, edits: int | None = None) -> ExampleResult:
    return ExampleResult(
        **{"kind": "", "question": "", "truth": "", "answer": "", "chance": 0.0},
        name=id,
        part=part,
        score=score,
        edits=edits,
        length=None if edits is None else 10,
    )


def run(part: str, scores: str) -> dict[str, ExampleResult]:
    return {f"{part}{i}": result(f"{part}{i}", part, int(s)) for i, s in enumerate(scores)}


@pytest.mark.parametrize(
    ("better", "worse", "p"),
    [
        (0, 0, 1.0),
        (1, 0, 1.0),
        (5, 0, 2 / 32),
        (0, 6, 2 / 64),
        (8, 2, 2 * (1 + 10 + 45) / 1024),
        (5, 5, 1.0),
        (59, 6, 3.6e-12),
    ],
)
def test_p_values_of_the_sign_test(better: int, worse: int, p: float) -> None:
    assert sign_test(better, worse) == pytest.approx(p, rel=0.5 if p < 1e-9 else 1e-12)
    assert sign_test(worse, better) == sign_test(better, worse)


def test_interval_of_a_paired_difference() -> None:
    # 8 and 2 of 98 pairs: (8.5 - 2.5) / 100, variance (11 - 36 / 100) / 100^2.
    low, high = binary_difference_interval(8, 2, 98)
    half = 1.96 * sqrt(10.64) / 100
    assert (low, high) == (pytest.approx(0.06 - half), pytest.approx(0.06 + half))
    low, high = binary_difference_interval(0, 0, 20)
    assert -0.2 < low < 0 < high < 0.2  # equal runs have an interval, too
    assert binary_difference_interval(1, 0, 1)[1] <= 1


def test_parts_are_paired_by_question() -> None:
    new, other = run("a", "1111100") | run("b", "01"), run("a", "0000010") | run("b", "00")
    rows = {row.part: row for row in compare_results(new, other, PARTS, PARTS)}
    assert list(rows) == ["a", "b", "all"]
    a = rows["a"]
    assert (a.count, a.num_better, a.num_worse) == (7, 5, 1)
    assert (a.score, a.other_score, a.difference) == (
        pytest.approx(5 / 7),
        pytest.approx(1 / 7),
        pytest.approx(4 / 7),
    )
    assert a.p_value == pytest.approx(2 * (1 + 6) / 64)
    assert a.interval[0] < a.difference < a.interval[1]
    assert (rows["all"].count, rows["all"].num_better) == (9, 6)


def test_only_common_questions_are_compared() -> None:
    rows = compare_results(run("a", "111"), run("a", "1"), PARTS, PARTS)
    assert [(row.part, row.count) for row in rows] == [("a", 1)]
    assert compare_results(run("a", "1"), run("b", "1"), PARTS, PARTS) == []


def test_error_rates_are_compared_by_edits() -> None:
    new = {str(i): result(str(i), "text", 0, edits) for i, edits in enumerate((0, 1, 2, 3))}
    other = {str(i): result(str(i), "text", 0, edits) for i, edits in enumerate((0, 3, 4, 1))}
    (row,) = compare_results(new, other, PARTS, PARTS)
    assert (row.metric, row.num_better, row.num_worse) == ("character error rate", 2, 1)
    assert (row.score, row.other_score) == (6 / 40, 8 / 40)
    assert row.difference == pytest.approx(-2 / 40)
    # Edits differ by 0, -2, -2, 2, around a mean of -1/2: squares of 11 in all.
    half = 1.96 * sqrt(11 * 4 / 3) / 40
    assert row.interval == (pytest.approx(-0.05 - half), pytest.approx(-0.05 + half))


def test_the_row_of_all_parts_has_only_the_pooled_ones() -> None:
    new = run("text", "00") | run("a", "11") | run("b", "1")
    other = run("text", "11") | run("a", "00") | run("b", "1")
    rows = {row.part: row for row in compare_results(new, other, PARTS, ("a", "b"))}
    assert list(rows) == ["text", "a", "b", "all"]
    assert (rows["all"].count, rows["all"].num_better, rows["all"].num_worse) == (3, 2, 0)
    for pooled in ((), ("a",)):
        assert [row.part for row in compare_results(new, other, PARTS, pooled)] == list(PARTS)


def test_controls_and_questions_that_are_asked_again_are_not_pooled() -> None:
    synthetic = open_suite("synthetic")
    controls = {part for part in synthetic.parts if synthetic.threshold(part).kind == "chance"}
    assert controls
    assert pooled_parts(synthetic) == [part for part in synthetic.parts if part not in controls]
    assert pooled_parts(open_suite("wordings")) == []
