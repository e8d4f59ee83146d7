"""Values of --lora-modules, and vLLM's several values after one option."""

from __future__ import annotations

import pytest

from qwen2vl.cli.serve.lora_modules import expand_lora_modules, parse_lora_modules
from qwen2vl.errors import ConfigError


@pytest.mark.parametrize(
    ("arguments", "expanded"),
    [
        ("--lora-modules a=b", "--lora-modules a=b"),
        ("--lora-modules a=b c=d e=f", "--lora-modules a=b --lora-modules c=d --lora-modules e=f"),
        ("--lora-modules=a=b c=d", "--lora-modules=a=b --lora-modules c=d"),
        ("--lora-modules a=b nano c=d", "--lora-modules a=b nano c=d"),
        ("--lora-modules a=b --port=9 c=d", "--lora-modules a=b --port=9 c=d"),
        ("--lora-modules x c=d", "--lora-modules x --lora-modules c=d"),
        ("c=d --lora-modules", "c=d --lora-modules"),
        ("--port 9 c=d", "--port 9 c=d"),
    ],
)
def test_the_option_is_repeated(arguments: str, expanded: str) -> None:
    assert expand_lora_modules(arguments.split()) == expanded.split()


def test_names_and_folders() -> None:
    modules = parse_lora_modules(
        ["a=b=c", '{"name": "org/x", "path": "d", "base_model_name": "m"}']
    )
    assert modules == {"a": "b=c", "org/x": "d"}


@pytest.mark.parametrize(
    "value",
    ["a", "=b", "a=", "{", "{}", '{"name": "a"}', '{"name": 1, "path": "b"}', '{"path": "b"}']
    + ['{"name": "a", "path": "b", "rank": 1}'],
)
def test_other_forms_are_refused(value: str) -> None:
    with pytest.raises(ConfigError, match=r"lora_modules: got .* must be NAME=DIR, or"):
        parse_lora_modules([value])


def test_a_name_is_given_once() -> None:
    with pytest.raises(ConfigError, match="the name a is given twice"):
        parse_lora_modules(["a=b", '{"name": "a", "path": "c"}'])
