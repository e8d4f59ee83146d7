"""Scenes of shapes: the truth is in the pixels."""

from __future__ import annotations

import re
from collections import Counter
from itertools import combinations
from typing import Any

import numpy as np
import pytest

from qwen2vl.synth import Mixture, Question, render, sample
from qwen2vl.synth.colors import COLORS, is_light
from qwen2vl.synth.draw import KINDS, draw, shape_mask
from qwen2vl.synth.shapes import MIN_SIDE, overlap, phrases, plural
from qwen2vl.synth.spec import Scene, Shape

PLAIN = Mixture(weights={"shapes": 1.0}, questions=6, textured_share=0.0)


def _drawn(count: int, mixture: Mixture = PLAIN) -> list[tuple[tuple[Question, ...], Scene]]:
    specs = [sample(21, i, mixture) for i in range(count)]
    return [(s.questions, p) for s in specs for p in s.pictures if isinstance(p, Scene)]


def _named(pixels: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Name each pixel by the nearest span of a colour; an independent judge of the drawing."""
    names = list(COLORS)
    distances = []
    for low, high in COLORS.values():
        a, b = np.array(low, float), np.array(high, float)
        t = ((pixels - a) @ (b - a) / ((b - a) @ (b - a))).clip(0, 1)
        distances.append(np.linalg.norm(pixels - (a + t[..., None] * (b - a)), axis=-1))
    return np.array(names)[np.argmin(distances, axis=0)]


def _inside(image: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Mark pixels that equal all four neighbours: no soft edges."""
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


def test_sides_and_overlaps_obey() -> None:
    for _, scene in _drawn(600):
        boxes = [shape.box for shape in scene.shapes]
        assert all(min(b[2] - b[0], b[3] - b[1]) >= MIN_SIDE for b in boxes)
        assert min(min(b) for b in boxes) >= 0
        assert all(b[2] <= scene.width and b[3] <= scene.height for b in boxes)
        assert all(overlap(a, b) <= 0.1 for a, b in combinations(boxes, 2))


def test_overlap_is_a_share_of_the_smaller_box() -> None:
    assert overlap((0, 0, 10, 10), (9, 0, 29, 20)) == pytest.approx(0.1)
    assert overlap((0, 0, 10, 10), (10, 0, 20, 10)) == 0
    assert overlap((0, 0, 10, 10), (2, 2, 4, 4)) == 1


def test_touching_shapes_differ_in_color() -> None:
    for _, scene in _drawn(600):
        for a, b in combinations(scene.shapes, 2):
            assert a.color != b.color or overlap(a.box, b.box) == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", [24, 37, 90])
def test_ink_fills_its_box_exactly(kind: str, side: int) -> None:
    mask = np.asarray(shape_mask(kind, side))
    assert mask.shape == (side, side)
    for border in (mask[:2], mask[-2:], mask[:, :2], mask[:, -2:]):
        assert border.max() > 60, kind


def test_six_kinds_are_clearly_distinct() -> None:
    masks = {kind: np.asarray(shape_mask(kind, 24), dtype=float) / 255 for kind in KINDS}
    for a, b in combinations(KINDS, 2):
        assert np.abs(masks[a] - masks[b]).mean() > 0.1, (a, b)


def test_box_encloses_the_shape_in_the_pixels() -> None:
    for _, scene in _drawn(150, Mixture(weights={"shapes": 1.0}, num_shapes=(1, 1))):
        (shape,) = scene.shapes
        far = np.abs(draw(scene).astype(int) - np.array(scene.ground)).max(axis=-1) > 30
        ys, xs = np.nonzero(far)
        found = (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
        assert np.abs(np.subtract(found, shape.box)).max() <= 1, shape


def test_colors_are_what_they_are_called() -> None:
    for _, scene in _drawn(200):
        for shape in scene.shapes:
            assert str(_named(np.array(shape.rgb, float))) == shape.color
        names = {shape.color for shape in scene.shapes}
        assert ("white" if is_light(scene.ground) else "black") not in names


def test_counts_are_in_the_pixels() -> None:
    """Flood fill counts again what the questions about number say."""
    seen: Counter[str] = Counter()
    mixture = Mixture(weights={"shapes": 1.0}, questions=6, textured_share=0.0, canvas=(56, 130))
    for questions, scene in _drawn(120, mixture):
        image = draw(scene).astype(float)
        far = _inside(image) & (np.abs(image - np.array(scene.ground)).max(axis=-1) > 0)
        named = _named(image)
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


def _only_phrase_in(text: str, scene: Scene) -> Shape:
    if len(scene.shapes) == 1:
        return scene.shapes[0]
    names = [name for name in phrases(scene) if f"the {name}" in text]
    return phrases(scene)[max(names, key=len)]


def test_names_and_colors_mean_one_shape() -> None:
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


def test_positions_are_beyond_doubt() -> None:
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


def _towards(text: str) -> tuple[int, int]:
    """Axis and sign of the one direction word."""
    rules = {"left": (0, -1), "right": (0, 1), "up": (1, -1), "down": (1, 1)}
    (word,) = (word for word in rules if re.search(rf"\b{word}\b", text))
    return rules[word]


def test_comparisons_hold() -> None:
    seen: Counter[str] = Counter()
    for questions, scene in _drawn(700):
        called = phrases(scene)
        for question in questions:
            if question.task not in ("larger", "smaller", "further"):
                continue
            names = [n for n, s in called.items() if n == s.phrase and n in question.text]
            (other,) = set(names) - {question.answer}
            a, b = called[question.answer], called[other]
            if question.task == "further":
                axis, sign = _towards(question.text)
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


def test_all_numbers_kinds_and_colors_come() -> None:
    scenes = [scene for _, scene in _drawn(500)]
    counts = Counter(len(scene.shapes) for scene in scenes)
    assert set(counts) == {1, 2, 3, 4, 5}
    assert min(counts.values()) > 60
    assert {s.kind for scene in scenes for s in scene.shapes} == set(KINDS)
    assert {s.color for scene in scenes for s in scene.shapes} == set(COLORS)


def test_small_canvases_take_fewer_shapes() -> None:
    mixture = Mixture(weights={"shapes": 1.0}, canvas=(56, 70), num_shapes=(4, 5))
    assert {len(scene.shapes) for _, scene in _drawn(30, mixture)} == {2}


def test_grain_moves_no_color_far() -> None:
    mixture = Mixture(weights={"shapes": 1.0}, textured_share=1.0)
    for index in range(30):
        spec = sample(4, index, mixture)
        (scene,) = spec.pictures
        image = render(spec).messages[0]["content"][0]["image"].astype(int)
        near = np.abs(image - np.array(scene.ground)).max(axis=-1) <= 7
        assert near.mean() > 0.1


def test_plural() -> None:
    assert [plural(k) for k in ("cross", "star", "red cross")] == [
        "crosses",
        "stars",
        "red crosses",
    ]
