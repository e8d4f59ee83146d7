"""Expected calibration error, against values computed by hand."""

from __future__ import annotations

from math import log

import pytest

from qwen2vl.eval.runner.calibration import expected_calibration_error, measure_calibration
from qwen2vl.eval.task import ExampleResult


def result(score: float, logprob: float | None) -> ExampleResult:
    return ExampleResult(
        **{"name": "", "kind": "", "question": "", "truth": "", "answer": "", "chance": 0.0},
        score=score,
        logprob=logprob,
    )


def test_error_is_the_weighted_distance_of_the_bins() -> None:
    # Bin 0.9 to 1: 1.0, 0.9 and 0.95 with 2 of 3 right: |2 - 2.85|. Bin 0.2 to 0.3: |1 - 0.25|.
    confidences, scores = [1.0, 0.9, 0.95, 0.25], [1, 0, 1, 1]
    assert expected_calibration_error(confidences, scores) == pytest.approx((0.85 + 0.75) / 4)


def test_within_a_bin_errors_cancel_out_and_between_bins_they_do_not() -> None:
    assert expected_calibration_error([0.5, 0.5], [1, 0]) == 0
    assert expected_calibration_error([0.4, 0.6], [1, 0]) == pytest.approx(0.6)
    assert expected_calibration_error([0.4, 0.6], [1, 0], num_bins=1) == 0


def test_confidence_is_the_probability_of_the_answer() -> None:
    measured = measure_calibration([result(1, log(0.8)), result(0, log(0.7)), result(1, None)])
    assert measured is not None
    assert (measured.confidence, measured.accuracy, measured.count) == (
        pytest.approx(0.75),
        0.5,
        2,
    )
    assert measured.error == pytest.approx((0.2 + 0.7) / 2)


def test_without_probabilities_there_is_no_calibration() -> None:
    assert measure_calibration([result(1, None)]) is None
    assert measure_calibration([]) is None


def test_a_log_probability_that_rounding_made_positive_is_certain() -> None:
    measured = measure_calibration([result(1, 1e-6)])
    assert measured is not None and (measured.confidence, measured.error) == (1.0, 0.0)
