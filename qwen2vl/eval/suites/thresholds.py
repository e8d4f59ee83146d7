"""Thresholds of the parts of a suite, and the check of results against them.

A part is measured by its accuracy, or by its character error rate where it recognizes text. The
threshold of a control is chance: an accuracy no higher than guessing explains.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from qwen2vl.eval.task import TaskResults

__all__ = ["CHANCE", "NO_THRESHOLD", "Threshold", "ThresholdCheck", "check_results"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Threshold:
    """Threshold of the score of a part.

    accuracy: at least `limit`. cer: character error rate of at most `limit`. relative_cer:
    character error rate of at most `limit` above that of the part `text`. chance: accuracy no
    higher than guessing explains. none: reported only.
    """

    kind: Literal["accuracy", "cer", "relative_cer", "chance", "none"]
    limit: float | None = None
    goal: float | None = None


CHANCE = Threshold(kind="chance")
NO_THRESHOLD = Threshold(kind="none")


@dataclass(frozen=True, slots=True, kw_only=True)
class ThresholdCheck:
    """Score of a part compared with its threshold."""

    metric: Literal["accuracy", "character error rate"]
    score: float
    interval: tuple[float, float]  # 95 % confidence
    limit: float | None  # lower bound, or upper bound if `lower_is_better`
    goal: float | None
    lower_is_better: bool
    passed: bool | None  # None: no limit, or the part it is relative to was not run


def check_results(
    runs: Mapping[str, TaskResults], thresholds: Mapping[str, Threshold]
) -> dict[str, ThresholdCheck]:
    """Compare the results of each part with its threshold.

    Args:
        runs: part -> its results.
        thresholds: part -> its threshold; has all parts of `runs`.
    """
    return {name: _check_part(results, thresholds[name], runs) for name, results in runs.items()}


def _check_part(
    results: TaskResults, threshold: Threshold, runs: Mapping[str, TaskResults]
) -> ThresholdCheck:
    cer, cer_interval = results.character_error_rate, results.character_error_interval
    kind = threshold.kind
    if kind in ("cer", "relative_cer", "none") and cer is not None and cer_interval is not None:
        is_relative = kind == "relative_cer"
        limit = _limit_above("text", threshold.limit, runs) if is_relative else threshold.limit
        return ThresholdCheck(
            metric="character error rate",
            score=cer,
            interval=cer_interval,
            limit=limit,
            goal=threshold.goal,
            lower_is_better=True,
            passed=None if limit is None else cer <= limit,
        )
    lower_is_better = kind == "chance"
    limit = results.chance_upper_bound if lower_is_better else threshold.limit
    if lower_is_better and limit is not None and limit >= 1:
        limit = None  # too few questions to tell a score from guessing
    score = results.accuracy
    passed = None if limit is None else (score <= limit if lower_is_better else score >= limit)
    return ThresholdCheck(
        metric="accuracy",
        score=score,
        interval=results.accuracy_interval,
        limit=limit,
        goal=threshold.goal,
        lower_is_better=lower_is_better,
        passed=passed,
    )


def _limit_above(
    name: str, distance: float | None, runs: Mapping[str, TaskResults]
) -> float | None:
    """Return the character error rate of part `name` plus `distance`; None if it was not run."""
    cer = runs[name].character_error_rate if name in runs else None
    return None if cer is None or distance is None else cer + distance
