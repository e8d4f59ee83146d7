"""Drawing of composite pictures, as uint8 (height, width, 3).

All random choices are in the picture. Pixels depend on the versions of resvg, FreeType and libjpeg
by a few shades.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from qwen2vl.fetch import dataset_folder
from qwen2vl.synth.compositing.generated import figure_mask, generate_photo
from qwen2vl.synth.compositing.icons import change_tone, check_icons, icon_raster, render_icon
from qwen2vl.synth.compositing.layers import (
    Composite,
    Generated,
    Ground,
    Icon,
    Layer,
    Photo,
    Rect,
    ShapeLayer,
    Text,
)
from qwen2vl.synth.compositing.text import check_font, text_extent, text_mask
from qwen2vl.synth.shape_masks import shape_mask

__all__ = ["PHOTOS", "check_resources", "draw_composite", "photo"]

PHOTOS = "photos"  # the dataset

_NOISE_ROWS = 16  # that are drawn at once
_CELLS_PER_CLOUD = 3


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
    image = _draw_ground(picture.ground, picture.width, picture.height)
    for layer in picture.layers:
        _paint(image, layer)
    if picture.blur:
        image = image.filter(ImageFilter.GaussianBlur(picture.blur))
    if picture.jpeg_quality:
        image = _compress(image, picture.jpeg_quality)
    return np.array(image)


def _draw_ground(ground: Ground, width: int, height: int) -> Image.Image:
    if ground.kind == "plain":
        return Image.new("RGB", (width, height), ground.rgb)
    if ground.kind == "noise":
        cells = _draw_noise(ground, -(-width // ground.cell), -(-height // ground.cell))
        wide = cells.repeat(ground.cell, 1)[:, :width] if ground.cell > 1 else cells
        return Image.fromarray(wide.repeat(ground.cell, 0)[:height] if ground.cell > 1 else wide)
    if ground.kind == "clouds":
        return _draw_clouds(ground, width, height)
    rows, columns = np.arange(height), np.arange(width)
    if ground.kind == "checks":
        kinds_of_rows = _blend(ground, (np.arange(2)[:, None] + columns // ground.cell) % 2)
        return Image.fromarray(kinds_of_rows[rows // ground.cell % 2])
    if ground.kind == "gradient" and ground.seed % 2 == 0:
        line = _blend(ground, columns / max(1, width - 1))[None]
    elif ground.kind == "gradient":
        line = _blend(ground, rows / max(1, height - 1))[:, None]
    else:
        line = _blend(ground, rows // ground.cell % 2)[:, None]
    return Image.fromarray(line).resize((width, height), Image.Resampling.NEAREST)


def _blend(ground: Ground, shares: NDArray[np.number[Any]]) -> NDArray[np.uint8]:
    """Return colors (..., 3): `rgb` where the shares (...) are 0, `rgb2` where they are 1."""
    low, high = np.array(ground.rgb, np.float32), np.array(ground.rgb2, np.float32)
    return (low + (high - low) * shares[..., None].astype(np.float32)).round().astype(np.uint8)


def _draw_noise(ground: Ground, columns: int, rows: int) -> NDArray[np.uint8]:
    """Draw one pixel for each cell, (rows, columns, 3)."""
    generator = np.random.Generator(np.random.Philox(ground.seed))
    # Colors of whole rows: numpy is slow where an operand repeats every three numbers.
    low = np.tile(np.array(ground.rgb, np.float32), (columns, 1))
    range_ = np.tile(np.array(ground.rgb2, np.float32), (columns, 1)) - low
    colors = np.empty((rows, columns, 3), dtype=np.uint8)
    for top in range(0, rows, _NOISE_ROWS):  # so that the floats stay in the cache
        part = colors[top : top + _NOISE_ROWS]
        shares = generator.random(part.shape, dtype=np.float32)
        shares *= range_
        shares += low
        part[:] = np.rint(shares, out=shares)
    return colors


def _draw_clouds(ground: Ground, width: int, height: int) -> Image.Image:
    """Enlarge a small grid of random shares, bicubically."""
    step = _CELLS_PER_CLOUD * ground.cell
    # The margins hold what the bicubic filter reads outside of the picture.
    size = (-(-height // step) + 3, -(-width // step) + 3)
    values = np.random.Generator(np.random.Philox(ground.seed)).integers(0, 256, size, np.uint8)
    shares = Image.fromarray(values).resize(
        (width, height), Image.Resampling.BICUBIC, box=(1, 1, 1 + width / step, 1 + height / step)
    )
    image = Image.new("RGB", (width, height), ground.rgb)
    image.paste(ground.rgb2, (0, 0), shares)
    return image


def _paint(image: Image.Image, layer: Layer) -> None:
    if isinstance(layer, Text):
        _paint_text(image, layer)
        return
    x1, y1, x2, y2 = layer.box
    size = (x2 - x1, y2 - y1)
    if isinstance(layer, ShapeLayer):
        image.paste(layer.rgb, (x1, y1), shape_mask(layer.kind, *size, layer.angle))
    elif isinstance(layer, Rect):
        image.paste(layer.rgb, layer.box)
    elif isinstance(layer, Icon):
        icon = change_tone(_fit_icon(layer, size), layer.tone)
        image.paste(icon, (x1, y1), icon)
    elif isinstance(layer, Generated):
        if layer.kind == "photo":
            image.paste(generate_photo(layer.seed).resize(size), (x1, y1))
        else:
            image.paste(layer.rgb, (x1, y1), figure_mask(layer.kind, layer.seed, size))
    else:
        cropped = photo(layer.file).crop(layer.crop) if layer.crop else photo(layer.file)
        image.paste(cropped.resize(size, Image.Resampling.LANCZOS), (x1, y1))


def _paint_text(image: Image.Image, layer: Text) -> None:
    """Paint the part of the picture that the text covers."""
    left, top, right, bottom = text_extent(layer.text, layer.font, layer.size)
    x1, y1 = max(0, layer.x + left), max(0, layer.y + top)
    x2, y2 = min(image.width, layer.x + right), min(image.height, layer.y + bottom)
    if x1 >= x2 or y1 >= y2:
        return
    mask = text_mask(
        layer.text,
        layer.font,
        layer.size,
        width=x2 - x1,
        height=y2 - y1,
        x=layer.x - x1,
        y=layer.y - y1,
    )
    image.paste(layer.rgb, (x1, y1), mask)


def _fit_icon(layer: Icon, size: tuple[int, int]) -> Image.Image:
    """Draw an icon as RGBA of the size of its box."""
    if not layer.raster:
        icon = render_icon(layer.style, layer.name, max(size), layer.lines)
        if layer.angle:
            icon = icon.rotate(layer.angle, Image.Resampling.BICUBIC)
        return icon if icon.size == size else icon.resize(size, Image.Resampling.LANCZOS)
    icon = icon_raster(layer.style, layer.name, layer.raster, layer.lines)
    if layer.angle:
        # Rotation takes longer than resizing: of the two sizes, the smaller one is rotated.
        side = min(max(size), layer.raster)
        icon = _resize_icon(icon, (side, side)).rotate(layer.angle, Image.Resampling.BILINEAR)
    return _resize_icon(icon, size).convert("RGBA")


def _resize_icon(icon: Image.Image, size: tuple[int, int]) -> Image.Image:
    if icon.size == size:
        return icon
    return icon.resize(size, Image.Resampling.BICUBIC, reducing_gap=2.0)


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
