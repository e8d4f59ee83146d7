"""Rows of the table: chance, all parts, controls, similar names, calibration, refusals, pairs."""

from __future__ import annotations

import pytest

from qwen2vl.eval.runner.run import SuiteAnswer, score_item
from qwen2vl.eval.runner.scores import SuiteScores, score_suite
from qwen2vl.eval.suites.suite import Suite, SuiteItem
from qwen2vl.eval.suites.synthetic_suite import SyntheticSuite
from qwen2vl.eval.task import ExampleResult
from tests.eval.runner.toy import ToySuite

REFUSALS = ("I cannot see it.", "I do not know.")


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


def test_refusals_are_counted_on_both_sides_and_the_answered_are_scored() -> None:
    def result(number: int, answerable: bool, answer: str) -> ExampleResult:
        item = SuiteItem(
            id=f"{number}",
            part="word",
            kind="k",
            question="?",
            answers=("red",) if answerable else REFUSALS,
            metric="exact_match",
            chance=0.5,
            refusals=REFUSALS,
            is_answerable=answerable,
        )
        return score_item(item, SuiteAnswer(text=answer, prompt_tokens=10 * number))

    answers = ["red", "red", "blue", "I do not know."]  # 3 answered, 2 of them right
    results = [result(number, True, answer) for number, answer in enumerate(answers)]
    results += [result(4 + n, False, a) for n, a in enumerate(["I cannot see it.", "red"])]
    (row,) = score_suite(ToySuite(), results, blind=False).rows
    refusals = row.refusals
    assert refusals is not None
    assert (refusals.num_unanswerable, refusals.refused) == (2, 0.5)
    assert (refusals.num_answerable, refusals.wrongly_refused) == (4, 0.25)
    assert (refusals.num_answered, refusals.answered_accuracy) == (3, pytest.approx(2 / 3))
    assert row.results.accuracy == pytest.approx(3 / 6) and row.prompt_tokens == 25
    assert score_suite(ToySuite(), results, blind=True).rows[0].refusals is None
    plain = scores(ToySuite(), ["word"]).rows[0]
    assert plain.refusals is None and plain.prompt_tokens is None


def test_parts_with_the_same_items_are_compared_item_by_item() -> None:
    class PairedSuite(ToySuite):
        paired_parts = (("text", "word"), ("word", "absent"))

    texts = {"word": ["1", "1", "0"], "text": ["1", "0", "0", "1"]}
    results = [
        score_item(
            SuiteItem(
                id=f"{part}/{number}",
                part=part,
                kind="k",
                question="?",
                answers=("1",),
                metric="exact_match",
                chance=0.1,
            ),
            SuiteAnswer(text=text),
        )
        for part, answers in texts.items()
        for number, text in enumerate(answers)
    ]
    ((other, row),) = score_suite(PairedSuite(), results, blind=False).pairs
    assert (other, row.part, row.count) == ("word", "text", 3)
    assert (row.score, row.other_score) == (pytest.approx(1 / 3), pytest.approx(2 / 3))
    assert (row.num_better, row.num_worse) == (0, 1)
