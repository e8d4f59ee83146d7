"""Overrides of a stage's data: a path as its only source, `data` for every stage with data."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from qwen2vl.data.config import DataConfig, SourceConfig
from qwen2vl.errors import ConfigError
from qwen2vl.recipes import tiny
from qwen2vl.train.config import Stage, TrainConfig, dump, override

DATA = DataConfig(
    sources=(SourceConfig(path="a.jsonl", weight=1), SourceConfig(path="b.jsonl", weight=2))
)


def config_with_data() -> TrainConfig:
    """Return a run whose second stage uses synthetic data."""
    world = tiny.recipe().stages[0]
    stages = (Stage(name="one", steps=1, data=DATA), world, Stage(name="two", steps=1, data=DATA))
    return replace(tiny.recipe(), stages=stages)


def test_data_applies_to_every_stage_with_data() -> None:
    config = override(
        config_with_data(), ["data=mine.jsonl", "data.max_tokens=4096", "data.oversize=drop"]
    )
    for number in (0, 2):
        data = config.stages[number].data
        assert data == replace(
            DATA, sources=(SourceConfig(path="mine.jsonl"),), max_tokens=4096, oversize="drop"
        )
    assert config.stages[1] == config_with_data().stages[1]


def test_one_stage_or_one_source_can_be_overridden() -> None:
    overrides = [
        "stages.0.data.sources.1.weight=5",
        "stages.2.data.sources.0.path=s3://x/c.parquet",
    ]
    config = override(config_with_data(), overrides)
    assert [s.weight for s in config.stages[0].data.sources] == [1, 5]  # type: ignore[union-attr]
    assert config.stages[2].data.sources[0].label == "c"  # type: ignore[union-attr]


def test_a_synthetic_stage_can_be_given_data() -> None:
    config = override(tiny.recipe(), ["stages.1.data=mine.jsonl"])
    assert config.stages[1].data == DataConfig(sources=(SourceConfig(path="mine.jsonl"),))


@pytest.mark.parametrize(
    ("item", "text"),
    [
        ("data.max_token=1", "unknown key 'max_token'; did you mean max_tokens"),
        ("data.oversize=cut", "not one of refuse, resize, drop"),
        ("data.global_batch_size=0", "data.global_batch_size is 0, must be 1 or more"),
        ("data.sources.5.path=x", "not one of 0 to 1"),
    ],
)
def test_wrong_overrides_are_refused_by_key(item: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        override(config_with_data(), [item])


def test_a_stage_without_mixture_and_data_is_refused() -> None:
    with pytest.raises(ConfigError, match="stage empty: give a mixture of the world, or data"):
        Stage(name="empty", steps=1)


def test_data_are_part_of_the_dump() -> None:
    dumped = json.loads(dump(config_with_data()))["stages"][0]["data"]
    assert [source["path"] for source in dumped["sources"]] == ["a.jsonl", "b.jsonl"]
