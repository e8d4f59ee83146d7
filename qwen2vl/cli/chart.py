"""Line charts drawn with Pillow: an image of panels, each with labeled curves.

Charts are drawn at three times the size and downsampled for antialiasing. The font is the one
included in Pillow, so that no system font is required. A noisy curve is drawn twice: the raw points
in a light color, and a moving average.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image, ImageDraw, ImageFont

__all__ = ["COLORS", "INK", "Curve", "Panel", "draw_chart"]

# Distinguishable with color vision deficiency (Okabe and Ito), dark enough for lines.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#B8860B", "#56A0D3", "#5B4B8A", "#7F7F7F")

SCALE = 3  # supersampling factor
WIDTH, HEIGHT = 620, 300  # of one panel
LEFT, TOP, BOTTOM, LABELS = 58, 56, 34, 150  # margins of the plot area; LABELS is on the right
MARGIN, HEADER = 26, 58  # of the image; HEADER: height of its title
INK, GRAY, FAINT, BACKGROUND = "#1F2328", "#6E7781", "#E6E9ED", "#FFFFFF"
LINE_HEIGHT = 17  # of the labels beside curves
SMOOTHING_DIVISOR = 40  # half window of the moving average = number of points // this
MAX_SMOOTHED_POINTS = 250  # of a smoothed curve
MAX_MARKERS = 30  # curves with at most this many points get a marker each


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """One curve of points (step, value), ordered by step."""

    name: str
    points: Sequence[tuple[float, float]]
    color: str
    thin: bool = False  # a secondary curve
    smooth: bool = True  # draw a moving average; False: draw the points as they are


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One diagram with its curves and axes."""

    title: str
    note: str  # quantity and unit of the y axis
    curves: Sequence[Curve]
    percent: bool = False
    from_zero: bool = True  # y axis starts at 0; False: at the minimum if that is far above 0
    marks: Sequence[tuple[float, str]] = ()  # labeled vertical lines: (step, label)


def draw_chart(title: str, subtitle: str, panels: Sequence[Panel], columns: int = 2) -> Image.Image:
    """Draw a grid of panels, row by row, below a title."""
    from PIL import Image, ImageDraw  # lazy, so that `plot --help` is fast

    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    size = (2 * MARGIN + columns * WIDTH, MARGIN + HEADER + rows * HEIGHT)
    image = Image.new("RGB", (SCALE * size[0], SCALE * size[1]), BACKGROUND)
    canvas = _Canvas(ImageDraw.Draw(image), MARGIN, MARGIN)
    canvas.text((0, 0), title, 22, INK)
    canvas.text((0, 30), subtitle, 13, GRAY)
    for index, panel in enumerate(panels):
        row, column = divmod(index, columns)
        corner = (MARGIN + column * WIDTH, MARGIN + HEADER + row * HEIGHT)
        _draw_panel(_Canvas(canvas.draw, *corner), panel)
    return image.resize(size, Image.Resampling.LANCZOS)


class _Canvas:
    """Drawing functions in units of the final image, relative to the corner of a panel."""

    def __init__(self, draw: ImageDraw.ImageDraw, left: float, top: float) -> None:
        self.draw, self.left, self.top = draw, left, top

    def at(self, point: tuple[float, float]) -> tuple[float, float]:
        return SCALE * (self.left + point[0]), SCALE * (self.top + point[1])

    def line(self, points: Sequence[tuple[float, float]], color: str, width: float) -> None:
        placed = [self.at(point) for point in points]
        self.draw.line(placed, color, round(SCALE * width), joint="curve")

    def dot(self, point: tuple[float, float], color: str, radius: float) -> None:
        self.draw.circle(self.at(point), SCALE * radius, color, BACKGROUND, SCALE)

    def text(
        self, point: tuple[float, float], text: str, size: int, color: str, anchor: str = "la"
    ) -> None:
        self.draw.text(self.at(point), text, color, _font(SCALE * size), anchor)


@lru_cache(maxsize=16)
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    from PIL import ImageFont

    return ImageFont.load_default(size)


