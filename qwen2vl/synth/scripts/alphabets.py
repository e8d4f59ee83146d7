"""Scripts of the family `lines`: languages, letters, and which texts would be ambiguous.

A text is ambiguous if a reader could not know its characters: "cow" looks like "COW" at another
size, and some Cyrillic words look like Latin ones. All texts are in Unicode's normal form NFC.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass

from qwen2vl.errors import ConfigError

__all__ = ["SCRIPTS", "Script", "find_script", "has_clear_case", "has_clear_script", "is_letter_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Script:
    """What the texts of a script are made of."""

    label: str  # its name in an answer
    languages: tuple[str, ...] = ()  # locales of CLDR
    prefixes: tuple[str, ...] = ("LATIN",)  # of the Unicode names of its letters
    has_marks: bool = False  # vowel signs and the like belong to its letters
    has_case: bool = False
    letters: str = ""  # of random strings; empty: those of its words, where `is_listed`
    is_listed: bool = False  # random strings make sense: one character is one sign
    separator: str = " "  # between words
    width: float = 0.6  # of an average character, in em
    min_size: int = 10  # pixels per em at which it is legible


_ASCII = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
# Without letters that look like others: Ð (Đ), Ţ (Ț), Ĕ Ĭ Ŏ (Ě Ǐ Ǒ), Ŀ, ĸ, ŉ. Words have them.
_ACCENTED_SMALL = (
    "àáâãäåæçèéêëìíîïñòóôõöøùúûüýþÿāăąćĉċčďđēėęěĝğġģĥħĩīįıĵķĺļľłńņňŋōőœŕŗřśŝşšťŧũūŭůűųŵŷźżžșț"
    "ảạấầẩẫậắằẳẵặẻẽẹếềểễệỉịỏọốồổỗộớờởỡợơủụứừửữựưỳỵỷỹ"
)
_DOTLESS = "\u0131"  # its capital is I
_ACCENTED = _ACCENTED_SMALL + _ACCENTED_SMALL.replace(_DOTLESS, "").upper() + "ßİ"
_GREEK = "αβγδεζηθικλμνξοπρσςτυφχψωάέήίόύώϊϋ"
_RUSSIAN = "абвгдежзийклмнопрстуфхцчшщъыьэюя"
_MORE_CYRILLIC = "ёґєіїўђјљњћџѓќѕәғқңөұүһ"


def _upper(letters: str) -> str:
    return "".join(letter.upper() for letter in letters if len(letter.upper()) == 1)


_EUROPE = (
    "af az br bs ca cs cy da de dsb es et eu fi fo fr ga gd gl hr hsb hu is it lb lt lv mt nl nn "
    "no pl pt rm ro sc sk sl sq sr-Latn sv tk tr vi"
)
SCRIPTS: Mapping[str, Script] = {
    "latin": Script(label="Latin", languages=("en",), has_case=True, letters=_ASCII),
    "latin_accents": Script(
        label="Latin",
        languages=tuple(_EUROPE.split()),
        has_case=True,
        letters=_ACCENTED,
        min_size=13,
    ),
    "digits": Script(label="", letters="0123456789"),
    "greek": Script(
        label="Greek",
        languages=("el",),
        prefixes=("GREEK",),
        has_case=True,
        letters=2 * _GREEK + _upper(_GREEK.replace("ς", "")),
        min_size=12,
    ),
    "cyrillic": Script(
        label="Cyrillic",
        languages=tuple("ru ru uk uk bg sr be mk kk ky mn tg".split()),
        prefixes=("CYRILLIC",),
        has_case=True,
        letters=2 * (_RUSSIAN + _upper(_RUSSIAN)) + _MORE_CYRILLIC + _upper(_MORE_CYRILLIC),
        width=0.65,
        min_size=12,
    ),
    "hebrew": Script(
        label="Hebrew", languages=("he",), prefixes=("HEBREW",), is_listed=True, min_size=12
    ),
    "arabic": Script(label="Arabic", languages=("ar",), prefixes=("ARABIC",), min_size=16),
    "hangul": Script(
        label="Korean",
        languages=("ko",),
        prefixes=("HANGUL",),
        is_listed=True,
        width=1.0,
        min_size=14,
    ),
    "japanese": Script(
        label="Japanese",
        languages=("ja",),
        prefixes=("CJK", "HIRAGANA", "KATAKANA"),
        is_listed=True,
        separator="",
        width=1.0,
        min_size=16,
    ),
    "han": Script(
        label="Chinese",
        languages=("zh", "zh-Hant"),
        prefixes=("CJK",),
        is_listed=True,
        separator="",
        width=1.0,
        min_size=16,
    ),
    "devanagari": Script(
        label="Devanagari",
        languages=("hi", "mr", "ne"),
        prefixes=("DEVANAGARI",),
        has_marks=True,
        min_size=16,
    ),
    "bengali": Script(
        label="Bengali",
        languages=("bn", "as"),
        prefixes=("BENGALI",),
        has_marks=True,
        min_size=16,
    ),
    "tamil": Script(
        label="Tamil",
        languages=("ta",),
        prefixes=("TAMIL",),
        has_marks=True,
        width=0.8,
        min_size=16,
    ),
    "thai": Script(
        label="Thai", languages=("th",), prefixes=("THAI",), has_marks=True, min_size=16
    ),
    "khmer": Script(
        label="Khmer", languages=("km",), prefixes=("KHMER",), has_marks=True, min_size=18
    ),
    "myanmar": Script(
        label="Burmese",
        languages=("my",),
        prefixes=("MYANMAR",),
        has_marks=True,
        width=0.8,
        min_size=18,
    ),
    "ethiopic": Script(
        label="Ethiopic",
        languages=("am", "ti"),
        prefixes=("ETHIOPIC",),
        is_listed=True,
        width=0.8,
        min_size=16,
    ),
}

# A text of these alone looks like one of the other case at another size.
_SHAPED_LIKE_CAPITALS = frozenset(
    "ckopsuvwxyzæœø" + "вгджзиклмнопстхцчшщъыьэюяєґљњџқңөү" + "θκοπρτφχψω"
)
# A text of these alone looks like one of the Latin script.
_LIKE_LATIN = frozenset(
    "аеосрхуіјѕһкАВЕЅКМНОРСТХУІЈЗҺҮ" + "ΑΒΕΖΗΙΚΜΝΟΡΤΥΧοόνυικρυ" + "ёЁїЇ" + "ΆΈΉΊΌΎ"
)


def find_script(name: str) -> Script:
    """Find a script of the table.

    Raises:
        ConfigError: it is not in the table.
    """
    if name not in SCRIPTS:
        raise ConfigError(f"mixture: scripts name {name}; scripts are {', '.join(SCRIPTS)}")
    return SCRIPTS[name]


def is_letter_of(char: str, script: Script) -> bool:
    """Return whether a character belongs to the words of a script, spaces excluded."""
    categories = ("L", "M") if script.has_marks else ("Lu", "Ll", "Lo")
    is_letter = unicodedata.category(char).startswith(categories)
    return is_letter and unicodedata.name(char).startswith(script.prefixes)


def has_clear_case(text: str) -> bool:
    """Return whether the letters cannot be mistaken for those of the other case.

    Texts of both cases are clear, since the sizes of their letters differ.
    """
    if text not in (text.lower(), text.upper()):
        return True
    letters = {unicodedata.normalize("NFD", char)[0] for char in text.lower() if char.isalpha()}
    return not letters or not letters <= _SHAPED_LIKE_CAPITALS


def has_clear_script(text: str) -> bool:
    """Return whether a text of another script than the Latin one has a letter that shows it."""
    letters = [char for char in text if char.isalpha()]
    return any(not char.isascii() and char not in _LIKE_LATIN for char in letters)
