"""Canvases: sizes and backgrounds within the limits of the mixture, and degradation."""

from __future__ import annotations

import math
from random import Random

import numpy as np
import pytest

from qwen2vl.synth.canvas import degrade, sample_canvas, sample_size
from qwen2vl.synth.compositing import Composite, draw_composite
from qwen2vl.synth.spec import Mixture


@pytest.mark.parametrize(
    ("low", "high", "aspect"), [(64, 336, 4.0), (200, 200, 1.0), (56, 900, 20.0)]
)
def test_sizes_are_within_the_limits_and_varied(low: int, high: int, aspect: float) -> None:
    mixture = Mixture(picture_side=(low, high), max_aspect=aspect)
    sizes = [sample_size(Random(i), mixture) for i in range(300)]
    for width, height in sizes:
        assert min(width, height) >= 28
        assert max(width / height, height / width) <= 1.06 * aspect
        assert low * 0.98 <= math.sqrt(width * height) <= max(high * 1.02, 28 * aspect**0.5 * 1.02)
    if low < high:
        middle = math.sqrt(low * high)
        # Small pictures are more frequent: 63 % are in the lower half of the octaves.
        assert 155 < sum(math.sqrt(w * h) < middle for w, h in sizes) < 225
        assert 100 < sum(w > h for w, h in sizes) < 200


def test_a_canvas_has_no_layers_and_the_shares_of_the_mixture() -> None:
    mixture = Mixture(textured_share=0.5)
    canvases = [sample_canvas(Random(i), mixture) for i in range(300)]
    assert not any(c.layers or c.blur or c.jpeg_quality for c in canvases)
    kinds = [c.ground.kind for c in canvases]
    assert 110 < kinds.count("plain") < 190
    assert set(kinds) == {"plain", "gradient", "noise", "clouds"}
    for canvas in canvases:
        if canvas.ground.kind != "plain":
            assert np.abs(np.subtract(canvas.ground.rgb, canvas.ground.rgb2)).max() <= 18
    assert sample_canvas(Random(1), mixture, size=(40, 90)).height == 90


def test_strong_backgrounds_differ_strongly_and_have_no_large_cells_of_noise() -> None:
    mixture = Mixture(textured_share=1.0)
    grounds = [sample_canvas(Random(i), mixture, strong=1.0).ground for i in range(200)]
    assert all(np.abs(np.subtract(g.rgb, g.rgb2)).max() >= 20 for g in grounds)
    assert max(g.cell for g in grounds if g.kind == "noise") <= 8
    assert max(g.cell for g in grounds) == 24


def test_a_share_of_the_pictures_is_degraded() -> None:
    picture = Composite(width=150, height=120)
    assert degrade(Random(0), picture, Mixture(degraded_share=0.0)) is picture
    changed = [degrade(Random(i), picture, Mixture(degraded_share=0.4)) for i in range(300)]
    assert 80 < sum(c != picture for c in changed) < 160
    assert {bool(c.blur) + 2 * bool(c.jpeg_quality) for c in changed} == {0, 1, 2, 3}
    assert all(c.blur <= 0.6 for c in changed)  # little in a small picture
    assert all(40 <= c.jpeg_quality <= 95 for c in changed if c.jpeg_quality)


@pytest.mark.parametrize("size", [(28, 28), (2000, 100), (56, 700)])
def test_every_size_can_be_drawn(size: tuple[int, int]) -> None:
    mixture = Mixture(textured_share=1.0, degraded_share=1.0)
    for seed in range(6):
        rng = Random(seed)
        picture = degrade(rng, sample_canvas(rng, mixture, size=size, strong=0.5), mixture)
        assert draw_composite(picture).shape == (size[1], size[0], 3)
