"""`train --dry-run`: the data's facts, samples with what is learned in brackets, and no model."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.cli.conftest import Run
from tests.data.rows import conversation, write_media, write_rows

WORDS = ["data.max_tokens=512", "data.bins=4", "data.cache=kept", "stages.0.steps=6", "workers=0"]

RECIPE = """
from dataclasses import replace
from qwen2vl.recipes import tiny
from qwen2vl.data.config import DataConfig, Source
from qwen2vl.train.config import Stage

def recipe():
    stage = Stage(name="read", steps=9, data=DataConfig(sources=(Source(path="none"),)))
    return replace(tiny.recipe(), stages=(stage, tiny.recipe().stages[1]), out="here")
"""


def prepare() -> None:
    write_media(Path("set"))
    rows = [conversation("<image>what?", f"answer {i}", image=f"{i % 5}.png") for i in range(24)]
    rows.append(conversation("<image>what?", "none", image="none.png"))
    write_rows(Path("set/rows.jsonl"), rows)
    Path("own.py").write_text(RECIPE)


def test_a_dry_run_tells_what_a_run_would_do(run: Run) -> None:
    prepare()
    words = [*WORDS, "data=set/rows.jsonl", "data.max_bad=0.1"]
    result = run("train", "own.py", *words, "--dry-run")
    assert result.exit_code == 0, result.stderr
    text = result.stdout
    assert "stage see: 10 steps of the world" in text
    assert "stage read: 6 steps" in text
    row = next(line for line in text.splitlines() if line.startswith("| rows"))
    assert [cell.strip() for cell in row.split("|")[2:4]] == ["25", "25"]
    assert "1 missing" in row
    assert "fill " in text and "% of 512 tokens" in text
    assert "on 2 ranks" in text
    # Alone in the stage that reads, whose four bins eight ranks cannot share; both of the world.
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
    assert "<|vision_start|><|image_pad|> x 12 <|vision_end|>what?<|im_end|>" in text
    assert "assistant\n[[answer 0<|im_end|>]]\n" in text
    assert "tokens take" not in text  # nothing has run yet
    assert not Path("here").exists()


def test_time_epochs_and_a_stage_that_is_all_warm_up_are_told(run: Run) -> None:
    prepare()
    Path("here").mkdir()
    Path("here/metrics.jsonl").write_text(json.dumps({"tokens_per_second": 100.0}) + "\n")
    words = [*WORDS, "data=set/rows.jsonl", "data.max_bad=0.1", "stages.1.steps=0"]
    result = run("train", "own.py", *words, "optim.warmup=7", "--dry-run")
    assert "tokens take" in result.stdout
    assert "at the speed of this run's last report" in result.stdout
    assert "passes (epochs)" in result.stdout
    assert "stage read: its 6 steps are all warm-up, in which the rate still" in result.stderr
    assert "stage see: its" not in result.stderr  # it takes no step


def test_a_stage_of_the_world_that_is_all_warm_up_is_told(run: Run) -> None:
    prepare()
    words = [*WORDS, "data=set/rows.jsonl", "data.max_bad=0.1", "stages.0.steps=0"]
    result = run("train", "own.py", *words, "optim.warmup=11", "--dry-run")
    assert result.exit_code == 0, result.stderr
    assert "stage see: its 10 steps are all warm-up, in which the rate still" in result.stderr
    assert "stage read: its" not in result.stderr  # it takes no step


def test_data_that_cannot_be_used_are_one_line(run: Run) -> None:
    prepare()
    result = run("train", "own.py", *WORDS, "data=set/rows.jsonl", "--dry-run")
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert "1 of 25 samples are bad (1 missing), the limit is 1.00%; rows.jsonl:25" in line
    result = run("train", "own.py", *WORDS, "data=set/nothing.jsonl", "--dry-run")
    assert "set/nothing.jsonl: no such file" in result.stderr.splitlines()[0]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (['adapter.targets=["model.eyes"]'], "'model.eyes' matches no linear layer; names are"),
        (['stages.0.rules=[["eyes", 1], [".*", 0]]'], "rules that match no parameter: eyes"),
        (['stages.0.rules=[[".*", 0]]'], "stage lora: its rules freeze every parameter"),
        (["accumulate=2"], "data.bins is 1, which 1 ranks x 2 batches cannot share evenly"),
        (["stages.0.steps=0"], "its stages have no step to take; give stages.0.steps=N"),
        (["minutes=-1"], "minutes is -1, must be 0 or more"),
    ],
)
def test_what_a_run_could_not_begin_with_is_told_before_data_are_read(
    run: Run, words: list[str], complaint: str
) -> None:
    result = run("train", "lora", "model=nano", "data=no/such.jsonl", *words, "--dry-run")
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert complaint in line


def test_data_of_a_recipe_without_any_are_refused(run: Run) -> None:
    result = run("train", "tiny", "data=set/rows.jsonl", "--dry-run")
    assert "no stage of tiny reads data; write stages.0.data=FILE" in result.stderr
