"""Generated drawings: pictures with the statistics of photos, and figures without a name.

`generate_photo` draws textures, landscapes, out-of-focus objects and spots in muted colors, with
uneven light and grain, so that training needs no photos: those at hand are for tests. The figures
of `figure_mask` are irregular polygons, blobs, scribbles and strokes. Both depend on a seed only.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

__all__ = ["FIGURE_KINDS", "PHOTO_SIDE", "figure_mask", "generate_photo"]

FIGURE_KINDS = ("polygon", "blob", "scribble", "strokes")
PHOTO_SIDE = 128  # pixels; larger boxes get the same photo enlarged

_MASK_SIDE = 192  # pixels at which figures are drawn before they are resized
_Field = NDArray[np.floating[Any]]  # (PHOTO_SIDE, PHOTO_SIDE), 0 to 1


@lru_cache(maxsize=32)
def generate_photo(seed: int) -> Image.Image:
    """Draw a picture that resembles a photo, PHOTO_SIDE x PHOTO_SIDE pixels, RGB."""
    rng = np.random.Generator(np.random.Philox(seed))
    detail = _fractal(rng)
    image = (_texture, _landscape, _objects, _spots)[rng.integers(4)](rng, detail)
    light = _light(rng) + rng.uniform(0, 0.5) * (detail - 0.5)
    lit = np.asarray(image, np.float32) * light[:, :, None]
    grain = (0.0, 2.0, 6.0, 12.0)[rng.integers(4)]
    if grain:
        lit += grain * rng.standard_normal((*detail.shape, 1), dtype=np.float32)
    return Image.fromarray(lit.clip(0, 255).astype(np.uint8))


def figure_mask(kind: str, seed: int, size: tuple[int, int]) -> Image.Image:
    """Draw the coverage mask of a figure without a name, "L", `size` (width, height) pixels.

    Args:
        kind: one of FIGURE_KINDS.
        seed: each makes another figure.
        size: in pixels.
    """
    rng = np.random.Generator(np.random.Philox(seed))
    image = Image.new("L", (_MASK_SIDE, _MASK_SIDE), 0)
    canvas = ImageDraw.Draw(image)
    if kind in ("polygon", "blob"):
        canvas.polygon(_outline(rng, smooth=kind == "blob"), fill=255)
    elif kind == "scribble":
        canvas.line(_curve(rng), fill=255, width=int(rng.integers(6, 16)), joint="curve")
    else:
        for _ in range(rng.integers(5, 9)):
            (x1, y1), (x2, y2) = rng.uniform(0, _MASK_SIDE, (2, 2))
            canvas.line((x1, y1, x2, y2), fill=255, width=int(rng.integers(5, 14)))
    return image.crop(image.getbbox()).resize(size, Image.Resampling.BILINEAR)


def _texture(rng: np.random.Generator, detail: _Field) -> Image.Image:
    return _paint(rng, detail)


def _landscape(rng: np.random.Generator, detail: _Field) -> Image.Image:
    """Draw an upper part of soft and a lower part of strong contrast, with an uneven border."""
    rows = np.linspace(0, 1, PHOTO_SIDE, dtype=np.float32)[:, None]
    border = rng.uniform(0.25, 0.75) + 0.3 * (_noise(rng, (1, 6)) - 0.5)
    upper = _paint(rng, 0.7 * rows + 0.3 * _noise(rng, (4, 3)))
    return Image.composite(_paint(rng, detail), upper, _mask((rows - border) * rng.uniform(10, 80)))


def _objects(rng: np.random.Generator, detail: _Field) -> Image.Image:
    """Draw a few shaded objects, some of them out of focus, one before the other."""
    image = _paint(rng, 0.8 * _noise(rng, (4, 4)) + 0.2 * detail)
    for blur in sorted(rng.uniform(0.3, 7, rng.integers(3, 9)), reverse=True):
        mask = Image.new("L", image.size, 0)
        x, y = rng.uniform(-0.1, 1.1, 2) * PHOTO_SIDE
        reach = rng.uniform(0.08, 0.4) * PHOTO_SIDE
        points = [
            (x + reach * float(r) * math.cos(angle), y + reach * float(r) * math.sin(angle))
            for r, angle in zip(rng.uniform(0.5, 1, 9), np.arange(9) * math.tau / 9, strict=True)
        ]
        ImageDraw.Draw(mask).polygon(points, fill=255)
        # Muted, so that none could be meant where a question names a color.
        color = rng.uniform(30, 220) + 0.3 * (rng.uniform(0, 255, 3) - 128)
        corners = (color + rng.uniform(-40, 40, (3, 3, 1))).clip(0, 255).astype(np.uint8)
        surface = Image.fromarray(corners).resize(image.size, Image.Resampling.BILINEAR)
        image.paste(surface, (0, 0), mask.filter(ImageFilter.BoxBlur(float(blur))))
    return image


def _spots(rng: np.random.Generator, detail: _Field) -> Image.Image:
    """Draw spots of one surface on another, as cells, pebbles or leaves are."""
    cells = int(rng.integers(6, 24))
    field = _noise(rng, (cells, cells))
    above = _paint(rng, 0.5 * detail + 0.5 * field)
    below = _paint(rng, 0.5 * detail + 0.25)
    return Image.composite(
        above, below, _mask((field - rng.uniform(0.45, 0.6)) * rng.uniform(8, 40))
    )


def _mask(shares: _Field) -> Image.Image:
    return Image.fromarray((255 * shares.clip(0, 1)).astype(np.uint8))


def _fractal(rng: np.random.Generator) -> _Field:
    """Add noise of rising frequency, stretched in one direction in half of the cases."""
    stretch = rng.uniform(1, 5) if rng.random() < 0.5 else 1.0
    roughness, weight = rng.uniform(0.4, 0.85), 1.0
    total = rng.random((3, 3), dtype=np.float32)
    for cells in (4, 8, 16, 32, 64, PHOTO_SIDE):
        size = (cells, max(3, round(cells / stretch)))
        weight *= roughness
        total = _resize(total, size) + weight * rng.random(size, dtype=np.float32)
    total = _resize(total, (PHOTO_SIDE, PHOTO_SIDE))
    if rng.random() < 0.5:
        total = np.ascontiguousarray(total.T)
    low, high = total.min(), total.max()
    return (total - low) / (high - low)


def _noise(rng: np.random.Generator, cells: tuple[int, int]) -> _Field:
    """Interpolate random values on a grid of (rows, columns)."""
    grid = rng.random((cells[0] + 1, cells[1] + 1), dtype=np.float32)
    return _resize(grid, (PHOTO_SIDE, PHOTO_SIDE))


def _resize(field: _Field, size: tuple[int, int]) -> _Field:
    """Interpolate a field bicubically; `size` is (rows, columns)."""
    if field.shape == size:
        return field
    rows, columns = size
    return np.asarray(Image.fromarray(field).resize((columns, rows), Image.Resampling.BICUBIC))


def _paint(rng: np.random.Generator, field: _Field) -> Image.Image:
    """Map values of 0 to 1 to a palette of muted colors from dark to light."""
    saturation = rng.uniform(0.05, 0.6) if rng.random() < 0.5 else 0.0
    hues = rng.random() + rng.uniform(0, 0.2) * np.arange(4)
    low, high = sorted(rng.uniform(0, 255, 2))
    levels = np.linspace(low, max(high, low + 40), 4)
    knots, places = np.linspace(0, 255, 4), np.arange(256)
    palette = np.empty((256, 3), dtype=np.uint8)
    for channel in range(3):
        tint = 0.5 + 0.5 * np.cos(math.tau * (hues - channel / 3))
        values = np.interp(places, knots, levels * (1 - saturation * tint))
        palette[:, channel] = values.clip(0, 255)
    full = np.broadcast_to(field, (PHOTO_SIDE, PHOTO_SIDE))
    image = Image.fromarray((255 * full.clip(0, 1)).astype(np.uint8))
    image.putpalette(palette.tobytes())
    return image.convert("RGB")


def _light(rng: np.random.Generator) -> _Field:
    """Return the brightness of each pixel: light from one side, and dark corners."""
    line = np.linspace(-1, 1, PHOTO_SIDE, dtype=np.float32)
    angle, strength = rng.uniform(0, math.tau), rng.uniform(0, 0.3)
    corners = rng.uniform(0, 0.18) if rng.random() < 0.5 else 0.0
    across = strength * math.cos(angle) * line - corners * line**2
    down = strength * math.sin(angle) * line - corners * line**2
    return 1 + across[None, :] + down[:, None]


def _outline(rng: np.random.Generator, *, smooth: bool) -> list[tuple[float, float]]:
    """Return the corners of an irregular figure around the center of the mask."""
    count = int(rng.integers(7, 12))
    radii = rng.uniform(0.3, 1, count)
    angles = (np.arange(count) + rng.uniform(-0.35, 0.35, count)) * math.tau / count
    if smooth:
        fine = np.linspace(0, count, 96, endpoint=False)
        radii = np.interp(fine, np.arange(count + 1), np.append(radii, radii[0]))
        kernel = np.hanning(17) / np.hanning(17).sum()
        radii = np.convolve(np.concatenate([radii[-8:], radii, radii[:8]]), kernel, "valid")
        angles = np.arange(96) * math.tau / 96
    half = _MASK_SIDE / 2
    return [
        (half + half * float(r) * math.cos(a), half + half * float(r) * math.sin(a))
        for r, a in zip(radii, angles, strict=True)
    ]


def _curve(rng: np.random.Generator) -> list[tuple[float, float]]:
    """Return the points of a line with several turns."""
    count = int(rng.integers(12, 19))
    turns = rng.uniform(0.05, 0.95, (2, count)) * _MASK_SIDE
    fine = np.linspace(0, count - 1, 8 * count)
    kernel = np.hanning(11) / np.hanning(11).sum()
    x, y = (
        np.convolve(np.pad(np.interp(fine, np.arange(count), turn), 5, "edge"), kernel, "valid")
        for turn in turns
    )
    return [(float(a), float(b)) for a, b in zip(x, y, strict=True)]
