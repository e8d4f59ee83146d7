"""`qwen2vl eval`: table, JSON, results file, blind control, server, comparison, and errors."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from qwen2vl.cli import options
from qwen2vl.cli.main import main
from qwen2vl.engine import PreparedRequest, SamplingParams
from qwen2vl.eval.mini import build_task
from qwen2vl.eval.runner.results_file import read_results
from qwen2vl.eval.suites import easy_vqa
from qwen2vl.eval.suites.frozen_suite import FrozenSuite
from qwen2vl.eval.task import Messages
from tests.cli.chat.openai_server import OpenAIServer, openai_server, text_reply
from tests.eval.suites.package import write_package
from tests.folders import write_tiny
from tests.fonts import hide_system_fonts
from tests.requirements import needs_judge_fonts


@dataclass(frozen=True)
class Delta:
    finish_reason: str = "stop"


@dataclass(frozen=True)
class OraclePrompt:
    text: str
    cache_salt: bytes = b""


@dataclass(frozen=True)
class TextOutput:
    text: str
    cumulative_logprob: float = -0.1
    prompt_tokens: int = 1021


@dataclass
class OracleLLM:
    """An LLM that returns the correct answers of the suite and records the parameters."""

    answers: dict[str, list[str]]
    params: SamplingParams | None = None
    batch_sizes: list[int] = field(default_factory=list)

    def prepare(self, messages: Messages, params: SamplingParams) -> PreparedRequest:
        self.params = params
        text = messages[0]["content"][-1]["text"]
        return PreparedRequest(OraclePrompt(text), params, 0.0)  # type: ignore[arg-type]

    def generate_prepared(
        self, prepared: Sequence[PreparedRequest], *, on_delta: Callable[[Any], None]
    ) -> list[TextOutput]:
        self.batch_sizes.append(len(prepared))
        outputs: list[TextOutput] = []
        for request in prepared:
            text = request.prompt.text  # type: ignore[attr-defined]
            outputs.append(TextOutput(self.answers[text].pop(0)))
            on_delta(Delta())
        return outputs


def oracle_llm(*parts: str) -> OracleLLM:
    answers: dict[str, list[str]] = {}
    for part in parts:
        for case in build_task(part).cases:
            answers.setdefault(case.question.text, []).append(case.question.answer)
    return OracleLLM(answers)


def use_llm(monkeypatch: pytest.MonkeyPatch, llm: OracleLLM) -> OracleLLM:
    loaded = options.LoadedModel(llm=llm, name="nano", load_seconds=0.0)  # type: ignore[arg-type]
    monkeypatch.setattr(options, "load_model_from_options", lambda _given, **_: loaded)
    return llm


@pytest.fixture
def oracle(monkeypatch: pytest.MonkeyPatch) -> OracleLLM:
    return use_llm(monkeypatch, oracle_llm("counting"))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[OpenAIServer]:
    monkeypatch.delenv("QWEN2VL_API_KEY", raising=False)
    with openai_server() as running:
        running.answer = lambda body: text_reply("2")
        yield running


def run(*args: str | Path) -> Result:
    return CliRunner().invoke(main, ["eval", *map(str, args)])


def rows_of(table: str) -> list[list[str]]:
    """Return the cells of the first table, without its header."""
    lines = [line.strip("|") for line in table.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.split("|")] for line in lines[1:]]


def titles_of(table: str) -> list[str]:
    """Return the titles of the first table, which may take several lines."""
    lines = table.splitlines()[1:]
    header = lines[: next(n for n, line in enumerate(lines) if line.startswith("|-"))]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in header]
    return [" ".join(filter(None, column)) for column in zip(*cells, strict=True)]


# Tables -----------------------------------------------------------------------------------------


def test_the_table_has_score_chance_threshold_and_verdict(oracle: OracleLLM) -> None:
    result = run("--task", "counting")
    assert result.exit_code == 0, result.output
    (row,) = rows_of(result.stdout)
    assert row == [
        *("counting", "accuracy", "100.0 %", "97.5 - 100.0", "18.7 %"),
        *(">= 95.0 %", "yes", "150", "1,021"),
    ]
    assert "expected calibration error: 9.5 % (mean confidence 90.5 %" in result.stdout
    assert result.stdout.splitlines()[-1].startswith("synthetic ")
    assert result.stderr == "" and oracle.batch_sizes == [64, 64, 22]


def test_the_blind_control_is_compared_with_chance(oracle: OracleLLM) -> None:
    result = run("--task", "counting", "--blind")
    (row,) = rows_of(result.stdout)
    assert row[:3] == ["counting", "accuracy", "100.0 %"]
    assert row[5].startswith("<= 2") and row[6] == "NO"  # an oracle does not look at the image
    assert "counting: control: the image belongs to another question" in result.stdout


def test_decoding_is_greedy_regardless_of_the_checkpoint(oracle: OracleLLM) -> None:
    run("--task", "counting", "--limit", "1")
    assert oracle.params is not None
    assert (oracle.params.temperature, oracle.params.repetition_penalty) == (0, 1)
    assert oracle.params.logprobs == 0


def test_json_output_and_the_results_file_agree(oracle: OracleLLM, tmp_path: Path) -> None:
    output = tmp_path / "results.jsonl"
    result = run("--suite", "mini", "--task", "counting", "--limit", "7", "--json", "-o", output)
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert (printed["suite"], printed["model"], printed["limit"]) == ("synthetic", "nano", 7)
    assert printed["calibration"]["count"] == 7 and "comparison" not in printed
    (part,) = printed["parts"]
    assert (part["part"], part["score"], part["num_examples"], part["passed"]) == (
        *("counting", 1.0, 7, True),
    )
    header, results = read_results(output)
    assert (header.suite, header.blind, header.model["name"]) == ("synthetic", False, "nano")
    assert list(results) == [f"counting/{number:03d}" for number in range(7)]


def test_evaluation_of_a_real_model(tmp_path: Path) -> None:
    write_tiny(tmp_path / "tiny")
    result = run("--model", tmp_path / "tiny", "--task", "shapes", "--limit", "2", "--json")
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    (part,) = printed["parts"]
    assert (part["num_examples"], part["passed"]) == (2, False)
    assert 0 < printed["calibration"]["confidence"] < 1


@needs_judge_fonts
def test_character_errors_are_shown_with_the_exact_match_share(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use_llm(monkeypatch, oracle_llm("text"))
    result = run("--task", "text", "--limit", "3")
    assert rows_of(result.stdout)[0][:4] == [*("text", "CER", "0.0 %", "0.0 - 0.0")]
    assert (
        "CER: character error rate; lines read without any error: text 100.0 %\n" in result.stdout
    )


def test_parts_without_fonts_are_skipped_with_a_note(
    oracle: OracleLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    hide_system_fonts(monkeypatch)
    result = run("--task", "text", "--task", "counting", "--limit", "1", "--json")
    assert result.exit_code == 0
    assert [part["part"] for part in json.loads(result.stdout)["parts"]] == ["counting"]
    assert result.stderr.startswith("qwen2vl: text is left out: fonts: ")
    assert "apt-get install fonts-cantarell fonts-ebgaramond" in result.stderr


def test_without_any_drawable_part_the_error_is_raised(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hide_system_fonts(monkeypatch)
    result = run("--task", "text")
    assert result.exit_code == 2
    assert "error: fonts: " in result.stderr and "apt-get install" in result.stderr


# Results files ----------------------------------------------------------------------------------


def test_a_complete_run_is_printed_again_without_a_model(
    oracle: OracleLLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("--task", "counting", "-o", tmp_path / "results.jsonl")
    first = run(*arguments)
    monkeypatch.setattr(options, "load_model_from_options", lambda *_, **__: pytest.fail("loaded"))
    second = run(*arguments)
    assert rows_of(second.stdout) == rows_of(first.stdout)
    assert f"150 of them were in {tmp_path}" in second.stdout


def test_the_file_of_other_options_is_refused(oracle: OracleLLM, tmp_path: Path) -> None:
    output = tmp_path / "results.jsonl"
    run("--task", "counting", "--limit", "1", "-o", output)
    for arguments in (("--blind",), ("--dtype", "float32")):
        result = run("--task", "counting", "--limit", "1", "-o", output, *arguments)
        assert result.exit_code == 2 and "has the answers of another run: " in result.stderr
        assert len(result.stderr.splitlines()) == 1


@pytest.mark.slow
def test_a_killed_process_is_continued_to_the_same_file(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    command = [sys.executable, "-m", "qwen2vl", "eval", "--task", "shapes", "--task", "counting"]
    command += ["--json", "--dtype", "float32", "-o"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, whole], env=environment, check=True, capture_output=True)
    process = subprocess.Popen([*command, killed], env=environment, stdout=subprocess.DEVNULL)
    while not killed.exists() or killed.read_bytes().count(b"\n") < 100:
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -9
    assert killed.read_bytes().count(b"\n") < 301
    subprocess.run([*command, killed], env=environment, check=True, capture_output=True)
    assert killed.read_bytes() == whole.read_bytes()


# Comparison -------------------------------------------------------------------------------------


def test_two_runs_are_compared_question_by_question(
    oracle: OracleLLM, server: OpenAIServer, tmp_path: Path
) -> None:
    other, arguments = tmp_path / "other.jsonl", ("--task", "counting", "--limit", "30")
    assert run(*arguments, "--server", server.url, "-o", other).exit_code == 0
    result = run(*arguments, "--compare", other)
    assert result.exit_code == 0, result.output
    assert f"compared with {other}, paired by question:" in result.stdout
    row = rows_of(result.stdout)[-1]
    wrong = sum(case.question.answer != "2" for case in build_task("counting").cases[:30])
    assert (row[0], row[2], row[3], row[7:9]) == ("counting", "30", "100.0 %", [str(wrong), "0"])
    assert float(row[9]) == pytest.approx(2 / 2**wrong, rel=0.05)


def test_comparison_with_other_questions_is_refused(
    oracle: OracleLLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other.jsonl"
    run("--task", "counting", "--limit", "1", "-o", other)
    result = run("--task", "shapes", "--limit", "1", "--compare", other, "--model", "nano")
    assert result.exit_code != 0
    other.write_text(other.read_text().replace('"digest": "', '"digest": "0'), encoding="utf-8")
    result = run("--task", "counting", "--compare", other)
    assert result.exit_code == 2
    assert "only runs of the same questions can be compared" in result.stderr


# Servers and published sets ---------------------------------------------------------------------


def test_a_server_answers_in_place_of_a_model(server: OpenAIServer, tmp_path: Path) -> None:
    output = tmp_path / "results.jsonl"
    result = run("--task", "counting", "--limit", "4", "--server", server.url, "-o", output)
    assert result.exit_code == 0, result.output
    assert rows_of(result.stdout)[0][7] == "4" and len(server.bodies) == 4
    assert "calibration" not in result.stdout  # this server sends no log probabilities
    assert read_results(output)[0].model == {"name": "nano", "server": True}


ANY_SIZE = ("--suite", "any-size", "--limit", "1", "--json")


@pytest.fixture
def _no_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask the questions of frozen suites without their pictures, which need datasets."""
    monkeypatch.setattr(FrozenSuite, "check_part", lambda self, part: None)
    monkeypatch.setattr(
        FrozenSuite,
        "messages",
        lambda self, item: [{"role": "user", "content": item.question}],
    )


