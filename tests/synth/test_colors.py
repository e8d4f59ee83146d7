"""Colors: twelve disjoint RGB segments, and backgrounds on which each is visible."""

from __future__ import annotations

from itertools import combinations, product
from random import Random

import numpy as np
import pytest

from qwen2vl.synth.colors import (
    COLORS,
    MORE_COLORS,
    colors_on,
    contrast,
    is_light,
    sample_color,
    sample_ground,
    sample_text_colors,
    shades_of,
)


def test_color_segments_are_disjoint() -> None:
    steps = np.linspace(0, 1, 21)[:, None]
    segments = {
        name: np.array(a) + steps * (np.array(b) - np.array(a))
        for name, (a, b) in {**COLORS, **MORE_COLORS}.items()
    }
    assert len(segments) == 12
    for first, second in combinations(segments, 2):
        distances = [np.linalg.norm(p - q) for p, q in product(segments[first], segments[second])]
        assert min(distances) > 50, (first, second)


@pytest.mark.parametrize("name", sorted({**COLORS, **MORE_COLORS}))
def test_shades_lie_on_their_segment(name: str) -> None:
    low, high = np.minimum(*shades_of(name)), np.maximum(*shades_of(name))
    for seed in range(50):
        shade = np.array(sample_color(Random(seed), name))
        assert (low <= shade).all()
        assert (shade <= high).all()


def test_every_allowed_color_is_distinct_from_its_ground() -> None:
    rng = Random(2)
    for _ in range(400):
        ground = sample_ground(rng)
        names = colors_on(ground)
        assert len(names) == 7
        assert ("white" in names) != is_light(ground)
        for name in names:
            shade = sample_color(rng, name)
            assert np.abs(np.subtract(shade, ground)).max() > 70, (name, ground)


def test_grounds_are_valid_and_both_light_and_dark() -> None:
    grounds = [sample_ground(Random(i)) for i in range(400)]
    assert all(0 <= v <= 255 for ground in grounds for v in ground)
    assert 180 < sum(is_light(ground) for ground in grounds) < 300


def test_contrast_equals_the_wcag_ratio() -> None:
    assert contrast((0, 0, 0), (255, 255, 255)) == pytest.approx(21)
    assert contrast((9, 9, 9), (9, 9, 9)) == 1
    assert contrast((119, 119, 119), (255, 255, 255)) == pytest.approx(4.48, abs=0.1)


def test_text_colors_are_varied_and_readable() -> None:
    pairs = [sample_text_colors(Random(i)) for i in range(300)]
    assert min(contrast(*pair) for pair in pairs) >= 3.5
    assert len(set(pairs)) > 250
