"""Texts of the suite `lines`: names of objects in many languages, English sentences, and numbers.

Names are those of Unicode CLDR (dataset names) for the objects of synth/compositing/names.tsv, in
Unicode's normal form NFC. Only names are used whose characters are letters and marks of the part's
script: a digit, a quotation mark or an invisible joiner would make the written form ambiguous.
"""

from __future__ import annotations

import json
import unicodedata
from dataclasses import dataclass
from functools import cache
from random import Random

from qwen2vl.fetch import dataset_folder
from qwen2vl.synth.compositing import icon_names

__all__ = [
    "NAMES",
    "TextSource",
    "has_clear_case",
    "load_names",
    "sample_english",
    "sample_names",
    "sample_number",
]

NAMES = "names"  # the dataset
MAX_NAMES = 4  # in a line

_VARIATION_SELECTOR = "\ufe0f"  # CLDR omits it from its keys
_SENTENCES = (
    *("The {a} is {color}.", "Where is the {a}?", "No {a} today!", "My {a}: {color}"),
    *("{a} and {b}", "{a}, {b}", "{a} & {b}", "Buy the {a}.", "{a} - {b}", "'{a}' or '{b}'?"),
)
_WITHOUT_POINTS = ("HEBREW", "ARABIC")  # vowel signs are tiny, and most texts omit them
# Alone, such a letter looks the same as its capital at another size.
_SHAPED_LIKE_CAPITALS = frozenset("ckopsuvwxyz" + "вгджзиклмнопстхцчшщъыьэюяєґљњџ" + "θκοπρτφχψ")
_COLORS = ("red", "blue", "green", "old", "big", "new", "gone")


@dataclass(frozen=True, slots=True, kw_only=True)
class TextSource:
    """What the lines of a part are made of."""

    languages: tuple[str, ...]  # locales of CLDR
    scripts: tuple[str, ...]  # first words of Unicode's character names: "CYRILLIC"
    max_length: int = 24  # characters of a line
    separator: str = " "  # between names
    has_case: bool = False  # some lines begin with a capital letter
    needs_accent: bool = False  # every line has a letter beyond ASCII


@cache
def load_names(language: str, scripts: tuple[str, ...]) -> tuple[str, ...]:
    """Load the names of objects in a language, sorted by length.

    Args:
        language: locale of CLDR, such as "pt".
        scripts: of the letters; names with other characters than these and spaces are left out.

    Raises:
        DatasetNotFoundError: the dataset names is not on this machine.
    """
    path = dataset_folder(NAMES) / "annotations" / language / "annotations.json"
    annotations = json.loads(path.read_text(encoding="utf-8"))["annotations"]["annotations"]
    found: set[str] = set()
    for icon in icon_names().values():
        entry = annotations.get(icon.emoji) or annotations.get(
            icon.emoji.replace(_VARIATION_SELECTOR, "")
        )
        if entry and "tts" in entry:
            found.add(unicodedata.normalize("NFC", entry["tts"][0]))
    names = [name for name in found if all(_is_of(char, scripts) for char in name)]
    return tuple(sorted(names, key=lambda name: (len(name), name)))


def sample_names(rng: Random, source: TextSource, language: str) -> str:
    """Sample one to four names in one line of a sampled length."""
    names = load_names(language, source.scripts)
    shortest = len(names[len(names) // 50])
    length = rng.randint(shortest, source.max_length)
    chosen = [rng.choice([name for name in names if len(name) <= length])]
    while len(chosen) < MAX_NAMES:
        free = length - len(source.separator.join([*chosen, ""]))
        fitting = [name for name in names if len(name) <= free]
        if not fitting:
            break
        chosen.append(rng.choice(fitting))
    text = source.separator.join(chosen)
    if source.has_case and rng.random() < 0.5:
        text = _capitalize(text, language)
    return unicodedata.normalize("NFC", text)


def sample_english(rng: Random, max_length: int) -> str:
    """Sample English words: names in several cases, or in half of all lines a short sentence."""
    source = TextSource(languages=("en",), scripts=("LATIN",), max_length=max_length)
    is_sentence = rng.random() < 0.5
    while not is_sentence:
        text = sample_names(rng, source, "en")
        if text.isascii():
            return rng.choice((str.lower, str.title, str.upper, _capitalize))(text)
    names = [n for n in load_names("en", source.scripts) if len(n) <= max_length // 2]
    while True:
        a, b = rng.sample([name for name in names if name.isascii()], 2)
        text = rng.choice(_SENTENCES).format(a=a, b=b, color=rng.choice(_COLORS))
        if len(text) <= max_length:
            return _capitalize(text) if rng.random() < 0.5 else text


def has_clear_case(text: str) -> bool:
    """Return whether no letter can be mistaken for its capital: "cow" and "COW" look alike."""
    if text != text.lower() and text != text.upper():
        return True  # the sizes of the letters differ
    letters = {unicodedata.normalize("NFD", char)[0] for char in text.lower() if char.isalpha()}
    return not letters or not letters <= _SHAPED_LIKE_CAPITALS


def sample_number(rng: Random) -> str:
    """Sample a number as it is written: a count, a price, a date, a time, a telephone number."""
    kind = rng.randrange(8)
    if kind == 0:
        return f"{rng.randrange(10 ** rng.randint(1, 6))}"
    if kind == 1:
        return f"{rng.randrange(1000, 10 ** rng.randint(4, 8)):,}"
    if kind == 2:
        return f"{rng.uniform(-99, 999):.{rng.randint(1, 3)}f}"
    if kind == 3:
        price = f"{rng.randrange(1, 1000)}.{rng.choice((0, 49, 50, 75, 95, 99)):02d}"
        return f"{rng.choice('$£€')}{price}"
    if kind == 4:
        return f"{rng.randrange(1, 101)}%"
    if kind == 5:
        return _date(rng)
    if kind == 6:
        return _time(rng)
    return _phone(rng)


def _date(rng: Random) -> str:
    year, month, day = rng.randint(1950, 2039), rng.randint(1, 12), rng.randint(1, 28)
    forms = (f"{year}-{month:02d}-{day:02d}", f"{day}/{month}/{year}", f"{day}.{month}.{year}")
    return rng.choice(forms)


def _time(rng: Random) -> str:
    hour, minute, second = rng.randrange(24), rng.randrange(60), rng.randrange(60)
    forms = (f"{hour}:{minute:02d}", f"{hour:02d}:{minute:02d}:{second:02d}")
    return rng.choice((*forms, f"{hour}:{minute:02d} - {(hour + 2) % 24}:{minute:02d}"))


def _phone(rng: Random) -> str:
    groups = [
        rng.randrange(10 ** (n - 1), 10**n) for n in rng.choice(((3, 4), (3, 3, 4), (2, 4, 4)))
    ]
    separator = rng.choice((" ", "-", " "))
    prefix = rng.choice(("", "", f"+{rng.randint(20, 99)} "))
    return prefix + separator.join(map(str, groups))


def _capitalize(text: str, language: str = "en") -> str:
    """Make the first letter a capital; Turkish has a dotted one, which `str.upper` ignores."""
    first = "İ" if language == "tr" and text[0] == "i" else text[0].upper()
    return (first if len(first) == 1 else text[0]) + text[1:]


def _is_of(char: str, scripts: tuple[str, ...]) -> bool:
    kinds = "L" if scripts[0] in _WITHOUT_POINTS else "LM"
    is_letter = unicodedata.category(char)[0] in kinds
    return char == " " or (is_letter and unicodedata.name(char).startswith(scripts))