@pytest.mark.usefixtures("_no_drawing")
@pytest.mark.parametrize(("context", "is_asked"), [(4096, False), (5312, True), (None, True)])
def test_parts_that_do_not_fit_into_the_context_of_a_server_are_left_out(
    server: OpenAIServer, context: int | None, is_asked: bool
) -> None:
    card = {} if context is None else {"max_model_len": context}
    server.models = {"data": [{"id": "nano", **card}]}
    result = run(*ANY_SIZE, "--task", "2000x2000*", "--server", server.url)
    assert result.exit_code == 0, result.output
    parts = [row["part"] for row in json.loads(result.stdout)["parts"]]
    assert ("2000x2000_unresized" in parts) == is_asked and "2000x2000" in parts
    note = (
        "qwen2vl: 2000x2000_unresized: left out: the longest prompts need a context of 5,312 "
        "tokens, that of nano on the server has 4,096; start the server with --max-model-len 5312"
    )
    assert result.stderr.startswith(note) != is_asked


@pytest.mark.usefixtures("_no_drawing")
def test_a_server_whose_context_holds_no_part_is_an_error(server: OpenAIServer) -> None:
    server.models = {"data": [{"id": "nano", "max_model_len": 4096}]}
    result = run(*ANY_SIZE, "--task", "2000x2000_unresized", "--server", server.url)
    assert result.exit_code == 2 and not server.bodies
    assert "error: 2000x2000_unresized: the longest prompts need a context of" in result.stderr


