"""Scores of answers to the items of suites, by the name of a metric.

    exact_match     the normalized answer is one of the accepted ones
    edit_distance   text recognition: edits between the normalized lines, correct if none
    box_iou         the first box or bare coordinates of the answer have an IoU of at least 0.5

All are functions of `qwen2vl.eval.metrics`; a suite names one for each item.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal, NamedTuple

from qwen2vl import grounding
from qwen2vl.eval.metrics import edit_distance, iou, normalize_answer, normalize_line

__all__ = ["MIN_IOU", "AnswerScore", "Metric", "answer_iou", "score_answer"]

Metric = Literal["exact_match", "edit_distance", "box_iou"]
MIN_IOU = 0.5  # a box is correct from this IoU on


class AnswerScore(NamedTuple):
    """Whether an answer is correct; of text recognition, its edits and their upper bound too."""

    is_correct: bool
    edits: int | None = None
    length: int | None = None  # characters of the reference


def score_answer(
    metric: Metric,
    answers: Sequence[str],
    answer: str,
    *,
    box: tuple[float, float, float, float] | None = None,
) -> AnswerScore:
    """Score an answer.

    Args:
        metric: name of the metric.
        answers: accepted ones; "edit_distance" takes the first.
        answer: text of the model.
        box: ground truth of "box_iou": x1, y1, x2, y2 as fractions of the image's size.
    """
    if metric == "edit_distance":
        reference = normalize_line(answers[0])
        edits = edit_distance(normalize_line(answer), reference)
        return AnswerScore(edits == 0, edits, len(reference))
    if metric == "box_iou":
        assert box is not None, "an item of box_iou has a box"
        return AnswerScore(answer_iou(box, answer) >= MIN_IOU)
    return AnswerScore(_is_one_of(answer, answers))


def answer_iou(box: tuple[float, float, float, float], answer: str) -> float:
    """Return the IoU of the first shape of an answer with the ground truth; 0 if it is no box."""
    found = grounding.parse(answer, bare=True)
    if not found or not isinstance(found[0].shape, grounding.Box):
        return 0.0
    return iou(box, found[0].shape.to_pixels((1, 1)))


def _is_one_of(answer: str, answers: Collection[str]) -> bool:
    normalized = normalize_answer(answer)
    return any(normalized == normalize_answer(accepted) for accepted in answers)
