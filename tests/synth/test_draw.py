"""Drawing: ink at the computed position, six distinct shapes, slight background noise."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from qwen2vl.synth import Mixture, render, sample
from qwen2vl.synth.draw import draw_image, ink_extent
from qwen2vl.synth.shape_masks import SHAPE_KINDS, shape_mask
from qwen2vl.synth.spec import Line, Scene
from tests.requirements import needs_training_fonts

WHITE, BLACK = (255, 255, 255), (0, 0, 0)


@pytest.mark.parametrize("text", ["A", "fj", "gyp &", "W.", "-", "Tea, 12:30!"])
@pytest.mark.parametrize(
    "font",
    [
        "Caladea-Italic.ttf",
        "Courier Prime.otf",
        pytest.param("FreeSerifItalic.ttf", marks=needs_training_fonts),
        pytest.param("DejaVuSansMono.ttf", marks=needs_training_fonts),
    ],
)
def test_ink_extent_matches_the_pixels(text: str, font: str) -> None:
    left, top, right, bottom = ink_extent(text, font, 30, cell=0, tracking=1)
    line = Line(
        text=text,
        font=font,
        size=30,
        width=right - left + 20,
        height=bottom - top + 20,
        x=10 - left,
        y=10 - top,
        ink=BLACK,
        ground=WHITE,
        tracking=1,
    )
    ys, xs = np.nonzero(draw_image(line)[..., 0] < 255)
    found = (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
    assert found == (10, 10, line.width - 10, line.height - 10)


def test_tracking_widens_a_line() -> None:
    extents = [ink_extent("abcd", "Cabin-Bold.otf", 20, cell=0, tracking=t) for t in (0, 2)]
    assert extents[1][2] - extents[0][2] == 6


def test_later_shapes_cover_earlier_ones() -> None:
    spec = sample(1, 0, Mixture(weights={"shapes": 1.0}, num_shapes=(1, 1), textured_share=0.0))
    (scene,) = spec.pictures
    assert isinstance(scene, Scene)
    (shape,) = scene.shapes
    square = replace(shape, kind="square", rgb=(1, 2, 3))
    image = draw_image(replace(scene, shapes=(shape, square)))
    x1, y1, x2, y2 = shape.box
    assert (image[y1:y2, x1:x2] == (1, 2, 3)).all()


@pytest.mark.parametrize("kind", SHAPE_KINDS)
@pytest.mark.parametrize("side", [24, 37, 90])
def test_ink_fills_its_box_exactly(kind: str, side: int) -> None:
    mask = np.asarray(shape_mask(kind, side))
    assert mask.shape == (side, side)
    for border in (mask[:2], mask[-2:], mask[:, :2], mask[:, -2:]):
        assert border.max() > 60, kind


def test_six_kinds_are_clearly_distinct() -> None:
    masks = {kind: np.asarray(shape_mask(kind, 24), dtype=float) / 255 for kind in SHAPE_KINDS}
    for a, b in combinations(SHAPE_KINDS, 2):
        assert np.abs(masks[a] - masks[b]).mean() > 0.1, (a, b)


def test_grain_changes_colors_slightly() -> None:
    mixture = Mixture(weights={"shapes": 1.0}, textured_share=1.0)
    for index in range(30):
        spec = sample(4, index, mixture)
        (scene,) = spec.pictures
        image = render(spec).messages[0]["content"][0]["image"].astype(int)
        near = np.abs(image - np.array(scene.ground)).max(axis=-1) <= 7
        assert near.mean() > 0.1