@pytest.mark.usefixtures("_no_drawing")
def test_parts_of_one_run_are_compared_under_their_own_titles(server: OpenAIServer) -> None:
    result = run(
        *("--suite", "wordings", "--task", "trained", "--task", "held_out", "--limit", "5"),
        *("--server", server.url),
    )
    assert result.exit_code == 0, result.output
    table = result.stdout.split("compared with trained, paired by item:\n")[1]
    titles = titles_of(table)
    assert titles[3:5] == ["score", "compared with"]
    assert "p: McNemar's exact test of accuracies; sign test" in table


@pytest.mark.usefixtures("_no_drawing")
def test_refusals_have_columns_of_their_own(server: OpenAIServer) -> None:
    server.answer = lambda body: text_reply("cat", usage={"prompt_tokens": 9})
    result = run(*("--suite", "honesty", "--task", "absent", "--server", server.url))
    assert result.exit_code == 0, result.output
    table = result.stdout.split("refusals of unanswerable and of answerable questions:\n")[1]
    titles = titles_of(table)
    assert titles == [
        *("part", "refused (unanswerable)", "95 % CI", "questions", "refused (answerable)"),
        *("questions", "accuracy of answered", "questions"),
    ]
    assert titles_of(result.stdout)[-1] == "tokens"


