"""Question wordings: number, held-out quarter, and the questions of each split."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from functools import cache
from random import Random

import pytest

from qwen2vl.synth import Mixture, sample
from qwen2vl.synth.colors import COLORS
from qwen2vl.synth.families.text_only import SMALL_TALK
from qwen2vl.synth.shape_masks import SHAPE_KINDS
from qwen2vl.synth.wordings import (
    OPENINGS,
    load_wordings,
    sample_question_text,
    trained_wordings,
    wordings_of,
)

MAIN = "read name_shape describe color color_of_kind count_all count_some position larger exists "
MAIN += "find name_box same_shape same_color same_text which_has_more direction appeared_first "
MAIN += "moved_first repeat reverse spell character_at who_are_you what_can_you_do"

FAMILIES = ("text", "shapes", "grounding", "two_pictures", "motion", "text_only")

# Words of the names in questions.
_NAMES = ("the", "and", "shapes?", "first", "second", "left", "right", "up", "down", *COLORS)
_NAMES += tuple(f"{kind}(?:e?s)?" for kind in SHAPE_KINDS)

# Another hash means other training data, and held-out wordings that a model may have seen.
FROZEN_WORDINGS = "a250b99e5d45e422"


def _shape_of(text: str) -> str:
    return re.sub(r"\{\d\}", "{}", text)


def test_the_wordings_are_frozen() -> None:
    content = repr(list(load_wordings().items())).encode()
    assert hashlib.sha256(content).hexdigest()[:16] == FROZEN_WORDINGS


@pytest.mark.parametrize("task", MAIN.split())
def test_main_tasks_have_at_least_twelve_wordings(task: str) -> None:
    assert len(load_wordings()[task]) >= 12


@pytest.mark.parametrize("task", sorted(load_wordings()))
def test_a_quarter_is_held_out(task: str) -> None:
    train, held_out = wordings_of(task, "train"), wordings_of(task, "held_out")
    assert len(held_out) * 3 <= len(train) <= len(held_out) * 3 + 3
    assert not set(train) & set(held_out)
    assert sorted(train + held_out) == sorted(wordings_of(task, "all"))
    assert len(set(wordings_of(task, "all"))) == len(wordings_of(task, "all"))


def test_no_wording_is_held_out_of_one_task_and_trained_in_another() -> None:
    train = {_shape_of(w) for task in load_wordings() for w in wordings_of(task, "train")}
    held_out = {_shape_of(w) for task in load_wordings() for w in wordings_of(task, "held_out")}
    assert not train & held_out


def test_training_leaves_out_the_patterns_of_easy_vqa() -> None:
    dropped = {
        wording
        for task in load_wordings()
        for wording in set(wordings_of(task, "train")) - set(trained_wordings(task))
    }
    assert dropped == {
        "What color is the shape?",
        "What color is the {0}?",
        "Is there a {0}?",
        # That of wordings.json without marks is held out.
        "Locate <|object_ref_start|>the {0}<|object_ref_end|>.",
    }


@cache
def _pattern(task: str, split: str, field: str = ".+") -> re.Pattern[str]:
    name = {"count_kind": "count_some", "count_color": "count_some"}.get(task, task)
    plain = (re.escape(_plain(wording)) for wording in wordings_of(name, split))
    return re.compile("|".join(re.sub(r"\\{\d\\}", lambda _: field, w) for w in plain))


def _plain(text: str) -> str:
    """Remove what distinguishes a casual question from its wording."""
    for opening in OPENINGS:
        text = text.removeprefix(opening)
    return text.rstrip(".?").lower()


@pytest.mark.parametrize("split", ["held_out", "all"])
def test_the_other_splits_have_wordings_as_they_are_written(split: str) -> None:
    weights = dict.fromkeys(FAMILIES, 1.0)
    mixture = Mixture(weights=weights, split=split, max_questions=3, fonts="bundled")  # type: ignore[arg-type]
    for index in range(250):
        for question in sample(0, index, mixture).questions:
            text = re.sub(r"\ban (?=orange)", "a ", question.text)
            assert _pattern(question.task, split).fullmatch(_plain(text)), text


def test_training_has_no_held_out_wordings() -> None:
    mixture = Mixture(weights=dict.fromkeys(FAMILIES, 1.0), max_questions=3, fonts="bundled")
    name = f"(?:{'|'.join(_NAMES)})"
    field = rf"(?:<\|box.+>|{name}(?:,? {name})*)"
    # Of small talk "hi" is held out and "hi!" trained; a text to copy may be at any place.
    excluded = {"repeat", "reverse", "spell", "character_at", *SMALL_TALK}
    for index in range(250):
        for question in sample(0, index, mixture).questions:
            if question.task not in excluded:
                text = re.sub(r"\ban (?=orange)", "a ", question.text)
                assert not _pattern(question.task, "held_out", field).fullmatch(_plain(text)), text


def test_a_third_of_the_training_questions_has_listed_wordings() -> None:
    rng = Random(0)
    asked = Counter(
        _plain(sample_question_text(rng, "position", "train", "star")) for _ in range(3000)
    )
    listed = {_plain(w.format("star")) for w in trained_wordings("position")}
    share = sum(asked[text] for text in listed) / 3000
    assert 0.3 < share < 0.4
    assert len(asked) > 1000
    assert all(asked[text] > 40 for text in listed)


def test_only_training_questions_are_casual() -> None:
    rng = Random(0)
    asked = [sample_question_text(rng, "find", "train", "red circle") for _ in range(800)]
    opened = sum(question.startswith(OPENINGS) for question in asked)
    bare = sum(question[-1] not in ".?>!" for question in asked)
    assert 30 < opened < 120
    assert bare > 60
    official = {w.format("red circle") for w in wordings_of("find", "held_out")}
    assert {
        sample_question_text(rng, "find", "held_out", "red circle") for _ in range(300)
    } == official


def test_article_agrees_with_the_word() -> None:
    mixture = Mixture(
        weights={"shapes": 1.0, "two_pictures": 1.0}, max_questions=4, fonts="bundled"
    )
    asked = [q.text for i in range(400) for q in sample(0, i, mixture).questions]
    assert any(" an orange " in text for text in asked)
    assert not any(re.search(r"\ba orange|\ban (?![aeiou])", text, re.I) for text in asked)
