"""Text of any script as a coverage mask.

A font is a file of the tables in synth/fonts.py and synth/scripts/tables.py, which is looked for on
this system ("FILE.ttc#2": the third face of a collection), or "PACKAGE/FILE" of the dataset
test-fonts. Fonts of the dataset and of most families of scripts/tables.py are shaped by HarfBuzz
(Pillow's raqm layout): Arabic and the scripts of India need it, without which their text is wrong,
so that a Pillow without raqm is refused. The others are placed by the advances of their glyphs.

Pillow takes about a millisecond for a line. Where no shaping is needed, training fonts at some
sizes (`has_cached_glyphs`) are drawn character by character from a cache, without kerning and
ligatures.
"""

from __future__ import annotations

import zlib
from functools import cache, lru_cache
from typing import Any, NamedTuple

from PIL import Image, ImageFont, features

from qwen2vl.fetch import dataset_folder
from qwen2vl.synth.fonts import TRAINING_FAMILIES, FontError, font_path
from qwen2vl.synth.scripts.tables import MORE_FAMILIES

__all__ = ["DATASET", "check_font", "has_cached_glyphs", "text_extent", "text_mask"]

DATASET = "test-fonts"
_SHAPED = frozenset(
    file for family in MORE_FAMILIES.values() if family.is_shaped for file in family.files
)
# Fonts of scripts whose letters may stand side by side as they are.
_SIMPLE_SCRIPTS = {"latin", "latin_accents", "digits", "greek", "cyrillic"}
_PLACED = frozenset(file for _, files in TRAINING_FAMILIES.values() for file in files) | frozenset(
    file
    for family in MORE_FAMILIES.values()
    if _SIMPLE_SCRIPTS.issuperset(family.scripts)
    for file in family.files
)
_CACHED_SIZES = 8  # one of so many sizes
_CACHED_GLYPHS = 150_000  # of some 600 bytes


class _Glyph(NamedTuple):
    """A character drawn alone, relative to its pen on the baseline."""

    mask: Any  # Pillow's image, without the Python object around it
    left: int
    top: int
    right: int
    bottom: int
    advance: int


def check_font(font: str) -> None:
    """Check that text can be drawn in a font.

    Raises:
        DatasetNotFoundError: the dataset test-fonts is not on this machine.
        FontError: the font is not installed, or Pillow lacks raqm.
    """
    if "/" in font:
        dataset_folder(DATASET)
    else:
        font_path(font.partition("#")[0])
    if _is_shaped(font) and not features.check("raqm"):
        raise FontError(
            "fonts: Pillow has no raqm layout, which shapes Arabic, Devanagari and others; install "
            "Pillow from PyPI, and libfribidi (apt-get install libfribidi0)"
        )


@cache
def has_cached_glyphs(font: str, size: int) -> bool:
    """Return whether text in a font and size is drawn from cached glyphs: one size of eight."""
    return font in _PLACED and (size + zlib.crc32(font.encode())) % _CACHED_SIZES == 0


def text_extent(text: str, font: str, size: int) -> tuple[int, int, int, int]:
    """Compute a box that holds the ink of a line, relative to its left end on the baseline.

    Returns:
        (left, top, right, bottom), the last two exclusive; left and top are often negative. It is
        as high as the ink, and as wide as the ink and the advance.

    Raises:
        DatasetNotFoundError, FontError: as `check_font` does.
    """
    mask, left, top = _draw(text, font, size)
    return left, top, left + mask.width, top + mask.height


def text_mask(
    text: str, font: str, size: int, *, width: int, height: int, x: int, y: int
) -> Image.Image:
    """Draw a line of text: a mask of coverage, "L", `width` x `height`.

    Args:
        text: the line.
        font: file name, or "PACKAGE/FILE".
        size: pixels per em.
        width: of the mask, pixels.
        height: of the mask, pixels.
        x: left end of the line.
        y: baseline.

    Raises:
        DatasetNotFoundError, FontError: as `check_font` does.
    """
    line, left, top = _draw(text, font, size)
    mask = Image.new("L", (width, height), 0)
    mask.paste(line, (x + left, y + top))
    return mask


# An example is measured when it is sampled, and drawn soon after.
@lru_cache(maxsize=64)
def _draw(text: str, font: str, size: int) -> tuple[Image.Image, int, int]:
    """Draw a line: its mask, and where this begins, relative to the left end on the baseline."""
    if has_cached_glyphs(font, size):
        return _place_glyphs(text, font, size)
    core, (left, top) = _face(font, size).getmask2(text, "L", anchor="ls")
    mask = Image.new("L", core.size)
    if all(core.size):
        mask.im.paste(core, (0, 0, *core.size))
    return mask, int(left), int(top)


def _place_glyphs(text: str, font: str, size: int) -> tuple[Image.Image, int, int]:
    """Draw a line as `_draw` does, each character beside the one before."""
    placed: list[tuple[int, _Glyph]] = []
    pen = left = right = top = bottom = 0
    for char in text:
        glyph = _glyph(char, font, size)
        left, right = min(left, pen + glyph.left), max(right, pen + glyph.right)
        top, bottom = min(top, glyph.top), max(bottom, glyph.bottom)
        placed.append((pen, glyph))
        pen += glyph.advance
    line = Image.new("L", (max(right, pen) - left, bottom - top))
    for x, glyph in placed:
        if glyph.bottom > glyph.top:
            x1, y1 = x + glyph.left - left, glyph.top - top
            x2, y2 = x + glyph.right - left, glyph.bottom - top
            line.im.paste(255, (x1, y1, x2, y2), glyph.mask)
    return line, left, top


@lru_cache(maxsize=_CACHED_GLYPHS)
def _glyph(char: str, font: str, size: int) -> _Glyph:
    face = _face(font, size)
    mask, (left, top) = face.getmask2(char, "L", anchor="ls")
    width, height = mask.size if all(mask.size) else (0, 0)
    left, top = int(left), int(top)
    return _Glyph(mask, left, top, left + width, top + height, round(face.getlength(char)))


def _is_shaped(font: str) -> bool:
    return "/" in font or font in _SHAPED


@lru_cache(maxsize=512)
def _face(font: str, size: int) -> ImageFont.FreeTypeFont:
    check_font(font)
    layout = ImageFont.Layout.RAQM if _is_shaped(font) else ImageFont.Layout.BASIC
    if "/" in font:
        return ImageFont.truetype(str(dataset_folder(DATASET) / font), size, layout_engine=layout)
    file, _, index = font.partition("#")
    return ImageFont.truetype(font_path(file), size, int(index or 0), layout_engine=layout)
