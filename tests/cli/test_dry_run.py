"""`train --dry-run`: data report, memory estimate, samples with supervised text in brackets."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.cli.conftest import Run
from tests.data.rows import conversation, write_media, write_rows

OVERRIDES = [
    "data.max_tokens=512",
    "data.global_batch_size=4",
    "data.cache_dir=cache",
    "stages.0.steps=6",
    "num_workers=0",
]

RECIPE = """
from dataclasses import replace
from qwen2vl.recipes import tiny
from qwen2vl.data.config import DataConfig, SourceConfig
from qwen2vl.train.config import Stage

def recipe():
    stage = Stage(name="read", steps=9, data=DataConfig(sources=(SourceConfig(path="none"),)))
    return replace(tiny.recipe(), stages=(stage, tiny.recipe().stages[1]), output_dir="here")
"""


def prepare() -> None:
    write_media(Path("set"))
    rows = [conversation("<image>what?", f"answer {i}", image=f"{i % 5}.png") for i in range(24)]
    rows.append(conversation("<image>what?", "none", image="none.png"))
    write_rows(Path("set/rows.jsonl"), rows)
    Path("own.py").write_text(RECIPE)


def test_a_dry_run_reports_the_planned_run(run: Run) -> None:
    prepare()
    overrides = [*OVERRIDES, "data=set/rows.jsonl", "data.max_bad_fraction=0.1"]
    result = run("train", "own.py", *overrides, "--dry-run")
    assert result.exit_code == 0, result.stderr
    text = result.stdout
    assert "stage see: 10 steps of synthetic data" in text
    assert "run      tiny: 16 steps, muon, learning rate 0.002; output in here" in text
    assert "stage    read: trains 350,336 parameters (100.0%) in 6 steps of 4 bins of up" in text
    assert re.search(r"data     of stage read, in 6 steps: \d\.?\d* epochs", text)
    row = next(line for line in text.splitlines() if line.startswith("| rows"))
    cells = [cell.strip() for cell in row.split("|")]
    assert cells[2:4] == ["25", "25"]
    assert cells[-2] == "1"  # bad
    assert "qwen2vl: rows: left out 1 with a missing media file: rows.jsonl:25: none.png is" in (
        result.stderr
    )
    assert "fill " in text and "% of 512 tokens" in text
    assert "on 2 ranks" in text
    # One rank in stage `read`, whose four bins eight ranks cannot share; both in stage `see`.
    titles = [
        "ranks",
        "weights",
        "moments",
        "gathered",
        "gradients",
        "activations",
        "logits",
        "peak",
    ]
    headers = [line for line in text.splitlines() if line.startswith("| ranks")]
    assert [[cell.strip() for cell in h.strip("|").split("|")] for h in headers] == [titles] * 2
    assert re.findall(r"^\| +([18]) \| +\d+\.\d MB \|", text, re.MULTILINE) == ["1", "8", "1"]
    assert "rows.jsonl:1" in text
    assert re.search(r"decoded  (10|9) samples: \1 as their headers say", text)
    assert len(re.findall(r"^rows.jsonl:\d+$", text, re.MULTILINE)) == 4  # of the only source
    assert "<|vision_start|><|image_pad|> x 8 <|vision_end|>what?<|im_end|>" in text
    assert "assistant\n[[answer 0<|im_end|>]]\n" in text
    assert "tokens take" not in text  # there is no throughput measurement yet
    assert not Path("here").exists()


def test_duration_epochs_and_a_stage_within_warm_up_are_reported(run: Run) -> None:
    prepare()
    Path("here").mkdir()
    Path("here/metrics.jsonl").write_text(json.dumps({"tokens_per_second": 100.0}) + "\n")
    overrides = [*OVERRIDES, "data=set/rows.jsonl", "data.max_bad_fraction=0.1", "stages.1.steps=0"]
    result = run("train", "own.py", *overrides, "optim.warmup_steps=7", "--dry-run")
    assert "tokens take" in result.stdout
    assert "at the throughput of this run's last report" in result.stdout
    assert " epochs" in result.stdout
    assert (
        "stage read: its 6 steps are all warm-up, in which the learning rate still" in result.stderr
    )
    assert "stage see: its" not in result.stderr  # it takes no step


def test_a_synthetic_stage_within_warm_up_is_reported(run: Run) -> None:
    prepare()
    overrides = [*OVERRIDES, "data=set/rows.jsonl", "data.max_bad_fraction=0.1", "stages.0.steps=0"]
    result = run("train", "own.py", *overrides, "optim.warmup_steps=11", "--dry-run")
    assert result.exit_code == 0, result.stderr
    assert (
        "stage see: its 10 steps are all warm-up, in which the learning rate still" in result.stderr
    )
    assert "stage read: its" not in result.stderr  # it takes no step


def test_unusable_data_is_a_one_line_error(run: Run) -> None:
    prepare()
    result = run("train", "own.py", *OVERRIDES, "data=set/rows.jsonl", "--dry-run")
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert "1 of 25 samples are bad (1 with a missing media file), the limit is 1.00%" in line
    assert "rows.jsonl:25: none.png is missing in" in line
    result = run("train", "own.py", *OVERRIDES, "data=set/nothing.jsonl", "--dry-run")
    assert "set/nothing.jsonl: no such file" in result.stderr.splitlines()[0]


def test_what_the_headers_do_not_show_is_found_by_decoding(run: Run) -> None:
    prepare()
    whole = Path("set/4.png").read_bytes()
    Path("set/4.png").write_bytes(whole[: len(whole) // 2])
    rows = [conversation("<image>what?", f"a {i}", image=f"{i % 5}.png", tag=i) for i in range(24)]
    rows.append(conversation("what?", ""))
    write_rows(Path("set/rows.jsonl"), rows)
    result = run("train", "own.py", *OVERRIDES, "data=set/rows.jsonl", "--dry-run")
    assert result.exit_code == 2
    assert "[[a 0<|im_end|>]]" in result.stdout  # the report is complete
    *notes, line = result.stderr.splitlines()
    assert "rows: ignored columns: tag (of 24 samples)" in result.stderr
    assert result.stderr.count("rows: 1 sample with an empty answer, of which only") == 1
    assert any("rows: bad when decoded: rows.jsonl:5: 4.png" in note for note in notes)
    assert re.search(r"\d of \d+ samples that were decoded are bad, the limit is 1.00%", line)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ['adapter.target_modules=["model.missing"]'],
            "'model.missing' matches no linear layer; names are",
        ),
        (['stages.0.rules=[["missing", 1], [".*", 0]]'], "rules that match no parameter: missing"),
        (['stages.0.rules=[[".*", 0]]'], "stage lora: its rules freeze every parameter"),
        (
            ["gradient_accumulation_steps=2"],
            "data.global_batch_size is 1, which 2 batches (1 rank x gradient_accumulation_steps=2) "
            "cannot share evenly",
        ),
        (["stages.0.steps=0"], "its stages have no step to take; give stages.0.steps=N"),
        (["max_minutes=-1"], "max_minutes is -1, must be 0 or more"),
    ],
)
def test_invalid_configs_are_reported_before_data_is_read(
    run: Run, overrides: list[str], message: str
) -> None:
    result = run("train", "lora", "model=nano", "data=no/such.jsonl", *overrides, "--dry-run")
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert message in line


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "lora reads data: give data=FILE, since data.jsonl, which its recipe names, does not"),
        (["epochs=3"], "lora reads data: give data=FILE"),
        (["data=none.jsonl"], "none.jsonl: no such file; check the path"),
        (["data=none/*.jsonl"], "none/*.jsonl: no such file; check the path"),
        (["data=set/rows.jsonl", "validation=none.jsonl"], "validation=none.jsonl: no such file"),
        (["data=set/rows.jsonl", "adapter.init=none"], "adapter 'none': no such folder"),
        (["data=set/rows.jsonl", "report_to=wandb"], "the package wandb is not installed"),
    ],
)
def test_what_is_missing_is_reported_first_and_alike_by_run_and_dry_run(
    run: Run, monkeypatch: pytest.MonkeyPatch, overrides: list[str], message: str
) -> None:
    prepare()
    monkeypatch.setattr("qwen2vl.train.logging.loggers.find_spec", lambda _: None)
    for option in ([], ["--dry-run"]):
        result = run("train", "lora", "model=nano", "output_dir=here", *overrides, *option)
        assert result.exit_code in (1, 2)
        assert not result.stdout
        (line,) = result.stderr.splitlines()
        assert message in line
    assert not Path("here").exists()


def test_a_folder_of_another_run_is_refused_by_run_and_dry_run(run: Run) -> None:
    short = ["tiny", "output_dir=here", "num_workers=0", "num_threads=1"]
    short += ["evaluation.eval_steps=0", *(f"stages.{i}.steps=1" for i in range(4))]
    assert run("train", *short).exit_code == 0
    for option in ([], ["--dry-run"]):
        result = run("train", *short, "stages.3.steps=2", *option)
        assert (result.exit_code, result.stdout) == (2, "")
        (line,) = result.stderr.splitlines()
        assert "step-000004 was made with other values of stages.3.steps (1, now 2)" in line
        assert f"(model={Path('here/model-000004')} starts it from this result)" in line


def test_data_that_changed_since_the_run_began_are_refused(run: Run) -> None:
    prepare()
    rows = [conversation(f"question {i}", f"answer {i}") for i in range(24)]
    path = write_rows(Path("set/text.jsonl"), rows)
    overrides = [*OVERRIDES, f"data={path}", "stages.1.steps=0", "evaluation.eval_steps=0"]
    overrides += ["num_threads=1", "data.global_batch_size=1", "stages.0.steps=1"]
    result = run("train", "own.py", *overrides)
    assert result.exit_code == 0, result.stderr
    write_rows(path, rows[1:])
    result = run("train", "own.py", *overrides, "--dry-run")
    assert result.exit_code == 2
    assert "here: the data of read are not those that this run began with" in result.stderr


def test_a_data_override_without_a_data_stage_is_an_error(run: Run) -> None:
    result = run("train", "tiny", "data=set/rows.jsonl", "--dry-run")
    assert "no stage of tiny reads data; write stages.0.data=FILE" in result.stderr
