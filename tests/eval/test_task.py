"""Evaluation loop: examples are run in order, scored, and aggregated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest

from qwen2vl.errors import InputError
from qwen2vl.eval.metrics import edit_distance
from qwen2vl.eval.task import Answer, ExampleResult, Messages, run_task


@dataclass(frozen=True)
class Sums:
    """A minimal task: the double of a number, optionally scored as text recognition."""

    name: str = "sums"
    note: str = "made up for this test"
    is_text: bool = False

    def examples(self) -> Sequence[int]:
        return range(10, 15)

    def prompt(self, example: int) -> Messages:
        return [{"role": "user", "content": f"Twice {example}?"}]

    def score(self, example: int, answer: str) -> ExampleResult:
        truth = str(2 * example)
        return ExampleResult(
            name=f"sums/{example}",
            kind="double",
            question=f"Twice {example}?",
            truth=truth,
            answer=answer,
            score=float(answer == truth),
            chance=0.1,
            edits=edit_distance(answer, truth) if self.is_text else None,
            length=len(truth) if self.is_text else None,
        )


@dataclass(frozen=True)
class Output:
    text: str


def double(messages: Messages) -> str:
    return str(2 * int(messages[0]["content"].split()[1].rstrip("?")))


def test_examples_are_run_in_order() -> None:
    names: list[str] = []
    results = run_task(Sums(), double, on_result=lambda result: names.append(result.name))
    assert names == [f"sums/{i}" for i in range(10, 15)]
    assert (results.num_examples, results.accuracy) == (5, 1.0)
    assert results.character_error_rate is None and results.character_error_interval is None
    assert 0.5 < results.accuracy_interval[0] < results.accuracy_interval[1] == 1.0
    assert results.note == "made up for this test"


@pytest.mark.parametrize("missing", [None, "", Output("")])
def test_missing_answer_is_scored_as_wrong(missing: Answer) -> None:
    results = run_task(
        Sums(is_text=True), lambda messages: missing if "12" in str(messages) else double(messages)
    )
    assert (results.num_examples, results.accuracy) == (5, 0.8)
    assert results.results[2].answer == ""
    assert results.character_error_rate == pytest.approx(2 / 10)


def test_answer_may_be_an_object_with_text() -> None:
    assert run_task(Sums(), lambda messages: Output(double(messages))).accuracy == 1.0


def test_character_error_rate_is_over_all_characters() -> None:
    results = run_task(Sums(is_text=True), lambda _: "2000")
    assert results.character_error_rate == pytest.approx((2 + 3 * 4) / 10)
    assert results.accuracy == 0.0


def test_limit_runs_the_first_examples() -> None:
    assert [r.name for r in run_task(Sums(), double, limit=2).results] == ["sums/10", "sums/11"]
    assert run_task(Sums(), double, limit=99).num_examples == 5


@pytest.mark.parametrize("limit", [0, -1])
def test_limit_below_one_is_rejected(limit: int) -> None:
    with pytest.raises(InputError, match=f"task sums: limit is {limit}, must be at least 1"):
        run_task(Sums(), double, limit=limit)
