"""The lists of known differences: every example has the values that are listed."""

from __future__ import annotations

from importlib import import_module
from random import Random
from typing import Any

import pytest

from qwen2vl.eval.metrics.choice_sets import egoschema_choice, mmmu_choice, mmt_choice
from qwen2vl.eval.metrics.differences import (
    KIT_DIFFERENCES,
    STYLE_DIFFERENCES,
    KitDifference,
    StyleDifference,
)


def function_of(name: str) -> Any:
    """Return a function of the package by "module.function"."""
    module, _, attribute = name.partition(".")
    return getattr(import_module(f"qwen2vl.eval.metrics.{module}"), attribute)


@pytest.mark.parametrize("difference", STYLE_DIFFERENCES, ids=lambda d: d.name)
def test_styles_differ_as_listed(difference: StyleDifference) -> None:
    function = function_of(difference.function)
    for style, value in difference.values.items():
        found = function(*difference.arguments, **difference.options, style=style)
        assert found == (pytest.approx(value) if isinstance(value, float | tuple) else value)
    assert len({repr(value) for value in difference.values.values()}) > 1, "no difference"


@pytest.mark.parametrize("difference", KIT_DIFFERENCES, ids=lambda d: d.name)
def test_ours_is_as_listed(difference: KitDifference) -> None:
    found = function_of(difference.function)(*difference.arguments, **difference.options)
    assert found == difference.ours


def test_names_are_unique() -> None:
    names = [difference.name for difference in (*STYLE_DIFFERENCES, *KIT_DIFFERENCES)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("read", [mmmu_choice, mmt_choice, egoschema_choice])
def test_letters_are_drawn_from_a_generator_only(read: Any) -> None:
    choices = {"A": "cat", "B": "dog", "C": "bird"}
    drawn = [read("none", choices, style="lmms", draw=Random(seed)) for seed in range(20)]
    assert set(drawn) == set(choices)
    assert drawn == [Random(seed).choice("ABC") for seed in range(20)]  # as the kit draws
    assert read("none", choices, style="lmms") is None
    assert read("none", choices, style="strict", draw=Random(0)) is None
