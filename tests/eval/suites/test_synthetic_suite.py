"""The synthetic suite: the mini suite's items, thresholds and controls, under the new interface."""

from __future__ import annotations

import pytest

from qwen2vl.eval.mini import PARTS, build_task
from qwen2vl.eval.runner.run import SuiteAnswer, score_item
from qwen2vl.eval.suites.synthetic_suite import SyntheticSuite

SUITE = SyntheticSuite()


def test_every_part_of_the_mini_suite_is_a_part_or_a_blind_control() -> None:
    assert {*SUITE.parts, *(f"wrong_{part}" for part in SUITE.blind_parts)} == set(PARTS)
    assert "relations" in SUITE.parts and "relations" in SUITE.blind_parts
    assert set(SUITE.blind_parts) < set(SUITE.parts)


@pytest.mark.parametrize("part", ["counting", "find", "motion_shuffled", "text"])
def test_oracle_scores_are_those_of_the_mini_suite(part: str) -> None:
    task = build_task(part)
    items = SUITE.items([part])
    assert [item.id for item in items] == [f"{part}/{case.name}" for case in task.cases]
    for item, case in zip(items, task.cases, strict=True):
        for answer in (case.question.answer, "red", ""):
            expected = task.score(case, answer)
            result = score_item(item, SuiteAnswer(text=answer))
            assert (result.score, result.edits, result.length, result.chance, result.name) == (
                expected.score, expected.edits, expected.length, expected.chance, expected.name,
            )  # fmt: skip
        assert score_item(item, SuiteAnswer(text=item.answers[0])).score == 1


def test_the_blind_control_is_that_of_the_mini_suite() -> None:
    blind, task = SUITE.items(["counting"], blind=True), build_task("wrong_counting")
    assert [item.media for item in blind] == list(task.cases)
    assert [item.id for item in blind] == [item.id for item in SUITE.items(["counting"])]
    assert SUITE.threshold("counting", blind=True).kind == "chance"
    assert SUITE.threshold("counting").limit == 0.95
    assert "belongs to another question" in SUITE.note("counting", blind=True)


def test_messages_are_rendered_when_they_are_asked_for() -> None:
    item = SUITE.items(["motion"])[0]
    content = SUITE.messages(item)[0]["content"]
    assert content[0]["video"].ndim == 4 and content[-1]["text"] == item.question
