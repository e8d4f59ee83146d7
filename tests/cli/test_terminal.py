"""Formatting of durations and sizes, and escaping of control characters."""

from __future__ import annotations

import pytest

from qwen2vl.cli.terminal import escape_control_characters, format_duration, format_size


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.24, "0.2 s"),
        (1.4, "1 s"),
        (15.2, "15 s"),
        (89.0, "89 s"),
        (90.0, "2 min"),
        (600.0, "10 min"),
        (5399.0, "90 min"),
        (7300.0, "2 h"),
    ],
)
def test_durations_are_rounded(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_sizes_are_width_first() -> None:
    assert format_size((3024, 4032)) == "4032 x 3024"


def test_escape_sequences_become_visible() -> None:
    assert escape_control_characters("\x1b[2Jhi\n\u56fe") == "\\x1b[2Jhi\\n\u56fe"
    assert escape_control_characters("\x1b[2Jhi\n\t", keep="\n\t") == "\\x1b[2Jhi\n\t"
