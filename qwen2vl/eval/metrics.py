"""How right an answer is, and how sure one can be of a mean of such answers.

Text is judged by the character error rate (edits over the length of the truth, all lines together)
and by exact match; words by exact match after `normalize`; boxes by their overlap. Beside every
share stands what guessing would reach: `chance_limit` is the most that luck explains. It must not
know tasks, pictures or models; standard library only. Next room: task.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

from qwen2vl import grounding

__all__ = [
    "chance_limit",
    "edit_distance",
    "iou",
    "normalize",
    "ratio_interval",
    "wilson_interval",
]

Z = 1.96  # standard deviations on either side that hold 95 % of a normal distribution


def edit_distance(a: str, b: str) -> int:
    """Count the fewest insertions, deletions and replacements that turn `a` into `b`.

    Compares code points; costs len(a) * len(b) steps. (Levenshtein.)
    """
    row = list(range(len(b) + 1))  # distances from the first i characters of a to each start of b
    for i, left in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, right in enumerate(b, 1):
            replaced = diagonal + (left != right)
            diagonal = row[j]
            row[j] = min(replaced, row[j] + 1, row[j - 1] + 1)
    return row[-1]


def normalize(answer: str) -> str:
    """Reduce an answer in words to what is compared: "A red circle. " is "red circle".

    Grounding tokens, space around, one full stop at the end, upper case and an article at the
    beginning do not count; space inside counts as one. Never used on text that was read, where
    all but the space around matters.
    """
    for token in grounding.GROUNDING_TOKENS:
        answer = answer.replace(token, " ")
    words = answer.casefold().split()
    if len(words) > 1 and words[0] in ("a", "an", "the"):
        words = words[1:]
    return " ".join(words).removesuffix(".")


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Divide what two boxes (x1, y1, x2, y2) share by what they cover together.

    Scaling an axis of both changes nothing, so boxes in pixels, in thousandths or in shares of
    the picture give the same. Two boxes without area share nothing.
    """
    wide = min(a[2], b[2]) - max(a[0], b[0])
    high = min(a[3], b[3]) - max(a[1], b[1])
    shared = max(wide, 0) * max(high, 0)
    covered = _area(a) + _area(b) - shared
    return shared / covered if covered > 0 else 0.0


def wilson_interval(right: float, count: int) -> tuple[float, float]:
    """Bound a share `right` / `count` with 95 % confidence (Wilson's score interval).

    Unlike the plain normal interval it says something at shares of 0 and 1.
    """
    share, z2 = right / count, Z * Z
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = Z * sqrt(share * (1 - share) / count + z2 / (4 * count * count)) / (1 + z2 / count)
    return max(0.0, middle - half), min(1.0, middle + half)


def ratio_interval(parts: Sequence[float], wholes: Sequence[float]) -> tuple[float, float]:
    """Bound sum(parts) / sum(wholes) with 95 % confidence, each pair being drawn on its own.

    The linearized ratio: a long line with many errors counts for more than a short one. With one
    pair nothing is known, and the ratio itself comes back twice.
    """
    count, total = len(parts), sum(wholes)
    ratio = sum(parts) / total
    if count < 2:
        return ratio, ratio
    squares = sum((part - ratio * whole) ** 2 for part, whole in zip(parts, wholes, strict=True))
    half = Z * sqrt(squares * count / (count - 1)) / total
    return max(0.0, ratio - half), ratio + half


def chance_limit(chances: Sequence[float], *, sigmas: float = 3.0) -> float:
    """Return the share of right answers that guessing exceeds in one run of a thousand.

    Args:
        chances: for each question, how likely a guess is right.
        sigmas: standard deviations above the expected share; three leave 0.13 %.
    """
    count = len(chances)
    deviation = sqrt(sum(p * (1 - p) for p in chances)) / count
    return min(1.0, sum(chances) / count + sigmas * deviation)


def _area(box: Sequence[float]) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])
