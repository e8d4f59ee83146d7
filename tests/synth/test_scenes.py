"""Scenes: positions, overlaps, colors and kinds of the sampled shapes."""

from __future__ import annotations

from collections import Counter
from itertools import combinations

import numpy as np
import pytest

from qwen2vl.synth import Mixture, sample
from qwen2vl.synth.colors import COLORS, is_light
from qwen2vl.synth.draw import draw_image
from qwen2vl.synth.scenes import MIN_SIDE, overlap
from qwen2vl.synth.shape_masks import SHAPE_KINDS
from qwen2vl.synth.spec import Scene
from tests.synth.families.test_shapes import name_pixels

PLAIN = Mixture(weights={"shapes": 1.0}, textured_share=0.0)


def _scenes(count: int, mixture: Mixture = PLAIN) -> list[Scene]:
    specs = [sample(21, i, mixture) for i in range(count)]
    return [p for s in specs for p in s.pictures if isinstance(p, Scene)]


def test_sides_and_overlaps_are_within_limits() -> None:
    for scene in _scenes(600):
        boxes = [shape.box for shape in scene.shapes]
        assert all(min(b[2] - b[0], b[3] - b[1]) >= MIN_SIDE for b in boxes)
        assert min(min(b) for b in boxes) >= 0
        assert all(b[2] <= scene.width and b[3] <= scene.height for b in boxes)
        assert all(overlap(a, b) <= 0.1 for a, b in combinations(boxes, 2))


def test_overlap_is_a_fraction_of_the_smaller_box() -> None:
    assert overlap((0, 0, 10, 10), (9, 0, 29, 20)) == pytest.approx(0.1)
    assert overlap((0, 0, 10, 10), (10, 0, 20, 10)) == 0
    assert overlap((0, 0, 10, 10), (2, 2, 4, 4)) == 1


def test_touching_shapes_differ_in_color() -> None:
    for scene in _scenes(600):
        for a, b in combinations(scene.shapes, 2):
            assert a.color != b.color or overlap(a.box, b.box) == 0


def test_box_encloses_the_pixels_of_the_shape() -> None:
    for scene in _scenes(150, Mixture(weights={"shapes": 1.0}, num_shapes=(1, 1))):
        (shape,) = scene.shapes
        far = np.abs(draw_image(scene).astype(int) - np.array(scene.ground)).max(axis=-1) > 30
        ys, xs = np.nonzero(far)
        found = (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
        assert np.abs(np.subtract(found, shape.box)).max() <= 1, shape


def test_pixels_have_the_named_color() -> None:
    for scene in _scenes(200):
        for shape in scene.shapes:
            assert str(name_pixels(np.array(shape.rgb, float))) == shape.color
        names = {shape.color for shape in scene.shapes}
        assert ("white" if is_light(scene.ground) else "black") not in names


def test_all_counts_kinds_and_colors_occur() -> None:
    scenes = _scenes(500)
    counts = Counter(len(scene.shapes) for scene in scenes)
    assert set(counts) == {1, 2, 3, 4, 5}
    assert min(counts.values()) > 60
    assert {s.kind for scene in scenes for s in scene.shapes} == set(SHAPE_KINDS)
    assert {s.color for scene in scenes for s in scene.shapes} == set(COLORS)


def test_small_canvases_have_fewer_shapes() -> None:
    mixture = Mixture(weights={"shapes": 1.0}, canvas=(56, 70), num_shapes=(4, 5))
    assert {len(scene.shapes) for scene in _scenes(30, mixture)} == {2}
