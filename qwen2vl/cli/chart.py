"""Curves on paper: panels of lines with their names beside them, drawn with Pillow.

Drawn three times as large and scaled down, which makes edges smooth; letters are those that come
with Pillow, so that no font has to be there. A curve is shown twice, as it is and averaged over
its neighbors. It must not know what is plotted. Back up: plot.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image, ImageDraw, ImageFont

__all__ = ["COLORS", "INK", "Curve", "Panel", "draw"]

# Told apart by people who see colors differently too (Okabe and Ito), dark enough for lines.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#B8860B", "#56A0D3", "#5B4B8A", "#7F7F7F")

SCALE = 3  # drawn so many times larger
WIDTH, HEIGHT = 620, 300  # of one panel
LEFT, TOP, BOTTOM, LABELS = 58, 56, 34, 150  # room around the curves; LABELS on the right
MARGIN, HEAD = 26, 58  # of the sheet; HEAD for its title
INK, GRAY, FAINT, PAPER = "#1F2328", "#6E7781", "#E6E9ED", "#FFFFFF"
LINE_HEIGHT = 17  # of names beside curves
SMOOTH = 40  # a curve is averaged over this part of its length, to either side
FINEST = 250  # points of an averaged curve; more would only tremble
DOTS = 30  # points that are few enough to be shown one by one


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """Points (step, value), in order."""

    name: str
    points: Sequence[tuple[float, float]]
    color: str
    thin: bool = False  # beside others that matter more
    smooth: bool = True  # measured at every report; False: each point counts


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One diagram; several share the steps below them."""

    title: str
    note: str  # what the numbers are, and which way is better
    curves: Sequence[Curve]
    percent: bool = False
    from_zero: bool = True  # else fitted, where curves stay far above
    marks: Sequence[tuple[float, str]] = ()  # steps where something begins, by name


def draw(title: str, subtitle: str, panels: Sequence[Panel], columns: int = 2) -> Image.Image:
    """Put panels on a sheet, row by row."""
    from PIL import Image, ImageDraw  # here, so that `plot --help` answers at once

    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    size = (2 * MARGIN + columns * WIDTH, MARGIN + HEAD + rows * HEIGHT)
    sheet = Image.new("RGB", (SCALE * size[0], SCALE * size[1]), PAPER)
    pen = _Pen(ImageDraw.Draw(sheet), MARGIN, MARGIN)
    pen.text((0, 0), title, 22, INK)
    pen.text((0, 30), subtitle, 13, GRAY)
    for index, panel in enumerate(panels):
        row, column = divmod(index, columns)
        place = (MARGIN + column * WIDTH, MARGIN + HEAD + row * HEIGHT)
        _panel(_Pen(pen.draw, *place), panel)
    return sheet.resize(size, Image.Resampling.LANCZOS)


class _Pen:
    """Draws in the units of the finished sheet, from a corner."""

    def __init__(self, draw: ImageDraw.ImageDraw, left: float, top: float) -> None:
        self.draw, self.left, self.top = draw, left, top

    def at(self, point: tuple[float, float]) -> tuple[float, float]:
        return SCALE * (self.left + point[0]), SCALE * (self.top + point[1])

    def line(self, points: Sequence[tuple[float, float]], color: str, width: float) -> None:
        placed = [self.at(point) for point in points]
        self.draw.line(placed, color, round(SCALE * width), joint="curve")

    def dot(self, point: tuple[float, float], color: str, radius: float) -> None:
        self.draw.circle(self.at(point), SCALE * radius, color, PAPER, SCALE)

    def text(
        self, point: tuple[float, float], words: str, size: int, color: str, anchor: str = "la"
    ) -> None:
        self.draw.text(self.at(point), words, color, _font(SCALE * size), anchor)


@lru_cache(maxsize=16)
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    from PIL import ImageFont

    return ImageFont.load_default(size)


