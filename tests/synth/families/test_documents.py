"""Documents: conversations about them, wordings, sizes, speed of drawing."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from functools import cache
from importlib.resources import files
from itertools import combinations
from random import Random

import pytest

from qwen2vl import grounding
from qwen2vl.synth.compositing import draw_composite
from qwen2vl.synth.compositing.layers import Composite
from qwen2vl.synth.documents import (
    sample_chart,
    sample_display,
    sample_receipt,
    sample_screen,
    sample_table,
)
from qwen2vl.synth.families.documents import TASK_WEIGHTS, sample
from qwen2vl.synth.grammar.expansion import list_patterns
from qwen2vl.synth.grammar.holdout import is_held_out
from qwen2vl.synth.spec import FamilySample, Mixture, Spec

MIXTURE = Mixture(fonts="bundled", max_questions=4)
KINDS = (sample_receipt, sample_table, sample_chart, sample_display, sample_screen)
TEMPLATES: dict[str, list[str]] = json.loads(
    files("qwen2vl.synth.grammar").joinpath("documents.json").read_text(encoding="utf-8")
)
# Tasks whose questions may be the same: the answer is the label of a bar.
SAME_FORMAT = {"chart_superlative", "chart_position", "chart_label_of_color"}


@cache
def patterns_of(task: str) -> frozenset[str]:
    return frozenset(p for template in TEMPLATES[task] for p in list_patterns(template))


def drawn(count: int, mixture: Mixture = MIXTURE) -> list[FamilySample]:
    return [sample(Random(f"tests/{index}"), mixture) for index in range(count)]


def test_samples_are_reproducible_and_convert_to_json() -> None:
    for index, one in enumerate(drawn(40)):
        assert one == sample(Random(f"tests/{index}"), MIXTURE)
        spec = Spec(
            family="documents", seed=1, index=index, questions=one.questions, pictures=one.pictures
        )
        assert Spec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


def test_conversations_are_up_to_the_limit_and_questions_differ() -> None:
    lengths: Counter[int] = Counter()
    for one in drawn(200):
        lengths[len(one.questions)] += 1
        assert len({(q.task, q.text) for q in one.questions}) == len(one.questions)
        tasks = [q.task for q in one.questions]
        assert "read_receipt" not in tasks[:-1]
        assert all(q.text and q.answer for q in one.questions)
    assert max(lengths) == 4 and lengths[4] > 120
    assert all(len(one.questions) == 1 for one in drawn(20, Mixture(fonts="bundled")))


def test_every_task_is_asked() -> None:
    mixture = Mixture(fonts="bundled", max_questions=8)
    asked = Counter(q.task for one in drawn(350, mixture) for q in one.questions)
    assert set(asked) == set(TEMPLATES)
    assert set(TASK_WEIGHTS) <= set(TEMPLATES)


def test_facts_fill_in_all_names_of_their_wordings() -> None:
    used = {
        task: {int(number) for text in templates for number in re.findall(r"\{(\d)\}", text)}
        for task, templates in TEMPLATES.items()
    }
    for kind in KINDS:
        for index in range(30):
            document = kind(Random(index), MIXTURE)
            assert document is not None
            for fact in document.facts:
                assert used[fact.task] == set(range(len(fact.fields))), fact
                assert fact.about


def test_questions_of_a_conversation_have_different_subjects() -> None:
    for one in drawn(150, Mixture(fonts="bundled", max_questions=8)):
        by_task = defaultdict(list)
        for question in one.questions:
            by_task[question.task].append(question)
        # The price of an item is not asked for after the item that has this price.
        for price in by_task["receipt_price"]:
            assert not any(price.answer in other.text for other in by_task["receipt_item"])
        if by_task["display_number"]:
            assert not by_task["display_digits"] and not by_task["display_nth"]
        bars = [question.answer for question in by_task["chart_superlative"]]
        assert len(set(bars)) == len(bars)


def test_yes_and_no_are_in_balance() -> None:
    answers = Counter(
        q.answer for one in drawn(350) for q in one.questions if q.answer in ("yes", "no")
    )
    assert 0.4 < answers["yes"] / (answers["yes"] + answers["no"]) < 0.6


def test_boxes_are_written_in_the_official_format() -> None:
    found = 0
    for one in drawn(200):
        (picture,) = one.pictures
        for question in one.questions:
            assert (question.box is not None) == (question.task == "screen_click")
            if question.box is None:
                continue
            found += 1
            (parsed,) = grounding.parse(question.answer)
            assert parsed.phrase is not None and parsed.phrase in question.text
            assert isinstance(parsed.shape, grounding.Box)
            pixels = parsed.shape.to_pixels((picture.height, picture.width))
            assert max(abs(a - b) for a, b in zip(pixels, question.box, strict=True)) <= 0.5
    assert found > 20


@pytest.mark.parametrize(
    ("side", "aspect"), [((28, 64), 4.0), ((64, 336), 1.0), ((64, 1200), 20.0), ((600, 800), 2.0)]
)
def test_pictures_have_the_sizes_of_the_mixture(side: tuple[int, int], aspect: float) -> None:
    mixture = Mixture(fonts="bundled", picture_side=side, max_aspect=aspect)
    for one in drawn(25, mixture):
        (picture,) = one.pictures
        assert isinstance(picture, Composite)
        assert 0.95 * side[0] ** 2 <= picture.width * picture.height <= side[1] ** 2
        assert 0.97 / aspect <= picture.width / picture.height <= aspect / 0.97
        assert draw_composite(picture).shape == (picture.height, picture.width, 3)


def test_most_pictures_have_at_most_150_vision_tokens() -> None:
    tokens = []
    for one in drawn(150, Mixture(fonts="bundled", picture_side=(64, 1000))):
        (picture,) = one.pictures
        tokens.append(-(-picture.width // 28) * -(-picture.height // 28))
    assert sorted(tokens)[130] <= 170
    assert 20 < sorted(tokens)[75] < 110


@pytest.mark.parametrize("task", sorted(TEMPLATES))
def test_a_task_has_more_than_a_hundred_patterns(task: str) -> None:
    assert 8 <= len(TEMPLATES[task]) <= 30
    patterns = patterns_of(task)
    assert len(patterns) > 100
    some = sorted(patterns)[:: len(patterns) // 100]
    trained = sum(not is_held_out(pattern) for pattern in some)
    assert 0.6 < trained / len(some) < 0.95
    for pattern in patterns:
        text = re.sub(r"<\|\w+\|>", "", pattern)
        assert not re.search(r"  |[][|<>]|[.?][.?]| [.?,]|^[^A-Z{<]", text), pattern
        assert text[-1] in ".?", pattern


def test_tasks_share_no_pattern() -> None:
    owners: dict[str, set[str]] = defaultdict(set)
    for task in TEMPLATES:
        for pattern in patterns_of(task):
            owners[pattern.lower()].add(task)
    shared = {
        frozenset(tasks) for tasks in owners.values() if len(tasks) > 1 and not tasks <= SAME_FORMAT
    }
    assert {pair for tasks in shared for pair in combinations(sorted(tasks), 2)} <= {
        ("chart_value", "display_value_of"),
        ("display_number", "display_temperature"),
        ("display_number", "display_time"),
    }


def test_the_held_out_split_uses_other_wordings() -> None:
    mixture = Mixture(fonts="bundled", split="held_out", max_questions=2)
    trained = {q.text for one in drawn(60) for q in one.questions}
    held_out = [q.text for one in drawn(60, mixture) for q in one.questions]
    assert sum(text in trained for text in held_out) < 3
