"""`train`: progress lines, the exported folder, evaluation, resume, and errors."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from qwen2vl import recipes
from qwen2vl.cli import evaluations, terminal
from qwen2vl.cli.commands.train import RunPrinter
from qwen2vl.memory import matmul_dtype
from tests.cli.conftest import Run
from tests.data.rows import conversation, write_media, write_rows

# What `dtype=auto` chooses on this machine.
DTYPE = str(matmul_dtype("auto", torch.device("cpu"))).removeprefix("torch.")
SHORT = [
    *("evaluation.eval_steps=0", "num_workers=0", "num_threads=1"),
    *("logging_steps=2", "output_dir=here"),
] + [f"stages.{i}.{field}" for i in range(4) for field in ("steps=2", "global_batch_size=4")]


def test_a_run_reports_its_steps_and_exports_a_working_folder(run: Run) -> None:
    result = run("train", "tiny", *SHORT)
    assert result.exit_code == 0, result.stderr
    *lines, model, hint = result.stdout.splitlines()
    begin, reports = lines[:-4], lines[-4:]
    assert begin[0] == "run      tiny: 8 steps, muon, learning rate 0.002; output in here"
    assert begin[1] == "model    random weights, 350,336 parameters"
    assert begin[4].startswith(
        "stage    world: trains 350,336 parameters (100.0%) in 2 steps of 4 "
    )
    assert begin[-2:] == [
        f"device   cpu, 1 thread, {DTYPE}, 0 data workers",
        "reports  every 2 steps, or 30 s; checkpoints every 10 steps",
    ]
    for step, line in zip((2, 4, 6, 8), reports, strict=True):
        assert re.match(rf" +\d+\.\d min  {step}/8 \w+  loss \d\.\d+  .*\| shapes \d\.\d+/", line)
    assert model == f"model: {Path('here/model-000008')}"
    assert "qwen2vl ask --model here" in hint
    records = [json.loads(line) for line in Path("here/metrics.jsonl").read_text().splitlines()]
    assert [line["stage"] for line in records] == ["words", "see", "world", "answers"]
    # Of the second of two steps of each stage, in a warm-up of four, with a decay of one step.
    assert [line["lr"] for line in records] == [2e-3 * 2 / 4] * 4
    answer = run("ask", "--model", "here/model-000008", "Hi", "--max-tokens", 2, "--json")
    assert len(json.loads(answer.stdout)["token_ids"]) <= 2


def test_help_lists_every_recipe(run: Run) -> None:
    text = run("train", "--help").stdout
    (line,) = re.findall(r"Names: (.*?)\.\n", text, re.DOTALL)
    assert re.split(r",\s+", line) == recipes.list_recipes()


def test_evaluation_during_training(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluations, "_base_parts", lambda suite: ["shapes"])
    overrides = [
        "evaluation.eval_steps=3",
        "evaluation.num_examples=8",
        "evaluation.num_questions=1",
        "report_to=tensorboard",
    ]
    result = run("train", "tiny", *SHORT, *overrides, "peak_tflops=1")
    assert result.exit_code == 0, result.stderr
    *lines, _, _ = result.stdout.splitlines()
    assert (
        "evaluate every 3 steps and after the last, on 8 synthetic samples of another seed" in lines
    )
    evaluation_lines = [line for line in lines if " validation " in line]
    steps = [step for line in lines for step in re.findall(r"(\d+) validation", line)]
    assert steps == ["3", "6", "8"]
    assert all(
        re.search(r"loss \d\.\d+  vision gain -?\d\.\d+  \| shapes", p) for p in evaluation_lines
    )
    assert all(re.search(r"\| mini .*shapes \d+%", line) for line in evaluation_lines)
    assert all(re.search(r"img/s  MFU \d\.\d%  wait", line) for line in lines if "/8 " in line)
    lines = [json.loads(line) for line in Path("here/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 3, 4, 6, 6, 8, 8]
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
    *_, finished, model, hint = again.stdout.splitlines()
    assert finished == (
        "finished 8 steps before; begin another run with output_dir=FOLDER "
        f"(model={Path('here/model-000008')} starts it from this result)"
    )
    assert (model.split(":")[0], hint.split(":")[0]) == ("model", "try")
    shutil.rmtree("here/step-000008")
    *_, resuming, report, _, _ = run("train", "tiny", *overrides).stdout.splitlines()
    assert resuming == f"resuming from step 6 of 8: {Path('here/step-000006')}"
    assert "8/8 answers" in report


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nan0"], "no recipe 'nan0'; did you mean nano?"),
        (["tiny", "optm.lr=1"], "unknown key 'optm'; did you mean optim?"),
        (["tiny", "init=./nowhere"], "no such folder"),
        (["lora", "--learning_rate=3"], "unknown key 'learning_rate'; write optim.lr=3"),
        (["lora", "--learning_rate", "3"], "unknown key 'learning_rate'; write optim.lr=3"),
        (["lora", "--optim.lr=3"], "fields are given without dashes; write optim.lr=3"),
        (["lora", "--epochs=3"], "fields are given without dashes; write epochs=3"),
        (
            ["lora", "data=a.jsonl", "data=b.jsonl"],
            "data is given twice, as a.jsonl and b.jsonl; write several files as data=a.jsonl,b.js",
        ),
        (["lora", "validation=1", "validation=2"], "validation is given twice, as 1 and 2; give"),
        (["lora", "--dry_run"], "Did you mean '--dry-run'?"),
        (["lora", "--nothing"], "No such option '--nothing'"),
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


def prepare_rows(num_rows: int = 8) -> None:
    write_media(Path("set"))
    rows = [
        conversation("<image>what?", f"answer {i}", image=f"{i % 5}.png") for i in range(num_rows)
    ]
    write_rows(Path("set/rows.jsonl"), rows)


LORA = ["lora", "model=nano", "data=set/rows.jsonl", "data.cache_dir=cache", "output_dir=here"]
# Logs by steps only; bfloat16 would be slow on a processor without it.
LORA += ["logging_seconds=0", "dtype=float32"]
LORA += ["num_workers=0", "num_threads=1", "data.max_tokens=1024"]


def test_a_run_on_a_few_rows_of_data(run: Run) -> None:
    prepare_rows()
    result = run("train", *LORA, "stages.0.steps=24", "validation=2", "evaluation.eval_steps=12")
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == "run      lora: 24 steps, adamw, learning rate 0.0002; output in here"
    assert lines[2].startswith(
        "stage    lora: trains 217,088 adapter parameters (5.0%) in 24 steps"
    )
    assert "data     of stage lora, in 24 steps: 24 epochs (passes over the data)" in lines
    (row,) = (line for line in lines if line.startswith("| rows"))
    assert [cell.strip() for cell in row.split("|")[2:4]] == ["8", "6"]
    assert (
        "evaluate every 12 steps and after the last, on the 2 samples held out of stage lora"
        in lines
    )
    assert any(re.search(r" 20/24 lora  epoch 20.00  loss \d", line) for line in lines)
    assert any(re.search(r" 24 validation  loss \d", line) for line in lines)
    assert (
        "stage lora: 24 steps read the same 6 samples 24 times, which mostly memorizes them; "
        "stages.0.steps=20 reads them 20 times"
    ) in result.stderr
    listed = [json.loads(x)["sample"] for x in Path("here/held_out.jsonl").read_text().splitlines()]
    assert len(listed) == 2
    held_out = f"held out 2 samples of rows: {', '.join(listed)}; listed in "
    assert f"{held_out}{Path('here/held_out.jsonl')}" in lines
    finished = run("train", *LORA, "stages.0.steps=24", "validation=2", "evaluation.eval_steps=12")
    assert f"(adapter.init={Path('here/adapter-000024')} starts it from" in finished.stdout
    adapter, model, hint = lines[-3:]
    assert adapter == f"adapter: {Path('here/adapter-000024')}"
    assert model == f"model: {Path('here/model-000024')}"
    command = hint.removeprefix("try:   qwen2vl ").removesuffix(" --image IMAGE QUESTION")
    answer = run(*command.split(), "Hi", "--max-tokens", 2, "--json")
    assert answer.exit_code == 0, answer.stderr
    records = [json.loads(line) for line in Path("here/metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "held_out" in r] == [12, 24]
    assert [r["epoch"] for r in records if "loss" in r] == [20.0, 24.0]
    reports = [record for record in records if "loss" in record]
    assert reports[0]["lr"] == 2e-4  # of step 20, the last one of the warm-up


def test_epochs_set_the_steps_of_a_run_and_of_its_dry_run(run: Run) -> None:
    prepare_rows(24)
    overrides = [*LORA, "epochs=3", "data.max_tokens=512", "validation=0.1"]
    dry = run("train", *overrides, "--dry-run")
    assert dry.exit_code == 0, dry.stderr
    result = run("train", *overrides)
    assert result.exit_code == 0, result.stderr
    number = re.search(r"run +lora: (\d+) steps", result.stdout)
    assert number is not None
    assert int(number[1]) > 3  # several bins an epoch
    # Ten evaluations of these steps, not of those of the recipe.
    assert f"evaluate every {-(-int(number[1]) // 10)} step" in result.stdout
    assert re.search(rf"{number[1]}/{number[1]} lora  epoch 3.00 ", result.stdout)
    # Both say the same about the run, its data and its evaluation.
    for begin in ("run ", "model ", "stage ", "device ", "reports ", "data ", "bins ", "evaluate "):
        said = [[x for x in r.stdout.splitlines() if x.startswith(begin)] for r in (dry, result)]
        assert said[0] == said[1] != [], begin


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["epochs=three"], "epochs=three: is not a number; write epochs=3"),
        (["epochs=0"], "epochs=0: must be above 0"),
        (["epochs=3", "stages.0.steps=5"], "epochs=3 and stages.0.steps=5 both set the steps"),
        (["validation=7"], "validation=7: rows has 8 usable conversations, of which at most 4 may"),
        (["validation=none.jsonl"], "none.jsonl: no such file"),
        (["learning_rate=1e-3"], "unknown key 'learning_rate'; write optim.lr=1e-3"),
    ],
)
def test_errors_of_short_keys_come_before_the_first_step(
    run: Run, overrides: list[str], message: str
) -> None:
    prepare_rows()
    result = run("train", *LORA, *overrides)
    assert result.exit_code == 2
    assert message in result.stderr.splitlines()[-1]
    assert not Path("here/metrics.jsonl").exists()


def test_an_empty_file_and_bad_rows_are_answered_with_a_remedy(run: Run) -> None:
    prepare_rows()
    path = Path("set/rows.jsonl")
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines, '{"prompt": "q", "answer": "a"}']))
    (line,) = run("train", *LORA, "--dry-run").stderr.splitlines()
    assert "1 of 9 samples are bad (1 with malformed messages), the limit is 1.00%" in line
    assert "rows.jsonl:9: the row has the keys prompt, answer, and none of messages," in line
    remedy = line.rpartition(" ")[2]
    assert remedy == "data.max_bad_fraction=0.12"
    result = run("train", *LORA, remedy, "--dry-run")
    assert result.exit_code == 0
    assert (
        "rows: left out 1 with malformed messages: rows.jsonl:9: the row has the" in result.stderr
    )
    path.write_text("")
    (line,) = run("train", *LORA, "--dry-run").stderr.splitlines()
    assert 'set/rows.jsonl holds no line; write one conversation a line, as {"messages":' in line


def test_in_a_pipe_only_the_heartbeat_reports_the_measuring(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(terminal, "SECONDS_PER_NOTE", 0.0)
    printer = RunPrinter(recipes.load_recipe("lora"))
    printer.show_progress("measuring rows", 100, 2000)
    assert printer._heartbeat.activity == "measuring rows, 100 of 2,000 samples"
    assert capsys.readouterr().err == ""
