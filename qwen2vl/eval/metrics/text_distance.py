"""Edit distance and what builds on it: character error rate, ANLS, and normalized exact match.

ANLS (average normalized Levenshtein similarity) scores DocVQA and InfoVQA: 1 minus the edit
distance over the longer length, of the best reference answer, and 0 below a half.
(Biten et al., "Scene Text Visual Question Answering", arXiv 1905.13648.)
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from math import nan

from qwen2vl import grounding
from qwen2vl.eval.metrics.scores import Style, require_answers

__all__ = [
    "anls",
    "character_error_rate",
    "edit_distance",
    "normalize_answer",
    "normalize_line",
]


def edit_distance(a: str, b: str) -> int:
    """Return the Levenshtein distance: fewest insertions, deletions and replacements from a to b.

    Compares code points; takes len(a) * len(b) steps.
    """
    row = list(range(len(b) + 1))  # distances from the first i characters of a to each prefix of b
    for i, left in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, right in enumerate(b, 1):
            replaced = diagonal + (left != right)
            diagonal = row[j]
            row[j] = min(replaced, row[j] + 1, row[j - 1] + 1)
    return row[-1]


def character_error_rate(predictions: Sequence[str], truths: Sequence[str]) -> float:
    """Return edits over characters of the ground truth (CER), both summed over all lines.

    NaN where the ground truth has no characters.
    """
    edits = sum(edit_distance(p, t) for p, t in zip(predictions, truths, strict=True))
    length = sum(map(len, truths))
    return edits / length if length else nan


def anls(prediction: str, answers: Sequence[str], *, style: Style, threshold: float = 0.5) -> float:
    """Return the normalized Levenshtein similarity of the best reference answer, 0 to 1.

    Case and whitespace are normalized before the distance. In both kits the distance is divided by
    the length of the texts as they were, so that extra whitespace raises the score; `strict`
    divides by the length of the normalized texts. (lmms-eval: api.metrics.anls; VLMEvalKit:
    vqa_eval.anls_compute and hit_calculate.)

    Raises:
        InputError: there are no reference answers.
    """
    similarity = max(_similarity(prediction, a, style) for a in require_answers(answers))
    return similarity if similarity >= threshold else 0.0


def _similarity(prediction: str, answer: str, style: Style) -> float:
    left, right = (" ".join(text.lower().split()) for text in (answer, prediction))
    if style == "strict":
        length = max(len(left), len(right))
    else:  # upper() can change the number of characters
        length = max(len(answer.upper()), len(prediction.upper()))
    return 1 - edit_distance(left, right) / length if length else 1.0


def normalize_line(text: str) -> str:
    """Normalize a recognized line of text: NFC, without invisible format characters.

    Canonically equivalent spellings become equal (U+095C and U+0921 U+093C), joiners and marks of
    direction disappear, and surrounding whitespace is removed.
    """
    visible = "".join(char for char in text if unicodedata.category(char) != "Cf")
    return unicodedata.normalize("NFC", visible).strip()


def normalize_answer(answer: str) -> str:
    """Normalize a short answer for exact match: "A red circle. " becomes "red circle".

    Removes grounding tokens, surrounding whitespace, one final full stop, case and a leading
    article, and collapses whitespace; a typographic apostrophe becomes a plain one. Not used for
    text recognition: `normalize_line`. (As in the evaluation of SQuAD and VQA.)
    """
    for token in grounding.GROUNDING_TOKENS:
        answer = answer.replace(token, " ")
    words = answer.replace("\N{RIGHT SINGLE QUOTATION MARK}", "'").casefold().split()
    if len(words) > 1 and words[0] in ("a", "an", "the"):
        words = words[1:]
    return " ".join(words).removesuffix(".")
