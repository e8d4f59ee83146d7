"""`key=value` overrides: parsed by the field's type, refused with the nearest key."""

import json
from collections.abc import Callable

import pytest

from qwen2vl.errors import ConfigError
from qwen2vl.recipes import lora, tiny
from qwen2vl.train.config import TrainConfig, dump, override


@pytest.mark.parametrize(
    ("item", "is_applied"),
    [
        ("optim.lr=1e-3", lambda c: c.optim.lr == 1e-3),
        ("optim.lr=1", lambda c: c.optim.lr == 1.0),
        ("stages.2.steps=7", lambda c: [s.steps for s in c.stages] == [10, 10, 7, 10]),
        ("stages.0.mixture.text_length=[2,3]", lambda c: c.stages[0].mixture.text_length == (2, 3)),
        ("stages.1.weighting=token", lambda c: c.stages[1].weighting == "token"),
        ('stages.0.mixture.weights={"text":1}', lambda c: c.stages[0].mixture.weights["text"] == 1),
        (
            'stages.3.rules=[["visual\\\\..*", 0], [".*", 1]]',  # the merger frozen with the tower
            lambda c: c.stages[3].rules == ((r"visual\..*", 0), (".*", 1)),
        ),
        ("output_dir=a b/c", lambda c: c.folder == "a b/c"),
        ("compile=true", lambda c: c.compile is True),
    ],
)
def test_an_override_replaces_its_field_and_nothing_else(
    item: str, is_applied: Callable[[TrainConfig], bool]
) -> None:
    config = override(tiny.recipe(), [item])
    assert is_applied(config)
    key = item.partition("=")[0].split(".")[0]
    for name in tiny.recipe().__slots__:
        if name != key:
            assert getattr(config, name) == getattr(tiny.recipe(), name)


@pytest.mark.parametrize(
    ("item", "text"),
    [
        ("optim.lr", "no '='"),
        ("optim.learning=1", "unknown key 'learning'"),
        ("optm.lr=1", "did you mean optim"),
        ("optim.lr=fast", "'fast' is not of type float"),
        ("seed=1.5", "'1.5' is not of type int"),
        ("seed=true", "not of type int"),
        ("stages.9.steps=1", "stages has 4 items, numbered .* '9' is no .* stages.0.steps=1$"),
        ("stages.steps=1", "'steps' is no such number; write stages.0.steps=1$"),
        ("stages.0.rules=x", r"'x' is not a list; write it .*rules=\[\[\"PATTERN\", MULTIPLE\]"),
        ("seed.x=1", "has no parts"),
        ("dtype=float16", "not one of auto, bfloat16, float32"),
        ("compile=1", "not of type bool"),
        ("max_minutes=-1", "max_minutes is -1, must be 0 or more"),
        ("gradient_accumulation_steps=0", "gradient_accumulation_steps is 0, must be 1 or more"),
        ("logging_steps=0", "logging_steps is 0, must be 1 or more"),
        ("stages.0.steps=-1", "stage words: steps is -1, must be 0 or more"),
        ("dat.bins=1", "unknown key 'dat'; did you mean data"),
        ("steps=9", "unknown key 'steps'; each stage of tiny has its own number: stages.0.steps="),
        ("zzz=1", "known are .*, save_total_limit, data, epochs, model, validation$"),
        ("optim=adamw", "it has the parts name, lr, .*; set one, as optim.name=adamw"),
        ("logging_seconds=-1", "logging_seconds is -1, must be 0 or more"),
        ("adapter.rank=4", "tiny trains no adapter; use the recipe lora"),
    ],
)
def test_wrong_overrides_are_refused_by_key(item: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        override(tiny.recipe(), [item])


def test_a_run_without_a_step_is_refused() -> None:
    overrides = [f"stages.{i}.steps=0" for i in range(4)]
    assert override(tiny.recipe(), overrides[:3]).steps == 10
    with pytest.raises(ConfigError, match="run tiny: its stages have no step to take; give"):
        override(tiny.recipe(), overrides)


def test_dump_is_json_and_differs_between_configs() -> None:
    config = tiny.recipe()
    assert json.loads(dump(config))["stages"][0]["name"] == "words"
    assert dump(config) == dump(tiny.recipe())
    assert dump(config) != dump(override(config, ["seed=1"]))


def test_model_is_a_short_key_for_init() -> None:
    assert override(lora.recipe(), ["model=DIR"]).init == "DIR"


def test_fields_of_the_adapter_can_be_overridden() -> None:
    overrides = [
        "adapter.rank=4",
        'adapter.target_modules=["visual.*"]',
        "adapter.quantize_base=nf4",
    ]
    adapter = override(lora.recipe(), overrides).adapter
    assert adapter is not None
    assert (adapter.rank, adapter.target_modules, adapter.quantize_base) == (
        4,
        ("visual.*",),
        "nf4",
    )
    with pytest.raises(ConfigError, match="unknown key 'rnk'; did you mean rank"):
        override(lora.recipe(), ["adapter.rnk=4"])
    with pytest.raises(ConfigError, match=r"'adapter.target_modules=\[\"q\", \"v\"\]'$"):
        override(lora.recipe(), ["adapter.target_modules=[q,v]"])
    with pytest.raises(ConfigError, match="'int3' is not one of none, nf4, nf4_double"):
        override(lora.recipe(), ["adapter.quantize_base=int3"])
