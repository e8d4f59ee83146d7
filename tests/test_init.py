"""Public API of the package: lazy imports of the names in `__all__`."""

from __future__ import annotations

import subprocess
import sys

import pytest

import qwen2vl


@pytest.mark.parametrize("name", qwen2vl.__all__)
def test_every_public_name_is_importable(name: str) -> None:
    value = getattr(qwen2vl, name)
    assert value.__name__ == name
    assert value.__doc__
    assert name in dir(qwen2vl)


def test_unknown_names_raise_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="module 'qwen2vl' has no attribute 'Qwen3VL'"):
        _ = qwen2vl.Qwen3VL


@pytest.mark.parametrize("first", ["qwen2vl.engine", "qwen2vl.loading", "qwen2vl"])
def test_load_is_the_function_whatever_was_imported_first(first: str) -> None:
    code = (
        f"import {first}\nfrom qwen2vl import LLM, load\nfrom qwen2vl.loading import load_model\n"
        "assert callable(load) and load_model.__module__ == load.__module__ == 'qwen2vl.loading'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_names_are_the_objects_of_their_modules() -> None:
    from qwen2vl.engine import LLM
    from qwen2vl.loading import load

    assert qwen2vl.LLM is LLM
    assert qwen2vl.load is load
