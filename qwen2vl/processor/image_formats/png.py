"""PNG: 16-bit colors in full precision, and the transparent color of every depth.

Pillow keeps the high bytes of 16-bit colors, and compares the transparent color of 2, 4 and 16 bit
with values of 8 bit. Here the low bytes are decoded as well, and tRNS is compared with the values
that are stored. (PNG specification, third edition: 11.3.1.1, 13.12.)
"""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

from qwen2vl.processor.image_formats.samples import COMPOSITED, composite_on_white, to_8_bit

__all__ = ["load_png"]

# Raw mode of the plugin for 16 bit -> mode and raw mode by which the low bytes are decoded.
_LOW_BYTES = {"RGB;16B": ("RGB", "RGB;16L"), "RGBA;16B": ("RGBA", "RGBA;16L")}
_OPAQUE = 65535
_GRAY_ALPHA = "LA;16B"  # its four bytes are decoded as those of RGBA
_LEVELS = {"L;2": 3, "L;4": 15}  # raw modes that are scaled to 255


def load_png(image: PngImagePlugin.PngImageFile) -> Image.Image:
    """Decode the current frame; return it, or an image of its pixels.

    Transparent pixels are composited on white, and noted, where Pillow has no mode for them.

    Raises:
        OSError, SyntaxError, ValueError, ...: as `image.load`.
    """
    raw_mode = _raw_mode(image)
    if image.tell() == 0 and not getattr(image, "is_animated", False):
        if raw_mode in _LOW_BYTES:
            return _load_wide(image, raw_mode)
        if raw_mode == _GRAY_ALPHA:
            return _load_wide_gray_alpha(image)
    image.load()
    key = image.info.get("transparency")
    if isinstance(key, int) and image.mode in ("L", "I;16"):
        values = np.asarray(image)[..., None]
        is_key = values == key * 255 // _LEVELS.get(raw_mode, 255)
        return _with_white(to_8_bit(values), is_key)
    return image


def _raw_mode(image: PngImagePlugin.PngImageFile) -> str:
    args: Any = image.tile[0][3] if image.tile else ""
    return args if isinstance(args, str) else str(args[0])


def _load_wide(image: PngImagePlugin.PngImageFile, raw_mode: str) -> Image.Image:
    """Decode RGB and RGBA of 16 bit: the low bytes first, by a second reader of the same file."""
    file = image.fp
    assert file is not None, "pixels are not loaded yet"
    position = file.tell()
    file.seek(0)
    second = PngImagePlugin.PngImageFile(file)
    low = _load_as(second, *_LOW_BYTES[raw_mode])
    file.seek(position)
    image.load()
    values = np.asarray(image).astype(np.uint16) << 8 | np.asarray(low)
    key = image.info.get("transparency")
    if isinstance(key, tuple):
        return _with_white(to_8_bit(values), (values == np.array(key)).all(2, keepdims=True))
    return _opaque(values) if values.shape[2] == 4 else Image.fromarray(to_8_bit(values))


def _load_wide_gray_alpha(image: PngImagePlugin.PngImageFile) -> Image.Image:
    stored = np.asarray(_load_as(image, "RGBA", "RGBA")).astype(np.uint16)
    return _opaque(stored[..., ::2] << 8 | stored[..., 1::2])


def _load_as(image: PngImagePlugin.PngImageFile, mode: str, raw_mode: str) -> Image.Image:
    """Decode the bytes of the file by another raw mode of the same number of bits."""
    image._mode = mode
    image.tile = [image.tile[0]._replace(args=raw_mode)]
    image.load()
    return image


def _opaque(values: np.ndarray) -> Image.Image:
    """Composite 16-bit colors, whose last channel is alpha, on white."""
    colors, alpha = values[..., :-1], values[..., -1:]
    if alpha.min() == _OPAQUE:
        return _image_of(to_8_bit(colors))
    image = _image_of(composite_on_white(colors, alpha))
    image.info[COMPOSITED] = True
    return image


def _with_white(colors: np.ndarray, is_transparent: np.ndarray) -> Image.Image:
    """Return 8-bit colors, white where they are transparent."""
    image = _image_of(np.where(is_transparent, np.uint8(255), colors))
    if is_transparent.any():
        image.info[COMPOSITED] = True
    return image


def _image_of(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
