"""Worded questions: fields and articles, typing, the two splits, and speed."""

from __future__ import annotations

import re
import time
from collections import Counter
from random import Random

import pytest

from qwen2vl.synth.grammar import (
    OPENINGS,
    fill_pattern,
    is_held_out,
    sample_pattern,
    vary_typing,
    word_question,
)


@pytest.mark.parametrize(
    ("pattern", "fields", "text"),
    [
        ("Is a {0} there, a {0}?", ("orange star",), "Is an orange star there, an orange star?"),
        ("A {0} here?", ("umbrella",), "An umbrella here?"),
        ("a {0} or a {1}?", ("unicorn", "owl"), "a unicorn or an owl?"),
        ("is there a {0}", ("hourglass",), "is there an hourglass"),
        ("is there a {0}", ("x-ray",), "is there an x-ray"),
        ("is there a {0}", ("one-piece swimsuit",), "is there a one-piece swimsuit"),
        ("is there a {0}", ("euro banknote",), "is there a euro banknote"),
        ("is there a {0}", ("UFO",), "is there a UFO"),
        ("data {0}, the {0}", ("owl",), "data owl, the owl"),
        ("the {0} or the {1}", ("A {0}", "b"), "the A {0} or the b"),
        ("{1}, {0}", ("a", "b"), "b, a"),
    ],
)
def test_fields_are_filled_with_their_article(
    pattern: str, fields: tuple[str, ...], text: str
) -> None:
    assert fill_pattern(pattern, *fields) == text


def test_typing_varies_without_held_out_forms() -> None:
    rng = Random(0)
    typed = Counter(vary_typing(rng, "Where is the {0}?") for _ in range(4000))
    for form in ("Where is the {0}?", "where is the {0}?", "Where is the {0}", "where is the {0}"):
        assert typed[form] > 300
    opened = sum(count for text, count in typed.items() if text.startswith(OPENINGS))
    assert 300 < opened < 500
    assert {text for text in typed if text.startswith("So, ")} == {"So, where is the {0}?"}
    closed = [text for text in typed if "hank" in text or "lease" in text]
    assert any(text == "Where is the {0}? Thanks." for text in closed)
    for text in typed:
        assert not re.search(r"[?!.]{2}| [?!.]|\{0\},? please", text)
        assert text != text.upper()


@pytest.mark.parametrize(
    ("pattern", "forbidden"),
    [
        ("Repeat this: {0}", r"\}."),  # thanks would be a part of the text
        ("I want to know what it is.", r"\bi want to know what it is\.\s"),
        ("Please read it.", r"(?i)please.*please"),
        ("Name the shape.", r"Please tell me: name"),
    ],
)
def test_openings_and_closings_fit(pattern: str, forbidden: str) -> None:
    rng = Random(1)
    texts = {vary_typing(rng, pattern) for _ in range(600)}
    assert len(texts) >= 2
    assert not [text for text in texts if re.search(forbidden, text)]


def test_fields_keep_their_casing() -> None:
    rng = Random(2)
    texts = [word_question(rng, "repeat", "aB Cd. E") for _ in range(500)]
    assert all("aB Cd. E" in text for text in texts)
    assert any(text == text[0].lower() + text[1:] for text in texts)


def test_questions_of_the_splits_are_different() -> None:
    rng = Random(3)
    held_out = {word_question(rng, "lacks", "{0}", held_out=True) for _ in range(500)}
    trained = {word_question(rng, "lacks", "{0}") for _ in range(2000)}
    assert not trained & held_out
    assert all(map(is_held_out, held_out))
    assert all(not pattern[0].islower() for pattern in held_out)
    assert len(trained) > 1000


def test_a_question_takes_microseconds() -> None:
    rng = Random(4)
    for _ in range(3000):
        word_question(rng, "color_of_kind", "circle")
    start = time.process_time()
    for _ in range(3000):
        word_question(rng, "color_of_kind", "circle")
    assert (time.process_time() - start) / 3000 < 2e-4  # 20 microseconds on an idle core


def test_every_common_task_has_thousands_of_patterns() -> None:
    rng = Random(5)
    for task in ("color_of_kind", "count_some", "exists", "lacks", "find", "read", "position"):
        assert len({sample_pattern(rng, task) for _ in range(1500)}) > 800
