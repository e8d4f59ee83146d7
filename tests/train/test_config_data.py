"""Overrides of what a stage reads: a path for a source, `data` for every stage that reads any."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from qwen2vl.data.config import DataConfig, Source
from qwen2vl.errors import ConfigError
from qwen2vl.recipes import tiny
from qwen2vl.train.config import Stage, TrainConfig, dump, override

DATA = DataConfig(sources=(Source(path="a.jsonl", weight=1), Source(path="b.jsonl", weight=2)))


def reading() -> TrainConfig:
    """Make a run whose second stage shows the world."""
    world = tiny.recipe().stages[0]
    stages = (Stage(name="one", steps=1, data=DATA), world, Stage(name="two", steps=1, data=DATA))
    return replace(tiny.recipe(), stages=stages)


def test_data_means_every_stage_that_reads_any() -> None:
    config = override(reading(), ["data=mine.jsonl", "data.max_tokens=4096", "data.oversize=drop"])
    for number in (0, 2):
        data = config.stages[number].data
        assert data == replace(
            DATA, sources=(Source(path="mine.jsonl"),), max_tokens=4096, oversize="drop"
        )
    assert config.stages[1] == reading().stages[1]


def test_one_stage_and_one_source_can_be_meant() -> None:
    words = ["stages.0.data.sources.1.weight=5", "stages.2.data.sources.0.path=s3://x/c.parquet"]
    config = override(reading(), words)
    assert [s.weight for s in config.stages[0].data.sources] == [1, 5]  # type: ignore[union-attr]
    assert config.stages[2].data.sources[0].label == "c"  # type: ignore[union-attr]


def test_a_stage_of_the_world_can_be_given_data() -> None:
    config = override(tiny.recipe(), ["stages.1.data=mine.jsonl"])
    assert config.stages[1].data == DataConfig(sources=(Source(path="mine.jsonl"),))


@pytest.mark.parametrize(
    ("word", "text"),
    [
        ("data.max_token=1", "unknown key 'max_token'; did you mean max_tokens"),
        ("data.oversize=cut", "not one of refuse, resize, drop"),
        ("data.bins=0", "data.bins is 0, must be 1 or more"),
        ("data.sources.5.path=x", "not one of 0 to 1"),
    ],
)
def test_what_is_wrong_is_named(word: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        override(reading(), [word])


def test_a_stage_without_anything_to_show_is_refused() -> None:
    with pytest.raises(ConfigError, match="stage empty: give a mixture of the world, or data"):
        Stage(name="empty", steps=1)


def test_data_are_part_of_the_dump() -> None:
    kept = json.loads(dump(reading()))["stages"][0]["data"]
    assert [source["path"] for source in kept["sources"]] == ["a.jsonl", "b.jsonl"]
