"""Arithmetic of samples, against exact fractions."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from qwen2vl.processor.image_formats.samples import (
    composite_image,
    composite_on_white,
    row_blocks,
    to_8_bit,
)


def test_16_bit_is_divided_by_257_and_rounded() -> None:
    values = np.arange(65536, dtype=np.uint16)
    np.testing.assert_array_equal(to_8_bit(values), np.rint(values / 257))
    small = np.arange(256, dtype=np.uint8)
    assert to_8_bit(small) is small


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_compositing_is_rounded_once(dtype: type) -> None:
    generator = np.random.default_rng(0)
    most = np.iinfo(dtype).max
    values = generator.integers(0, most + 1, (300, 200, 4)).astype(dtype)
    colors, alpha = values[..., :3], values[..., 3:]
    exact = 255 * (1 - (1 - colors / most) * (alpha / most))
    assert np.abs(composite_on_white(colors, alpha) - exact).max() <= 0.5001


def test_compositing_of_images_is_within_one() -> None:
    generator = np.random.default_rng(0)
    values = generator.integers(0, 256, (300, 200, 4)).astype(np.uint8)
    image, is_transparent = composite_image(Image.fromarray(values))
    exact = 255 * (1 - (1 - values[..., :3] / 255) * (values[..., 3:] / 255))
    assert is_transparent
    assert np.abs(np.asarray(image) - exact).max() <= 1
    values[..., 3] = 255
    image, is_transparent = composite_image(Image.fromarray(values))
    np.testing.assert_array_equal(np.asarray(image), values[..., :3])
    assert not is_transparent


def test_blocks_of_rows_cover_the_image() -> None:
    for shape in ((1, 1), (5, 3_000_000), (3000, 1000, 4), (1 << 21, 1)):
        rows = [row for part in row_blocks(shape) for row in range(shape[0])[part]]
        assert rows == list(range(shape[0]))
