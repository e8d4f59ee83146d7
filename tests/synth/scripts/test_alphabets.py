"""The table of scripts: letters in the form NFC, and which texts are ambiguous."""

from __future__ import annotations

import unicodedata

import pytest

from qwen2vl.errors import ConfigError
from qwen2vl.eval.suites.frozen_suite import open_frozen_suite
from qwen2vl.synth.scripts.alphabets import (
    SCRIPTS,
    find_script,
    has_clear_case,
    has_clear_script,
    is_letter_of,
)


def test_every_script_of_the_suite_is_in_the_table() -> None:
    assert set(open_frozen_suite("lines").header.parts) <= set(SCRIPTS)


@pytest.mark.parametrize("name", [name for name, script in SCRIPTS.items() if script.letters])
def test_letters_are_characters_of_the_script_in_nfc(name: str) -> None:
    script = SCRIPTS[name]
    assert unicodedata.normalize("NFC", script.letters) == script.letters
    if name != "digits":
        assert all(is_letter_of(char, script) for char in script.letters)


def test_letters_of_languages_are_in_the_alphabets() -> None:
    accents, cyrillic = SCRIPTS["latin_accents"].letters, SCRIPTS["cyrillic"].letters
    assert set("äöüßÄÖÜéèêçñąęłśżźćńčřěůőűığşțăâîøåæþðıİỹữ") - set("ğşð") <= set(accents)
    assert set("ґєіїўђјљњћџѓќѕёъыэӘҒҚҢӨҰҮҺ") <= set(cyrillic)
    assert set("ΑΩάέήίόύώϊςθ") <= set(SCRIPTS["greek"].letters)


def test_letters_that_look_like_others_are_not_in_random_texts() -> None:
    assert not set("ÐŢţĔŎŀĸ") & set(SCRIPTS["latin_accents"].letters)


@pytest.mark.parametrize(
    ("char", "name", "belongs"),
    [
        *(("я", "cyrillic", True), ("b", "cyrillic", False), ("1", "cyrillic", False)),
        *(("é", "latin", True), ("́", "latin", False), ("ि", "devanagari", True)),
        *(("日", "japanese", True), ("の", "japanese", True), ("の", "han", False)),
    ],
)
def test_letters_of_a_script(char: str, name: str, belongs: bool) -> None:
    assert is_letter_of(char, SCRIPTS[name]) == belongs


@pytest.mark.parametrize("text", ["Cow", "cat", "COWARD", "12:30", "5 kg", "жук в саду", "ΨΑΡΙ"])
def test_clear_case(text: str) -> None:
    assert has_clear_case(text)


@pytest.mark.parametrize("text", ["cow", "COW", "ŠVŮZ", "x", "киви", "ψωκ"])
def test_unclear_case(text: str) -> None:
    assert not has_clear_case(text)


def test_a_text_of_letters_like_latin_ones_has_no_clear_script() -> None:
    like_latin = "\u0441\u043e\u0440"  # Cyrillic es, o, er
    assert not has_clear_script(like_latin)
    assert not has_clear_script("\u0391\u0392\u0395")  # Greek alpha, beta, epsilon
    assert has_clear_script(f"{like_latin} я")
    assert not has_clear_script("abc 12")


def test_an_unknown_script_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"scripts name klingon; scripts are latin, "):
        find_script("klingon")
