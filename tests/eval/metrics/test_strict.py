"""The strict rules: what they read, and what they refuse to guess."""

from __future__ import annotations

import pytest

from qwen2vl.errors import InputError
from qwen2vl.eval.metrics.choice_sets import egoschema_choice
from qwen2vl.eval.metrics.multiple_choice import circular_correct, extract_choice
from qwen2vl.eval.metrics.ocrbench import ocrbench_hit, ocrbench_score
from qwen2vl.eval.metrics.open_answers import (
    covered_text_match,
    mathvista_correct,
    mmmu_open_correct,
    mtvqa_correct,
)
from qwen2vl.eval.metrics.relaxed import relaxed_accuracy
from qwen2vl.eval.metrics.scores import ItemScore
from qwen2vl.eval.metrics.vqa import vqa_accuracy
from qwen2vl.eval.metrics.yes_no import (
    HallusionResult,
    MMEResult,
    hallusion_scores,
    mme_scores,
    parse_yes_no,
)

CHOICES = {"A": "a red ball", "B": "the dog", "C": "B", "D": "12"}


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        (" (B). ", "B"),
        ("**B**", "B"),
        ("B.", "B"),
        ("B) The dog.", "B"),
        ("(A) a red ball", "A"),
        ("the dog", "B"),
        ("Dog.", "B"),
        ("12", "D"),
        ("The answer is (A).", "A"),
        ("Answer: D", "D"),
        ("I thought of the dog.\nThe correct option is A.", "A"),
        ("A. the dog", None),  # the letter and the text disagree
        ("A dog", "B"),
        ("A or B", None),
        ("The answer is A. Or the answer is B.", None),
        ("The answer is A dog", None),
        ("E", None),
        ("b", "C"),  # the text of option C
        ("cat", None),
        ("", None),
    ],
)
def test_letters(text: str, letter: str | None) -> None:
    assert extract_choice(text, CHOICES, style="strict") == letter


def test_options_of_egoschema_have_their_letter() -> None:
    choices = {"A": "A. she cooks", "B": "B. she reads"}
    assert egoschema_choice("B. she reads", choices, style="strict") == "B"
    assert egoschema_choice("she reads", choices, style="strict") == "B"


def test_all_rotations_must_be_right() -> None:
    turned = [("A", "A", {"A": "x", "B": "y"}), ("y", "A", {"A": "y", "B": "x"})]
    assert circular_correct(turned, style="strict")
    assert not circular_correct([*turned, ("B", "A", {"A": "x", "B": "y"})], style="strict")
    assert not circular_correct([], style="strict")


@pytest.mark.parametrize(
    ("text", "answer", "is_right"),
    [
        ("10.5", "10", True),
        ("10.51", "10", False),
        ("1,050 ", "1000", True),
        ("1,05", "105", False),
        ("50%", "50%", True),
        ("50", "50%", False),
        ("0.00", "0", True),
        ("0.01", "0", False),
        ("-5.2", "-5", True),
        ("5.2", "-5", False),
        ("2014", "2014", True),
        ("2013", "2014", False),
        ("2,013", "2014", False),
        ("Yes.", "yes", True),
        ("nan", "nan", True),
        ("", "", False),
        ("+", "+", True),
        ("4.2 million", "4.2", False),
    ],
)
def test_charts(text: str, answer: str, is_right: bool) -> None:
    assert relaxed_accuracy(text, [answer], style="strict") == is_right


def test_an_answer_of_which_nothing_is_left_keeps_its_words() -> None:
    assert vqa_accuracy("A", ["a"] * 10, style="strict") == 1
    assert vqa_accuracy("", ["a"] * 10, style="strict") == 0
    many = "." * 40
    assert vqa_accuracy(f"u{many}s", ["us"] * 10, style="strict") == 1  # no limit of 32