@pytest.fixture
def _package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    definition = write_package(tmp_path / "package", num_images=2)
    suite = easy_vqa.EasyVQA(tmp_path / "package", definition)
    monkeypatch.setattr(easy_vqa, "open_easy_vqa", lambda: suite)


@pytest.mark.usefixtures("_package")
def test_a_published_set_has_a_row_of_all_parts(server: OpenAIServer) -> None:
    server.answer = lambda body: text_reply("no")
    result = run("--suite", "easy-vqa", "--server", server.url)
    assert result.exit_code == 0, result.output
    rows = rows_of(result.stdout)
    assert [row[0] for row in rows] == [*easy_vqa.load_definition().patterns, "all"]
    assert rows[0][2] == "0.0 %" and rows[-1][5] == "48"
    assert "with similar names accepted: " in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--task", "letters"), "no part of the suite synthetic is called letters: text, text_2x"),
        (("-o", "nowhere/results.jsonl"), "nowhere does not exist; make it first"),
        (("--limit", "0"), "0 is not in the range x>=1"),
        (("--suite", "maxi"), "'maxi' is not one of 'synthetic', 'easy-vqa', "),
        (("--compare", "none.jsonl"), "none.jsonl: cannot be read: No such file"),
        (("--concurrency", "3"), "--api-key and --concurrency are for a server"),
        (("--server", "localhost:1", "--dtype", "float32"), "--dtype is an option of a model that"),
        (("--server", "localhost:1", "--kv-cache-dtype", "int8"), "--kv-cache-dtype is an option"),
    ],
)
def test_invalid_options_are_errors_before_loading(
    arguments: tuple[str, ...], message: str
) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr and len(result.stderr.splitlines()) == 1
