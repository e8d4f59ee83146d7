"""Parts of error messages: values in one short line, whatever they are."""

from __future__ import annotations

from typing import Any

import pytest

from qwen2vl.errors import abbreviate, suggest


class Broken:
    """A class whose repr has a bug."""

    def __repr__(self) -> str:
        raise AttributeError("bug")


def nested(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1, "1"),
        ("a\nb", r"'a\nb'"),
        ("a" * 59, "'" + "a" * 56 + "..."),
        (b"\xff" * 99, "b'" + r"\xff" * 13 + r"\xf..."),
        ("a" + " " * 99, "'a '..."),
        (Broken(), "<Broken>"),
        (nested(100_000), "[" * 57 + "..."),
        ([1] * 10_000_000, "[" + "1, " * 18 + "1,..."),
        ({"k" * 10_000_000: 1}, "{'" + "k" * 55 + "..."),
        ([10**5000], "<list>"),
        ({"a": [1, "two"]}, "{'a': [1, 'two']}"),
    ],
)
def test_values_are_shown_in_one_short_line(value: Any, text: str) -> None:
    assert abbreviate(value) == text
    assert len(abbreviate(value)) <= 60


def test_addresses_are_not_shown() -> None:
    assert abbreviate(object()) == "<object object>"


def test_unknown_names_get_the_closest_or_all_known_ones() -> None:
    assert suggest("temprature", ["top_p", "temperature"]) == "did you mean temperature?"
    assert suggest("xyz", ["top_p", "temperature"]) == "known: temperature, top_p"
