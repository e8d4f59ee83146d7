"""Scores of items and of sets: mean, parse rate, confidence interval and means of groups.

A metric scores one answer; `summarize` makes the score of a set from them. The parse rate is the
share of answers from which the metric could read an answer at all: with a low one, a score measures
the format of the answers. Nothing is kept between calls, and the order of items has no effect.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import fsum, nan
from typing import Literal

from qwen2vl.errors import InputError
from qwen2vl.eval.metrics.intervals import bootstrap_interval, wilson_interval

__all__ = ["ItemScore", "Score", "Style", "mean", "require_answers", "summarize"]

Style = Literal["lmms", "vlmevalkit", "strict"]
"""Whose rule: lmms-eval 0.7.3, ms-vlmeval 0.0.20 (VLMEvalKit), or ours, which refuses doubt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ItemScore:
    """Score of one answer."""

    value: float  # 0 to 1
    is_parsed: bool = True  # False: no answer could be read, and the value is 0
    group: str = ""  # category, language, split, ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """Score of a set of items; all values are NaN when the set is empty."""

    value: float  # 0 to 1
    count: int
    parse_rate: float  # share of answers that could be read
    interval: tuple[float, float]  # 95 % confidence interval of the mean over items
    groups: Mapping[str, float]  # group -> mean over its items, sorted by name


def mean(values: Iterable[float]) -> float:
    """Return the mean, NaN for no values; rounded once, so that the order has no effect."""
    listed = list(values)
    return fsum(listed) / len(listed) if listed else nan


def summarize(items: Iterable[ItemScore], *, over: Literal["items", "groups"] = "items") -> Score:
    """Summarize the scores of a set.

    Args:
        items: scores of the answers.
        over: whether the value is the mean over items, or the mean over the means of groups, as
            lmms-eval's for MMStar. The interval is always that of the mean over items.
    """
    listed = list(items)
    values = [item.value for item in listed]
    by_group: dict[str, list[float]] = {}
    for item in listed:
        by_group.setdefault(item.group, []).append(item.value)
    groups = {name: mean(by_group[name]) for name in sorted(by_group)}
    if set(values) <= {0, 1}:
        interval = wilson_interval(fsum(values), len(values))
    else:
        interval = bootstrap_interval(values)
    return Score(
        value=mean(values) if over == "items" else mean(groups.values()),
        count=len(listed),
        parse_rate=mean(float(item.is_parsed) for item in listed),
        interval=interval,
        groups=groups,
    )


def require_answers(answers: Sequence[str]) -> Sequence[str]:
    """Return the reference answers.

    Raises:
        InputError: there are none, as in test splits that a server scores.
    """
    if not answers:
        raise InputError("no reference answers: this split is scored by its authors' server")
    return answers
