"""Family `shapes`: answers agree with the pixels and the scenes."""

from __future__ import annotations

import re
from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np

from qwen2vl.synth import Mixture, Question, sample
from qwen2vl.synth.colors import COLORS
from qwen2vl.synth.draw import draw_image
from qwen2vl.synth.families.shapes import plural
from qwen2vl.synth.scenes import unique_phrases
from qwen2vl.synth.spec import Scene, Shape

PLAIN = Mixture(weights={"shapes": 1.0}, max_questions=6, textured_share=0.0)


def _drawn(count: int, mixture: Mixture = PLAIN) -> list[tuple[tuple[Question, ...], Scene]]:
    specs = [sample(21, i, mixture) for i in range(count)]
    return [(s.questions, p) for s in specs for p in s.pictures if isinstance(p, Scene)]


def name_pixels(pixels: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Classify each pixel by the nearest color segment, independently of the drawing code."""
    names = list(COLORS)
    distances = []
    for low, high in COLORS.values():
        a, b = np.array(low, float), np.array(high, float)
        t = ((pixels - a) @ (b - a) / ((b - a) @ (b - a))).clip(0, 1)
        distances.append(np.linalg.norm(pixels - (a + t[..., None] * (b - a)), axis=-1))
    return np.array(names)[np.argmin(distances, axis=0)]


def _inside(image: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Mark pixels that equal all four neighbors, which excludes antialiased edges."""
    same = np.ones(image.shape[:2], dtype=bool)
    for axis, step in ((0, 1), (0, -1), (1, 1), (1, -1)):
        same &= (image == np.roll(image, step, axis)).all(axis=-1)
    return same


def _components(mask: np.ndarray[Any, Any]) -> int:
    """Count connected regions of more than 40 pixels, growing each from one of its pixels."""
    left = np.pad(mask, 1)
    count = 0
    while left.any():
        region = np.zeros_like(left)
        region[tuple(np.argwhere(left)[0])] = True
        size = 0
        while (grown := int(region.sum())) > size:
            size = grown
            for axis, step in ((0, 1), (0, -1), (1, 1), (1, -1)):
                region |= np.roll(region, step, axis) & left
        left &= ~region
        count += size > 40
    return count


def test_counts_match_the_pixels() -> None:
    """Counts in the answers equal the number of connected regions."""
    seen: Counter[str] = Counter()
    mixture = Mixture(
        weights={"shapes": 1.0}, max_questions=6, textured_share=0.0, canvas=(56, 130)
    )
    for questions, scene in _drawn(120, mixture):
        image = draw_image(scene).astype(float)
        far = _inside(image) & (np.abs(image - np.array(scene.ground)).max(axis=-1) > 0)
        named = name_pixels(image)
        for question in questions:
            if question.task == "count_all":
                count = sum(_components(far & (named == color)) for color in COLORS)
            elif question.task == "count_color":
                color = next(c for c in COLORS if f"{c} shapes" in question.text)
                count = _components(far & (named == color))
            else:
                continue
            seen[question.task] += 1
            assert int(question.answer) == count, (question, scene)
    assert min(seen["count_all"], seen["count_color"]) > 30


def _each(answer: str) -> dict[str, str]:
    return dict(part.split(": ") for part in answer.split(", "))


def test_multi_answer_questions_are_answered_in_the_order_of_the_question() -> None:
    seen: Counter[str] = Counter()
    orders = 0
    mixture = Mixture(weights={"shapes": 1.0}, list_share=1.0)
    for questions, scene in _drawn(400, mixture):
        question = questions[0]
        if not question.task.startswith("each_"):
            continue
        seen[question.task] += 1
        answers = _each(question.answer)
        places = [question.text.index(name) for name in answers]
        assert places == sorted(places), question
        assert len(answers) >= 2
        for name, value in answers.items():
            kinds = [s for s in scene.shapes if name in (s.kind, plural(s.kind))]
            colors = [s for s in scene.shapes if name == s.color]
            if question.task == "each_color":
                assert [s.color for s in kinds] == [value]
            elif question.task == "each_kind":
                assert [s.kind for s in colors] == [value]
            else:
                assert int(value) == len(kinds) + len(colors)
        if question.task == "each_color":
            lefts = [next(s.center for s in scene.shapes if s.kind == k) for k in answers]
            orders += lefts != sorted(lefts)
    assert set(seen) == {"each_color", "each_kind", "each_count", "each_color_count"}
    assert min(seen.values()) > 15
    assert orders > seen["each_color"] / 3  # otherwise the answer would follow from the positions


def _only_phrase_in(text: str, scene: Scene) -> Shape:
    if len(scene.shapes) == 1:
        return scene.shapes[0]
    names = [
        name
        for name in unique_phrases(scene)
        if re.search(rf"\b(?:the|this|that) {name}\b", text.lower())
    ]
    return unique_phrases(scene)[max(names, key=len)]


def test_names_and_colors_refer_to_one_shape() -> None:
    seen: Counter[str] = Counter()
    for questions, scene in _drawn(400):
        for question in questions:
            if question.task == "color_of_kind":
                (shape,) = (s for s in scene.shapes if s.kind in question.text)
                assert question.answer == shape.color
            elif question.task == "name_shape_of_color":
                (shape,) = (s for s in scene.shapes if s.color in question.text)
                assert question.answer == shape.kind
            else:
                continue
            seen[question.task] += 1
    assert min(seen["color_of_kind"], seen["name_shape_of_color"]) > 50


def test_positions_are_unambiguous() -> None:
    parts: Counter[str] = Counter()
    for questions, scene in _drawn(700):
        for question in questions:
            if question.task not in ("position", "left_or_right", "top_or_bottom"):
                continue
            x, y = _only_phrase_in(question.text, scene).center
            dx, dy = x / scene.width - 0.5, y / scene.height - 0.5
            holds = {
                "left": dx < -0.1,
                "right": dx > 0.1,
                "top": dy < -0.1,
                "bottom": dy > 0.1,
                "middle": max(abs(dx), abs(dy)) < 0.1,
            }
            assert holds[question.answer], question
            parts[question.answer] += 1
    assert min(parts.values()) > 20
    assert len(parts) == 5


def _toward(text: str) -> tuple[int, int]:
    """Return axis and sign of the direction word."""
    rules = {"left": (0, -1), "right": (0, 1), "up": (1, -1), "down": (1, 1)}
    (word,) = (word for word in rules if re.search(rf"\b{word}\b", text))
    return rules[word]


def test_comparisons_are_correct() -> None:
    seen: Counter[str] = Counter()
    for questions, scene in _drawn(700):
        called = unique_phrases(scene)
        for question in questions:
            if question.task not in ("larger", "smaller", "further"):
                continue
            names = [n for n, s in called.items() if n == s.phrase and n in question.text]
            (other,) = set(names) - {question.answer}
            a, b = called[question.answer], called[other]
            if question.task == "further":
                axis, sign = _toward(question.text)
                assert sign * (a.center[axis] - b.center[axis]) > 0, question
            else:
                sign = 1 if question.task == "larger" else -1
                assert sign * (a.side - b.side) > 0
            seen[question.task] += 1
    assert min(seen.values()) > 30


def test_yes_and_no_are_equally_frequent_and_true() -> None:
    answers: Counter[str] = Counter()
    for questions, scene in _drawn(500):
        for question in questions:
            if question.task == "exists":
                present = any(s.phrase in question.text for s in scene.shapes)
                assert question.answer == ("yes" if present else "no")
                answers[question.answer] += 1
    assert abs(answers["yes"] - answers["no"]) < 0.25 * answers.total()


def test_plural() -> None:
    assert [plural(k) for k in ("cross", "star", "red cross")] == [
        "crosses",
        "stars",
        "red crosses",
    ]


def test_a_list_names_every_shape_from_left_to_right() -> None:
    lists = 0
    for questions, scene in _drawn(400, Mixture(weights={"shapes": 1.0}, list_share=1.0)):
        if questions[0].task != "list":
            continue
        lists += 1
        # The order is ambiguous where two shapes are nearly above each other.
        middles = sorted(shape.center[0] for shape in scene.shapes)
        assert all(b - a >= 0.05 * scene.width for a, b in pairwise(middles))
        ordered = sorted(scene.shapes, key=lambda shape: shape.box[0] + shape.box[2])
        assert questions[0].answer.split(", ") == [f"{s.color} {s.kind}" for s in ordered]
    assert lists > 60
