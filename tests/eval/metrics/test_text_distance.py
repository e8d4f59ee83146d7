"""Edit distance, CER, ANLS and answer normalization: known values and properties."""

from __future__ import annotations

from math import isnan

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen2vl.errors import InputError
from qwen2vl.eval.metrics.text_distance import (
    anls,
    character_error_rate,
    edit_distance,
    normalize_answer,
)

TEXTS = st.text("abcde ", max_size=12)


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [
        ("", "", 0),
        ("", "abc", 3),
        ("kitten", "sitting", 3),
        ("flaw", "lawn", 2),
        ("intention", "execution", 5),
        ("saturday", "sunday", 3),
        ("ab", "ba", 2),
        ("A", "a", 1),
        ("Caf\u00e9", "Cafe", 1),
    ],
)
def test_known_edit_distances(a: str, b: str, distance: int) -> None:
    assert edit_distance(a, b) == distance


@given(TEXTS, TEXTS, TEXTS)
def test_edit_distance_is_a_metric(a: str, b: str, c: str) -> None:
    distance = edit_distance(a, b)
    assert distance == edit_distance(b, a)
    assert (distance == 0) == (a == b)
    assert abs(len(a) - len(b)) <= distance <= max(len(a), len(b))
    assert edit_distance(a, c) <= distance + edit_distance(b, c)


@given(TEXTS, TEXTS)
def test_common_suffix_does_not_change_the_distance(a: str, b: str) -> None:
    assert edit_distance(a + "xyz", b + "xyz") == edit_distance(a, b)


@pytest.mark.parametrize(
    ("answer", "normalized"),
    [
        ("Red circle. ", "red circle"),
        ("<|object_ref_start|>the star<|object_ref_end|>", "star"),
        ("An orange cross", "orange cross"),
        ("a", "a"),
        ("another star", "another star"),
        ("red\n  circle", "red circle"),
        ("Yes.", "yes"),
        ("2", "2"),
        ("...", ".."),
        ("", ""),
    ],
)
def test_normalize_answer(answer: str, normalized: str) -> None:
    assert normalize_answer(answer) == normalized


def test_character_error_rate_weighs_lines_by_length() -> None:
    assert character_error_rate(["abcd", "x"], ["abce", "y"]) == pytest.approx(2 / 5)
    assert character_error_rate(["", ""], ["abc", "d"]) == 1
    assert isnan(character_error_rate([], []))


def test_anls_is_that_of_the_best_reference_and_0_below_the_threshold() -> None:
    assert anls("University of Californa", ["x", "university of california"], style="lmms") > 0.95
    assert anls("ab", ["abcde"], style="strict") == 0
    assert anls("ab", ["abcde"], style="strict", threshold=0.4) == pytest.approx(0.4)


@given(TEXTS, st.lists(TEXTS, min_size=1, max_size=3))
def test_extra_whitespace_never_lowers_a_strict_anls(text: str, answers: list[str]) -> None:
    spaced = f"  {text.replace(' ', '   ')} "
    assert anls(spaced, answers, style="strict") == anls(text, answers, style="strict")
    assert anls(answers[0], answers, style="strict") == 1


def test_a_set_without_references_is_refused() -> None:
    with pytest.raises(InputError, match="scored by its authors"):
        anls("a", [], style="lmms")
