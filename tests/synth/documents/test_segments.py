"""Seven segments: each digit lights the right ones, in every form."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest

from qwen2vl.synth.compositing import Composite, draw_composite
from qwen2vl.synth.compositing.layers import Ground, Rect
from qwen2vl.synth.documents.segments import (
    SEGMENTS,
    SegmentShape,
    draw_segments,
    sample_segment_shape,
    segments_width,
)

LIT, DIM = (255, 255, 255), (60, 60, 60)


def draw(text: str, shape: SegmentShape, unlit: tuple[int, int, int] | None = None) -> np.ndarray:
    width = segments_width(text, shape)
    picture = Composite(
        width=width,
        height=shape.height,
        ground=Ground(rgb=(0, 0, 0)),
        layers=tuple(draw_segments(text, (0, 0), shape, lit=LIT, unlit=unlit)),
    )
    return draw_composite(picture)[:, :, 0]


def lit_segments(pixels: np.ndarray, shape: SegmentShape) -> set[str]:
    """Return the segments whose center is lit, of the only digit."""
    half, thick = shape.height // 2, shape.thickness
    quarter = shape.height // 4
    left, right = thick // 2, shape.width - 1 - thick // 2
    middle = shape.width // 2
    centers = {
        "a": (middle, thick // 2),
        "g": (middle, half),
        "d": (middle, shape.height - 1 - thick // 2),
        "f": (left, quarter),
        "b": (right, quarter),
        "e": (left, half + quarter),
        "c": (right, half + quarter),
    }
    slanted = {
        name: (x + round(shape.slant * (shape.height - y)), y) for name, (x, y) in centers.items()
    }
    return {name for name, (x, y) in slanted.items() if pixels[y, x] > 128}


@pytest.mark.parametrize("seed", range(12))
def test_every_digit_lights_its_segments(seed: int) -> None:
    rng = Random(seed)
    shape = sample_segment_shape(rng, rng.randint(18, 120))
    for digit, names in SEGMENTS.items():
        if digit == " ":
            continue
        found = lit_segments(draw(digit, shape, DIM if seed % 2 else None), shape)
        tails = {"6": {"a"}, "9": {"d"}}.get(digit, set())
        expected = set(names) if shape.has_tails else set(names) - tails
        assert found == expected, (digit, shape)


def test_unlit_segments_are_drawn_dim() -> None:
    shape = sample_segment_shape(Random(1), 60)
    pixels = draw("1", shape, DIM)
    assert set(np.unique(pixels)) == {0, DIM[0], LIT[0]}
    assert (draw("1", shape) == DIM[0]).sum() == 0


def test_marks_are_narrower_than_digits_and_distinct() -> None:
    shape = SegmentShape(height=60, width=30, thickness=6, gap=1, space=8)
    assert segments_width("1:1", shape) == 30 + 8 + 6 + 8 + 30
    colon, point = draw(":", shape), draw(".", shape)
    assert colon.shape == point.shape == (60, 6)
    assert (point > 0).sum() == 36 and (colon > 0).sum() == 72
    assert (point[54:] > 0).all()


def test_slanted_digits_stay_within_their_width() -> None:
    shape = SegmentShape(
        height=80, width=40, thickness=8, gap=2, space=8, is_pointed=True, slant=0.15
    )
    width = segments_width("88", shape)
    for layer in draw_segments("88", (0, 0), shape, lit=LIT):
        assert isinstance(layer, Rect)
        assert 0 <= layer.box[0] < layer.box[2] <= width
        assert 0 <= layer.box[1] < layer.box[3] <= 80
    upright = lit_segments(draw("8", shape), shape)
    assert upright == set("abcdefg")
