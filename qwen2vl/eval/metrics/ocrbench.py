"""OCRBench: 1000 questions, right where an answer occurs in the prediction; the score is the sum.

The kits count in different ways: lmms-eval adds to counters of its module, so that two evaluations
in one process add up. Here nothing is kept. (Liu et al., "OCRBench", arXiv 2305.07895.)
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence

from qwen2vl.eval.metrics.scores import ItemScore, Style, require_answers

__all__ = ["RECOGNITION", "ocrbench_hit", "ocrbench_score"]

RECOGNITION = (
    "Regular Text Recognition",
    "Irregular Text Recognition",
    "Artistic Text Recognition",
    "Handwriting Recognition",
    "Digit String Recognition",
    "Non-Semantic Text Recognition",
)  # question types that are reported together, as "Text Recognition"

# Full-width forms of "!" to "~" and the ideographic space, which lmms-eval alone folds.
FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x3000: 0x20}


def ocrbench_hit(
    prediction: str, answers: Sequence[str], *, is_formula: bool, style: Style
) -> float:
    """Return 1 where one of the answers occurs in the prediction, otherwise 0.

    Args:
        prediction: the model's answer.
        answers: reference answers.
        is_formula: of handwritten formulas (HME100k) all spaces are removed and case counts; other
            texts are stripped and lower-cased, and line breaks become spaces.
        style: `lmms` folds full-width ASCII in texts that are not formulas. `strict` applies NFKC,
            removes or collapses all whitespace, and never accepts an empty answer.

    (lmms-eval: ocrbench.utils.ocrbench_process_results; VLMEvalKit: ocrbench.OCRBench_eval.)

    Raises:
        InputError: there are no reference answers.
    """
    text = _normalize(prediction.strip() if style == "lmms" else prediction, is_formula, style)
    wanted = [_normalize(answer, is_formula, style) for answer in require_answers(answers)]
    return float(any(a in text and (a != "" or style != "strict") for a in wanted))


def ocrbench_score(items: Iterable[ItemScore]) -> dict[str, float]:
    """Return the hits of every question type, of "Text Recognition", and of all as "Final Score".

    Args:
        items: scores with the question type as `group`.
    """
    sums: dict[str, float] = {}
    for item in items:
        sums[item.group] = sums.get(item.group, 0) + item.value
    total = sum(sums.values())
    recognition = sum(sums.get(name, 0) for name in RECOGNITION)
    return {**sums, "Text Recognition": recognition, "Final Score": total}


def _normalize(text: str, is_formula: bool, style: Style) -> str:
    if style == "strict":
        words = unicodedata.normalize("NFKC", text).split()
        return "".join(words) if is_formula else " ".join(words).casefold()
    if is_formula:
        return text.strip().replace("\n", " ").replace(" ", "")
    folded = text.translate(FULL_WIDTH) if style == "lmms" else text
    return folded.lower().strip().replace("\n", " ")
