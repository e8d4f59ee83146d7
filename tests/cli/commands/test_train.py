"""`train`: progress lines, the exported folder, evaluation, resume, and errors."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from qwen2vl import recipes
from qwen2vl.cli import evaluations
from qwen2vl.eval.mini import build_task
from tests.cli.conftest import Run

SHORT = ["num_workers=0", "num_threads=1", "logging_steps=2", "output_dir=here"] + [
    f"stages.{i}.{field}" for i in range(4) for field in ("steps=2", "global_batch_size=4")
]


def test_a_run_reports_its_steps_and_exports_a_working_folder(run: Run) -> None:
    result = run("train", "tiny", *SHORT)
    assert result.exit_code == 0, result.stderr
    *reports, model, hint = result.stdout.splitlines()
    for step, line in zip((2, 4, 6, 8), reports, strict=True):
        assert re.match(rf" +\d+\.\d min  {step}/8 \w+  loss \d\.\d+  .*\| shapes \d\.\d+/", line)
    assert model == f"model: {Path('here/model-000008')}"
    assert "qwen2vl ask --model here" in hint
    records = [json.loads(line) for line in Path("here/metrics.jsonl").read_text().splitlines()]
    assert [line["stage"] for line in records] == ["words", "see", "world", "answers"]
    answer = run("ask", "--model", "here/model-000008", "Hi", "--max-tokens", 2, "--json")
    assert len(json.loads(answer.stdout)["token_ids"]) <= 2


def test_help_lists_every_recipe(run: Run) -> None:
    text = run("train", "--help").stdout
    (line,) = re.findall(r"Names: (.*?)\.\n", text, re.DOTALL)
    assert re.split(r",\s+", line) == recipes.list_recipes()


def test_evaluation_during_training(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluations, "_base_tasks", lambda: [build_task("shapes")])
    overrides = [
        "evaluation.eval_steps=3",
        "evaluation.num_examples=8",
        "evaluation.num_questions=1",
        "report_to=tensorboard",
    ]
    result = run("train", "tiny", *SHORT, *overrides, "peak_tflops=1")
    assert result.exit_code == 0, result.stderr
    *lines, _, _ = result.stdout.splitlines()
    evaluation_lines = [line for line in lines if "held out" in line]
    assert [re.search(r"(\d+) held out", line)[1] for line in evaluation_lines] == ["3", "6"]
    assert all(
        re.search(r"loss \d\.\d+  vision gain -?\d\.\d+  \| shapes", p) for p in evaluation_lines
    )
    assert all(re.search(r"\| mini .*shapes \d+%", line) for line in evaluation_lines)
    assert all(re.search(r"img/s  MFU \d\.\d%  wait", line) for line in lines if "/8 " in line)
    lines = [json.loads(line) for line in Path("here/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 3, 4, 6, 6, 8]
    shares = lines[0]["phases"]
    assert set(shares) == {"data", "forward", "backward", "optimizer", "other"}
    assert all(share > 0 for share in shares.values())
    assert any(Path("here/tensorboard").iterdir())
    drawn = run("plot", "here", "-o", "here.png")
    assert drawn.exit_code == 0, drawn.stderr


def test_a_finished_run_is_not_repeated_and_an_interrupted_one_resumes(run: Run) -> None:
    overrides = [*SHORT, "save_steps=6"]
    run("train", "tiny", *overrides)
    again = run("train", "tiny", *overrides)
    assert again.exit_code == 0
    assert [line.split(":")[0] for line in again.stdout.splitlines()] == ["model", "try"]
    shutil.rmtree("here/step-000008")
    first, report, *_ = run("train", "tiny", *overrides).stdout.splitlines()
    assert first == f"resuming from step 6 of 8: {Path('here/step-000006')}"
    assert "8/8 answers" in report


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nan0"], "no recipe 'nan0'; did you mean nano?"),
        (["tiny", "optm.lr=1"], "unknown key 'optm'; did you mean optim?"),
        (["tiny", "init=./nowhere"], "no such folder"),
        (
            ["tiny", "output_dir=/dev/null/x"],
            "/dev/null/x: cannot be made a folder: Not a directory",
        ),
    ],
)
def test_errors_are_one_line(run: Run, arguments: list[str], message: str) -> None:
    result = run("train", *arguments)
    assert result.exit_code in (1, 2)
    (line,) = result.stderr.splitlines()
    assert message in line
