"""Templates of all JSON files: correct patterns, fields, the held-out share, one task a pattern.

A task may have tens of thousands of patterns; tests look at a seeded sample of each, and at all
patterns of a reduced grammar, in which common.json has one picture, one color and no suffixes.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from random import Random

import pytest

from qwen2vl.synth.families.text_only import SMALL_TALK
from qwen2vl.synth.grammar import expansion
from qwen2vl.synth.grammar.expansion import (
    count_expansions,
    list_patterns,
    load_templates,
    sample_pattern,
)
from qwen2vl.synth.grammar.holdout import is_held_out, load_wordings
from qwen2vl.synth.wordings import trained_wordings

SAMPLES = 200  # of patterns of a task
MAX_PATTERNS = 40_000  # of a template
FEW = 100  # patterns, of which the held-out share may be any

# Alternatives that do not change what a question asks for: the reduced grammar has one of them.
_EQUIVALENT = {"picture": "picture", "a_picture": "a picture", "color": "color", "colors": "colors"}
_EQUIVALENT |= dict.fromkeys(("maybe_in_picture", "maybe_in_video", "one_character"), "")
_EQUIVALENT |= dict.fromkeys(("one_word", "yes_or_no", "number_only", "name_only"), "")
_EQUIVALENT |= dict.fromkeys(("first_or_second", "text_only"), "")

# Tasks whose questions have the same answers, so that they may have the same patterns.
_FORMATS = {
    "color": "color color_of_kind color_of_one appeared_first appeared_last",
    "shape": "name_shape name_shape_of_color shape_of_one",
    "phrase": "describe",
    "compared name": "larger smaller further moved_first",
    "number": "count_all count_some count_in_one",
    "yes or no": "exists same_shape same_color same_number same_text",
    "yes if absent": "lacks",
    "region": "position",
    "side": "left_or_right",
    "level": "top_or_bottom",
    "boxes": "find find_each",
    "all boxes": "find_all",
    "name in box": "name_box",
    "text": "read read_page read_one",
    "first or second": "which_has_more which_shows",
    "direction": "direction",
}
_FORMAT_OF = {task: name for name, tasks in _FORMATS.items() for task in tasks.split()}

_REPEATED = re.compile(r"\b(?!that\b|bye\b|in in the\b)(\w+) \1\b", re.IGNORECASE)
_WRONG_ARTICLE = re.compile(r"\ba (?!u[ns]|eu|one)[aeiou]|\ban [^aeiouhx{\"]", re.IGNORECASE)
_WRONG_MARKS = re.compile(r"[.,?:;!]{2}| [.,?:;!]|  |^[.,?:;!]|[\[\]|]|[.?!] [a-z]")


@cache
def sampled(task: str) -> list[str]:
    """Return different patterns of a task: all, or a sample."""
    templates = load_templates()[task]
    if sum(map(count_expansions, templates)) <= SAMPLES:
        return list(dict.fromkeys(p for t in templates for p in list_patterns(t)))
    rng = Random(task)
    return list(dict.fromkeys(sample_pattern(rng, task) for _ in range(SAMPLES)))


@pytest.fixture
def reduced(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    common = {**expansion._common(), **{name: (one,) for name, one in _EQUIVALENT.items()}}
    caches = (expansion._parse, expansion._common_alternatives)
    monkeypatch.setattr(expansion, "_common", lambda: common)
    for cached in caches:
        cached.cache_clear()
    yield
    monkeypatch.undo()
    for cached in caches:
        cached.cache_clear()


def test_every_task_of_wordings_has_templates() -> None:
    assert set(load_wordings()) <= set(load_templates())
    assert all(load_templates().values())


@pytest.mark.parametrize("task", sorted(load_templates()))
def test_patterns_are_well_formed(task: str) -> None:
    templates = load_templates()[task]
    assert len(set(templates)) == len(templates)
    for template in templates:
        assert count_expansions(template) <= MAX_PATTERNS, template
    for pattern in sampled(task):
        assert not _REPEATED.search(pattern), pattern
        assert not _WRONG_ARTICLE.search(pattern), pattern
        assert not _WRONG_MARKS.search(re.sub(r"<\|\w+\|>", "", pattern)), pattern
        assert not pattern[0].islower(), pattern
        words = re.findall(r"[A-Za-z]{2,}", pattern)
        assert not words or any(not word.isupper() for word in words), pattern


@pytest.mark.parametrize("task", sorted(load_templates()))
def test_fields_are_numbered_from_zero(task: str) -> None:
    fields = {frozenset(re.findall(r"\{(.*?)\}", pattern)) for pattern in sampled(task)}
    names = frozenset[str]().union(*fields)
    assert names == {str(number) for number in range(len(names))}
    if task in load_wordings():
        asked = {frozenset(re.findall(r"\{(.*?)\}", w)) for w in load_wordings()[task]}
        assert fields == asked == {names}


def test_a_fifth_of_every_task_is_held_out() -> None:
    for task in load_templates():
        held_out = sum(map(is_held_out, sampled(task)))
        share = held_out / len(sampled(task))
        assert 0 < share < 1, task
        if len(sampled(task)) > FEW:
            tolerance = 3.5 * (0.2 * 0.8 / len(sampled(task))) ** 0.5  # standard deviations
            assert -tolerance < share - 0.2 < tolerance + 0.04, task  # the suites' are added
    patterns = [pattern for task in load_templates() for pattern in sampled(task)]
    assert 0.19 < sum(map(is_held_out, patterns)) / len(patterns) < 0.24


def test_no_pattern_has_two_kinds_of_answer(reduced: None) -> None:
    tasks_of: dict[str, set[str]] = defaultdict(set)
    for task in _FORMAT_OF.keys() & load_templates().keys():
        for template in load_templates()[task]:
            for pattern in list_patterns(template):
                tasks_of[pattern.lower().rstrip(".?!")].add(task)
    assert len(tasks_of) > 10_000
    wrong = {p: t for p, t in tasks_of.items() if len({_FORMAT_OF[task] for task in t}) > 1}
    assert not wrong


def test_small_talk_has_no_patterns_of_other_tasks(reduced: None) -> None:
    topics = set(SMALL_TALK) - {"no_picture"}  # which asks what other tasks ask
    patterns = {task: set[str]() for task in load_templates()}
    for task, templates in load_templates().items():
        if task in topics or task in _FORMAT_OF:
            for template in templates:
                patterns[task].update(p.lower().rstrip(".?!") for p in list_patterns(template))
    for topic in topics:
        for task in patterns.keys() - {topic}:
            assert not patterns[topic] & patterns[task], (topic, task)


def test_every_task_of_wordings_keeps_trained_ones() -> None:
    assert all(len(trained_wordings(task)) >= 3 for task in load_wordings())
