"""Held-out patterns: a fifth by hash, those of the file however they are written, none trained."""

from __future__ import annotations

from importlib.resources import files

import pytest

from qwen2vl.synth.grammar.holdout import (
    LISTED,
    is_held_out,
    is_listed,
    load_wordings,
    normalize_pattern,
    wordings_of,
)


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("Is there a {0}?", "is there {}"),
        ("IS THERE AN {shape} ??", "is there {}"),
        ("Find <|object_ref_start|>the {0}<|object_ref_end|>.", "find {}"),
        ("What's the {0}'s color?", "whats {}s color"),  # codespell:ignore whats
        ("The {1}, or  the {0}!", "{} or {}"),
        ("A star: {0}", "a star {}"),
    ],
)
def test_normalization(text: str, key: str) -> None:
    assert normalize_pattern(text) == key


@pytest.mark.parametrize(
    "pattern",
    [
        "What color is the {0}?",
        "what color is {0}",
        "What color is the {0}? One word.",
        "Here is a picture. Is there a {0} in the image?",
        "The {0}'s color?",  # "stars color" is "{0} color?"
        "Total number of {0}?",  # and this "total {0}?"
        "Locate <|object_ref_start|>the {0}<|object_ref_end|>.",
    ],
)
def test_patterns_of_suites_are_held_out(pattern: str) -> None:
    assert is_held_out(pattern)


@pytest.mark.parametrize("pattern", ["Which color is the {0}?", "Find the {0}.", "Hello!", "Bye"])
def test_trained_wordings_are_not_held_out(pattern: str) -> None:
    assert not is_held_out(pattern)


def test_a_fifth_of_all_patterns_is_held_out() -> None:
    patterns = [f"Word {number} of the {{0}}" for number in range(3000)]
    assert 540 <= sum(map(is_held_out, patterns)) <= 660  # 600 +- 3 standard deviations
    for pattern in patterns[:100]:
        assert is_held_out(pattern) == is_held_out(pattern.upper() + "!")


def test_the_file_is_normalized() -> None:
    lines = files("qwen2vl.synth.grammar").joinpath(LISTED).read_text(encoding="utf-8").splitlines()
    keys = [line.replace("{name}", "{}") for line in lines]
    assert lines == sorted(set(lines)) and len(set(keys)) == len(keys) > 300
    assert [normalize_pattern(key) for key in keys] == keys
    assert all(is_listed(key) for key in keys)


def test_wordings_are_trained_or_held_out() -> None:
    for task in load_wordings():
        assert {*wordings_of(task, "train"), *wordings_of(task, "held_out")} == set(
            wordings_of(task, "all")
        )
