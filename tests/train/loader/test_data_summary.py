"""Data summary: the counts of an opened dataset, checked against the dataset itself."""

from __future__ import annotations

import json
from pathlib import Path

from qwen2vl.data.dataset import PackedDataset
from qwen2vl.train.loader.data_summary import HELD_OUT_FILE, summarize_data, write_held_out
from tests.data.rows import conversation, create_data_config, create_run_config, write_rows
from tests.tiny import tiny_processor


def test_counts_of_samples_bins_and_epochs(tmp_path: Path) -> None:
    rows = [conversation(f"question {i}", "x" * (i + 20)) for i in range(40)]
    rows += [conversation("<image>?", "a", image=f"none{i}.png") for i in range(5)]
    data = create_data_config(
        tmp_path,
        write_rows(tmp_path / "a.jsonl", rows),
        write_rows(tmp_path / "b.jsonl", [conversation("other", f"{i}") for i in range(8)]),
        validation_size=0.25,
        max_bad_fraction=0.2,
    )
    config = create_run_config(tmp_path, data, steps=9)
    dataset = PackedDataset.open(data, tiny_processor(), seed=0)
    summary = summarize_data(config, 0, dataset)
    first, second = summary.sources
    assert (first.name, first.num_samples, first.num_held_out, first.num_entries) == (
        *("a", 45, 10),
        35,
    )
    assert (second.name, second.num_samples, second.num_held_out, second.num_entries) == (
        *("b", 8, 2),
        6,
    )
    assert first.bad == {"missing": 5}
    assert len(first.bad_samples) == 5
    assert first.bad_samples[0].startswith("a.jsonl:41: none0.png is missing")
    assert (summary.num_samples, summary.num_held_out) == (53, 12)
    Path(config.folder).mkdir()
    write_held_out(config, {0: dataset})
    lines = [json.loads(x) for x in (Path(config.folder) / HELD_OUT_FILE).read_text().splitlines()]
    assert [line["source"] for line in lines] == ["a"] * 10 + ["b"] * 2
    assert {line["stage"] for line in lines} == {config.stages[0].name}
    held_out, trained = (
        {dataset.sources[0].name(i) for i in entries.tolist() if i < 45}
        for entries in (dataset.held_out, dataset.plan.entries)
    )
    named = [line["sample"] for line in lines[:10]]
    assert set(named) == held_out and not held_out & trained
    assert list(first.held_out_samples) == named[:3]
    tokens = int(dataset.tokens.sum() - dataset.tokens[dataset.held_out].sum())
    assert first.num_tokens + second.num_tokens == tokens
    assert summary.epochs == 9 * 4 / summary.num_bins == dataset.epochs(9)
    assert summary.tokens_per_step == tokens * 4 / summary.num_bins
    steps = summary.steps_of(20)
    assert dataset.epochs(steps) <= 20 < dataset.epochs(steps + 1)
    assert summary.steps_of(0.001) == 1
