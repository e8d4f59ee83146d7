"""Scores of a run by part: what the table of `qwen2vl eval` and its JSON object show.

A part is scored by accuracy with a Wilson interval, or by its character error rate; beside it
stand the chance level and the threshold of its suite. All parts together have an accuracy where
all of them are measured by it and none is a control.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from qwen2vl.eval.metrics import wilson_interval
from qwen2vl.eval.runner.calibration import Calibration, measure_calibration
from qwen2vl.eval.suites.suite import Suite
from qwen2vl.eval.suites.thresholds import (
    CHANCE,
    NO_THRESHOLD,
    ThresholdCheck,
    check_results,
)
from qwen2vl.eval.task import ExampleResult, TaskResults

__all__ = ["ALL", "PartScore", "SimilarScore", "SuiteScores", "score_suite"]

ALL = "all"  # name of the row of all parts together


@dataclass(frozen=True, slots=True, kw_only=True)
class PartScore:
    """One row of the table."""

    part: str
    results: TaskResults
    check: ThresholdCheck
    chance: float  # mean chance level: expected accuracy of guessing


@dataclass(frozen=True, slots=True, kw_only=True)
class SimilarScore:
    """Accuracy where similar names are accepted too."""

    accuracy: float
    interval: tuple[float, float]  # 95 % confidence
    chance: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SuiteScores:
    """The scores of a run."""

    rows: tuple[PartScore, ...]  # by part, in the order of the suite; "all" is the last
    calibration: Calibration | None  # without controls; None: no probabilities are known
    similar: SimilarScore | None  # None: the suite has no map of names


def score_suite(suite: Suite, results: Iterable[ExampleResult], *, blind: bool) -> SuiteScores:
    """Return the scores of results.

    Args:
        suite: that they belong to.
        results: of any parts.
        blind: they are of the blind control.
    """
    listed = list(results)
    by_part = {part: [r for r in listed if r.part == part] for part in suite.parts}
    runs = {
        part: TaskResults(task=part, note=suite.note(part, blind=blind), results=tuple(own))
        for part, own in by_part.items()
        if own
    }
    thresholds = {part: suite.threshold(part, blind=blind) for part in runs}
    checks = check_results(runs, thresholds)
    rows = [_row(part, runs[part], check) for part, check in checks.items()]
    is_uniform = all(check.metric == "accuracy" for check in checks.values())
    has_control = not blind and CHANCE in thresholds.values()
    if len(rows) > 1 and is_uniform and not has_control:
        together = TaskResults(task=ALL, note="", results=tuple(listed))
        threshold = CHANCE if blind else NO_THRESHOLD
        (check,) = check_results({ALL: together}, {ALL: threshold}).values()
        rows.append(_row(ALL, together, check))
    measured = [r for r in listed if blind or thresholds[r.part] != CHANCE]
    return SuiteScores(
        rows=tuple(rows), calibration=measure_calibration(measured), similar=_score_similar(listed)
    )


def _row(part: str, results: TaskResults, check: ThresholdCheck) -> PartScore:
    chance = sum(r.chance for r in results.results) / results.num_examples
    return PartScore(part=part, results=results, check=check, chance=chance)


def _score_similar(results: Sequence[ExampleResult]) -> SimilarScore | None:
    known = [
        (r.similar_score, r.similar_chance)
        for r in results
        if r.similar_score is not None and r.similar_chance is not None
    ]
    if not known:
        return None
    correct, count = sum(score for score, _ in known), len(known)
    return SimilarScore(
        accuracy=correct / count,
        interval=wilson_interval(correct, count),
        chance=sum(chance for _, chance in known) / count,
    )
