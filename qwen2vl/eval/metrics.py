"""Evaluation metrics with confidence intervals: CER, exact match, IoU, Wilson score, chance level.

Recognized text is scored by the character error rate (edit distance over the length of the ground
truth, summed over all lines) and by exact match; short answers by exact match after
`normalize_answer`; boxes by IoU. `chance_upper_bound` is the highest accuracy that guessing can
explain. Standard library only.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

from qwen2vl import grounding

__all__ = [
    "chance_upper_bound",
    "edit_distance",
    "iou",
    "normalize_answer",
    "ratio_interval",
    "wilson_interval",
]

Z = 1.96  # standard deviations on either side that hold 95 % of a normal distribution


def edit_distance(a: str, b: str) -> int:
    """Return the Levenshtein distance: fewest insertions, deletions and replacements from a to b.

    Compares code points; takes len(a) * len(b) steps.
    """
    row = list(range(len(b) + 1))  # distances from the first i characters of a to each prefix of b
    for i, left in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, right in enumerate(b, 1):
            replaced = diagonal + (left != right)
            diagonal = row[j]
            row[j] = min(replaced, row[j] + 1, row[j - 1] + 1)
    return row[-1]


def normalize_answer(answer: str) -> str:
    """Normalize a short answer for exact match: "A red circle. " becomes "red circle".

    Removes grounding tokens, surrounding whitespace, one final full stop, case and a leading
    article, and collapses whitespace. Not used for text recognition, where only surrounding
    whitespace is ignored. (As in the evaluation of SQuAD and VQA.)
    """
    for token in grounding.GROUNDING_TOKENS:
        answer = answer.replace(token, " ")
    words = answer.casefold().split()
    if len(words) > 1 and words[0] in ("a", "an", "the"):
        words = words[1:]
    return " ".join(words).removesuffix(".")


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Return the intersection over union (IoU) of two boxes (x1, y1, x2, y2).

    Invariant to scaling an axis of both boxes, so that pixels, thousandths and normalized
    coordinates give the same value. The IoU of two boxes without area is 0.
    """
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    intersection = max(width, 0) * max(height, 0)
    union = _area(a) + _area(b) - intersection
    return intersection / union if union > 0 else 0.0


def wilson_interval(correct: float, count: int) -> tuple[float, float]:
    """Return the 95 % confidence interval of `correct` / `count` (Wilson score interval).

    Unlike the normal approximation it has a width at proportions of 0 and 1.
    """
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
    ratio = sum(numerators) / total
    if count < 2:
        return ratio, ratio
    squares = sum((n - ratio * d) ** 2 for n, d in zip(numerators, denominators, strict=True))
    half = Z * sqrt(squares * count / (count - 1)) / total
    return max(0.0, ratio - half), ratio + half


def chance_upper_bound(chances: Sequence[float], *, sigmas: float = 3.0) -> float:
    """Return the accuracy that guessing exceeds in about one of a thousand runs.

    Args:
        chances: chance level of each question: probability that a guess is correct.
        sigmas: standard deviations above the expected accuracy; three leave 0.13 %.
    """
    count = len(chances)
    deviation = sqrt(sum(p * (1 - p) for p in chances)) / count
    return min(1.0, sum(chances) / count + sigmas * deviation)


def _area(box: Sequence[float]) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])
