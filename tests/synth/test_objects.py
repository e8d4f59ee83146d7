"""Objects: sizes, places, boxes of the ink, visible colors, and names that are unique."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from random import Random

import numpy as np
import pytest

from qwen2vl.synth.canvas import sample_canvas
from qwen2vl.synth.compositing import Composite, Ground, draw_composite
from qwen2vl.synth.compositing.icon_sampling import are_near
from qwen2vl.synth.objects import (
    SceneObject,
    colors_for,
    place_box,
    sample_icon,
    sample_objects,
    sample_shape,
    training_names,
    unique_names,
    visible_colors,
)
from qwen2vl.synth.spec import Box, Mixture
from tests.requirements import needs_dataset

WHITE = Composite(width=200, height=150)
SIZES = [(64, 64), (300, 100), (40, 700), (1600, 1200)]


def drawn_box(one: SceneObject) -> Box:
    pixels = draw_composite(replace(WHITE, layers=(one.layer,)))
    rows, columns = np.nonzero(np.abs(pixels.astype(int) - 255).max(axis=-1) > 40)
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


@pytest.mark.parametrize("size", SIZES)
def test_shapes_are_apart_inside_the_picture_and_of_all_sizes(size: tuple[int, int]) -> None:
    shorter, sides = min(size), []
    for seed in range(60):
        rng = Random(seed)
        canvas = sample_canvas(rng, Mixture(), size=size)
        objects = sample_objects(rng, canvas, rng.randint(1, 4))
        assert objects
        for one in objects:
            x1, y1, x2, y2 = one.box
            assert 0 <= x1 < x2 <= size[0] and 0 <= y1 < y2 <= size[1]
            sides.append(max(x2 - x1, y2 - y1))
        for a, b in combinations([one.box for one in objects], 2):
            assert a[2] < b[0] or b[2] < a[0] or a[3] < b[1] or b[3] < a[1]
    assert min(sides) < max(0.09 * shorter, 13) and max(sides) > 0.6 * shorter
    assert max(sides) <= 0.91 * shorter


def test_a_box_that_does_not_fit_is_none() -> None:
    assert place_box(Random(0), WHITE, 100, [(0, 0, 200, 150)]) is None
    assert place_box(Random(0), replace(WHITE, height=9), 100, []) is None
    box = place_box(Random(0), WHITE, 40, [(0, 0, 100, 150)], smallest=30)
    assert box is not None and box[0] >= 102 and 30 <= box[2] - box[0] <= 40


@pytest.mark.parametrize("kind", ["circle", "rectangle", "oval", "triangle", "star", "heart"])
def test_the_box_of_a_shape_is_that_of_its_pixels(kind: str) -> None:
    angles, flat = set(), 0
    for seed in range(40):
        shape = sample_shape(Random(seed), kind, "blue", (20, 10, 120, 110))
        assert max(abs(a - b) for a, b in zip(drawn_box(shape), shape.box, strict=True)) <= 1
        assert (shape.phrase, shape.name) == (f"blue {kind}", kind)
        angles.add(shape.layer.angle)
        x1, y1, x2, y2 = shape.layer.box
        flat += (x2 - x1) != (y2 - y1)
    assert (len(angles) > 5) == (kind != "circle")
    assert flat == 40 if kind in ("rectangle", "oval") else flat < 30


def test_every_visible_color_differs_from_all_of_the_background() -> None:
    for seed in range(100):
        ground = sample_canvas(Random(seed), Mixture(textured_share=0.7), strong=0.5).ground
        names = visible_colors(ground)
        assert len(names) >= 8
        shape = sample_shape(Random(seed), "square", Random(seed).choice(names), (0, 0, 9, 9))
        for end in (ground.rgb,) if ground.kind == "plain" else (ground.rgb, ground.rgb2):
            assert np.abs(np.subtract(shape.layer.rgb, end)).max() >= 55  # type: ignore[union-attr]
    assert set(colors_for((255, 255, 255))) & {"white", "black"} == {"black"}
    assert set(colors_for((0, 0, 0))) & {"white", "black", "gray"} == {"white", "gray"}
    assert "gray" not in visible_colors(
        Ground(kind="checks", rgb=(255, 255, 255), rgb2=(150, 150, 150))
    )


def test_a_name_is_unique_or_absent() -> None:
    objects = [
        sample_shape(Random(0), kind, color, (0, 0, 20, 20))
        for kind, color in (("circle", "red"), ("circle", "blue"), ("star", "red"))
    ]
    assert unique_names(objects) == {
        "red circle": objects[0],
        "blue circle": objects[1],
        "blue shape": objects[1],
        "red star": objects[2],
        "star": objects[2],
    }


def test_few_kinds_repeat() -> None:
    counts = []
    for seed in range(60):
        objects = sample_objects(Random(seed), WHITE, 5, few_kinds=True)
        assert len({one.name for one in objects}) <= 3 and len({one.color for one in objects}) <= 3
        counts.append(max(sum(a.name == b.name for b in objects) for a in objects))
    assert counts.count(5) > 12 and counts.count(3) > 3


@needs_dataset("named-pictures")
def test_icons_are_visible_apart_in_name_and_have_the_box_of_their_ink() -> None:
    pytest.importorskip("resvg_py")
    errors, icons = [], 0
    for seed in range(25):
        rng = Random(seed)
        canvas = sample_canvas(rng, Mixture(textured_share=0.0), size=(200, 150))
        objects = sample_objects(rng, canvas, 3, icons=0.7)
        for a, b in combinations([one.name for one in objects if not one.color], 2):
            assert a == b or not are_near(a, b)
        for one in objects:
            if one.color:
                continue
            icons += 1
            pixels = draw_composite(replace(canvas, layers=(one.layer,))).astype(int)
            ink = np.abs(pixels - canvas.ground.rgb).max(axis=-1) > 30
            assert ink.sum() > 25, one
            rows, columns = np.nonzero(ink)
            found = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            errors += [abs(a - b) for a, b in zip(found, one.box, strict=True)]
    # Some parts of icons are hardly visible.
    assert icons > 30 and np.mean([error <= 2 for error in errors]) > 0.85


@needs_dataset("named-pictures")
def test_an_icon_that_is_black_is_not_drawn_on_black() -> None:
    pytest.importorskip("resvg_py")
    dark = Ground(rgb=(5, 5, 5))
    styles = {
        sample_icon(Random(i), "umbrella", (0, 0, 60, 60), ground=dark).layer.style  # type: ignore[union-attr]
        for i in range(40)
    }
    assert "fluent-emoji-high-contrast" not in styles and len(styles) > 3
    icon = sample_icon(Random(0), "umbrella", (0, 0, 60, 60), style="noto")
    assert (icon.phrase, icon.color) == ("umbrella", "")


def test_training_names_are_weighted() -> None:
    names = training_names()
    assert names.count("guitar") == 3 and names.count("four leaf clover") == 1
