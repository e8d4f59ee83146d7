"""Words, names, numbers and dates of documents.

words.json has lists of words by use. A part of the labels is made up of syllables, so that they
must be read and cannot be guessed. Words and names that a frozen suite holds out are in no list.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from random import Random

__all__ = [
    "cased",
    "load_word_lists",
    "sample_code",
    "sample_date",
    "sample_entry",
    "sample_good",
    "sample_made_up",
    "sample_shop",
    "sample_time",
    "spoken",
]

_ONSETS = ("b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z", "st", "tr", "br")
_VOWELS = "aeiou"
_MADE_UP_SHARE = 0.12
_TWO_WORDS_SHARE = 0.15
_CODE_LETTERS = "ABCDEFGHJKLMNPRSTUVWXYZ"


@cache
def load_word_lists() -> Mapping[str, tuple[str, ...]]:
    """Load words.json: use -> words."""
    text = files("qwen2vl.synth.documents").joinpath("words.json").read_text(encoding="utf-8")
    return {use: tuple(words) for use, words in json.loads(text).items()}


def sample_made_up(rng: Random) -> str:
    """Sample a pronounceable word of three syllables that is in no dictionary: "trovaki"."""
    return "".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(3))


def sample_code(rng: Random) -> str:
    """Sample a code of a letter and two to four digits: "K417"."""
    return rng.choice(_CODE_LETTERS) + str(rng.randrange(10, 10 ** rng.randint(2, 4)))


def sample_good(rng: Random, *, short: bool = False) -> str:
    """Sample a product in lower case: one word, two words, or a word that is made up."""
    kind = rng.random()
    if kind < _MADE_UP_SHARE:
        return sample_made_up(rng)
    good = rng.choice(load_word_lists()["goods"])
    if kind < _MADE_UP_SHARE + _TWO_WORDS_SHARE and not short:
        return f"{rng.choice(load_word_lists()['kinds'])} {good}"
    return good


def sample_shop(rng: Random) -> str:
    """Sample the name of a shop: "Anna's Bakery", "Tovaki Market", "River Books"."""
    lists = load_word_lists()
    kind = rng.choice(lists["shops"]).capitalize()
    how = rng.randrange(4)
    if how == 0:
        return f"{rng.choice(lists['people'])}'s {kind}"
    if how == 1:
        return f"{sample_made_up(rng).capitalize()} {kind}"
    if how == 2:
        return sample_made_up(rng).capitalize()
    return f"{rng.choice(lists['short']).capitalize()} {kind}"


def sample_entry(rng: Random) -> str:
    """Sample what a person types into a text field."""
    lists = load_word_lists()
    how = rng.randrange(5)
    if how == 0:
        return rng.choice(lists["people"])
    if how == 1:
        return str(rng.randrange(10, 10 ** rng.randint(2, 6)))
    if how == 2:
        return f"{rng.choice(lists['kinds'])} {rng.choice(lists['short'])}"
    return sample_code(rng) if how == 3 else rng.choice(lists["short"])


def sample_date(rng: Random) -> str:
    """Sample a date in one of five formats."""
    year, month, day = rng.randint(1998, 2035), rng.randint(1, 12), rng.randint(1, 28)
    name = load_word_lists()["months"][month - 1]
    return rng.choice(
        (
            f"{year}-{month:02d}-{day:02d}",
            f"{day:02d}.{month:02d}.{year}",
            f"{month:02d}/{day:02d}/{year}",
            f"{day} {name} {year}",
            f"{name} {day}, {year}",
        )
    )


def sample_time(rng: Random) -> str:
    """Sample a time of day, 24 hours: "09:41", some without the leading zero."""
    hour, minute = rng.randrange(24), rng.randrange(60)
    return f"{hour:02d}:{minute:02d}" if rng.random() < 0.7 else f"{hour}:{minute:02d}"


def cased(text: str, case: str) -> str:
    """Write a text in a case: "lower", "upper", "first" (capital) or "title"."""
    if case == "upper":
        return text.upper()
    if case == "first":
        return text[:1].upper() + text[1:]
    return " ".join(w[:1].upper() + w[1:] for w in text.split()) if case == "title" else text


def spoken(rng: Random, label: str) -> str:
    """Return a label as a question names it: as written, or in lower case."""
    return label.lower() if rng.random() < 0.5 else label