@dataclass(frozen=True, slots=True)
class _Axes:
    """Maps (step, value) to pixel coordinates in the panel."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float

    def place(self, point: tuple[float, float]) -> tuple[float, float]:
        x = (point[0] - self.x_low) / (self.x_high - self.x_low)
        y = (min(max(point[1], self.y_low), self.y_high) - self.y_low) / (self.y_high - self.y_low)
        wide, tall = WIDTH - LEFT - LABELS, HEIGHT - TOP - BOTTOM
        return LEFT + x * wide, TOP + (1 - y) * tall


def _draw_panel(canvas: _Canvas, panel: Panel) -> None:
    axes = _fit_axes(panel)
    canvas.text((0, 0), panel.title, 16, INK)
    canvas.text((0, 21), panel.note, 12, GRAY)
    _draw_grid(canvas, axes, panel)
    for curve in sorted(panel.curves, key=lambda curve: not curve.thin):
        _draw_curve(canvas, axes, curve)
    ends = [(axes.place(_smoothed_points(curve)[-1])[1], curve) for curve in panel.curves]
    for height, curve in _spread_labels(ends):
        canvas.text((WIDTH - LABELS + 10, height), curve.name, 13, curve.color, "lm")


def _fit_axes(panel: Panel) -> _Axes:
    """Compute the axis limits; the top 1.5 % of the values of a long run may be cut off."""
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


def _draw_grid(canvas: _Canvas, axes: _Axes, panel: Panel) -> None:
    for value in _ticks(axes.y_low, axes.y_high, 4):
        left, height = axes.place((axes.x_low, value))
        canvas.line([(left, height), axes.place((axes.x_high, value))], FAINT, 1)
        text = f"{100 * value:g} %" if panel.percent else _format_tick(value)
        canvas.text((left - 8, height), text, 12, GRAY, "rm")
    for step in _ticks(axes.x_low, axes.x_high, 5):
        x, bottom = axes.place((step, axes.y_low))
        canvas.text((x, bottom + 8), _format_tick(step), 12, GRAY, "ma")
    names_end = 0.0
    for step, name in panel.marks:
        x, top = axes.place((step, axes.y_high))
        canvas.line([(x, top - 6), axes.place((step, axes.y_low))], FAINT, 1)
        if x >= names_end:  # labels of short stages would overlap and are omitted
            canvas.text((x + 3, top - 8), name, 11, GRAY, "ls")
            names_end = x + 8 + 6.0 * len(name)


def _draw_curve(canvas: _Canvas, axes: _Axes, curve: Curve) -> None:
    shown = [axes.place(point) for point in _smoothed_points(curve)]
    if not curve.smooth:
        canvas.line(shown, curve.color, 1.4)
        for point in shown if len(shown) <= MAX_MARKERS else ():
            canvas.dot(point, curve.color, 3)
        return
    if not curve.thin:
        canvas.line([axes.place(point) for point in curve.points], _lighten(curve.color), 1)
    canvas.line(shown, curve.color, 1.5 if curve.thin else 2.2)


def _smoothed_points(curve: Curve) -> list[tuple[float, float]]:
    """Return the moving average at up to MAX_SMOOTHED_POINTS steps, with the first and last."""
    reach = len(curve.points) // SMOOTHING_DIVISOR if curve.smooth else 0
    values = [value for _, value in curve.points]
    last = len(values) - 1
    stride = max(1, len(values) // MAX_SMOOTHED_POINTS)
    chosen = sorted({*range(0, len(values), stride), last})
    windows = ((i, values[max(0, i - reach) : i + reach + 1]) for i in chosen)
    return [(curve.points[i][0], sum(window) / len(window)) for i, window in windows]


def _spread_labels(ends: list[tuple[float, Curve]]) -> list[tuple[float, Curve]]:
    """Shift labels vertically until they do not overlap, each as little as possible."""
    placed = sorted(ends, key=lambda end: end[0])
    heights = [height for height, _ in placed]
    for _ in range(100):
        moved = False
        for i in range(len(heights) - 1):
            overlap = LINE_HEIGHT - (heights[i + 1] - heights[i])
            if overlap > 0.1:
                heights[i] -= overlap / 2
                heights[i + 1] += overlap / 2
                moved = True
        if not moved:
            break
    # Keep all labels inside the panel, as long as they fit.
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


def _format_tick(value: float) -> str:
    """Format an axis value: 25000 as 25k, 0.5 as 0.5."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def _lighten(color: str) -> str:
    """Mix a color with three parts of white."""
    parts = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(0.25 * part + 0.75 * 255):02X}" for part in parts)