@pytest.mark.parametrize(
    ("text", "answer", "is_formula", "hit"),
    [
        ("The word is  HELLO\nworld", "hello world", False, 1),
        ("x^2", "x ^ 2", True, 1),
        ("X", "x", True, 0),
        ("anything", "", False, 0),
        ("", "a", False, 0),
    ],
)
def test_text_recognition(text: str, answer: str, is_formula: bool, hit: int) -> None:
    assert ocrbench_hit(text, [answer], is_formula=is_formula, style="strict") == hit


def test_the_score_of_ocrbench_is_the_number_of_hits() -> None:
    types = ["Handwriting Recognition", "Digit String Recognition", "Doc-oriented VQA"]
    hits = [ItemScore(value=1, group=name) for name in types for _ in range(2)]
    for _ in range(2):  # nothing is kept between evaluations
        scores = ocrbench_score(hits)
        assert (scores["Text Recognition"], scores["Final Score"]) == (4, 6)


def test_yes_and_no_are_words() -> None:
    texts = {"Yes, it is.": "yes", "no": "no", "yes or no": None, "yesterday": None, "Not": None}
    assert {text: parse_yes_no(text, style="strict") for text in texts} == texts


def test_both_questions_of_an_image_count_in_mme() -> None:
    rights = {"1": (True, True), "2": (True, False)}
    results = [
        MMEResult(category=c, image=i, is_correct=right)
        for c in ("OCR", "code_reasoning")
        for i, pair in rights.items()
        for right in pair
    ]
    scores = mme_scores(results)
    assert scores["OCR"] == 75 + 50
    assert (scores["perception"], scores["cognition"], scores["total"]) == (125, 125, 250)
    with pytest.raises(InputError, match="image 2: 1 answers, must be 2"):
        mme_scores(results[:3])


def test_groups_of_hallusion_bench() -> None:
    def result(category: str, figure: str, question: str, right: bool) -> HallusionResult:
        return HallusionResult(
            category=category,
            subcategory="ocr",
            set_id="0",
            figure_id=figure,
            question_id=question,
            is_correct=right,
        )

    results = [
        result("VD", "0", "0", True),
        result("VD", "0", "1", False),
        result("VS", "0", "0", True),
        result("VS", "1", "0", True),
    ]
    strict = hallusion_scores(results, style="strict")
    assert strict == pytest.approx(
        {"aAcc": 3 / 4, "fAcc": 2 / 3, "qAcc": 2 / 3, "average": (3 / 4 + 4 / 3) / 3}
    )
    merged = hallusion_scores(results, style="vlmevalkit")  # "ocr" of VD and of VS together
    assert (merged["fAcc"], merged["qAcc"]) == (0.5, 0.5)


def test_open_answers() -> None:
    assert mmmu_open_correct("First 3. Then the result is 8.0", ["8"], style="strict")
    assert mmmu_open_correct("The answer is the red ball.", ["red ball"], style="strict")
    assert not mmmu_open_correct("The answer is infrared", ["red"], style="strict")
    assert mmmu_open_correct("The answer is infrared", ["red"], style="lmms")
    assert mtvqa_correct("Das war  CAFE\u0301.", "caf\u00e9", style="strict")
    assert not mtvqa_correct("x", "", style="strict")


def test_mathvista() -> None:
    options = {"question_type": "multi_choice", "answer_type": "text", "choices": ["3/11", "8/11"]}
    assert mathvista_correct("(B)", "8/11", **options, style="strict")
    assert not mathvista_correct("8/12", "8/11", **options, style="strict")
    assert mathvista_correct("8/12", "8/11", **options, style="lmms")  # the most similar
    number = {"question_type": "free_form", "answer_type": "float", "precision": 1}
    assert mathvista_correct("1.26", "1.3", **number, style="strict")
    assert not mathvista_correct("about 1.3", "1.3", **number, style="strict")


def test_covered_text() -> None:
    def match(text: str) -> tuple[float, float]:
        return covered_text_match(text, "the old town", str.split, is_chinese=False)

    assert match("It says the old town here") == (1, 1)
    assert match("the new town") == (0, pytest.approx(2 / 4))
    assert match("nothing") == match("") == match("sorry, the old town") == (0, 0)
