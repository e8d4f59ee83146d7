"""Texts of a script: lengths, characters, case, and the dataset that they need."""

from __future__ import annotations

import unicodedata
from pathlib import Path
from random import Random
from typing import Any

import pytest

from qwen2vl.errors import ConfigError
from qwen2vl.fetch import DatasetNotFoundError
from qwen2vl.synth.scripts.alphabets import (
    SCRIPTS,
    has_clear_case,
    has_clear_script,
    is_letter_of,
)
from qwen2vl.synth.scripts.words import check_words, sample_text, to_upper, words_of
from tests.requirements import needs_dataset

# Few languages, since each takes 50 ms.
LOADED = {"greek": ("el",), "cyrillic": ("uk",), "latin_accents": ("pl",), "arabic": ("ar",)}
LOADED |= {"hangul": ("ko",), "han": ("zh",), "thai": ("th",)}


def texts(name: str, count: int = 400, low: int = 1, high: int = 24, **options: Any) -> list[str]:
    rng = Random(f"texts {name}")
    return [sample_text(rng, name, low, high, **options) for _ in range(count)]


def test_latin_texts_are_ascii_of_all_lengths_in_several_cases() -> None:
    sampled = texts("latin", 1500)
    assert all(text.isascii() and text == text.strip() and text for text in sampled)
    assert {len(text) for text in sampled} == set(range(1, 25))
    assert all(has_clear_case(text) for text in sampled)
    letters = [text for text in sampled if text.replace(" ", "").isalpha()]
    for is_case in (str.islower, str.isupper, str.istitle):
        assert sum(map(is_case, letters)) > len(letters) / 20
    written = set("".join(sampled))
    assert written >= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,!?-:'&")


def test_the_share_of_random_texts() -> None:
    words = set(words_of("en", "latin"))
    assert {"zebra", "guitar", "about"} <= words

    def known(share: float) -> int:
        sampled = texts("latin", 300, 4, 24, random_share=share)
        return sum(any(word.lower() in words for word in text.split()) for text in sampled)

    assert known(1.0) < 3
    assert known(0.0) > 130  # a third is made up


def test_excluded_characters_are_in_no_random_text_and_no_number() -> None:
    rng = Random(3)
    random = [sample_text(rng, "latin", 1, 12, random_share=1, excluded="Ie,") for _ in range(300)]
    assert not set("Ie,") & set("".join(random))
    numbers = [sample_text(rng, "digits", 1, 12, excluded="01") for _ in range(200)]
    assert not set("01") & set("".join(numbers))


def test_no_single_character_is_ambiguous() -> None:
    single = set(texts("latin", 600, 1, 1))
    assert not single & set("0O1Ilcoxz.,-")
    assert len(single) > 30


@needs_dataset("names")
@pytest.mark.parametrize("name", LOADED)
def test_texts_are_of_the_script_and_clear(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    script = SCRIPTS[name]
    monkeypatch.setattr(
        "qwen2vl.synth.scripts.words.find_script",
        lambda asked: type(script)(
            **{
                field: getattr(script, field)
                for field in type(script).__dataclass_fields__
                if field != "languages"
            },
            languages=LOADED[asked],
        ),
    )
    sampled = texts(name)
    assert all(unicodedata.normalize("NFC", text) == text for text in sampled)
    letters = {char for char in "".join(sampled) if char.isalpha()}
    own = {char for char in letters if is_letter_of(char, script)}
    assert letters == own
    assert max(map(len, sampled)) <= 24
    if name in ("greek", "cyrillic"):
        assert all(has_clear_script(text) and has_clear_case(text) for text in sampled)
        assert letters >= set(script.letters)
    if name == "latin_accents":
        assert not any(text.isascii() for text in sampled)


@needs_dataset("names")
def test_words_are_sorted_by_length_and_many() -> None:
    words = words_of("bg", "cyrillic")
    assert len(words) > 1500
    assert list(map(len, words)) == sorted(map(len, words))
    assert "куче" in words


def test_capitals_of_turkish_and_greek() -> None:
    assert to_upper("diş ığ", "tr") == "DİŞ IĞ"
    assert to_upper("άνθρωπος ϊός", "el") == "ΑΝΘΡΩΠΟΣ ΪΟΣ"
    assert to_upper("straße") == "STRASSE"


def test_what_is_absent_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWEN2VL_DATASETS", str(tmp_path))
    check_words(["latin", "digits"])
    with pytest.raises(DatasetNotFoundError, match="qwen2vl fetch-data names"):
        check_words(["latin", "greek"])
    with pytest.raises(ConfigError, match="scripts name runes"):
        check_words(["runes"])
