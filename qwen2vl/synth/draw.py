"""Rasterization of specs: lines of text and scenes of shapes, as uint8 (height, width, 3).

Everything costly is computed once and cached: glyph masks by font and size, shape masks by kind
and side, one tile of background noise. An image is then a background and a few pastes, well under
a millisecond. Drawing is deterministic: all random choices are in the spec.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from qwen2vl.synth.compositing import Composite, draw_composite
from qwen2vl.synth.fonts import Glyph, glyphs
from qwen2vl.synth.shape_masks import shape_mask
from qwen2vl.synth.spec import RGB, Line, Picture, Scene
from qwen2vl.synth.strings import ALPHABETS

__all__ = ["CHARACTERS", "draw_image", "ink_extent"]

CHARACTERS = ALPHABETS["all"] + " "

_GRAIN_SIDE = 1024
_GRAIN_SHADES = 7  # largest change of a channel value by the grain


def draw_image(picture: Picture) -> NDArray[np.uint8]:
    """Draw a line of text, a scene of shapes or a composite, (H, W, 3) uint8."""
    if isinstance(picture, Composite):
        return draw_composite(picture)
    return _draw_line(picture) if isinstance(picture, Line) else _draw_scene(picture)


def ink_extent(
    text: str, font: str, size: int, *, cell: int, tracking: int, leading: int = 0
) -> tuple[int, int, int, int]:
    """Compute the bounding box of the ink of a text, relative to the first pen position.

    Returns:
        (left, top, right, bottom), the last two exclusive; left and top are often negative.
    """
    boxes = [
        (x + g.left, y + g.top, x + g.left + g.mask.shape[1], y + g.top + g.mask.shape[0])
        for x, y, g in _layout_glyphs(text, font, size, cell, tracking, leading)
        if g.mask.size
    ]
    left, top, right, bottom = zip(*boxes, strict=True)
    return min(left), min(top), max(right), max(bottom)


def _layout_glyphs(
    text: str, font: str, size: int, cell: int, tracking: int, leading: int
) -> list[tuple[int, int, Glyph]]:
    """Return (x, y, glyph) for each character; in cells each glyph is centered in its own cell."""
    table = glyphs(font, size, CHARACTERS)
    placed: list[tuple[int, int, Glyph]] = []
    pen = baseline = 0
    for char in text:
        if char == "\n":
            pen, baseline = 0, baseline + leading
            continue
        glyph = table[char]
        if cell:
            ink = glyph.mask.shape[1]
            placed.append((pen + (cell - ink) // 2 - glyph.left, baseline, glyph))
            pen += cell
        else:
            placed.append((pen, baseline, glyph))
            pen += glyph.advance + tracking
    return placed


def _draw_line(line: Line) -> NDArray[np.uint8]:
    coverage = np.zeros((line.height, line.width), dtype=np.uint8)
    for x, y, glyph in _layout_glyphs(
        line.text, line.font, line.size, line.cell, line.tracking, line.leading
    ):
        height, width = glyph.mask.shape
        left, top = line.x + x + glyph.left, line.y + y + glyph.top
        # Glyphs may overlap their neighbor: the larger coverage counts.
        target = coverage[top : top + height, left : left + width]
        np.maximum(target, glyph.mask, out=target)
    image = _background(line.width, line.height, line.ground, line.texture)
    image.paste(line.ink, (0, 0), Image.fromarray(coverage))
    return np.array(image)


def _draw_scene(scene: Scene) -> NDArray[np.uint8]:
    image = _background(scene.width, scene.height, scene.ground, scene.texture)
    for shape in scene.shapes:
        image.paste(shape.rgb, shape.box[:2], shape_mask(shape.kind, shape.side))
    return np.array(image)


def _background(width: int, height: int, color: RGB, texture: int) -> Image.Image:
    if not texture:
        return Image.new("RGB", (width, height), color)
    y, x = texture % 1009 % (_GRAIN_SIDE - 1), texture % 997
    rows = np.take(_noise_tile(), range(y, y + height), axis=0, mode="wrap")
    grain = np.take(rows, range(x, x + width), axis=1, mode="wrap")
    shades = np.array(color, dtype=np.int16) + grain[:, :, None]
    return Image.fromarray(shades.clip(0, 255).astype(np.uint8))


@lru_cache(maxsize=1)
def _noise_tile() -> NDArray[np.int16]:
    """Create one fixed tile of smooth noise; each image takes a window of it."""
    noise = np.random.Generator(np.random.Philox(2)).integers(0, 256, (_GRAIN_SIDE // 4,) * 2)
    soft = Image.fromarray(noise.astype(np.uint8)).resize((_GRAIN_SIDE, _GRAIN_SIDE))
    shades = np.asarray(soft, dtype=np.float32) / 127.5 - 1
    return (shades * _GRAIN_SHADES).round().astype(np.int16)
