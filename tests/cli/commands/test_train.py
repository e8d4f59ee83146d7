"""`train`: a line a report, a folder at the end that answers, and misspelled words named."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from qwen2vl import recipes
from qwen2vl.cli import evaluations
from qwen2vl.eval.mini import build
from tests.cli.conftest import Run

SHORT = ["workers=0", "threads=1", "log_every=2", "out=here"] + [
    f"stages.{i}.{field}" for i in range(4) for field in ("steps=2", "examples=4")
]


def test_a_run_reports_its_steps_and_ends_with_a_folder_that_answers(run: Run) -> None:
    result = run("train", "tiny", *SHORT)
    assert result.exit_code == 0, result.stderr
    *reports, model, hint = result.stdout.splitlines()
    for step, line in zip((2, 4, 6, 8), reports, strict=True):
        assert re.match(rf" +\d+\.\d min  {step}/8 \w+  loss \d\.\d+  .*\| shapes \d\.\d+/", line)
    assert model == f"model: {Path('here/model-000008')}"
    assert "qwen2vl ask --model here" in hint
    told = [json.loads(line) for line in Path("here/metrics.jsonl").read_text().splitlines()]
    assert [line["stage"] for line in told] == ["words", "see", "world", "answers"]
    answer = run("ask", "--model", "here/model-000008", "Hi", "--max-tokens", 2, "--json")
    assert len(json.loads(answer.stdout)["token_ids"]) <= 2


def test_help_names_every_recipe(run: Run) -> None:
    said = run("train", "--help").stdout
    (line,) = re.findall(r"Names: (.*?)\.\n", said, re.DOTALL)
    assert re.split(r",\s+", line) == recipes.names()


def test_between_steps_the_model_is_asked_what_it_does_not_learn_from(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluations, "_plain_tasks", lambda: [build("shapes")])
    words = ["probe.every=3", "probe.examples=8", "probe.questions=1", "log=tensorboard"]
    result = run("train", "tiny", *SHORT, *words, "peak_tflops=1")
    assert result.exit_code == 0, result.stderr
    *told, _, _ = result.stdout.splitlines()
    asked = [line for line in told if "held out" in line]
    assert [re.search(r"(\d+) held out", line)[1] for line in asked] == ["3", "6"]
    assert all(re.search(r"loss \d\.\d+  vision gain -?\d\.\d+  \| shapes", p) for p in asked)
    assert all(re.search(r"\| mini .*shapes \d+%", line) for line in asked)
    assert all(re.search(r"img/s  MFU \d\.\d%  wait", line) for line in told if "/8 " in line)
    lines = [json.loads(line) for line in Path("here/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 3, 4, 6, 6, 8]
    shares = lines[0]["phases"]
    assert set(shares) == {"data", "forward", "backward", "optimizer", "other"}
    assert all(share > 0 for share in shares.values())
    assert any(Path("here/tensorboard").iterdir())
    drawn = run("plot", "here", "-o", "here.png")
    assert drawn.exit_code == 0, drawn.stderr


def test_a_finished_run_is_not_run_again_and_another_goes_on(run: Run) -> None:
    words = [*SHORT, "save_every=6"]
    run("train", "tiny", *words)
    again = run("train", "tiny", *words)
    assert again.exit_code == 0
    assert [line.split(":")[0] for line in again.stdout.splitlines()] == ["model", "try"]
    shutil.rmtree("here/step-000008")
    first, report, *_ = run("train", "tiny", *words).stdout.splitlines()
    assert first == f"going on from step 6 of 8: {Path('here/step-000006')}"
    assert "8/8 answers" in report


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["nan0"], "no recipe 'nan0'; did you mean nano?"),
        (["tiny", "optm.lr=1"], "unknown key 'optm'; did you mean optim?"),
        (["tiny", "init=./nowhere"], "no such folder"),
        (["tiny", "out=/dev/null/x"], "/dev/null/x: cannot be made a folder: Not a directory"),
    ],
)
def test_what_cannot_be_meant_is_one_line(run: Run, words: list[str], complaint: str) -> None:
    result = run("train", *words)
    assert result.exit_code in (1, 2)
    (line,) = result.stderr.splitlines()
    assert complaint in line
