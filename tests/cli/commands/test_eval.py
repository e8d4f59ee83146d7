"""`qwen2vl eval`: the table, JSON, the file of answers, what is left out, what is refused."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from qwen2vl.cli import options
from qwen2vl.cli.main import main
from qwen2vl.engine import SamplingParams
from qwen2vl.eval.mini import build
from qwen2vl.eval.task import Messages, read_results
from tests.eval.fontless import hide_fonts
from tests.folders import write_tiny
from tests.fonts import needs_judge_fonts


@dataclass
class Knowing:
    """Answer as somebody who has read the file of the suite; hears the parameters."""

    answers: dict[str, list[str]]
    params: SamplingParams | None = None

    def chat(self, messages: Messages, params: SamplingParams) -> list[Any]:
        self.params = params
        text = messages[0]["content"][-1]["text"]
        return [Said(self.answers[text].pop(0))]


@dataclass(frozen=True)
class Said:
    text: str


def knowing(*parts: str) -> Knowing:
    answers: dict[str, list[str]] = {}
    for part in parts:
        for case in build(part).cases:
            answers.setdefault(case.question.text, []).append(case.question.answer)
    return Knowing(answers)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Knowing:
    llm = knowing("counting", "wrong_counting")
    made = options.Opened(llm=llm, name="nano", load_seconds=0.0)  # type: ignore[arg-type]
    monkeypatch.setattr(options, "open_model", lambda _given: made)
    return llm


def run(*args: str | Path) -> Result:
    return CliRunner().invoke(main, ["eval", *map(str, args)])


def rows_of(table: str) -> list[list[str]]:
    """Take the cells out of a table, without its head."""
    lines = [line.strip("|") for line in table.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.split("|")] for line in lines[1:]]


def test_the_table_has_score_bar_and_verdict(opened: Knowing) -> None:
    result = run("--task", "*counting")
    assert result.exit_code == 0, result.output
    rows = rows_of(result.stdout)
    assert rows[0] == [
        *("counting", "share right", "100.0 %", "97.5 - 100.0", ">= 95.0 %", "", "yes", "150")
    ]
    assert rows[1][:3] == ["wrong_counting", "share right", "100.0 %"]
    assert rows[1][4].startswith("<= 2") and rows[1][6] == "NO"
    assert "wrong_counting: control: the picture belongs to another question" in result.stdout
    assert result.stdout.splitlines()[-1].startswith("300 questions in ")
    assert result.stderr.startswith("qwen2vl: nano ")


def test_answers_are_greedy_whatever_the_checkpoint_wants(opened: Knowing) -> None:
    run("--task", "counting", "--limit", "1")
    assert opened.params is not None
    assert (opened.params.temperature, opened.params.repetition_penalty) == (0, 1)


def test_json_and_the_file_of_answers_hold_the_same(opened: Knowing, tmp_path: Path) -> None:
    output = tmp_path / "results.jsonl"
    result = run("--suite", "mini", "--task", "counting", "--limit", "7", "--json", "-o", output)
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert (printed["suite"], printed["model"], printed["limit"]) == ("mini", "nano", 7)
    (part,) = printed["parts"]
    assert (part["part"], part["score"], part["count"], part["met"]) == ("counting", 1.0, 7, True)
    (results,) = read_results(output)
    assert (results.task, results.count, results.mean) == ("counting", 7, 1.0)


def test_a_real_model_is_asked(tmp_path: Path) -> None:
    write_tiny(tmp_path / "tiny")
    result = run("--model", tmp_path / "tiny", "--task", "shapes", "--limit", "2", "--json")
    assert result.exit_code == 0, result.output
    (part,) = json.loads(result.stdout)["parts"]
    assert (part["count"], part["met"]) == (2, False)


@needs_judge_fonts
def test_character_errors_stand_beside_the_lines_without_any(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = options.Opened(llm=knowing("text"), name="x", load_seconds=0.0)  # type: ignore[arg-type]
    monkeypatch.setattr(options, "open_model", lambda _given: made)
    result = run("--task", "text", "--limit", "3")
    assert rows_of(result.stdout)[0][:3] == ["text", "character errors", "0.0 %"]
    assert "lines read without any error: text 100.0 %\n" in result.stdout


def test_what_needs_fonts_is_left_out_aloud(
    opened: Knowing, monkeypatch: pytest.MonkeyPatch
) -> None:
    hide_fonts(monkeypatch)
    result = run("--task", "text", "--task", "counting", "--limit", "1", "--json")
    assert result.exit_code == 0
    assert [part["part"] for part in json.loads(result.stdout)["parts"]] == ["counting"]
    assert result.stderr.startswith("qwen2vl: text is left out: fonts: ")
    assert "apt-get install fonts-cabin fonts-cantarell" in result.stderr


def test_where_nothing_can_be_drawn_that_is_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    hide_fonts(monkeypatch)
    result = run("--task", "text")
    assert result.exit_code == 2
    assert "error: fonts: " in result.stderr and "apt-get install" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--task", "letters"), "no part of the mini suite is called letters: text, text_2x"),
        (("-o", "nowhere/results.jsonl"), "nowhere does not exist; make it first"),
        (("--limit", "0"), "0 is not in the range x>=1"),
        (("--suite", "maxi"), "'maxi' is not 'mini'"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_loading(
    arguments: tuple[str, ...], complaint: str
) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert complaint in result.stderr and len(result.stderr.splitlines()) == 1
