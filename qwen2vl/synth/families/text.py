"""Task family `text` (OCR): one line of text to read, or a page of lines, on a canvas of any size.

A curriculum starts with cells (one character in each 28 x 28 pixels, which is one vision token) and
ends with proportional text in any colors. The canvas size follows from the ink and the padding, so
no glyph is cut off. Pages are the most efficient training data: their many characters share the
cost of one question.
"""

from __future__ import annotations

import math
from dataclasses import replace
from random import Random

from qwen2vl.synth.colors import sample_text_colors
from qwen2vl.synth.draw import ink_extent
from qwen2vl.synth.fonts import files_of, stems_look_alike
from qwen2vl.synth.spec import RGB, FamilySample, Line, Mixture, Question
from qwen2vl.synth.strings import ALPHABETS, random_string, word_string
from qwen2vl.synth.wordings import sample_question_text

__all__ = ["sample", "sample_font", "sample_text", "write_line"]

_CELL = 28  # pixels a side of one vision token: patch 14, merge 2
_SPARSE_PIXELS = 160_000  # largest area of an enlarged canvas: 204 vision tokens
_CELL_SIZES = (20, 24)  # pixels per em; the range is narrow to keep "o" and "O" distinct
_LEADING = (1.15, 1.7)  # of the font size: distance between the baselines of a page


def sample(rng: Random, mixture: Mixture) -> FamilySample:
    """Sample one line, or a page of several, and a question that asks to read it."""
    font = sample_font(rng, mixture)
    page = mixture.page_share > 0 and rng.random() < mixture.page_share
    lines = rng.randint(*mixture.page_lines) if page else 1
    text = "\n".join(sample_text(rng, mixture, font) for _ in range(lines))
    line = write_line(rng, mixture, text, font)
    task = "read_page" if page else "read"
    question = sample_question_text(rng, task, mixture.split)
    return FamilySample((Question(task=task, text=question, answer=line.text),), (line,))


def sample_font(rng: Random, mixture: Mixture) -> str:
    """Sample a font family, then one of its faces: each family has the same probability."""
    return rng.choice(rng.choice(files_of(mixture.fonts)))


def sample_text(rng: Random, mixture: Mixture, font: str) -> str:
    """Sample the text to be written.

    In fonts that draw I and l alike, random strings contain no I, which could not be recognized;
    words keep it, since there the context disambiguates.
    """
    low, high = mixture.text_length
    alphabet = ALPHABETS[mixture.alphabet]
    if rng.random() >= mixture.random_share:
        return word_string(rng, low, high, alphabet)
    ambiguous = "I" if stems_look_alike(font) else ""
    spaces = mixture.alphabet == "all" and mixture.layout == "line"
    length = rng.randint(low, high)
    return random_string(rng, length, alphabet, spaces=spaces, excluded=ambiguous)


def write_line(rng: Random, mixture: Mixture, text: str, font: str) -> Line:
    """Sample font size, position and colors; text wider than `max_width` shrinks, then is cut."""
    ink, ground, texture = _sample_style(rng, mixture)
    if mixture.layout == "cells":
        return _write_cells(rng, text, font, ink, ground, texture)
    low, high = mixture.font_size
    max_width = mixture.max_width
    if mixture.large_share and rng.random() < mixture.large_share:
        low, high, max_width = high, 3 * high, 3 * max_width
    page = "\n" in text
    size = _sample_size(rng, min(3 * low // 2, high) if page else low, high)
    spacing = rng.uniform(*_LEADING) if page else 0.0
    tracking = rng.choice((0, 0, 0, 1, 2)) if size >= 16 else 0
    pads = [rng.randint(*mixture.padding) for _ in range(4)]
    while True:
        leading = round(spacing * size)
        left, top, right, bottom = ink_extent(
            text, font, size, cell=0, tracking=tracking, leading=leading
        )
        width = pads[0] + right - left + pads[2]
        if width <= max_width or len(_longest(text)) == 1:
            break
        if size > low:
            size = max(low, min(size - 1, size * max_width // width))
        else:
            longest = _longest(text)
            text = text.replace(longest, longest[:-1].rstrip(" "), 1)
    line = Line(
        text=text,
        font=font,
        size=size,
        width=width,
        height=pads[1] + bottom - top + pads[3],
        x=pads[0] - left,
        y=pads[1] - top,
        ink=ink,
        ground=ground,
        tracking=tracking,
        leading=leading,
        texture=texture,
    )
    if mixture.sparse_share and rng.random() < mixture.sparse_share:
        return _on_sparse_canvas(rng, line)
    return line


def _longest(text: str) -> str:
    return max(text.split("\n"), key=len)


def _on_sparse_canvas(rng: Random, line: Line) -> Line:
    """Enlarge the canvas to another aspect ratio, with the line at a random position."""
    aspect = math.exp(rng.uniform(math.log(1 / 4), math.log(40)))
    width = max(line.width, min(round(line.height * aspect), _SPARSE_PIXELS // line.height))
    height = max(line.height, min(round(line.width / aspect), _SPARSE_PIXELS // line.width))
    return replace(
        line,
        width=width,
        height=height,
        x=line.x + rng.randint(0, width - line.width),
        y=line.y + rng.randint(0, height - line.height),
    )


def _sample_size(rng: Random, low: int, high: int) -> int:
    """Sample any size up to 40, above that multiples of 4: each size needs a cached glyph table."""
    size = rng.randint(low, high)
    return size if size <= 40 else max(low, size - size % 4)


def _write_cells(rng: Random, text: str, font: str, ink: RGB, ground: RGB, texture: int) -> Line:
    """Center one character in each cell, at the sampled size or the largest that fits."""
    size, y = rng.randint(*_CELL_SIZES), 20 + rng.randint(-1, 1)
    rows = text.split("\n")
    while not all(_fits_cells(row, font, size, y) for row in rows):
        size -= 1
    return Line(
        text=text,
        font=font,
        size=size,
        width=_CELL * max(map(len, rows)),
        height=_CELL * len(rows),
        x=0,
        y=y,
        ink=ink,
        ground=ground,
        cell=_CELL,
        leading=_CELL,
        texture=texture,
    )


def _fits_cells(text: str, font: str, size: int, y: int) -> bool:
    """Return whether all glyphs fit their cells; wide ones of proportional fonts may not."""
    left, top, right, bottom = ink_extent(text, font, size, cell=_CELL, tracking=0)
    return left >= 0 and right <= _CELL * len(text) and y + top >= 0 and y + bottom <= _CELL


def _sample_style(rng: Random, mixture: Mixture) -> tuple[RGB, RGB, int]:
    if rng.random() < mixture.plain_share:
        return (0, 0, 0), (255, 255, 255), 0
    ink, ground = sample_text_colors(rng)
    textured = rng.random() < mixture.textured_share
    return ink, ground, rng.randrange(1, 1_000_000) if textured else 0
