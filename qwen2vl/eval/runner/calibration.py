"""Expected calibration error: by how much the confidence of answers differs from their accuracy.

The confidence of an answer is the probability that the model gave to its tokens, exp(cumulative
log probability). (Guo et al., "On Calibration of Modern Neural Networks", arXiv 1706.04599.)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import exp, fsum

from qwen2vl.eval.task import ExampleResult

__all__ = ["NUM_BINS", "Calibration", "expected_calibration_error", "measure_calibration"]

NUM_BINS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """Confidence and accuracy of the answers whose probability is known."""

    error: float  # expected calibration error, 0 to 1
    confidence: float  # mean
    accuracy: float  # of the same answers
    count: int


def measure_calibration(results: Iterable[ExampleResult]) -> Calibration | None:
    """Return the calibration of answers; None if no probability is known."""
    known = [(exp(min(0.0, r.logprob)), r.score) for r in results if r.logprob is not None]
    if not known:
        return None
    confidences, scores = [c for c, _ in known], [s for _, s in known]
    return Calibration(
        error=expected_calibration_error(confidences, scores),
        confidence=fsum(confidences) / len(known),
        accuracy=fsum(scores) / len(known),
        count=len(known),
    )


def expected_calibration_error(
    confidences: Sequence[float], scores: Sequence[float], *, num_bins: int = NUM_BINS
) -> float:
    """Return the mean over answers of |accuracy - confidence| of their bin.

    Args:
        confidences: of each answer, 0 to 1; bins have equal widths, and 1 is in the last.
        scores: of each answer: 1 correct, 0 wrong.
        num_bins: number of bins.
    """
    assert confidences, "no answers have no calibration"
    differences: list[list[float]] = [[] for _ in range(num_bins)]
    for confidence, score in zip(confidences, scores, strict=True):
        differences[min(int(confidence * num_bins), num_bins - 1)].append(score - confidence)
    return fsum(abs(fsum(bin)) for bin in differences) / len(confidences)
