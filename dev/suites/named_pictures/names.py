"""Names of the suite named-pictures: accepted answers, plurals, and names that may be confused.

names.json was written by hand. An accepted answer means what the CLDR name means, or is the plain
name of the same drawing ("dog face" -> "dog", "red apple" -> "apple"); a name of a wider class is
none ("bird" for a dove). Names that may be confused are never options of one question, nor in one
picture: their drawings are alike, or an answer fits both.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

__all__ = ["accepted_answers", "are_confusable", "plural_of", "scene_names"]

APOSTROPHE = "\N{RIGHT SINGLE QUOTATION MARK}"  # as in CLDR
# Words that say nothing about a drawing.
FUNCTION_WORDS = {"of", "the", "and", "a", "in", "man's", "woman's", "women's"}


@dataclass(frozen=True, slots=True, kw_only=True)
class NameTable:
    """The content of names.json."""

    synonyms: Mapping[str, tuple[str, ...]]  # other accepted answers; names without any are absent
    confusable: Mapping[str, frozenset[str]]  # name -> all names of its groups
    scene_plurals: Mapping[str, str]  # of the names for pictures of several icons


def accepted_answers(name: str) -> tuple[str, ...]:
    """Return the accepted names of an object, the CLDR name first."""
    typed = name.replace(APOSTROPHE, "'")
    return tuple(dict.fromkeys((name, typed, *_load().synonyms.get(name, ()))))


@cache
def are_confusable(name: str, other: str) -> bool:
    """Return whether two names must not be in one question or picture.

    They are in one group of names.json, or share an accepted answer or a word.
    """
    is_listed = name in _load().confusable.get(other, ())
    own, others = accepted_answers(name), accepted_answers(other)
    return is_listed or bool(set(own) & set(others) or _words(own) & _words(others))


def scene_names() -> tuple[str, ...]:
    """Return the names for pictures of several icons, which say plainly what is drawn."""
    return tuple(_load().scene_plurals)


def plural_of(name: str) -> str:
    """Return the plural of one of `scene_names`."""
    return _load().scene_plurals[name]


@cache
def _load() -> NameTable:
    raw = json.loads(Path(__file__).with_name("names.json").read_text(encoding="utf-8"))
    groups: dict[str, set[str]] = {}
    for group in raw["confusable"]:
        for name in group:
            groups.setdefault(name, set()).update(group)
    return NameTable(
        synonyms={name: tuple(others) for name, others in raw["synonyms"].items()},
        confusable={name: frozenset(others) for name, others in groups.items()},
        scene_plurals=raw["scene_plurals"],
    )


def _words(names: tuple[str, ...]) -> set[str]:
    spaced = (name.casefold().replace("-", " ").replace(APOSTROPHE, "'") for name in names)
    return {word for name in spaced for word in name.split()} - FUNCTION_WORDS
