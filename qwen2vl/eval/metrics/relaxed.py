"""Relaxed accuracy of ChartQA: numbers may be off by 5 %, other answers must be equal.

The paper's number is the mean of two splits of the same size, `human` and `augmented`: the mean
over items. (Masry et al., "ChartQA", arXiv 2203.10244, section 5.1, after Methani et al. 2020.)
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from qwen2vl.eval.metrics.scores import Style, require_answers

__all__ = ["relaxed_accuracy"]

NUMBER = re.compile(r"([-+]?(?=[\d.])(?:\d{1,3}(?:,\d{3})+|\d*)(?:\.\d+)?)\s*(%?)", re.ASCII)
YEAR = re.compile(r"(?:1[5-9]|20)\d\d", re.ASCII)


def relaxed_accuracy(
    prediction: str, answers: Sequence[str], *, style: Style, tolerance: float = 0.05
) -> float:
    """Return 1 where the prediction is right for one of the answers, otherwise 0.

    Both kits: where Python's `float` reads both texts, a "%" at the end divides by 100, and the
    answer is not 0, the relative difference may be `tolerance`; otherwise the texts must be equal
    but for case. So "0.0" is wrong for "0", "1,000" for "1000" and "50" for "50%", and a year may
    be off by a century. VLMEvalKit strips the prediction first.

    `strict`: thousands separators, a final full stop and surrounding whitespace are ignored; both
    or neither must have "%"; 0 must be 0, and years (1500 to 2099) must be equal.

    (lmms-eval: chartqa.utils.relaxed_correctness; VLMEvalKit: vqa_eval.process_line.)

    Raises:
        InputError: there are no reference answers.
    """
    if style == "strict":
        return float(any(_is_close(prediction, a, tolerance) for a in require_answers(answers)))
    text = prediction.strip() if style == "vlmevalkit" else prediction
    return float(any(_kits_accept(text, a, tolerance) for a in require_answers(answers)))


def _kits_accept(prediction: str, answer: str, tolerance: float) -> bool:
    found, wanted = _python_number(prediction), _python_number(answer)
    if found is None or not wanted:
        return prediction.lower() == answer.lower()
    return abs(found - wanted) / abs(wanted) <= tolerance


def _python_number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100.0 if text.endswith("%") else float(text)
    except ValueError:
        return None


def _is_close(prediction: str, answer: str, tolerance: float) -> bool:
    texts = [" ".join(text.casefold().split()).removesuffix(".") for text in (prediction, answer)]
    found, wanted = (NUMBER.fullmatch(text) for text in texts)
    if found is None or wanted is None:
        return texts[0] == texts[1] != ""
    if found[2] != wanted[2]:
        return False
    if YEAR.fullmatch(wanted[1]):
        return found[1] == wanted[1]
    values = [float(match[1].replace(",", "")) for match in (found, wanted)]
    return abs(values[0] - values[1]) <= tolerance * abs(values[1])
