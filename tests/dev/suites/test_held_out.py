"""The list of held-out patterns is that of the suites, and training questions have none of them."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

import pytest

from dev.suites.held_out import FILE, SUITES, list_held_out
from dev.suites.wordings import TYPING, find_held_out_pattern, held_out_patterns
from qwen2vl.eval.suites.easy_vqa import load_definition
from qwen2vl.eval.suites.frozen_suite import open_frozen_suite
from qwen2vl.synth import FAMILIES, Mixture, sample
from qwen2vl.synth.grammar import load_templates, sample_pattern, word_question
from qwen2vl.synth.grammar.holdout import is_held_out, load_wordings, normalize_pattern
from qwen2vl.synth.spec import FAMILY_NAMES
from tests.requirements import needs_dataset

# Families whose pictures are drawn without a dataset.
PLAIN = ("text", "shapes", "grounding", "two_pictures", "motion", "text_only")


def all_patterns() -> Iterator[str]:
    """Yield the patterns that training must avoid, as the suites and easy-VQA write them."""
    for listed in held_out_patterns().values():
        yield from listed
    for suite in SUITES:
        yield from open_frozen_suite(suite).header.held_out["patterns"]
    for patterns in load_definition().patterns.values():
        yield from patterns


def check_questions(weights: dict[str, float], count: int) -> None:
    mixture = Mixture(
        weights=weights,
        fonts="bundled",
        max_questions=4,
        list_share=0.2,
        page_share=0.3,
        picture_side=(64, 128),
    )
    easy_vqa = load_definition()
    held_out = {normalize_pattern(pattern) for pattern in all_patterns() if "{" not in pattern}
    for index in range(count):
        for question in sample(11, index, mixture).questions:
            text = question.text
            assert find_held_out_pattern(text) is None, text
            assert easy_vqa.find_pattern(text) is None, text
            assert normalize_pattern(text) not in held_out, text


def test_the_file_is_that_of_the_suites() -> None:
    assert FILE.read_text(encoding="utf-8").splitlines() == list_held_out()


def test_every_pattern_of_the_suites_is_held_out() -> None:
    patterns = list(all_patterns())
    assert len(patterns) > 250
    for pattern in patterns:
        assert is_held_out(pattern), pattern
        assert is_held_out(pattern.lower().rstrip(".?")), pattern
        assert is_held_out(pattern.rstrip(".?") + "? One word."), pattern


def test_every_pattern_with_a_name_in_it_is_held_out() -> None:
    for patterns in held_out_patterns().values():
        for pattern in patterns:
            assert is_held_out(pattern.replace("{0}", "snow-capped mountain")), pattern


def test_no_trained_pattern_is_one_of_the_suites() -> None:
    keys = {normalize_pattern(pattern) for pattern in all_patterns()}
    rng = Random(0)
    for task in load_templates():
        patterns = {sample_pattern(rng, task) for _ in range(60 if task in load_wordings() else 10)}
        for pattern in filter(lambda pattern: not is_held_out(pattern), patterns):
            assert normalize_pattern(pattern) not in keys, pattern
            filled = pattern.replace("{0}", "red star").replace("{1}", "blue cross")
            assert find_held_out_pattern(filled) is None, pattern


def test_no_question_is_typed_as_those_of_the_suite() -> None:
    rng = Random(1)
    for _ in range(3000):
        text = word_question(rng, "color_of_kind", "circle")
        for name, typing in TYPING.items():
            if name != "capitals without a final mark" or text[-1] in "?.":
                assert text != typing(text) or text[-1] not in "?.", (name, text)
        assert "??" not in text and " ?" not in text and not text.isupper()


def test_questions_of_the_first_families_have_no_held_out_pattern() -> None:
    check_questions(dict.fromkeys(PLAIN, 1.0), 250)


@needs_dataset("named-pictures")
@pytest.mark.parametrize("family", [name for name in FAMILY_NAMES if name not in PLAIN])
def test_questions_of_a_family_have_no_held_out_pattern(family: str) -> None:
    if family not in FAMILIES:
        pytest.skip(f"{family} is not registered")
    check_questions({family: 1.0}, 40)
