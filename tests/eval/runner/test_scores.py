"""Rows of the table: chance, the row of all parts, controls, similar names, calibration."""

from __future__ import annotations

import pytest

from qwen2vl.eval.runner.run import SuiteAnswer, score_item
from qwen2vl.eval.runner.scores import SuiteScores, score_suite
from qwen2vl.eval.suites.suite import Suite
from qwen2vl.eval.suites.synthetic_suite import SyntheticSuite
from tests.eval.runner.toy import ToySuite


def scores(suite: Suite, parts: list[str], *, blind: bool = False, text: str = "") -> SuiteScores:
    """Score answers that are `text`, or right where it is empty."""
    results = [
        score_item(item, SuiteAnswer(text=text or item.answers[0], logprob=0.0))
        for item in suite.items(parts, blind=blind)
    ]
    return score_suite(suite, results, blind=blind)


def test_rows_have_chance_and_the_last_one_is_of_all_parts() -> None:
    suite = SyntheticSuite()
    table = scores(suite, ["relations", "shapes"])
    assert [row.part for row in table.rows] == ["shapes", "relations", "all"]
    relations, everything = table.rows[1:]
    assert (relations.check.score, relations.check.passed) == (1.0, None)
    chances = [item.chance for item in suite.items(["relations"])]
    assert relations.chance == pytest.approx(sum(chances) / len(chances))
    assert (everything.results.num_examples, everything.check.score) == (250, 1.0)


def test_there_is_no_row_of_all_with_a_control_or_an_error_rate() -> None:
    suite = SyntheticSuite()
    assert [r.part for r in scores(suite, ["motion", "motion_shuffled"]).rows][-1] != "all"
    assert [r.part for r in scores(ToySuite(), ["word", "text"]).rows] == ["word", "text"]
    assert [r.part for r in scores(suite, ["motion"]).rows] == ["motion"]


def test_controls_are_not_in_the_calibration() -> None:
    suite = SyntheticSuite()
    both, one = scores(suite, ["motion", "motion_shuffled"]), scores(suite, ["motion"])
    assert both.calibration is not None and both.calibration == one.calibration
    blind = scores(suite, ["motion"], blind=True)
    assert blind.calibration is not None and blind.calibration.count == 100


def test_blind_parts_pass_up_to_chance() -> None:
    suite = SyntheticSuite()
    guessed = scores(suite, ["counting", "motion"], blind=True, text="2")
    assert [row.check.passed for row in guessed.rows] == [True, True, True]
    oracle = scores(suite, ["counting", "motion"], blind=True)
    assert [row.check.passed for row in oracle.rows] == [False, False, False]


def test_similar_names_are_scored_where_a_suite_has_them() -> None:
    table = scores(ToySuite(), ["word"], text="2.0")
    assert table.similar is not None
    assert (table.similar.accuracy, table.similar.chance) == (
        pytest.approx(1 / 120),
        pytest.approx(0.2),
    )
    assert scores(SyntheticSuite(), ["motion"]).similar is None
