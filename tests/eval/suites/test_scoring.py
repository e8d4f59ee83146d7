"""Metrics of suites by name: exact match, edit distance, IoU of boxes."""

from __future__ import annotations

import pytest

from qwen2vl.eval.suites.scoring import AnswerScore, score_answer

BOX = (0.1, 0.2, 0.5, 0.6)


@pytest.mark.parametrize(
    ("answer", "is_correct"),
    [("rectangle", True), ("A Square.", True), ("square hole", False), ("", False), ("n", False)],
)
def test_exact_match_is_normalized_and_accepts_any_answer(answer: str, is_correct: bool) -> None:
    assert score_answer("exact_match", ("rectangle", "square"), answer) == AnswerScore(is_correct)


def test_edit_distance_compares_case_and_ignores_surrounding_whitespace_only() -> None:
    assert score_answer("edit_distance", ("Ab c",), " Ab c\n") == AnswerScore(True, 0, 4)
    assert score_answer("edit_distance", ("Ab c",), "ab  c") == AnswerScore(False, 2, 4)


@pytest.mark.parametrize(
    ("reference", "answer"),
    [
        ("\u0921\u093c", "\u095c"),  # Devanagari: NFC has no single code point for it
        ("caf\u00e9", "cafe\u0301"),
        ("\u0645\u0631\u062d\u0628\u0627", "\u200f\u0645\u0631\u062d\u0628\u0627"),
    ],
)
def test_equivalent_spellings_of_a_line_are_equal(reference: str, answer: str) -> None:
    scored = score_answer("edit_distance", (reference,), answer)
    assert scored == AnswerScore(True, 0, len(reference))
    assert score_answer("edit_distance", (answer,), reference) == scored


def test_a_typographic_apostrophe_is_an_apostrophe() -> None:
    assert score_answer("exact_match", ("I can't tell.",), "I can\u2019t tell.").is_correct


@pytest.mark.parametrize(
    ("answer", "is_correct"),
    [
        ("<|box_start|>(100,200),(500,600)<|box_end|>", True),
        ("(100,200),(500,400)", True),  # an IoU of one half
        ("(100,200),(500,399)", False),
        ("red circle", False),
    ],
)
def test_box_iou_takes_the_first_box(answer: str, is_correct: bool) -> None:
    assert score_answer("box_iou", ("",), answer, box=BOX).is_correct is is_correct
