"""Task family `documents`: receipts, tables, bar charts, seven-segment displays and windows.

A picture shows one document, and each question asks for one fact about it. The questions of a
conversation have different subjects, so that no answer follows from an earlier one; the question
that asks to read a whole receipt is the last.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from random import Random
from types import MappingProxyType

from qwen2vl.grounding import Box, ObjectRef
from qwen2vl.synth.compositing.layers import Composite
from qwen2vl.synth.documents import (
    DocumentSample,
    Fact,
    sample_chart,
    sample_display,
    sample_receipt,
    sample_screen,
    sample_table,
)
from qwen2vl.synth.grammar import word_question
from qwen2vl.synth.spec import FamilySample, Mixture, Question

__all__ = ["TASK_WEIGHTS", "sample"]

_KINDS: Mapping[Callable[[Random, Mixture], DocumentSample | None], float] = MappingProxyType(
    {
        sample_receipt: 1.0,
        sample_table: 1.0,
        sample_chart: 1.0,
        sample_display: 1.0,
        sample_screen: 1.0,
    }
)

# Tasks that are asked more or less often than others about the same document, which have 1.
TASK_WEIGHTS: Mapping[str, float] = MappingProxyType(
    {
        "receipt_total": 2.0,
        "receipt_price": 2.0,
        "table_cell": 3.0,
        "table_rows": 0.5,
        "table_columns": 0.4,
        "table_header": 0.5,
        "table_first": 0.5,
        "table_last": 0.5,
        "chart_value": 2.0,
        "chart_superlative": 1.5,
        "chart_count": 0.5,
        "chart_position": 0.5,
        "display_number": 4.0,
        "display_time": 4.0,
        "display_temperature": 2.0,
        "display_value_of": 2.0,
        "display_color": 0.7,
        "screen_title": 0.7,
        "screen_click": 2.0,
        "screen_button_count": 0.4,
    }
)
_REPEATED = 0.5  # factor of the weight of a task that was asked already
_LAST = "read_receipt"


def sample(rng: Random, mixture: Mixture) -> FamilySample:
    """Sample a document and up to `max_questions` questions about it.

    Raises:
        FontError: a font of the mixture is not installed.
    """
    document = None
    while document is None:
        (kind,) = rng.choices(list(_KINDS), list(_KINDS.values()))
        document = kind(rng, mixture)
    facts = _sample_facts(rng, document.facts, mixture.max_questions)
    questions = [_ask(rng, fact, document.picture, mixture.split) for fact in facts]
    return FamilySample(tuple(questions), (document.picture,))


def _sample_facts(rng: Random, facts: tuple[Fact, ...], most: int) -> list[Fact]:
    """Sample facts that share no subject; a task is chosen first, then one of its facts."""
    by_task: dict[str, list[Fact]] = {}
    for fact in facts:
        by_task.setdefault(fact.task, []).append(fact)
    weights = {task: TASK_WEIGHTS.get(task, 1.0) for task in by_task}
    chosen: list[Fact] = []
    subjects: set[str] = set()
    while weights and len(chosen) < most:
        (task,) = rng.choices(list(weights), list(weights.values()))
        free = [fact for fact in by_task[task] if subjects.isdisjoint(fact.about)]
        if not free:
            del weights[task]
            continue
        fact = rng.choice(free)
        chosen.append(fact)
        subjects |= fact.about
        weights[task] *= _REPEATED
    return sorted(chosen, key=lambda fact: fact.task == _LAST)


def _ask(rng: Random, fact: Fact, picture: Composite, split: str) -> Question:
    text = word_question(rng, fact.task, *fact.fields, held_out=split == "held_out")
    answer = fact.answer
    if fact.box is not None:
        box = Box.from_pixels(fact.box, (picture.height, picture.width))
        answer = ObjectRef(answer).to_text() + box.to_text()
    return Question(task=fact.task, text=text, answer=answer, box=fact.box, choices=fact.choices)
