"""Drawing of composite pictures, as uint8 (height, width, 3).

All random choices are in the picture. Pixels depend on the versions of resvg, FreeType and libjpeg
by a few shades.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from qwen2vl.fetch import dataset_folder
from qwen2vl.synth.compositing.icons import check_icons, render_icon
from qwen2vl.synth.compositing.layers import Composite, Ground, Icon, Layer, Photo, ShapeLayer, Text
from qwen2vl.synth.compositing.text import check_font, text_mask
from qwen2vl.synth.shape_masks import shape_mask

__all__ = ["PHOTOS", "check_resources", "draw_composite", "photo"]

PHOTOS = "photos"  # the dataset


def check_resources(pictures: Iterable[Composite]) -> None:
    """Check that pictures can be drawn.

    Raises:
        DatasetNotFoundError: a dataset is not on this machine; the text has the command.
        ConfigError: a font or a library is not installed; the text has the package.
    """
    layers = [layer for picture in pictures for layer in picture.layers]
    if any(isinstance(layer, Icon) for layer in layers):
        check_icons()
    if any(isinstance(layer, Photo) for layer in layers):
        dataset_folder(PHOTOS)
    for font in sorted({layer.font for layer in layers if isinstance(layer, Text)}):
        check_font(font)


def draw_composite(picture: Composite) -> NDArray[np.uint8]:
    """Draw a picture, (H, W, 3) uint8.

    Raises:
        DatasetNotFoundError, ConfigError: as `check_resources` does.
    """
    image = Image.fromarray(_draw_ground(picture.ground, picture.width, picture.height))
    for layer in picture.layers:
        _paint(image, layer)
    if picture.blur:
        image = image.filter(ImageFilter.GaussianBlur(picture.blur))
    if picture.jpeg_quality:
        image = _compress(image, picture.jpeg_quality)
    return np.array(image)


def _draw_ground(ground: Ground, width: int, height: int) -> NDArray[np.uint8]:
    """Blend the two colors by a share for every pixel."""
    rows, columns = np.arange(height)[:, None], np.arange(width)[None, :]
    shares: NDArray[np.float32]
    if ground.kind == "plain":
        shares = np.zeros((1, 1), dtype=np.float32)
    elif ground.kind == "gradient":
        line = columns / max(1, width - 1) if ground.seed % 2 == 0 else rows / max(1, height - 1)
        shares = line.astype(np.float32)
    elif ground.kind == "noise":
        cells = (-(-height // ground.cell), -(-width // ground.cell), 3)
        values = np.random.Generator(np.random.Philox(ground.seed)).random(cells, dtype=np.float32)
        shares = values.repeat(ground.cell, 0).repeat(ground.cell, 1)[:height, :width]
    elif ground.kind == "stripes":
        shares = (rows // ground.cell % 2).astype(np.float32)
    else:
        shares = ((rows // ground.cell + columns // ground.cell) % 2).astype(np.float32)
    if shares.ndim == 2:
        shares = shares[:, :, None]
    low, high = np.array(ground.rgb, np.float32), np.array(ground.rgb2, np.float32)
    colors = (low + (high - low) * shares).round().astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(colors, (height, width, 3)))


def _paint(image: Image.Image, layer: Layer) -> None:
    if isinstance(layer, Text):
        width, height = image.size
        mask = text_mask(
            layer.text, layer.font, layer.size, width=width, height=height, x=layer.x, y=layer.y
        )
        image.paste(layer.rgb, (0, 0), mask)
        return
    x1, y1, x2, y2 = layer.box
    size = (x2 - x1, y2 - y1)
    if isinstance(layer, ShapeLayer):
        image.paste(layer.rgb, (x1, y1), shape_mask(layer.kind, size[0]))
    elif isinstance(layer, Icon):
        icon = render_icon(layer.style, layer.name, max(size))
        if layer.angle:
            icon = icon.rotate(layer.angle, Image.Resampling.BICUBIC)
        icon = icon if icon.size == size else icon.resize(size, Image.Resampling.LANCZOS)
        image.paste(icon, (x1, y1), icon)
    else:
        cropped = photo(layer.file).crop(layer.crop) if layer.crop else photo(layer.file)
        image.paste(cropped.resize(size, Image.Resampling.LANCZOS), (x1, y1))


@lru_cache(maxsize=32)
def photo(file: str) -> Image.Image:
    """Read a photo of the dataset, as RGB.

    Raises:
        DatasetNotFoundError: the dataset is not on this machine.
    """
    with Image.open(dataset_folder(PHOTOS) / file) as image:
        return image.convert("RGB")


def _compress(image: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")
