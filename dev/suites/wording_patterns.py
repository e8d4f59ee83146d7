"""Question patterns of the suite wordings: those of training, and those that are held out of it.

A pattern is a question with "{0}" for the name that it asks about ("red circle"; "circles" where
it counts). Trained ones are the training part of synth/wordings.json. Held out are its other part,
those of easy_vqa.json that fit, and those of wording_patterns.json beside it: whole sentences,
short ones as people type them, and negated ones, whose answer is no where the name is there. A
pattern that training has too, with other casing or punctuation, is dropped.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from qwen2vl.eval.suites.easy_vqa import load_definition
from qwen2vl.synth.wordings import load_wordings, wordings_of

__all__ = [
    "TASKS",
    "fill_pattern",
    "held_out_sentences",
    "informal_questions",
    "negated_questions",
    "normalize_wording",
    "reading_questions",
    "trained_patterns",
]

TASKS = (
    *("name_shape", "color", "color_of_kind", "count_all", "count_kind"),
    *("exists", "position", "left_or_right", "describe"),
)
_IN_WORDINGS = {"count_kind": "count_some"}  # task -> its name in wordings.json, where it differs

# The middle of a picture is on no side of it.
_UNCLEAR = {
    "On which side is the {0}?",
    "At which side is the {0}?",
    "Tell me on which side the {0} is.",
    "On which side of the picture is the {0}?",
}
_EASY_VQA = {"name_shape": "shape", "color": "color", "color_of_kind": "color_of_shape"}
_EASY_VQA |= {"exists": "has_shape"}  # task -> part of easy-VQA


def trained_patterns(task: str) -> tuple[str, ...]:
    """Return the patterns of a task that synth/wordings.json gives to training."""
    wordings = wordings_of(_IN_WORDINGS.get(task, task), "train")
    return tuple(wording for wording in wordings if wording not in _UNCLEAR)


def held_out_sentences(task: str) -> tuple[str, ...]:
    """Return the held-out patterns of a task that are whole sentences."""
    wordings = wordings_of(_IN_WORDINGS.get(task, task), "held_out")
    return _select((*wordings, *_of_easy_vqa(_EASY_VQA.get(task)), *_load()["sentences"][task]))


def informal_questions(task: str) -> tuple[str, ...]:
    """Return the held-out patterns of a task that are short or misspelled."""
    return _select(_load()["informal"][task])


def negated_questions() -> tuple[str, ...]:
    """Return held-out patterns of the task exists, to which yes and no are exchanged.

    "Is there not a circle?" is none of them: its answer is unclear in English.
    """
    lacks = [pattern for pattern in _of_easy_vqa("lacks_shape") if pattern.startswith("is no ")]
    return _select((*lacks, *_load()["negated"]))


def reading_questions() -> tuple[str, ...]:
    """Return all held-out patterns of the task read."""
    return (*held_out_sentences("read"), *informal_questions("read"))


def normalize_wording(text: str) -> str:
    """Remove from a question or pattern what typing varies: casing and punctuation."""
    return " ".join(re.sub(r"[^\w\s{}]", "", text.lower()).split())


def fill_pattern(pattern: str, name: str) -> str:
    """Return the question of a pattern about a name, with the article that the name requires."""
    if name.startswith("o"):  # orange
        pattern = re.sub(r"\b([aA]) \{0\}", r"\1n {0}", pattern)
    return pattern.format(name)


def _of_easy_vqa(part: str | None) -> list[str]:
    patterns: Mapping[str, tuple[str, ...]] = load_definition().patterns
    return [pattern.replace("{shape}", "{0}") for pattern in patterns[part]] if part else []


def _select(patterns: Iterable[str]) -> tuple[str, ...]:
    """Drop patterns that any task trains, unclear ones, and repetitions."""
    trained = {normalize_wording(w) for task in load_wordings() for w in wordings_of(task, "train")}
    selected: dict[str, str] = {}
    for pattern in patterns:
        key = normalize_wording(pattern)
        if key not in trained and pattern not in _UNCLEAR:
            selected.setdefault(key, pattern)
    return tuple(selected.values())


@cache
def _load() -> Mapping[str, Any]:
    file = Path(__file__).with_name("wording_patterns.json")
    return json.loads(file.read_text(encoding="utf-8"))
