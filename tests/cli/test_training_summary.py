"""Training summary: what is printed about a run, its data and its evaluation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qwen2vl.cli.training_summary import print_data, print_evaluation, print_run
from qwen2vl.recipes import nano, tiny
from qwen2vl.train.config import EvaluationConfig, TrainConfig
from qwen2vl.train.dry_run.report import check_config
from qwen2vl.train.init import build_processor
from qwen2vl.train.loader.data_summary import DataSummary, SourceSummary
from tests.data.rows import conversation, create_data_config, create_run_config, write_rows

Capture = pytest.CaptureFixture[str]


def summary(**fields: Any) -> DataSummary:
    source = SourceSummary(
        name="rows",
        num_samples=1000,
        num_entries=990,
        num_tokens=5000,
        num_targets=400,
        bad={"missing": 4, "answer": 1},
        bad_samples=["rows.jsonl:3: none.png is missing"],
        num_held_out=5,
        held_out_samples=["rows.jsonl:4", "rows.jsonl:8"],
    )
    defaults: dict[str, Any] = {
        "stage_index": 1,
        "name": "read",
        "steps": 10,
        "sources": [source],
        "num_bins": 20,
        "num_bins_per_step": 4,
        "max_tokens": 512,
        "packing_efficiency": 0.9,
        "num_resized": 0,
        "tokens_per_step": 1000.0,
        "epochs": 2.0,
    }
    return DataSummary(**{**defaults, **fields})


def test_a_run_is_printed_with_what_each_stage_trains(capsys: Capture) -> None:
    stages = tuple(
        replace(stage, steps=0) if stage.name == "see" else stage for stage in tiny.recipe().stages
    )
    config = replace(tiny.recipe(), stages=stages, num_threads=3, max_minutes=40.0)
    print_run(config, check_config(config, build_processor(config)))
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert [line.split()[:2] for line in lines] == [
        ["run", "tiny:"],
        ["model", "random"],
        ["stage", "words:"],
        ["stage", "world:"],
        ["stage", "answers:"],
        ["device", "cpu,"],
        ["reports", "every"],
    ]
    assert "3 threads" in lines[5]
    assert lines[6].endswith("checkpoints every 10 steps; ends after 40 minutes")
    assert captured.err == ""
    print_run(replace(config, max_minutes=1.0), check_config(config, build_processor(config)))
    assert capsys.readouterr().out.splitlines()[6].endswith("ends after 1 minute")


def test_the_parameters_of_nano_are_counted(capsys: Capture) -> None:
    config = replace(nano.recipe(), num_merges=0)  # those of its BPE need datasets
    counts = check_config(config, build_processor(config))
    assert counts.total == 9_590_016
    words, see, cells, *_ = counts.trainable
    assert words < counts.total == cells
    assert see == counts.total - words  # the decoder, then the tower with its merger
    print_run(config, counts)
    assert f"stage    see: trains {see:,} parameters" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("epochs", "text"),
    [
        (1.0, "1 epoch "),
        (0.123456, "0.123 epochs"),
        (2.5, "2.5 epochs"),
        (12345.6, "12,346 epochs"),
    ],
)
def test_epochs_are_printed(capsys: Capture, epochs: float, text: str) -> None:
    print_data(tiny.recipe(), summary(epochs=epochs))
    assert f"data     of stage read, in 10 steps: {text}" in capsys.readouterr().out


@pytest.mark.parametrize(("epochs", "is_noted"), [(20.0, False), (20.1, True)])
def test_more_than_twenty_epochs_are_noted_with_the_steps_of_twenty(
    capsys: Capture, epochs: float, is_noted: bool
) -> None:
    print_data(tiny.recipe(), summary(epochs=epochs))
    text = (
        "stage read: 10 steps read the same 995 samples 20 times, which mostly memorizes them; "
        "stages.1.steps=100 reads them 20 times"
    )
    assert (text in capsys.readouterr().err) == is_noted


def test_bad_samples_are_named_and_described(capsys: Capture) -> None:
    print_data(replace(tiny.recipe(), output_dir="here"), summary())
    assert capsys.readouterr().err == (
        "qwen2vl: rows: left out 4 with a missing media file, 1 without an answer to learn from: "
        "rows.jsonl:3: none.png is missing; and 4 more; the run lists those that it reads in "
        f"{Path('here/bad_samples.jsonl')}\n"
    )


def test_a_dry_run_names_more_bad_samples_one_a_line(capsys: Capture) -> None:
    config, data = replace(tiny.recipe(), output_dir="here"), summary()
    names = [f"r:{i}" for i in range(20)]
    source = replace(data.sources[0], bad={"answer": 30}, bad_samples=names)
    data = replace(data, sources=[source])
    print_data(config, data, max_bad_samples=20)
    first, *named, last = capsys.readouterr().err.splitlines()
    assert first.endswith("r:0")
    assert named == [f"  {name}" for name in names[1:]]
    assert last.startswith("  and 10 more; the run lists those that it reads in here")
    print_data(config, data)
    assert "r:0; r:1; r:2; and 27 more; the run" in capsys.readouterr().err


def test_unused_columns_are_named_once_for_each_source(capsys: Capture) -> None:
    data = summary()
    source = replace(data.sources[0], bad={}, unused={"channel": 1000, "objects.width": 7})
    print_data(tiny.recipe(), replace(data, sources=[source]))
    assert capsys.readouterr().err == (
        "qwen2vl: rows: ignored columns: channel, objects.width (of 7 samples)\n"
    )


def test_held_out_samples_are_named(capsys: Capture) -> None:
    print_data(replace(tiny.recipe(), output_dir="here"), summary())
    assert (
        "held out 5 samples of rows: rows.jsonl:4, rows.jsonl:8 and 3 more; the run lists all in "
        f"{Path('here/held_out.jsonl')}\n"
    ) in capsys.readouterr().out


def config_with_split(folder: Path, **fields: Any) -> TrainConfig:
    rows = [conversation(f"question {i}", "x" * (i + 20)) for i in range(40)]
    path = write_rows(folder / "rows.jsonl", rows)
    data = create_data_config(folder, path, validation_size=5)
    return create_run_config(folder, data, evaluation=EvaluationConfig(**fields))


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        (
            {"eval_steps": 2},
            "evaluate every 2 steps and after the last, on the 5 samples held out of stage read\n",
        ),
        (
            {"eval_steps": 1, "num_examples": 3},
            "evaluate every 1 step and after the last, on 3 samples of the 5 held out of stage "
            "read\n",
        ),
        ({"eval_steps": 0}, ""),
        (
            {"eval_steps": 99},
            "evaluate after the last step, on the 5 samples held out of stage read\n",
        ),
        ({"eval_steps": 2, "num_examples": 0}, ""),
    ],
)
def test_the_evaluation_is_printed(
    tmp_path: Path, capsys: Capture, fields: dict[str, Any], text: str
) -> None:
    config = config_with_split(tmp_path, **fields)
    print_evaluation(config, build_processor(config))
    assert capsys.readouterr().out == text


def test_stages_that_share_a_file_are_evaluated_in_one_line(
    tmp_path: Path, capsys: Capture
) -> None:
    path = write_rows(tmp_path / "others.jsonl", [conversation("a", "b", tag=1)])
    config = config_with_split(tmp_path, eval_steps=4, path=str(path))
    config = replace(config, stages=(*config.stages, *tiny.recipe().stages))
    print_evaluation(config, build_processor(config))
    captured = capsys.readouterr()
    assert captured.out == f"evaluate every 4 steps and after the last, on 1 sample of {path}\n"
    assert captured.err == f"qwen2vl: {path}: ignored columns: tag\n"
