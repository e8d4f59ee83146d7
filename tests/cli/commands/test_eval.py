"""`qwen2vl eval`: table, JSON, file of answers, skipped parts, and errors."""

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
from qwen2vl.eval.mini import build_task
from qwen2vl.eval.task import Messages, read_results
from tests.folders import write_tiny
from tests.fonts import hide_system_fonts
from tests.requirements import needs_judge_fonts


@dataclass
class OracleLLM:
    """An LLM that returns the correct answers of the suite and records the parameters."""

    answers: dict[str, list[str]]
    params: SamplingParams | None = None

    def chat(self, messages: Messages, params: SamplingParams) -> list[Any]:
        self.params = params
        text = messages[0]["content"][-1]["text"]
        return [TextOutput(self.answers[text].pop(0))]


@dataclass(frozen=True)
class TextOutput:
    text: str


def oracle_llm(*parts: str) -> OracleLLM:
    answers: dict[str, list[str]] = {}
    for part in parts:
        for case in build_task(part).cases:
            answers.setdefault(case.question.text, []).append(case.question.answer)
    return OracleLLM(answers)


@pytest.fixture
def oracle(monkeypatch: pytest.MonkeyPatch) -> OracleLLM:
    llm = oracle_llm("counting", "wrong_counting")
    loaded = options.LoadedModel(llm=llm, name="nano", load_seconds=0.0)  # type: ignore[arg-type]
    monkeypatch.setattr(options, "load_model_from_options", lambda _given: loaded)
    return llm


def run(*args: str | Path) -> Result:
    return CliRunner().invoke(main, ["eval", *map(str, args)])


def rows_of(table: str) -> list[list[str]]:
    """Return the cells of a table, without its header."""
    lines = [line.strip("|") for line in table.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.split("|")] for line in lines[1:]]


def test_the_table_has_score_threshold_and_verdict(oracle: OracleLLM) -> None:
    result = run("--task", "*counting")
    assert result.exit_code == 0, result.output
    rows = rows_of(result.stdout)
    assert rows[0] == [
        *("counting", "accuracy", "100.0 %", "97.5 - 100.0", ">= 95.0 %", "", "yes", "150")
    ]
    assert rows[1][:3] == ["wrong_counting", "accuracy", "100.0 %"]
    assert rows[1][4].startswith("<= 2") and rows[1][6] == "NO"
    assert "wrong_counting: control: the image belongs to another question" in result.stdout
    assert result.stdout.splitlines()[-1].startswith("300 questions in ")
    assert result.stderr == ""


def test_decoding_is_greedy_regardless_of_the_checkpoint(oracle: OracleLLM) -> None:
    run("--task", "counting", "--limit", "1")
    assert oracle.params is not None
    assert (oracle.params.temperature, oracle.params.repetition_penalty) == (0, 1)


def test_json_output_and_the_file_of_answers_agree(oracle: OracleLLM, tmp_path: Path) -> None:
    output = tmp_path / "results.jsonl"
    result = run("--suite", "mini", "--task", "counting", "--limit", "7", "--json", "-o", output)
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert (printed["suite"], printed["model"], printed["limit"]) == ("mini", "nano", 7)
    (part,) = printed["parts"]
    assert (part["part"], part["score"], part["num_examples"], part["passed"]) == (
        "counting",
        1.0,
        7,
        True,
    )
    (results,) = read_results(output)
    assert (results.task, results.num_examples, results.accuracy) == ("counting", 7, 1.0)


def test_evaluation_of_a_real_model(tmp_path: Path) -> None:
    write_tiny(tmp_path / "tiny")
    result = run("--model", tmp_path / "tiny", "--task", "shapes", "--limit", "2", "--json")
    assert result.exit_code == 0, result.output
    (part,) = json.loads(result.stdout)["parts"]
    assert (part["num_examples"], part["passed"]) == (2, False)


@needs_judge_fonts
def test_character_errors_are_shown_with_the_exact_match_share(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loaded = options.LoadedModel(llm=oracle_llm("text"), name="x", load_seconds=0.0)  # type: ignore[arg-type]
    monkeypatch.setattr(options, "load_model_from_options", lambda _given: loaded)
    result = run("--task", "text", "--limit", "3")
    assert rows_of(result.stdout)[0][:3] == ["text", "character error rate", "0.0 %"]
    assert "lines read without any error: text 100.0 %\n" in result.stdout


def test_parts_without_fonts_are_skipped_with_a_note(
    oracle: OracleLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    hide_system_fonts(monkeypatch)
    result = run("--task", "text", "--task", "counting", "--limit", "1", "--json")
    assert result.exit_code == 0
    assert [part["part"] for part in json.loads(result.stdout)["parts"]] == ["counting"]
    assert result.stderr.startswith("qwen2vl: text is left out: fonts: ")
    assert "apt-get install fonts-cantarell fonts-ebgaramond" in result.stderr


def test_without_any_drawable_part_the_font_error_is_raised(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hide_system_fonts(monkeypatch)
    result = run("--task", "text")
    assert result.exit_code == 2
    assert "error: fonts: " in result.stderr and "apt-get install" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--task", "letters"), "no part of the mini suite is called letters: text, text_2x"),
        (("-o", "nowhere/results.jsonl"), "nowhere does not exist; make it first"),
        (("--limit", "0"), "0 is not in the range x>=1"),
        (("--suite", "maxi"), "'maxi' is not 'mini'"),
    ],
)
def test_invalid_options_are_errors_before_loading(
    arguments: tuple[str, ...], message: str
) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr and len(result.stderr.splitlines()) == 1
