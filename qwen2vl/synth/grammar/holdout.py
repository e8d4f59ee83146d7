"""Which patterns training must avoid: a fifth of all, and those of the frozen suites and easy-VQA.

The fifth is chosen by a hash of the pattern, so that adding a template moves no other pattern. Not
among it are the wordings of wordings.json that are trained. The suites' patterns are in
held_out.txt, normalized (`python -m dev.suites.held_out` writes it; a test compares). Two patterns
that differ in casing, punctuation or an article are the same one.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from functools import cache, lru_cache
from hashlib import sha256
from importlib.resources import files
from pathlib import Path

__all__ = [
    "ANY_NAME",
    "LISTED",
    "is_held_out",
    "is_listed",
    "load_wordings",
    "normalize_pattern",
    "wordings_of",
]

LISTED = "held_out.txt"
ANY_NAME = "{name}"  # in a line of the file: also held out with one to three words in its place
_FIFTH = 5

_MARKS = re.compile(r"<\|\w+\|>")
_FIELD = re.compile(r"\{\w+\}")
_PUNCTUATION = re.compile(r"[^\w\s{}]")
_ARTICLE = re.compile(r"\b(?:an?|the) (?=\{)")
_SENTENCE_END = re.compile(r"(?<=[.?!])\s")

# As dev/suites/wordings.py finds them in questions; fields are words of patterns.
_WORD = r"(?!(?:the|an?|is|are|has|have|does|do|can|what|which|how|any)\b)[\w{}]+"
_NAME = rf"(?:(?:an?|the) )?{_WORD}(?: {_WORD}){{0,2}}"


@lru_cache(maxsize=1 << 18)
def is_held_out(pattern: str) -> bool:
    """Return whether training must not use a pattern."""
    key = normalize_pattern(pattern)
    if is_listed(key):
        return True
    if any(normalize_pattern(part) in _listed()[0] for part in _parts(pattern)):
        return True
    return sha256(key.encode()).digest()[0] % _FIFTH == 0 and key not in _trained()


def _parts(pattern: str) -> list[str]:
    """Return the rows of sentences in a pattern: a suite's may have "One word." after it."""
    sentences = _SENTENCE_END.split(pattern)
    count = len(sentences)
    ends = [(i, j) for i in range(count) for j in range(i + 1, count + 1) if j - i < count]
    return [" ".join(sentences[i:j]) for i, j in ends]


def is_listed(key: str) -> bool:
    """Return whether a normalized pattern is one of the frozen suites' or of easy-VQA's."""
    exact, expressions = _listed()
    if key in exact:
        return True
    for first in (key.partition(" ")[0], ANY_NAME):
        if first in expressions and expressions[first].fullmatch(key):
            return True
    return False


def normalize_pattern(text: str) -> str:
    """Remove what does not make another pattern: casing, punctuation, articles, field names."""
    text = text.lower()
    if "<" in text:
        text = _MARKS.sub("", text)
    if "{" in text:
        text = _FIELD.sub("{}", text)
    text = _PUNCTUATION.sub("", text)
    if "{" in text:
        text = _ARTICLE.sub("", text)
    return " ".join(text.split())


@cache
def load_wordings() -> Mapping[str, tuple[str, ...]]:
    """Load wordings.json: task -> wordings, in the order of the file."""
    import json  # here, so that importing qwen2vl.synth does not take its 2 ms

    text = (Path(__file__).parents[1] / "wordings.json").read_text(encoding="utf-8")
    return {task: tuple(wordings) for task, wordings in json.loads(text).items()}


@cache
def wordings_of(task: str, split: str) -> tuple[str, ...]:
    """Return the wordings of a task that belong to `split` ("train", "held_out" or "all").

    Every fourth wording of a task (index 3, 7, 11, ...) is held out.
    """
    wordings = load_wordings()[task]
    if split == "all":
        return wordings
    held_out = split == "held_out"
    return tuple(w for i, w in enumerate(wordings) if (i % 4 == 3) == held_out)


@cache
def _trained() -> frozenset[str]:
    return frozenset(
        normalize_pattern(wording)
        for task in load_wordings()
        for wording in wordings_of(task, "train")
    )


@cache
def _listed() -> tuple[frozenset[str], Mapping[str, re.Pattern[str]]]:
    """Return the listed patterns, and expressions for those with a name, by their first word."""
    text = files(__package__ or "").joinpath(LISTED).read_text(encoding="utf-8")
    lines = text.splitlines()
    named: dict[str, list[str]] = defaultdict(list)
    for line in lines:
        if ANY_NAME in line:
            named[line.partition(" ")[0]].append(re.escape(line).replace(r"\{name\}", _NAME))
    return frozenset(line.replace(ANY_NAME, "{}") for line in lines), {
        first: re.compile("|".join(listed)) for first, listed in named.items()
    }
