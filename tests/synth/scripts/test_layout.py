"""Blocks of lines that fit their limits, legible inks, and effects that text bears."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from random import Random
from typing import Any

import numpy as np
import pytest

from qwen2vl.synth.colors import COLORS, MORE_COLORS, contrast
from qwen2vl.synth.compositing import Composite, Ground, Text, draw_composite
from qwen2vl.synth.scripts import layout
from qwen2vl.synth.scripts.faces import Face
from qwen2vl.synth.scripts.layout import (
    Block,
    Ink,
    Limits,
    crop_canvas,
    degrade_text,
    free_place,
    limits_of,
    place_block,
    sample_block,
    sample_ink,
    sample_style,
)
from qwen2vl.synth.spec import Mixture

BLACK = Ink(rgb=(0, 0, 0), name="black")
WIDE = Limits(width=600, height=300, area=100_000)


@pytest.fixture(autouse=True)
def bundled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw in fonts that come with the package."""
    files = ("Cabin-Regular.otf", "Caladea-Italic.ttf", "Courier Prime Bold.otf")
    monkeypatch.setattr(layout, "sample_face", lambda rng, script: Face(file=rng.choice(files)))


def blocks(count: int, lines: int, limits: Limits, **fields: Any) -> list[Block]:
    rng, mixture = Random(4), Mixture(**fields)
    sampled = [sample_block(rng, mixture, "latin", lines, limits) for _ in range(count)]
    return [block for block in sampled if block is not None]


@pytest.mark.parametrize("lines", [1, 4])
@pytest.mark.parametrize(
    "limits",
    [WIDE, Limits(width=70, height=200, area=9000), Limits(width=300, height=60, area=9000)],
)
def test_blocks_fit_and_their_ink_begins_at_the_corner(lines: int, limits: Limits) -> None:
    found = blocks(40, lines, limits, font_size=(12, 40), text_length=(1, 20))
    assert len(found) >= 18
    for block in found:
        assert len(block.texts) == lines
        assert 12 <= block.size <= 40
        assert block.width <= limits.width and block.height <= limits.height
        assert block.width * block.height <= limits.area
        canvas = Composite(width=block.width + 20, height=block.height + 20)
        drawn = draw_composite(replace(canvas, layers=place_block(block, 10, 10, BLACK)))
        rows, columns = np.nonzero(drawn[:, :, 0] < 255)
        assert rows.min() in (10, 11) and rows.max() in (block.height + 8, block.height + 9)
        assert columns.min() >= 10 and columns.max() < block.width + 10


def test_texts_and_sizes_follow_the_mixture() -> None:
    found = blocks(300, 1, Limits(width=900, height=300, area=300_000), text_length=(3, 9))
    assert {len(block.texts[0]) for block in found} >= set(range(4, 10))
    assert {block.size for block in found} >= set(range(12, 41, 2))
    large = blocks(40, 1, Limits(width=2000, height=300, area=600_000), large_share=1.0)
    assert max(block.size for block in large) > 80


def test_limits_that_nothing_fits() -> None:
    assert not blocks(3, 1, Limits(width=9, height=9, area=81), font_size=(20, 40))


def test_lines_are_below_each_other_and_aligned() -> None:
    for block in blocks(30, 3, WIDE):
        baselines = [y for _, y in block.pens]
        steps = {b - a for a, b in pairwise(baselines)}
        assert len(steps) == 1
        assert 1.1 * block.size <= steps.pop() <= 1.75 * block.size


def test_a_crop_has_the_padding_of_the_mixture() -> None:
    rng, mixture = Random(1), Mixture(padding=(5, 9), plain_share=1.0, degraded_share=0.0)
    for block in blocks(20, 1, WIDE):
        picture, ink = crop_canvas(rng, mixture, block)
        assert ink == BLACK
        assert 10 <= picture.width - block.width <= 18
        rows, columns = np.nonzero(draw_composite(picture)[:, :, 0] < 255)
        assert 5 <= rows.min() <= 10 and 5 <= columns.min() <= 12


def test_inks_are_legible_and_named() -> None:
    rng, mixture = Random(2), Mixture(plain_share=0.0, textured_share=0.6)
    styles = [sample_style(rng, mixture, (60, 30)) for _ in range(300)]
    for canvas, ink in styles:
        ground = canvas.ground
        under = [ground.rgb] if ground.kind == "plain" else [ground.rgb, ground.rgb2]
        assert min(contrast(ink.rgb, rgb) for rgb in under) >= 2.9
    names = {ink.name for _, ink in styles}
    assert names >= {*COLORS, *MORE_COLORS, ""}
    named = [sample_style(rng, mixture, (60, 30), named=True)[1].name for _ in range(50)]
    assert all(named)


def test_used_colors_are_not_sampled_again() -> None:
    rng = Random(3)
    ground = Ground(rgb=(255, 255, 255))
    assert all(
        sample_ink(rng, ground, ("red", "blue")).name not in ("red", "blue") for _ in range(99)
    )


def test_small_text_is_blurred_less() -> None:
    rng, mixture = Random(5), Mixture(degraded_share=1.0)

    def blurs(size: int) -> list[float]:
        text = Text(text="a", font="Cabin-Bold.otf", size=size, x=5, y=30)
        picture = Composite(width=80, height=60, layers=(text,))
        return [degrade_text(rng, picture, mixture).blur for _ in range(200)]

    assert 0.3 < max(blurs(12)) <= 0.43
    assert 1 < max(blurs(48)) <= 1.2
    assert 20 < sum(blur == 0 for blur in blurs(30)) < 120


def test_places_of_a_block_are_all_over_the_canvas() -> None:
    rng = Random(6)
    canvas = Composite(width=400, height=200)
    (block,) = blocks(1, 1, limits_of(canvas), text_length=(3, 5), font_size=(14, 20))
    places = [free_place(rng, canvas, block) for _ in range(300)]
    assert min(x for x, _ in places) < 20 and min(y for _, y in places) < 20
    assert max(x for x, _ in places) in range(380 - block.width, 398 - block.width)
    assert max(y for _, y in places) in range(180 - block.height, 198 - block.height)
