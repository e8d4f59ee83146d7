"""Coverage masks of the geometric shapes, cached by kind and side.

Each shape touches all four sides of its square, so that its pixels fill the box of the ground truth
exactly.
"""

from __future__ import annotations

from functools import lru_cache
from math import cos, pi, sin

from PIL import Image, ImageDraw

__all__ = ["SHAPE_KINDS", "shape_mask"]

SHAPE_KINDS = ("circle", "square", "triangle", "star", "cross", "diamond")

_SUPERSAMPLING = 4


@lru_cache(maxsize=4096)
def shape_mask(kind: str, side: int) -> Image.Image:
    """Draw the coverage mask of one shape; it touches all four sides of the square."""
    big = side * _SUPERSAMPLING
    image = Image.new("L", (big, big), 0)
    canvas = ImageDraw.Draw(image)
    if kind == "circle":
        canvas.ellipse((0, 0, big - 1, big - 1), fill=255)
    else:
        points = [(x * (big - 1), y * (big - 1)) for x, y in _polygon(kind)]
        canvas.polygon(points, fill=255)
    return image.resize((side, side), Image.Resampling.BOX)


def _polygon(kind: str) -> list[tuple[float, float]]:
    """Return the corners of a shape in the unit square."""
    if kind == "star":
        return _star_polygon()
    arm = 1 / 3
    corners = {
        "square": [(0, 0), (1, 0), (1, 1), (0, 1)],
        "triangle": [(0.5, 0), (1, 1), (0, 1)],
        "diamond": [(0.5, 0), (1, 0.5), (0.5, 1), (0, 0.5)],
        "cross": [
            *((arm, 0), (1 - arm, 0), (1 - arm, arm), (1, arm), (1, 1 - arm), (1 - arm, 1 - arm)),
            *((1 - arm, 1), (arm, 1), (arm, 1 - arm), (0, 1 - arm), (0, arm), (arm, arm)),
        ],
    }
    return [(float(x), float(y)) for x, y in corners[kind]]


def _star_polygon() -> list[tuple[float, float]]:
    """Return a five-pointed star, stretched so that it touches all sides."""
    raw = [(r * sin(i * pi / 5), -r * cos(i * pi / 5)) for i, r in enumerate([1.0, 0.42] * 5)]
    xs, ys = zip(*raw, strict=True)
    wide, high = max(xs) - min(xs), max(ys) - min(ys)
    return [((x - min(xs)) / wide, (y - min(ys)) / high) for x, y in raw]
