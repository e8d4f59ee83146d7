"""Grammar of names: plurals, articles, and names that cannot be counted."""

from __future__ import annotations

import pytest

from qwen2vl.synth.object_questions.names import is_countable, join_names, plural, with_article


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("red cross", "red crosses"),
        ("guitar", "guitars"),
        ("butterfly", "butterflies"),
        ("monkey", "monkeys"),
        ("computer mouse", "computer mice"),
        ("maple leaf", "maple leaves"),
        ("box", "boxes"),
        ("hatching chick", "hatching chicks"),
        ("torch", "torches"),
        ("tropical fish", ""),
    ],
)
def test_plural(name: str, expected: str) -> None:
    assert plural(name) == expected


def test_articles() -> None:
    names = ("guitar", "owl", "unicorn", "orange star", "sunglasses", "bread")
    articles = ["a guitar", "an owl", "a unicorn", "an orange star", "sunglasses", "bread"]
    assert [with_article(name) for name in names] == articles


def test_plurals_substances_and_long_names_cannot_be_counted() -> None:
    assert all(is_countable(name) for name in ("guitar", "owl", "hexagon", "red circle"))
    names = ("sunglasses", "bread", "locked", "four leaf clover")
    assert not any(is_countable(name) for name in names)


def test_join_names() -> None:
    assert join_names(["a"]) == "a" and join_names(["a", "b", "c"]) == "a, b and c"
