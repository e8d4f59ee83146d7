"""Words for people: durations, sizes, and text that cannot steer a terminal."""

from __future__ import annotations

import pytest

from qwen2vl.cli.terminal import person_seconds, person_size, plain


@pytest.mark.parametrize(
    ("seconds", "said"),
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
def test_durations_are_rounded_as_one_says_them(seconds: float, said: str) -> None:
    assert person_seconds(seconds) == said


def test_sizes_are_width_first() -> None:
    assert person_size((3024, 4032)) == "4032 x 3024"


def test_escape_sequences_become_visible() -> None:
    assert plain("\x1b[2Jhi\n\u56fe") == "\\x1b[2Jhi\\n\u56fe"
    assert plain("\x1b[2Jhi\n\t", keep="\n\t") == "\\x1b[2Jhi\n\t"
