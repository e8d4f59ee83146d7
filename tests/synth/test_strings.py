"""Sampled strings: lengths, alphabets and punctuation."""

from __future__ import annotations

import hashlib
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen2vl.synth.strings import (
    ALPHABETS,
    DIGITS,
    LETTERS,
    PUNCTUATION,
    load_words,
    random_string,
    word_string,
)

ALPHABET = st.sampled_from(sorted(ALPHABETS))


def test_alphabet_is_letters_digits_and_eight_punctuation_characters() -> None:
    assert ALPHABETS["all"] == LETTERS + DIGITS + PUNCTUATION
    assert len(set(LETTERS)) == 52
    assert len(set(PUNCTUATION)) == 8


def test_the_words_are_frozen() -> None:
    # Another hash means other training data.
    digest = hashlib.sha256(" ".join(load_words()).encode()).hexdigest()
    assert digest[:16] == "86983534383260b4"


@given(seed=st.integers(0, 10**6), length=st.integers(1, 30), name=ALPHABET, spaces=st.booleans())
def test_random_strings_have_their_length(seed: int, length: int, name: str, spaces: bool) -> None:
    text = random_string(Random(seed), length, ALPHABETS[name], spaces=spaces)
    assert len(text) == length
    assert text == text.strip()
    assert "  " not in text
    assert set(text) <= set(ALPHABETS[name]) | ({" "} if spaces else set())


@given(seed=st.integers(0, 10**6), low=st.integers(1, 20), more=st.integers(0, 10), name=ALPHABET)
def test_word_strings_stay_in_their_range(seed: int, low: int, more: int, name: str) -> None:
    text = word_string(Random(seed), low, low + more, ALPHABETS[name])
    assert 1 <= len(text) <= low + more
    assert text == text.strip()
    assert set(text) <= set(ALPHABETS[name]) | {" "}


@given(seed=st.integers(0, 10**6), length=st.integers(1, 8))
def test_excluded_characters_do_not_occur(seed: int, length: int) -> None:
    text = random_string(Random(seed), length, LETTERS, spaces=False, excluded="I")
    assert "I" not in text


@pytest.mark.parametrize("name", sorted(ALPHABETS))
def test_single_characters_are_not_ambiguous(name: str) -> None:
    drawn = {random_string(Random(i), 1, ALPHABETS[name], spaces=False) for i in range(600)}
    assert not drawn & set("CcOoSsVvWwXxZz0Il.,-:'")


def test_characters_are_uniformly_distributed() -> None:
    rng = Random(1)
    text = "".join(random_string(rng, 16, ALPHABETS["all"], spaces=False) for _ in range(2000))
    counts = [text.count(char) for char in ALPHABETS["all"]]
    mean = len(text) / len(ALPHABETS["all"])  # 457, deviation 21
    assert max(abs(count - mean) for count in counts) < 6 * 21
