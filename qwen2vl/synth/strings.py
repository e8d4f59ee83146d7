"""Sampling of strings for text images: random characters, and text made of words and numbers.

Half or more of all lines are random, so that a model cannot predict characters from language alone;
words.txt has the words of the others. The alphabet includes eight punctuation characters:
. , ! ? - : ' & and spaces occur only between words.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from random import Random

__all__ = [
    "ALPHABETS",
    "DIGITS",
    "LETTERS",
    "LETTERS_OF_EUROPE",
    "PUNCTUATION",
    "load_words",
    "random_string",
    "word_string",
]

DIGITS = "0123456789"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
PUNCTUATION = ".,!?-:'&"
ALPHABETS = {"digits": DIGITS, "letters": LETTERS, "all": LETTERS + DIGITS + PUNCTUATION}

# Letters beyond ASCII of the European languages, in three scripts, and typographic marks.
LETTERS_OF_EUROPE = (
    "".join(chr(code) for code in (*range(0xC0, 0xD7), *range(0xD8, 0xF7), *range(0xF8, 0x180)))
    + "ȘșȚțẞƏə"
    + "".join(
        chr(code) for code in (0x386, *range(0x388, 0x38B), 0x38C, *range(0x38E, 0x3CF))
    ).replace(chr(0x3A2), "")
    + "".join(chr(code) for code in range(0x400, 0x460))
    + "ҐґҒғҚқҢңҮүҰұҺһӘәӨө"
    + "„“”‘’«»–—…€£°№"  # noqa: RUF001 - typographic marks are what is meant
)

# Without a neighbor these look like another character at another size or height.
_AMBIGUOUS_ALONE = frozenset("CcKkOoPpSsUuVvWwXxYyZz0Il1.,-:'")


@cache
def load_words() -> tuple[str, ...]:
    """Load words.txt: common English words, in the order of the file."""
    return tuple(Path(__file__).with_name("words.txt").read_text(encoding="utf-8").split())


def random_string(
    rng: Random, length: int, alphabet: str, *, spaces: bool, excluded: str = ""
) -> str:
    """Sample characters independently; some strings get one space, not at either end.

    A string of ambiguous characters gets one that shows the font size, since "o" and "O" could not
    be distinguished otherwise.
    """
    chars = [rng.choice(alphabet) for _ in range(length)]
    chars = [rng.choice("abdefgh") if c in excluded else c for c in chars]
    if _AMBIGUOUS_ALONE.issuperset(chars):
        anchors = [c for c in alphabet if c not in _AMBIGUOUS_ALONE]
        chars[rng.randrange(length)] = rng.choice(anchors)
    if spaces and length >= 5 and rng.random() < 0.4:
        chars[rng.randrange(2, length - 2)] = " "
    return "".join(chars)


def word_string(rng: Random, low: int, high: int, alphabet: str) -> str:
    """Sample words, numbers, times and prices of `low` to `high` characters, in several cases.

    Only the last word may be cut. For the digits alphabet, and for targets of one or two
    characters, the result is a random string.
    """
    target = rng.randint(low, high)
    if alphabet == DIGITS or target < 3:
        return random_string(rng, target, alphabet, spaces=False, excluded="I")
    marks = alphabet == ALPHABETS["all"]
    text = _sample_word(rng, marks=marks)
    while len(text) < target:
        text += _sample_separator(rng, marks=marks) + _sample_word(rng, marks=marks)
    case = rng.randrange(4)
    text = (text, text.capitalize(), text.upper(), text.title())[case]
    return text[:target].strip(" ")


def _sample_word(rng: Random, *, marks: bool) -> str:
    kind = rng.random()
    if not marks or kind < 0.8:
        return rng.choice(load_words())
    if kind < 0.9:
        return str(rng.randrange(10 ** rng.randint(1, 5)))
    if kind < 0.95:
        return f"{rng.randrange(24)}:{rng.randrange(60):02d}"
    return f"{rng.randrange(100)}.{rng.randrange(100):02d}"


def _sample_separator(rng: Random, *, marks: bool) -> str:
    if not marks or rng.random() < 0.75:
        return " "
    return rng.choice((", ", ". ", "! ", "? ", "-", ": ", " & ", "'"))
