"""The family `text`: a line to read, or a page of lines, anywhere on a canvas of any size.

A curriculum starts in cells (one character in each 28 x 28 pixels, which is one vision token) and
ends with free proportional text in any colors. The canvas follows from the ink and the padding,
so nothing is ever cut off. A page teaches most: its many letters share the cost of one question.
It must not know other families. Next room: scenes.py.
"""

from __future__ import annotations

import math
from dataclasses import replace
from random import Random

from qwen2vl.synth.colors import sample_text_colors
from qwen2vl.synth.draw import ink_extent
from qwen2vl.synth.fonts import files_of, stems_look_alike
from qwen2vl.synth.spec import RGB, Draft, Line, Mixture, Question
from qwen2vl.synth.strings import ALPHABETS, random_string, word_string
from qwen2vl.synth.wordings import ask

__all__ = ["sample", "sample_font", "sample_text", "write_line"]

_CELL = 28  # pixels a side of one vision token: patch 14, merge 2
_SPARSE_PIXELS = 160_000  # most pixels of a canvas that is grown: 204 vision tokens
_CELL_SIZES = (20, 24)  # pixels per em; the narrow range tells "o" from "O"
_LEADING = (1.15, 1.7)  # of the size: distance between the baselines of a page


def sample(rng: Random, mixture: Mixture) -> Draft:
    """Make up one line, or a page of several, and ask to read it."""
    font = sample_font(rng, mixture)
    page = mixture.page_share > 0 and rng.random() < mixture.page_share
    lines = rng.randint(*mixture.page_lines) if page else 1
    text = "\n".join(sample_text(rng, mixture, font) for _ in range(lines))
    line = write_line(rng, mixture, text, font)
    task = "read_page" if page else "read"
    question = ask(rng, task, mixture.split)
    return Draft((Question(task=task, text=question, answer=line.text),), (line,))


def sample_font(rng: Random, mixture: Mixture) -> str:
    """Take a family, then one of its faces, so that large families get no more than small ones."""
    return rng.choice(rng.choice(files_of(mixture.fonts)))


def sample_text(rng: Random, mixture: Mixture, font: str) -> str:
    """Make up what is written.

    In fonts whose I and l are the same bar, random strings leave out I: nobody could know.
    Words keep it, where the neighbors tell.
    """
    low, high = mixture.text_length
    alphabet = ALPHABETS[mixture.alphabet]
    if rng.random() >= mixture.random_share:
        return word_string(rng, low, high, alphabet)
    unknowable = "I" if stems_look_alike(font) else ""
    spaces = mixture.alphabet == "all" and mixture.layout == "line"
    length = rng.randint(low, high)
    return random_string(rng, length, alphabet, spaces=spaces, excluded=unknowable)


def write_line(rng: Random, mixture: Mixture, text: str, font: str) -> Line:
    """Choose how a text is drawn; what does not fit the widest canvas is set smaller, then cut."""
    ink, ground, texture = _sample_look(rng, mixture)
    if mixture.layout == "cells":
        return _write_cells(rng, text, font, ink, ground, texture)
    low, high = mixture.font_size
    widest = mixture.max_width
    if mixture.large_share and rng.random() < mixture.large_share:
        low, high, widest = high, 3 * high, 3 * widest
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
        if width <= widest or len(_longest(text)) == 1:
            break
        if size > low:
            size = max(low, min(size - 1, size * widest // width))
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
        return _on_empty_ground(rng, line)
    return line


def _longest(text: str) -> str:
    return max(text.split("\n"), key=len)


def _on_empty_ground(rng: Random, line: Line) -> Line:
    """Grow the canvas to another aspect ratio and put the line anywhere on it."""
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
    """Take any size up to 40, above that every fourth, for each is a table of glyphs to keep."""
    size = rng.randint(low, high)
    return size if size <= 40 else max(low, size - size % 4)


def _write_cells(rng: Random, text: str, font: str, ink: RGB, ground: RGB, texture: int) -> Line:
    """Set one character in the middle of each cell, as large as asked for or as fits."""
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
    """Wide letters of proportional fonts outgrow a cell that monospaced ones fill."""
    left, top, right, bottom = ink_extent(text, font, size, cell=_CELL, tracking=0)
    return left >= 0 and right <= _CELL * len(text) and y + top >= 0 and y + bottom <= _CELL


def _sample_look(rng: Random, mixture: Mixture) -> tuple[RGB, RGB, int]:
    if rng.random() < mixture.plain_share:
        return (0, 0, 0), (255, 255, 255), 0
    ink, ground = sample_text_colors(rng)
    textured = rng.random() < mixture.textured_share
    return ink, ground, rng.randrange(1, 1_000_000) if textured else 0
