"""Texts of a script: words of many languages, words that do not exist, and random characters.

Words are the names and keywords of emoji in Unicode CLDR (dataset names). English ones come with
the package: words.txt and the names of objects. A third of the words are made up from the pairs of
letters of real ones, so that a model cannot guess what it does not see.
"""

from __future__ import annotations

import json
import unicodedata
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from functools import cache
from random import Random

from qwen2vl.fetch import dataset_folder
from qwen2vl.synth.compositing.icons import icon_names
from qwen2vl.synth.scripts.alphabets import (
    SCRIPTS,
    Script,
    find_script,
    has_clear_case,
    has_clear_script,
    is_letter_of,
)
from qwen2vl.synth.scripts.numbers import sample_number
from qwen2vl.synth.strings import load_words

__all__ = ["NAMES", "check_words", "sample_text", "to_upper", "words_of"]

NAMES = "names"  # the dataset
_MAX_WORD = 24  # characters
_MAX_LISTED = 3000  # words of a language, spread over all lengths
_MAX_WORDS = 6  # in a text
_MADE_UP_SHARE = 0.33  # of the texts of words, in scripts with capitals
_DECORATED_SHARE = 0.3  # of the texts of words that have punctuation or a number
_MARKS = ".,!?-:'&"
_MORE_MARKS = '()/+%;"#@='
_ATTEMPTS = 200
_CLEAR_SCRIPTS = ("greek", "cyrillic")  # that share shapes of letters with the Latin one
_TURKIC = ("tr", "az")  # languages with a dotted capital I


def check_words(scripts: Sequence[str]) -> None:
    """Check that texts of scripts can be sampled.

    Raises:
        ConfigError: a script is not in the table.
        DatasetNotFoundError: the dataset names is not on this machine; the text has the command.
    """
    if any(find_script(name).languages for name in scripts if name != "latin"):
        dataset_folder(NAMES)


