"""Yes-no questions in groups: MME (two per image) and HallusionBench (figures and questions).

MME: 100 x accuracy + 100 x accuracy+ of each category, where accuracy+ is the share of images whose
two questions are both right; the paper's number is the sum of all 14 categories, at most 2800.
HallusionBench: the paper's number is the mean of the accuracies over answers, figures and
questions. (Fu et al., arXiv 2306.13394; Guan et al., arXiv 2310.14566.)
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Literal

from qwen2vl.errors import InputError
from qwen2vl.eval.metrics.scores import Style, mean
from qwen2vl.eval.metrics.vqa import remove_punctuation

__all__ = [
    "MME_COGNITION",
    "HallusionResult",
    "MMEResult",
    "hallusion_scores",
    "mme_scores",
    "parse_hallusion_answer",
    "parse_yes_no",
]

MME_COGNITION = frozenset(
    {"commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"}
)  # the other ten categories are perception

YesNo = Literal["yes", "no"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MMEResult:
    """Whether one of the two questions about an image was answered right."""

    category: str
    image: str  # name of the image within its category
    is_correct: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class HallusionResult:
    """Whether one question of HallusionBench was answered right."""

    category: str  # "VD" or "VS"
    subcategory: str
    set_id: str
    figure_id: str
    question_id: str
    is_correct: bool


def parse_yes_no(text: str, *, style: Style) -> YesNo | None:
    """Read "yes" or "no" from an answer; None where neither can be read.

    `lmms`: "yes", then "no", within the first four characters, so that "Not sure" is no; "y" and
    "n" alone. `vlmevalkit`: exactly one of both is a word, after its punctuation is removed.
    `strict`: exactly one of both is a word. (lmms-eval: mme.utils.parse_pred_ans; VLMEvalKit:
    yorn.YOrN_Extraction.)
    """
    if style == "lmms":
        return _from_start(text.lower().strip().replace(".", ""))
    if style == "vlmevalkit":
        words = set(remove_punctuation(text.lower(), style=style).split())
    else:
        words = set(re.findall(r"[^\W\d_]+", text.casefold()))
    if ("yes" in words) == ("no" in words):
        return None
    return "yes" if "yes" in words else "no"


def parse_hallusion_answer(text: str, *, style: Style) -> YesNo | None:
    """Read the answer to a question of HallusionBench.

    `lmms` is its rule without a judge: yes where "yes" occurs, otherwise no, so that every answer
    can be read. The other two are those of `parse_yes_no`. (lmms-eval:
    evaluate_hb.hb_aggregation_result_intern; its task asks a judge; VLMEvalKit: yorn.)
    """
    if style == "lmms":
        return "yes" if "yes" in text.lower() else "no"
    return parse_yes_no(text, style=style)


def mme_scores(results: Iterable[MMEResult]) -> dict[str, float]:
    """Return the score of each category, and "perception", "cognition" and their sum "total".

    (lmms-eval: mme.utils.mme_aggregate_results; VLMEvalKit: yorn.MME_rating.)

    Raises:
        InputError: an image has not two questions.
    """
    categories: dict[str, dict[str, list[bool]]] = {}
    for result in results:
        images = categories.setdefault(result.category, {})
        images.setdefault(result.image, []).append(result.is_correct)
    for category, images in categories.items():
        for image, pair in images.items():
            if len(pair) != 2:
                raise InputError(
                    f"MME, {category}, image {image}: {len(pair)} answers, must be 2; accuracy+ "
                    "needs both questions of an image"
                )
    scores = {
        category: 100 * mean(sum(pair) / 2 for pair in images.values())
        + 100 * mean(float(all(pair)) for pair in images.values())
        for category, images in sorted(categories.items())
    }
    cognition = [scores[name] for name in scores if name in MME_COGNITION]
    perception = [scores[name] for name in scores if name not in MME_COGNITION]
    sums = {"perception": _sum(perception), "cognition": _sum(cognition)}
    return {**scores, **sums, "total": _sum(scores.values())}


def hallusion_scores(results: Iterable[HallusionResult], *, style: Style) -> dict[str, float]:
    """Return "aAcc", "fAcc", "qAcc", 0 to 1, and their mean as "average".

    All questions of a figure, and all figures of a question, must be right to count. VLMEvalKit
    leaves the category out of the names of groups, so that groups of VD and VS whose subcategory is
    the same ("ocr") fall together. (lmms-eval: evaluate_hb; VLMEvalKit: yorn.Hallusion_rating.)
    """
    answers: list[float] = []
    figures: dict[Hashable, list[bool]] = {}
    questions: dict[Hashable, list[bool]] = {}
    for r in results:
        category = "" if style == "vlmevalkit" else r.category
        group = (category, r.subcategory, r.set_id)
        answers.append(float(r.is_correct))
        figures.setdefault((*group, r.figure_id), []).append(r.is_correct)
        questions.setdefault((*group, r.question_id), []).append(r.is_correct)
    scores = {
        "aAcc": mean(answers),
        "fAcc": mean(float(all(group)) for group in figures.values()),
        "qAcc": mean(float(all(group)) for group in questions.values()),
    }
    return {**scores, "average": mean(scores.values())}


def _from_start(text: str) -> YesNo | None:
    if len(text) == 1:
        return {"y": "yes", "n": "no"}.get(text)  # type: ignore[return-value]
    start = text[:4]
    if "yes" in start:
        return "yes"
    return "no" if "no" in start else None


def _sum(values: Iterable[float]) -> float:
    listed = list(values)
    return mean(listed) * len(listed)
