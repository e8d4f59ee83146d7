"""Scores of answers to public items: one item, and a whole set with the number that papers report.

Each metric has the rule of one style (`qwen2vl.eval.metrics`). An answer that cannot be read is
wrong and lowers the parse rate; nothing is drawn at random, and no judge is asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from qwen2vl.errors import InputError
from qwen2vl.eval.metrics import choice_sets as choice
from qwen2vl.eval.metrics.grounding import referring_accuracy
from qwen2vl.eval.metrics.multiple_choice import circular_correct, extract_choice
from qwen2vl.eval.metrics.ocrbench import ocrbench_hit, ocrbench_score
from qwen2vl.eval.metrics.open_answers import mmmu_open_correct, mtvqa_correct
from qwen2vl.eval.metrics.relaxed import relaxed_accuracy
from qwen2vl.eval.metrics.scores import ItemScore, Style, require_answers, summarize
from qwen2vl.eval.metrics.text_distance import anls
from qwen2vl.eval.metrics.vqa import vqa_accuracy
from qwen2vl.eval.metrics.yes_no import (
    HallusionResult,
    MMEResult,
    hallusion_scores,
    mme_scores,
    parse_hallusion_answer,
    parse_yes_no,
)
from qwen2vl.eval.public_sets.items import Metric, PublicItem

__all__ = ["score_item", "score_set"]

Reader = Callable[..., str | None]

READERS: Mapping[str, Reader] = {
    "multiple_choice": extract_choice,
    "mmbench": extract_choice,
    "mmmu": choice.mmmu_choice,
    "mmt_bench": choice.mmt_choice,
    "perception_test": choice.perception_test_choice,
    "egoschema": choice.egoschema_choice,
    "video_mme": choice.video_mme_choice,
}
TEXTS: Mapping[str, Callable[..., float]] = {
    "anls": anls,
    "relaxed_accuracy": relaxed_accuracy,
    "vqa_accuracy": vqa_accuracy,
}
JUDGED: Mapping[str, Callable[..., bool]] = {
    "ai2d": choice.option_letter_match,
    "realworldqa": choice.realworldqa_correct,
    "mvbench": choice.mvbench_correct,
}


def score_item(item: PublicItem, text: str, *, style: Style) -> ItemScore:
    """Score the answer to one item.

    Rotations of MMBench are scored one by one; `score_set` puts them together.

    Raises:
        InputError: the item has no references, as in test splits that a server scores.
    """
    if item.metric == "refcoco":
        box, size = item.details["box"], item.details["size"]
        found = referring_accuracy(text, box, size, style=style)
        return ItemScore(value=found.value, is_parsed=found.is_parsed, group=item.group)
    answers = require_answers(item.answers)
    value, is_parsed = _value(item, text, answers, style)
    return ItemScore(value=float(value), is_parsed=is_parsed, group=item.group)


def _value(item: PublicItem, text: str, answers: Sequence[str], style: Style) -> tuple[float, bool]:
    """Return the score, and whether an answer could be read."""
    is_parsed = bool(text.strip())
    if item.metric in TEXTS:
        return TEXTS[item.metric](text, answers, style=style), is_parsed
    if item.metric == "ocrbench":
        formula = bool(item.details["is_formula"])
        return ocrbench_hit(text, answers, is_formula=formula, style=style), is_parsed
    if item.metric == "mtvqa":
        return mtvqa_correct(text, answers[0], style=style), is_parsed
    if item.metric in ("mme", "hallusion_bench"):
        read = parse_yes_no if item.metric == "mme" else parse_hallusion_answer
        found = read(text, style=style)
        return found == answers[0], found is not None
    if item.metric == "mmmu" and not item.choices:
        return mmmu_open_correct(text, answers, style=style), is_parsed
    if item.metric in JUDGED:
        right = JUDGED[item.metric](text, answers[0], item.choices, style=style)
        readable = extract_choice(text, item.choices, style=style) is not None
        return right, right or readable or (not item.choices and is_parsed)
    letter = READERS[item.metric](text, item.choices, style=style)
    return letter == answers[0], letter is not None


def score_set(
    items: Sequence[PublicItem], texts: Sequence[str], *, style: Style
) -> dict[str, float]:
    """Score the answers to a set, whose items have one metric.

    Returns:
        "score", the number that papers report: 0 to 100, for MME up to 2800, for OCRBench the
        hits; "low" and "high", the 95 % interval of the mean over items; "count" of items;
        "parse_rate", 0 to 1; and the parts and groups of the score. NaN where there are no items.

    Raises:
        InputError: the numbers of items and answers differ, the metrics of the items differ, or
            references are absent.
    """
    if len(items) != len(texts):
        raise InputError(f"{len(texts)} answers to {len(items)} items; each item needs one")
    metrics: set[Metric] = {item.metric for item in items}
    if len(metrics) > 1:
        raise InputError(f"one set has one metric, got {', '.join(sorted(metrics))}")
    pairs = list(zip(items, texts, strict=True))
    scores = [score_item(item, text, style=style) for item, text in pairs]
    metric = next(iter(metrics), None)
    is_over_groups = style == "lmms" and metric == "multiple_choice"  # MMStar
    summary = summarize(scores, over="groups" if is_over_groups else "items")
    parts = _parts(metric, pairs, scores, style)
    low, high = summary.interval
    return {
        "score": 100 * summary.value,
        "count": summary.count,
        "parse_rate": summary.parse_rate,
        "low": 100 * low,
        "high": 100 * high,
        **{name: 100 * value for name, value in summary.groups.items() if name},
        **parts,
    }


def _parts(
    metric: Metric | None,
    pairs: Sequence[tuple[PublicItem, str]],
    scores: Sequence[ItemScore],
    style: Style,
) -> dict[str, float]:
    """Return the score and its parts, where a set has another one than a mean."""
    if metric == "mme":
        found = mme_scores(
            MMEResult(category=item.group, image=item.details["image"], is_correct=score.value == 1)
            for (item, _), score in zip(pairs, scores, strict=True)
        )
        return {**found, "score": found["total"]}
    if metric == "hallusion_bench":
        results = (
            HallusionResult(**item.details, is_correct=score.value == 1)
            for (item, _), score in zip(pairs, scores, strict=True)
        )
        percent = {k: 100 * v for k, v in hallusion_scores(results, style=style).items()}
        return {**percent, "score": percent["average"]}
    if metric == "ocrbench":
        hits = ocrbench_score(scores)
        return {**hits, "score": hits["Final Score"]}
    if metric == "mvbench":
        rights = ((text, s.value == 1) for (_, text), s in zip(pairs, scores, strict=True))
        return {"score": 100 * choice.mvbench_accuracy(rights, style=style)}
    if metric == "mmbench":
        return {"score": 100 * _circular(pairs, style)}
    return {}


def _circular(pairs: Iterable[tuple[PublicItem, str]], style: Style) -> float:
    questions: dict[str, list[tuple[str, str, Mapping[str, str]]]] = {}
    for item, text in pairs:
        rotation = (text, item.answers[0], item.choices)
        questions.setdefault(item.details["question"], []).append(rotation)
    right = [circular_correct(rotations, style=style) for rotations in questions.values()]
    return summarize(ItemScore(value=float(r)) for r in right).value