def sample_text(
    rng: Random,
    name: str,
    low: int,
    high: int,
    *,
    random_share: float = 1 / 3,
    excluded: str = "",
) -> str:
    """Sample a text of a script, of `low` to `high` characters, in the form NFC.

    Args:
        name: of the script.
        low: characters.
        high: characters; a text is longer where the script has none as short.
        random_share: share of random characters; the others are words.
        excluded: characters that no random text has, and digits and marks that no text has.

    Raises:
        ConfigError: the script is not in the table.
        DatasetNotFoundError: the dataset names is not on this machine.
    """
    script = find_script(name)
    text = ""
    for attempt in range(_ATTEMPTS):
        # No text of a narrow range may be clear: then a longer one is taken.
        length = rng.randint(low, high + attempt // 20)
        text = _sample(rng, name, script, length, random_share, excluded)
        is_short = len(text) <= max(high, length) or attempt > _ATTEMPTS // 2
        if text and is_short and _is_clear(text, name):
            break
    return text


@cache
def words_of(language: str, name: str) -> tuple[str, ...]:
    """Load the words and short phrases of a language, sorted by length.

    Raises:
        DatasetNotFoundError: the dataset names is not on this machine.
    """
    script, found = SCRIPTS[name], set[str]()
    for phrase in _english() if name == "latin" else _annotations(language):
        normal = unicodedata.normalize("NFC", phrase)
        found |= {normal, *(normal.split() if script.separator else ())}
    letters = {char for char in set("".join(found)) if char == " " or _is_letter(char, name)}
    shortest = 1 if script.width >= 1 else 2  # a syllable, or an ideograph
    fitting = [word for word in found if shortest <= len(word) <= _MAX_WORD]
    words = [word for word in fitting if letters.issuperset(word)]
    words.sort(key=lambda word: (len(word), word))
    return tuple(words[:: -(-len(words) // _MAX_LISTED)])


def to_upper(text: str, language: str = "en") -> str:
    """Write in capitals: those of Turkish keep the dot of the i, those of Greek have no accent."""
    if language in _TURKIC:
        text = text.replace("i", "İ")
    text = text.upper()
    if language == "el":
        text = unicodedata.normalize("NFD", text).replace("\u0301", "")
    return unicodedata.normalize("NFC", text)


def _sample(
    rng: Random, name: str, script: Script, length: int, random_share: float, excluded: str
) -> str:
    if name == "digits":
        number = sample_number(rng)
        return "" if set(number) & set(excluded) else number
    language = rng.choice(script.languages)
    can_be_random = bool(script.letters) or script.is_listed
    is_too_short = length < _shortest(language, name)
    if can_be_random and (is_too_short or rng.random() < random_share):
        return _random_text(rng, name, script, language, length, excluded)
    text = _word_text(rng, name, language, max(length, _shortest(language, name)))
    if script.has_case:
        text = _decorate(rng, _vary_case(rng, text, language), length, excluded)
    return unicodedata.normalize("NFC", text)


def _is_clear(text: str, name: str) -> bool:
    if name == "latin_accents" and text.isascii():
        return False
    if name in _CLEAR_SCRIPTS and not has_clear_script(text):
        return False
    return len(text) > 1 or text not in "0O1Il" if has_clear_case(text) else False


# Words ------------------------------------------------------------------------------------------


def _word_text(rng: Random, name: str, language: str, length: int) -> str:
    """Join words that fit."""
    script = SCRIPTS[name]
    if script.has_case and length > 2 and rng.random() < _MADE_UP_SHARE:
        return _made_up_text(rng, name, language, length)
    words, lengths = words_of(language, name), _lengths(language, name)
    text = ""
    for _ in range(_MAX_WORDS):
        separator = script.separator if text else ""
        fitting = bisect_right(lengths, length - len(text) - len(separator))
        if not fitting:
            break
        # Most words are long ones, of which two fill a text.
        first = bisect_right(lengths, rng.randint(0, lengths[fitting - 1]) - 1)
        text += separator + words[rng.randrange(min(first, fitting - 1), fitting)]
    return text


def _made_up_text(rng: Random, name: str, language: str, length: int) -> str:
    chain = _pairs(language, name)
    text = ""
    while len(text) < length - 1:
        word = rng.choice(chain[""])
        for _ in range(rng.randint(1, 10)):
            if len(text) + len(word) + 1 >= length or word[-2:] not in chain:
                break
            word += rng.choice(chain[word[-2:]])
        text += f" {word}" if text else word
    return text[:length].rstrip(" ")


def _vary_case(rng: Random, text: str, language: str) -> str:
    """Write as the language does, with a first capital, in capitals, or as a title."""
    how = rng.random()
    if how < 0.45:
        return text
    if how < 0.65:
        return to_upper(text[0], language)[:1] + text[1:]
    if how < 0.85:
        return to_upper(text, language)
    return " ".join(to_upper(word[0], language)[:1] + word[1:] for word in text.split())


def _decorate(rng: Random, text: str, length: int, excluded: str) -> str:
    """Add punctuation, or a number, to some texts that have space for it."""
    free = length - len(text)
    if free < 1 or rng.random() >= _DECORATED_SHARE:
        return text
    how = rng.randrange(6)
    if how == 0 and free > 2:
        varied = f"{text} {rng.randrange(10 ** min(3, free - 1))}"
    elif how == 1 and " " in text:
        varied = text.replace(" ", rng.choice((", ", " - ", " & ", ": ", "-", ". ")), 1)
    elif how == 2 and free > 1:
        quote = rng.choice(("''", "()", '""'))
        varied = quote[0] + text + quote[1]
    else:
        varied = text + rng.choice(".!?:,")
    added = set(varied) - set(text)
    fits = len(varied) <= length and not added & set(excluded)
    return varied if fits else text


# Random characters ------------------------------------------------------------------------------


def _random_text(
    rng: Random, name: str, script: Script, language: str, length: int, excluded: str
) -> str:
    letters = script.letters or _listed_letters(language, name)
    chars = [_random_char(rng, name, letters) for _ in range(length)]
    chars = [rng.choice("abdefgh") if char in excluded else char for char in chars]
    if script.has_case:
        how = rng.randrange(4)  # the last one: as sampled
        if how < 2:
            chars = [_change_case(char, capital=how == 1) for char in chars]
        elif how == 2:
            chars = [_change_case(char, capital=index == 0) for index, char in enumerate(chars)]
    chars = [char if char not in excluded else "E" for char in chars]
    if name == "latin":
        _add_marks(rng, chars, excluded)
    if script.separator and length >= 5 and rng.random() < 0.4:
        chars[rng.randrange(2, length - 2)] = script.separator
    return unicodedata.normalize("NFC", "".join(chars))


def _random_char(rng: Random, name: str, letters: str) -> str:
    if name == "latin" and rng.random() < 0.25:
        return rng.choice("0123456789")
    if name == "latin_accents" and rng.random() < 0.45:
        return rng.choice(SCRIPTS["latin"].letters)
    return rng.choice(letters)


def _change_case(char: str, *, capital: bool) -> str:
    changed = char.upper() if capital else char.lower()
    return changed if len(changed) == 1 else char


def _add_marks(rng: Random, chars: list[str], excluded: str) -> None:
    """Replace some characters by marks, of which no two are neighbors."""
    marks = [mark for mark in 3 * _MARKS + _MORE_MARKS if mark not in excluded]
    index = rng.randint(1, 6)
    while index < len(chars):
        chars[index] = rng.choice(marks)
        index += rng.randint(2, 14)


# Tables of a language ----------------------------------------------------------------------------


def _is_letter(char: str, name: str) -> bool:
    if name == "latin":
        return char.isascii() and char.isalpha()
    return is_letter_of(char, SCRIPTS[name])


def _english() -> list[str]:
    return [*load_words(), *icon_names()]


def _annotations(language: str) -> list[str]:
    path = dataset_folder(NAMES) / "annotations" / language / "annotations.json"
    entries = json.loads(path.read_text(encoding="utf-8"))["annotations"]["annotations"]
    return [text for entry in entries.values() for texts in entry.values() for text in texts]


@cache
def _lengths(language: str, name: str) -> tuple[int, ...]:
    return tuple(map(len, words_of(language, name)))


def _shortest(language: str, name: str) -> int:
    """Return the length from which there is some choice of words."""
    lengths = _lengths(language, name)
    return lengths[len(lengths) // 50]


@cache
def _listed_letters(language: str, name: str) -> str:
    """Return each character of the words of a language once."""
    return "".join(sorted(set("".join(words_of(language, name))) - {" "}))


@cache
def _pairs(language: str, name: str) -> Mapping[str, Sequence[str]]:
    """Return the letters that follow each pair, and under "" the pairs that start a word."""
    words = [word for text in words_of(language, name) for word in text.split() if len(word) > 2]
    following: dict[str, list[str]] = {"": [word[:2] for word in words]}
    for word in words:
        for index in range(len(word) - 2):
            following.setdefault(word[index : index + 2], []).append(word[index + 2])
    return {pair: tuple(letters) for pair, letters in following.items()}
