"""The public door: every name it lists opens, and nothing else does."""

from __future__ import annotations

import pytest

import qwen2vl


@pytest.mark.parametrize("name", qwen2vl.__all__)
def test_every_public_name_opens(name: str) -> None:
    value = getattr(qwen2vl, name)
    assert value.__name__ == name
    assert value.__doc__
    assert name in dir(qwen2vl)


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="module 'qwen2vl' has no attribute 'Qwen3VL'"):
        _ = qwen2vl.Qwen3VL


def test_names_are_those_of_the_rooms() -> None:
    from qwen2vl.engine import LLM
    from qwen2vl.load import load

    assert qwen2vl.LLM is LLM
    assert qwen2vl.load is load
