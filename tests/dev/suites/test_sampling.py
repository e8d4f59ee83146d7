"""Sampling that frozen suites share: balance, visibility, names."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest

from dev.suites.sampling import (
    FONTS,
    OBJECTS,
    deal,
    sample_icon,
    sample_shape,
    sample_text,
    sample_textured,
    visible_colors,
    with_article,
)
from qwen2vl.synth.colors import contrast, is_light
from qwen2vl.synth.compositing import Ground, ShapeLayer, Text, icon_names
from qwen2vl.synth.compositing.icons import HELD_OUT_STYLES
from qwen2vl.synth.compositing.text import text_extent


def test_dealt_values_are_balanced_and_in_random_order() -> None:
    dealt = deal(Random(1), "abcd", 10)
    assert set(Counter(dealt).values()) == {2, 3}
    assert dealt == deal(Random(1), "abcd", 10) != deal(Random(2), "abcd", 10)


def test_objects_are_drawn_by_every_held_out_style() -> None:
    for name in OBJECTS:
        assert set(HELD_OUT_STYLES) <= set(icon_names()[name].icons)
    assert len(set(OBJECTS)) == len(OBJECTS)


def test_shapes_are_visible_on_both_colors_of_a_ground() -> None:
    rng = Random(1)
    for kind in ("plain", "gradient", "noise", "stripes", "checks"):
        for _ in range(50):
            ground = sample_textured(rng, kind)
            layer = sample_shape(rng, ground).layer
            assert isinstance(layer, ShapeLayer)
            under = [ground.rgb] if kind == "plain" else [ground.rgb, ground.rgb2]
            assert all(contrast(layer.rgb, rgb) >= 2 for rgb in under)
            assert all(0 <= channel <= 255 for rgb in under for channel in rgb)


def test_visible_colors_depend_on_the_ground() -> None:
    assert {"white", "yellow"}.isdisjoint(visible_colors(Ground()))
    assert "black" not in visible_colors(Ground(rgb=(20, 20, 20)))


def test_grounds_of_icons_are_light() -> None:
    assert all(is_light(sample_textured(Random(n), "noise", light=True).rgb) for n in range(30))
    assert not all(is_light(sample_textured(Random(n), "noise").rgb) for n in range(30))


def test_text_is_placed_by_its_ink() -> None:
    named = sample_text(Random(1), Ground(), FONTS[0], 20, 5)
    layer = named.at((30, 40, 0, 0))
    assert isinstance(layer, Text) and len(named.name) == 5
    left, top, _, _ = text_extent(layer.text, layer.font, layer.size)
    assert (layer.x + left, layer.y + top) == (30, 40)
    words = sample_text(Random(1), Ground(), FONTS[0], 20, 0).name.split()
    assert len(words) == 2


def test_names_and_their_fair_forms() -> None:
    shape = sample_shape(Random(1), Ground(), kind="cross", color="red")
    assert shape.name == "red cross" and {"cross", "red"} < set(shape.answers)
    assert shape.at((1, 2, 3, 4)).box == (1, 2, 3, 4)  # type: ignore[union-attr]
    assert sample_icon(Random(1), "guitar").answers == ("guitar",)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("guitar", "a guitar"), ("anchor", "an anchor"), ("jeans", "jeans")],
)
def test_articles(name: str, expected: str) -> None:
    assert with_article(name) == expected
