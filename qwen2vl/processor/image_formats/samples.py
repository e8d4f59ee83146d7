"""Arithmetic of sample values: 16 to 8 bit, and compositing on white.

16-bit values are composited before they are rounded: afterwards, the result may be 2 of 255 away
from the exact color.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from PIL import Image

__all__ = ["composite_image", "composite_on_white", "float_white", "row_blocks", "to_8_bit"]

_BLOCK_PIXELS = 1 << 20
_EIGHT_BITS = ((np.arange(1 << 16, dtype=np.uint32) + 128) // 257).astype(np.uint8)


def row_blocks(shape: tuple[int, ...]) -> Iterator[slice]:
    """Yield slices of rows of about a megapixel, so that their float values take little memory."""
    step = max(1, _BLOCK_PIXELS // max(1, shape[1]))
    for start in range(0, shape[0], step):
        yield slice(start, start + step)


def to_8_bit(values: np.ndarray) -> np.ndarray:
    """Divide 16-bit values by 257, rounded; 8-bit values stay as they are."""
    if values.dtype == np.uint8:
        return values
    return _EIGHT_BITS[values]


def float_white(low: float, high: float) -> float | None:
    """Return what white is in float colors from `low` to `high`: 1 or 255; None if neither is sure.

    Interpolation leaves [0, 1] by up to 0.1, to be clipped. Maxima of up to 3 are neither that nor
    those of a picture of 0 to 255, which would be black.
    """
    if low >= -0.1 and high <= 1.1:
        return 1.0
    return 255.0 if low >= 0 and 3 < high <= 255 else None


def composite_on_white(colors: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Composite unsigned integers on white.

    Args:
        colors: (height, width, channels), not multiplied by alpha.
        alpha: (height, width, 1), of the same type.

    Returns:
        (height, width, channels) uint8.
    """
    most = np.float32(np.iinfo(colors.dtype).max)
    result = np.empty(colors.shape, np.uint8)
    for rows in row_blocks(colors.shape):
        opacity = alpha[rows] / most
        result[rows] = np.rint(255 * (colors[rows] / most * opacity + (1 - opacity)))
    return result


def composite_image(image: Image.Image) -> tuple[Image.Image, bool]:
    """Composite an 8-bit image of any mode with transparency on white.

    Returns:
        The image as RGB, and whether any of its pixels was transparent.

    Raises:
        ValueError: the mode, or what is said to be transparent, is invalid.
    """
    if image.mode == "La":
        image = image.convert("LA")
    rgba = image.convert("RGBA")
    if rgba.getchannel("A").getextrema()[0] == 255:
        return rgba.convert("RGB"), False
    white = Image.new("RGBA", rgba.size, "white")
    return Image.alpha_composite(white, rgba).convert("RGB"), True
