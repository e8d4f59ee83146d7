"""Text of any script, shaped by HarfBuzz (Pillow's raqm layout), as a coverage mask.

A font is a file of the tables in synth/fonts.py, which is looked for on this system, or
"PACKAGE/FILE" of the dataset test-fonts. Arabic and the scripts of India need shaping, without
which their text is wrong: where Pillow lacks raqm, text in fonts of the dataset is refused.
"""

from __future__ import annotations

from functools import lru_cache

from PIL import Image, ImageDraw, ImageFont, features

from qwen2vl.fetch import dataset_folder
from qwen2vl.synth.fonts import FontError, font_path

__all__ = ["DATASET", "check_font", "text_extent", "text_mask"]

DATASET = "test-fonts"


def check_font(font: str) -> None:
    """Check that text can be drawn in a font.

    Raises:
        DatasetNotFoundError: the dataset test-fonts is not on this machine.
        FontError: the font is not installed, or Pillow lacks raqm.
    """
    if "/" not in font:
        font_path(font)
        return
    dataset_folder(DATASET)
    if not features.check("raqm"):
        raise FontError(
            "fonts: Pillow has no raqm layout, which shapes Arabic, Devanagari and others; install "
            "Pillow from PyPI, and libfribidi (apt-get install libfribidi0)"
        )


def text_extent(text: str, font: str, size: int) -> tuple[int, int, int, int]:
    """Compute a box that holds the ink of a line, relative to its left end on the baseline.

    Returns:
        (left, top, right, bottom), the last two exclusive; left and top are often negative. It is
        as high as the ink, and as wide as the ink and the advance.

    Raises:
        DatasetNotFoundError, FontError: as `check_font` does.
    """
    left, top, right, bottom = _face(font, size).getbbox(text, anchor="ls")
    return int(left), int(top), int(right), int(bottom)


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
    mask = Image.new("L", (width, height), 0)
    ImageDraw.Draw(mask).text((x, y), text, font=_face(font, size), fill=255, anchor="ls")
    return mask


@lru_cache(maxsize=256)
def _face(font: str, size: int) -> ImageFont.FreeTypeFont:
    check_font(font)
    if "/" in font:
        path, layout = str(dataset_folder(DATASET) / font), ImageFont.Layout.RAQM
    else:
        path, layout = font_path(font), ImageFont.Layout.BASIC
    return ImageFont.truetype(path, size, layout_engine=layout)
