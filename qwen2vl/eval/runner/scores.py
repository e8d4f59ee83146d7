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
from qwen2vl.eval.runner.comparison import PairedComparison, compare_parts
from qwen2vl.eval.suites.suite import Suite
from qwen2vl.eval.suites.thresholds import (
    CHANCE,
    NO_THRESHOLD,
    ThresholdCheck,
    check_results,
)
from qwen2vl.eval.task import ExampleResult, TaskResults

__all__ = ["ALL", "PartScore", "RefusalScore", "SimilarScore", "SuiteScores", "score_suite"]

ALL = "all"  # name of the row of all parts together


@dataclass(frozen=True, slots=True, kw_only=True)
class RefusalScore:
    """Refusals of questions that the picture does not answer, and of those that it does."""

    num_unanswerable: int
    refused: float  # share of the unanswerable questions that were refused
    refused_interval: tuple[float, float]  # 95 % confidence
    num_answerable: int
    wrongly_refused: float  # share of the answerable questions that were refused
    num_answered: int  # answerable questions that were not refused
    answered_accuracy: float | None  # of these; None: there are none


@dataclass(frozen=True, slots=True, kw_only=True)
class PartScore:
    """One row of the table."""

    part: str
    results: TaskResults
    check: ThresholdCheck
    chance: float  # mean chance level: expected accuracy of guessing
    prompt_tokens: float | None  # mean; None: not known
    refusals: RefusalScore | None  # None: the suite has no unanswerable questions


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
    pairs: tuple[tuple[str, PairedComparison], ...] = ()  # of parts, with the name of the other one


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
    rows = [_row(part, runs[part], check, blind=blind) for part, check in checks.items()]
    is_uniform = all(check.metric == "accuracy" for check in checks.values())
    has_control = not blind and CHANCE in thresholds.values()
    if len(rows) > 1 and is_uniform and not has_control:
        together = TaskResults(task=ALL, note="", results=tuple(listed))
        threshold = CHANCE if blind else NO_THRESHOLD
        (check,) = check_results({ALL: together}, {ALL: threshold}).values()
        rows.append(_row(ALL, together, check, blind=blind))
    measured = [r for r in listed if blind or thresholds[r.part] != CHANCE]
    return SuiteScores(
        rows=tuple(rows),
        calibration=measure_calibration(measured),
        similar=_score_similar(listed),
        pairs=tuple(
            (other, comparison)
            for part, other in ([] if blind else suite.paired_parts)
            if (comparison := compare_parts(listed, part, other)) is not None
        ),
    )


def _row(part: str, results: TaskResults, check: ThresholdCheck, *, blind: bool) -> PartScore:
    chance = sum(r.chance for r in results.results) / results.num_examples
    tokens = [r.prompt_tokens for r in results.results if r.prompt_tokens is not None]
    return PartScore(
        part=part,
        results=results,
        check=check,
        chance=chance,
        prompt_tokens=sum(tokens) / len(tokens) if tokens else None,
        # With another picture it is not known whether it answers the question.
        refusals=None if blind else _score_refusals(results.results),
    )


def _score_refusals(results: Sequence[ExampleResult]) -> RefusalScore | None:
    """Return the share of refusals among both kinds of questions; None without a known one."""
    unanswerable = [r for r in results if r.is_answerable is False]
    answerable = [r for r in results if r.is_answerable]
    if not unanswerable or not answerable:
        return None
    refused = sum(bool(r.refused) for r in unanswerable)
    answered = [r for r in answerable if not r.refused]
    return RefusalScore(
        num_unanswerable=len(unanswerable),
        refused=refused / len(unanswerable),
        refused_interval=wilson_interval(refused, len(unanswerable)),
        num_answerable=len(answerable),
        wrongly_refused=1 - len(answered) / len(answerable),
        num_answered=len(answered),
        answered_accuracy=sum(r.score for r in answered) / len(answered) if answered else None,
    )


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
