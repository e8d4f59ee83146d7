"""Overrides of a stage's data: a path as its only source, `data` for every stage with data."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from qwen2vl.data.config import DataConfig, SourceConfig
from qwen2vl.errors import ConfigError
from qwen2vl.recipes import lora, tiny
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


def paths(config: TrainConfig) -> list[str]:
    data = config.stages[0].data
    assert data is not None
    return [source.path for source in data.sources]


@pytest.mark.parametrize(
    "item",
    [
        "data=a.jsonl,b.jsonl",
        'data=["a.jsonl", "b.jsonl"]',
        'data=[{"path": "a.jsonl"}, "b.jsonl"]',
        'data.sources=[{"path": "a.jsonl", "weight": 1}, {"path": "b.jsonl", "weight": 2.5}]',
    ],
)
def test_several_files_are_several_sources(item: str) -> None:
    assert paths(override(lora.recipe(), [item])) == ["a.jsonl", "b.jsonl"]


@pytest.mark.parametrize("path", ["s3://x/a,b.jsonl", "[ab].jsonl", "here,there.jsonl"])
def test_a_comma_or_bracket_in_a_path_is_kept(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("here,there.jsonl").touch()
    assert paths(override(lora.recipe(), [f"data={path}"])) == [path]


def test_a_synthetic_stage_can_be_given_data() -> None:
    config = override(tiny.recipe(), ["stages.1.data=mine.jsonl"])
    assert config.stages[1].data == DataConfig(sources=(SourceConfig(path="mine.jsonl"),))


@pytest.mark.parametrize(
    ("item", "text"),
    [
        ("data.max_token=1", "unknown key 'max_token'; did you mean max_tokens"),
        ("data.oversize=cut", "not one of refuse, resize, drop"),
        ("data.global_batch_size=0", "data.global_batch_size is 0, must be 1 or more"),
        ("data.sources.5.path=x", "has 2 items, numbered from 0.*all sources at once: data=FILE,F"),
        ('data=[{"file": "x"}]', r"data\[0\]: unknown field 'file'; known are path, name, media"),
        ('data=[{"path": 5}]', r"data\[0\].path is 5, must be text"),
        ('data.sources=[{"path": "x", "weight": "a"}]', "weight is 'a', must be a number"),
        ("data=[5]", r"data\[0\] is 5; give a path, or an object such as"),
        ("data=a/x.jsonl,b/x.jsonl", "each its own name, as data.sources="),
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


def test_validation_as_a_share_or_number_holds_samples_of_every_stage_with_data_out() -> None:
    config = override(config_with_data(), ["validation=0.05", "evaluation.num_examples=9"])
    sizes = [stage.data and stage.data.validation_size for stage in config.stages]
    assert sizes == [0.05, None, 0.05]
    assert config.evaluation.num_examples == 9  # as it was given
    config = override(config_with_data(), ["validation=300"])
    assert config.stages[0].data == replace(DATA, validation_size=300)
    assert (config.evaluation.num_examples, config.evaluation.path) == (300, "")


def test_validation_as_a_file_is_the_path_of_the_evaluation() -> None:
    config = override(config_with_data(), ["validation=0.05", "validation=others.jsonl"])
    assert config.evaluation.path == "others.jsonl"
    assert config.stages[0].data == DATA


@pytest.mark.parametrize(
    ("overrides", "eval_steps"),
    [
        (["stages.0.steps=500"], 50),  # the recipe has none: ten evaluations
        (["stages.0.steps=7"], 1),
        (["stages.0.steps=7", "evaluation.eval_steps=3"], 3),
        (["evaluation.eval_steps=0"], 0),
    ],
)
def test_validation_without_evaluations_in_the_recipe_gets_ten(
    overrides: list[str], eval_steps: int
) -> None:
    # Before the steps on the command line, on which the default depends.
    config = override(lora.recipe(), ["validation=0.1", *overrides])
    assert config.evaluation.eval_steps == eval_steps


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("-1", "validation=-1: give a share of the conversations below 1, a whole number"),
        ("1.5", "validation=1.5: give a share"),
        ("inf", "validation=inf: give a share"),
        ("nan", "validation=nan: give a share"),
    ],
)
def test_an_impossible_validation_size_is_refused(value: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        override(config_with_data(), [f"validation={value}"])


def test_a_share_of_synthetic_data_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"validation=0.1: no stage of tiny reads data; those of"):
        override(tiny.recipe(), ["validation=0.1"])
