"""Overrides: parsed by the field's type, refused with the nearest name."""

import json
from collections.abc import Callable

import pytest

from qwen2vl.errors import ConfigError
from qwen2vl.recipes import lora, tiny
from qwen2vl.train.config import TrainConfig, dump, override


@pytest.mark.parametrize(
    ("word", "read"),
    [
        ("optim.lr=1e-3", lambda c: c.optim.lr == 1e-3),
        ("optim.lr=1", lambda c: c.optim.lr == 1.0),
        ("stages.2.steps=7", lambda c: [s.steps for s in c.stages] == [10, 10, 7, 10]),
        ("stages.0.mixture.text_length=[2,3]", lambda c: c.stages[0].mixture.text_length == (2, 3)),
        ("stages.1.weighting=token", lambda c: c.stages[1].weighting == "token"),
        ('stages.0.mixture.weights={"text":1}', lambda c: c.stages[0].mixture.weights["text"] == 1),
        (
            'stages.3.rules=[["visual\\\\..*", 0], [".*", 1]]',  # the merger locked with its tower
            lambda c: c.stages[3].rules == ((r"visual\..*", 0), (".*", 1)),
        ),
        ("out=a b/c", lambda c: c.folder == "a b/c"),
        ("compile=true", lambda c: c.compile is True),
    ],
)
def test_a_word_replaces_its_field_and_nothing_else(
    word: str, read: Callable[[TrainConfig], bool]
) -> None:
    config = override(tiny.recipe(), [word])
    assert read(config)
    key = word.partition("=")[0].split(".")[0]
    for name in tiny.recipe().__slots__:
        if name != key:
            assert getattr(config, name) == getattr(tiny.recipe(), name)


@pytest.mark.parametrize(
    ("word", "text"),
    [
        ("optim.lr", "no '='"),
        ("optim.learning=1", "unknown key 'learning'"),
        ("optm.lr=1", "did you mean optim"),
        ("optim.lr=fast", "'fast' is not a float"),
        ("seed=1.5", "'1.5' is not a int"),
        ("seed=true", "not a int"),
        ("stages.9.steps=1", "not one of 0 to 3"),
        ("seed.x=1", "has no parts"),
        ("dtype=float16", "not one of bfloat16, float32"),
        ("compile=1", "not a bool"),
        ("minutes=-1", "minutes is -1, must be 0 or more"),
        ("accumulate=0", "accumulate is 0, must be 1 or more"),
        ("log_every=0", "log_every is 0, must be 1 or more"),
        ("stages.0.steps=-1", "stage words: steps is -1, must be 0 or more"),
        ("dat.bins=1", "unknown key 'dat'; did you mean data"),
        ("steps=9", "unknown key 'steps'; it belongs to a stage, the first's is stages.0.steps"),
        ("zzz=1", "known are .*, keep, data$"),
    ],
)
def test_wrong_words_are_refused_by_name(word: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        override(tiny.recipe(), [word])


def test_a_run_without_a_step_is_refused() -> None:
    words = [f"stages.{i}.steps=0" for i in range(4)]
    assert override(tiny.recipe(), words[:3]).steps == 10
    with pytest.raises(ConfigError, match="run tiny: its stages have no step to take; give"):
        override(tiny.recipe(), words)


def test_dump_is_json_and_tells_configs_apart() -> None:
    config = tiny.recipe()
    assert json.loads(dump(config))["stages"][0]["name"] == "words"
    assert dump(config) == dump(tiny.recipe())
    assert dump(config) != dump(override(config, ["seed=1"]))


def test_model_is_a_short_word_for_what_a_run_starts_from() -> None:
    assert override(lora.recipe(), ["model=DIR"]).init == "DIR"


def test_the_parts_of_an_adapter_are_replaced_like_any_other() -> None:
    words = ["adapter.rank=4", 'adapter.targets=["visual.*"]', "adapter.quantize_base=nf4"]
    adapter = override(lora.recipe(), words).adapter
    assert adapter is not None
    assert (adapter.rank, adapter.targets, adapter.quantize_base) == (4, ("visual.*",), "nf4")
    with pytest.raises(ConfigError, match="unknown key 'rnk'; did you mean rank"):
        override(lora.recipe(), ["adapter.rnk=4"])
    with pytest.raises(ConfigError, match="'int3' is not one of none, nf4, nf4_double"):
        override(lora.recipe(), ["adapter.quantize_base=int3"])
