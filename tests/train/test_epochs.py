"""Epochs: the steps that read the data so many times, and what is refused."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from qwen2vl.data.config import DataConfig
from qwen2vl.errors import ConfigError
from qwen2vl.recipes import tiny
from qwen2vl.train.config import TrainConfig
from qwen2vl.train.epochs import set_epochs
from qwen2vl.train.init import build_processor
from qwen2vl.train.loader.data_order import bins_of_step, stage_seed
from qwen2vl.train.loader.dataloader import open_dataset
from tests.data.rows import conversation, create_data_config, create_run_config, write_rows


def run_config(folder: Path, **fields: object) -> TrainConfig:
    """Return a run of 40 samples in 5 to 12 bins, one in a step unless `fields` says otherwise."""
    rows = [conversation(f"question {i}", "x" * (i + 20)) for i in range(40)]
    path = write_rows(folder / "rows.jsonl", rows)
    data: DataConfig = create_data_config(
        folder, path, **{"max_tokens": 512, "global_batch_size": 1, **fields}
    )
    return create_run_config(folder, data, steps=500)


@pytest.mark.parametrize("num_bins_per_step", [1, 4])
@pytest.mark.parametrize("epochs", [1, 3])
def test_every_sample_is_read_in_each_epoch(
    tmp_path: Path, epochs: int, num_bins_per_step: int
) -> None:
    config = set_epochs(run_config(tmp_path, global_batch_size=num_bins_per_step), epochs)
    dataset = open_dataset(config, 0, build_processor(config))
    counts = Counter(
        bin_number
        for step in range(config.steps)
        for bin_number in bins_of_step(
            dataset.plan, step, num_bins=num_bins_per_step, seed=stage_seed(config, 0)
        ).tolist()
    )
    assert set(counts) == set(range(len(dataset.plan)))
    assert min(counts.values()) == epochs
    # No step more than needed; the last one may begin another epoch.
    assert counts.total() - epochs * len(dataset.plan) < num_bins_per_step


def test_a_fraction_of_an_epoch_and_a_split(tmp_path: Path) -> None:
    num_bins = set_epochs(run_config(tmp_path), 1).steps
    assert set_epochs(run_config(tmp_path), 0.5).steps == -(-num_bins // 2)
    assert set_epochs(run_config(tmp_path), 1e-9).steps == 1
    assert set_epochs(run_config(tmp_path, validation_size=20), 1).steps < num_bins


def test_other_stages_and_the_config_are_unchanged(tmp_path: Path) -> None:
    config = run_config(tmp_path)
    off = replace(config.stages[0], name="off", steps=0)
    config = replace(config, stages=(tiny.recipe().stages[0], *config.stages, off))
    changed = set_epochs(config, 2)
    assert [stage.steps for stage in changed.stages if stage.name != "read"] == [10, 0]
    assert replace(changed, stages=config.stages) == config


@pytest.mark.parametrize("epochs", [0, -1, float("nan"), float("inf")])
def test_impossible_numbers_are_refused(tmp_path: Path, epochs: float) -> None:
    with pytest.raises(ConfigError, match=r"epochs=.*: must be above 0"):
        set_epochs(run_config(tmp_path), epochs)


def test_a_run_without_data_is_refused() -> None:
    with pytest.raises(ConfigError, match="no stage of tiny reads data"):
        set_epochs(tiny.recipe(), 3)
