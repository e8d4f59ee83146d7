"""The walk of one evaluation: every question asked, judged, counted, written and read back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from qwen2vl.errors import InputError
from qwen2vl.eval.metrics import edit_distance
from qwen2vl.eval.task import Answer, Messages, Result, read_results, run_task, write_results


@dataclass(frozen=True)
class Sums:
    """Ask for doubles; the smallest task there is."""

    name: str = "sums"
    note: str = "made up for this test"
    reads: bool = False

    def examples(self) -> Sequence[int]:
        return range(10, 15)

    def prompt(self, example: int) -> Messages:
        return [{"role": "user", "content": f"Twice {example}?"}]

    def score(self, example: int, answer: str) -> Result:
        truth = str(2 * example)
        return Result(
            name=f"sums/{example}",
            kind="double",
            question=f"Twice {example}?",
            truth=truth,
            answer=answer,
            score=float(answer == truth),
            chance=0.1,
            edits=edit_distance(answer, truth) if self.reads else None,
            length=len(truth) if self.reads else None,
        )


@dataclass(frozen=True)
class Said:
    text: str


def double(messages: Messages) -> str:
    return str(2 * int(messages[0]["content"].split()[1].rstrip("?")))


def test_every_question_is_asked_in_order_and_counted() -> None:
    heard: list[str] = []
    results = run_task(Sums(), double, on_result=lambda result: heard.append(result.name))
    assert heard == [f"sums/{i}" for i in range(10, 15)]
    assert (results.count, results.mean) == (5, 1.0)
    assert results.error_rate is None and results.error_interval is None
    assert 0.5 < results.interval[0] < results.interval[1] == 1.0
    assert results.note == "made up for this test"


@pytest.mark.parametrize("nothing", [None, "", Said("")])
def test_no_answer_is_wrong_and_counts(nothing: Answer) -> None:
    results = run_task(
        Sums(reads=True), lambda messages: nothing if "12" in str(messages) else double(messages)
    )
    assert (results.count, results.mean) == (5, 0.8)
    assert results.results[2].answer == ""
    assert results.error_rate == pytest.approx(2 / 10)


def test_an_answer_may_be_an_object_with_text() -> None:
    assert run_task(Sums(), lambda messages: Said(double(messages))).mean == 1.0


def test_errors_are_counted_over_all_characters_together() -> None:
    results = run_task(Sums(reads=True), lambda _: "2000")
    assert results.error_rate == pytest.approx((2 + 3 * 4) / 10)
    assert results.mean == 0.0


def test_a_limit_takes_the_first() -> None:
    assert [r.name for r in run_task(Sums(), double, limit=2).results] == ["sums/10", "sums/11"]
    assert run_task(Sums(), double, limit=99).count == 5


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_below_one_is_refused(limit: int) -> None:
    with pytest.raises(InputError, match=f"task sums: limit is {limit}, must be at least 1"):
        run_task(Sums(), double, limit=limit)


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    runs = [run_task(Sums(name="a"), double), run_task(Sums(name="b", reads=True), lambda _: "x\n")]
    write_results(tmp_path / "results.jsonl", runs)
    assert read_results(tmp_path / "results.jsonl") == runs
    assert len((tmp_path / "results.jsonl").read_text(encoding="utf-8").splitlines()) == 10


def test_files_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be written: Is a directory"):
        write_results(tmp_path, [])
    with pytest.raises(InputError, match="cannot be read: No such file"):
        read_results(tmp_path / "none.jsonl")
    (tmp_path / "other.jsonl").write_text('{"task": "a"}\n', encoding="utf-8")
    with pytest.raises(InputError, match="not a file of results"):
        read_results(tmp_path / "other.jsonl")
