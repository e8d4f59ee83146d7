"""Masks of the shapes: sizes, boxes of rotated shapes, and how kinds differ."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from PIL import Image, ImageDraw

from qwen2vl.synth.shape_masks import MORE_SHAPE_KINDS, SHAPE_KINDS, shape_extent, shape_mask

ALL_KINDS = (*SHAPE_KINDS, *MORE_SHAPE_KINDS)


def ink_box(mask: Image.Image) -> tuple[int, int, int, int]:
    rows, columns = np.nonzero(np.asarray(mask))
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


@pytest.mark.parametrize("kind", ALL_KINDS)
@pytest.mark.parametrize(("width", "height"), [(40, 40), (60, 33), (25, 48), (300, 290)])
def test_an_upright_shape_fills_its_box(kind: str, width: int, height: int) -> None:
    mask = shape_mask(kind, width, height)
    assert mask.size == (width, height) and mask.mode == "L"
    assert ink_box(mask) == (0, 0, width, height) == shape_extent(kind, width, height)


@pytest.mark.parametrize("kind", ALL_KINDS)
@pytest.mark.parametrize("angle", [-170, -15, 7, 45, 90, 133])
def test_a_rotated_shape_is_the_largest_that_its_box_holds(kind: str, angle: int) -> None:
    width, height = 70, 52
    found, extent = (
        ink_box(shape_mask(kind, width, height, angle)),
        shape_extent(kind, width, height, angle),
    )
    assert 0 <= extent[0] < extent[2] <= width and 0 <= extent[1] < extent[3] <= height
    assert all(abs(a - b) <= 1 for a, b in zip(found, extent, strict=True)), (found, extent)
    assert found[2] - found[0] >= width - 1 or found[3] - found[1] >= height - 1


def test_angles_are_counterclockwise() -> None:
    upright, turned = (np.asarray(shape_mask("triangle", 60, 60, angle)) for angle in (0, 90))
    assert np.abs(turned.astype(int) - np.rot90(upright)).mean() < 2


def test_a_square_mask_has_the_values_of_the_frozen_suites() -> None:
    # As it was before rectangles: supersampled four times, then resized.
    big = Image.new("L", (4 * 37, 4 * 37), 0)
    ImageDraw.Draw(big).ellipse((0, 0, 4 * 37 - 1, 4 * 37 - 1), fill=255)
    assert (
        shape_mask("circle", 37).tobytes() == big.resize((37, 37), Image.Resampling.BOX).tobytes()
    )


def test_all_kinds_are_distinct() -> None:
    sizes = dict.fromkeys(ALL_KINDS, (30, 30)) | {"rectangle": (30, 20), "oval": (30, 20)}
    masks = {}
    for kind, (width, height) in sizes.items():
        canvas = np.zeros((30, 30))
        canvas[:height, :width] = np.asarray(shape_mask(kind, width, height)) / 255
        masks[kind] = canvas
    for a, b in combinations(ALL_KINDS, 2):
        assert np.abs(masks[a] - masks[b]).mean() > 0.05, (a, b)


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(AssertionError, match="blob"):
        shape_mask("blob", 10)