@dataclass(frozen=True, slots=True)
class _Axes:
    """From steps and values to a place in the panel."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float

    def place(self, point: tuple[float, float]) -> tuple[float, float]:
        x = (point[0] - self.x_low) / (self.x_high - self.x_low)
        y = (min(max(point[1], self.y_low), self.y_high) - self.y_low) / (self.y_high - self.y_low)
        wide, tall = WIDTH - LEFT - LABELS, HEIGHT - TOP - BOTTOM
        return LEFT + x * wide, TOP + (1 - y) * tall


def _panel(pen: _Pen, panel: Panel) -> None:
    axes = _axes(panel)
    pen.text((0, 0), panel.title, 16, INK)
    pen.text((0, 21), panel.note, 12, GRAY)
    _grid(pen, axes, panel)
    for curve in sorted(panel.curves, key=lambda curve: not curve.thin):
        _curve(pen, axes, curve)
    ends = [(axes.place(_shown(curve)[-1])[1], curve) for curve in panel.curves]
    for height, curve in _spread(ends):
        pen.text((WIDTH - LABELS + 10, height), curve.name, 13, curve.color, "lm")


def _axes(panel: Panel) -> _Axes:
    """Fit the curves; the first wild values of a run may leave the panel at the top."""
    steps = [step for curve in panel.curves for step, _ in curve.points]
    values = sorted(value for curve in panel.curves for _, value in curve.points)
    many = len(values) >= 200
    high, low = values[int(0.985 * len(values)) if many else -1], values[0]
    if low > 0 and (panel.from_zero or low < 0.6 * high):
        low = 0.0
    if high <= low:
        high = low + (abs(low) or 1.0)
    step = _nice_step(low, high, 4)
    low, high = step * math.floor(low / step + 1e-9), step * math.ceil(high / step - 1e-9)
    first, last = min(steps), max(steps)
    return _Axes(first, last if last > first else first + 1, low, high)


def _grid(pen: _Pen, axes: _Axes, panel: Panel) -> None:
    for value in _ticks(axes.y_low, axes.y_high, 4):
        left, height = axes.place((axes.x_low, value))
        pen.line([(left, height), axes.place((axes.x_high, value))], FAINT, 1)
        words = f"{100 * value:g} %" if panel.percent else _short(value)
        pen.text((left - 8, height), words, 12, GRAY, "rm")
    for step in _ticks(axes.x_low, axes.x_high, 5):
        across, floor = axes.place((step, axes.y_low))
        pen.text((across, floor + 8), _short(step), 12, GRAY, "ma")
    names_end = 0.0
    for step, name in panel.marks:
        across, ceiling = axes.place((step, axes.y_high))
        pen.line([(across, ceiling - 6), axes.place((step, axes.y_low))], FAINT, 1)
        if across >= names_end:  # no room for the names of short stages
            pen.text((across + 3, ceiling - 8), name, 11, GRAY, "ls")
            names_end = across + 8 + 6.0 * len(name)


def _curve(pen: _Pen, axes: _Axes, curve: Curve) -> None:
    shown = [axes.place(point) for point in _shown(curve)]
    if not curve.smooth:
        pen.line(shown, curve.color, 1.4)
        for point in shown if len(shown) <= DOTS else ():
            pen.dot(point, curve.color, 3)
        return
    if not curve.thin:
        pen.line([axes.place(point) for point in curve.points], _pale(curve.color), 1)
    pen.line(shown, curve.color, 1.5 if curve.thin else 2.2)


def _shown(curve: Curve) -> list[tuple[float, float]]:
    """Average over neighbors; a curve keeps its first and last step."""
    reach = len(curve.points) // SMOOTH if curve.smooth else 0
    values = [value for _, value in curve.points]
    last = len(values) - 1
    stride = max(1, len(values) // FINEST)
    chosen = sorted({*range(0, len(values), stride), last})
    parts = ((i, values[max(0, i - reach) : i + reach + 1]) for i in chosen)
    return [(curve.points[i][0], sum(part) / len(part)) for i, part in parts]


def _spread(ends: list[tuple[float, Curve]]) -> list[tuple[float, Curve]]:
    """Move names apart that would stand on each other, each as little as it takes."""
    placed = sorted(ends, key=lambda end: end[0])
    heights = [height for height, _ in placed]
    for _ in range(100):
        moved = False
        for i in range(len(heights) - 1):
            lack = LINE_HEIGHT - (heights[i + 1] - heights[i])
            if lack > 0.1:
                heights[i] -= lack / 2
                heights[i + 1] += lack / 2
                moved = True
        if not moved:
            break
    # None may be pushed out of the panel, as long as there is room in it.
    for i in range(len(heights)):
        heights[i] = max(heights[i], TOP + i * LINE_HEIGHT)
    for i in range(len(heights)):
        heights[-1 - i] = min(heights[-1 - i], HEIGHT - BOTTOM - i * LINE_HEIGHT)
    return [(height, curve) for height, (_, curve) in zip(heights, placed, strict=True)]


def _nice_step(low: float, high: float, count: int) -> float:
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    return next(power * m for m in (1, 2, 5, 10) if power * m >= rough * 0.999)


def _ticks(low: float, high: float, count: int) -> list[float]:
    step = _nice_step(low, high, count)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(step * i, 12) for i in range(first, last + 1)]


def _short(value: float) -> str:
    """Write 25000 as 25k, 0.5 as it is."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def _pale(color: str) -> str:
    """Mix with three parts of paper."""
    parts = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(0.25 * part + 0.75 * 255):02X}" for part in parts)
