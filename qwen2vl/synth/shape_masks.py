"""Coverage masks of the geometric shapes, cached by kind, size and angle.

An upright shape touches all four sides of its box, so that its pixels fill the box of the ground
truth exactly. A rotated one is enlarged or reduced to the largest that its box holds, and
`shape_extent` returns the box of its pixels.
"""

from __future__ import annotations

from functools import lru_cache
from math import ceil, cos, floor, pi, radians, sin

from PIL import Image, ImageDraw

__all__ = ["MORE_SHAPE_KINDS", "SHAPE_KINDS", "shape_extent", "shape_mask"]

SHAPE_KINDS = ("circle", "square", "triangle", "star", "cross", "diamond")
# Further kinds of composite pictures. Frozen suites are sampled from SHAPE_KINDS alone.
MORE_SHAPE_KINDS = ("rectangle", "oval", "pentagon", "hexagon", "heart")

_SUPERSAMPLING = 4
_CACHED_SIDE = 256  # pixels; 4,096 masks of this size are 270 MB
_ROUND = ("circle", "oval")  # kinds that are drawn as ellipses
_NUM_POINTS = 120  # of the outline of a rotated ellipse, and of a heart

_Points = list[tuple[float, float]]


def shape_mask(kind: str, width: int, height: int | None = None, angle: int = 0) -> Image.Image:
    """Draw the coverage mask of one shape, "L", `width` x `height`.

    Args:
        kind: of SHAPE_KINDS or MORE_SHAPE_KINDS. A rectangle in a square box is a square.
        width: pixels.
        height: pixels; None: `width`.
        angle: degrees counterclockwise.
    """
    height = width if height is None else height
    draw = _cached_mask if max(width, height) <= _CACHED_SIDE else _draw_mask
    return draw(kind, width, height, angle)


def shape_extent(kind: str, width: int, height: int, angle: int = 0) -> tuple[int, int, int, int]:
    """Compute the box of the pixels of a shape's mask: (left, top, right, bottom)."""
    if not angle:
        return (0, 0, width, height)
    xs, ys = zip(*_rotate(kind, width, height, angle), strict=True)
    return (
        floor(width * min(xs)),
        floor(height * min(ys)),
        min(width, ceil(width * max(xs))),
        min(height, ceil(height * max(ys))),
    )


def _draw_mask(kind: str, width: int, height: int, angle: int) -> Image.Image:
    wide, high = width * _SUPERSAMPLING, height * _SUPERSAMPLING
    image = Image.new("L", (wide, high), 0)
    canvas = ImageDraw.Draw(image)
    if kind in _ROUND and not angle:
        canvas.ellipse((0, 0, wide - 1, high - 1), fill=255)
    else:
        corners = _rotate(kind, width, height, angle) if angle else _outline(kind)
        canvas.polygon([(x * (wide - 1), y * (high - 1)) for x, y in corners], fill=255)
    # Two steps, each of which rounds: the same values as resize(), which takes ten times longer.
    return image.reduce((_SUPERSAMPLING, 1)).reduce((1, _SUPERSAMPLING))


_cached_mask = lru_cache(maxsize=4096)(_draw_mask)


def _rotate(kind: str, width: int, height: int, angle: int) -> _Points:
    """Rotate a shape within its box, as large as fits; corners in shares of width and height."""
    turn = radians(angle)
    points = [((x - 0.5) * width, (y - 0.5) * height) for x, y in _outline(kind)]
    points = [(x * cos(turn) + y * sin(turn), y * cos(turn) - x * sin(turn)) for x, y in points]
    xs, ys = zip(*points, strict=True)
    wide, high = max(xs) - min(xs), max(ys) - min(ys)
    scale = min(width / wide, height / high)
    middle = (max(xs) + min(xs)) / 2, (max(ys) + min(ys)) / 2
    return [
        (0.5 + scale * (x - middle[0]) / width, 0.5 + scale * (y - middle[1]) / height)
        for x, y in points
    ]


def _outline(kind: str) -> _Points:
    """Return the corners of a shape in the unit square, all four sides of which it touches."""
    if kind in _POLYGONS:
        return [(float(x), float(y)) for x, y in _POLYGONS[kind]]
    steps = [2 * pi * i / _NUM_POINTS for i in range(_NUM_POINTS)]
    if kind == "star":
        return _stretch([(r * sin(i * pi / 5), -r * cos(i * pi / 5)) for i, r in enumerate(_STAR)])
    if kind == "pentagon":
        return _stretch([(sin(2 * i * pi / 5), -cos(2 * i * pi / 5)) for i in range(5)])
    if kind == "heart":
        return _stretch(
            [
                (sin(t) ** 3, -(13 * cos(t) - 5 * cos(2 * t) - 2 * cos(3 * t) - cos(4 * t)))
                for t in steps
            ]
        )
    assert kind in _ROUND, kind
    return [(0.5 + 0.5 * sin(t), 0.5 - 0.5 * cos(t)) for t in steps]


def _stretch(points: _Points) -> _Points:
    """Stretch a polygon so that it touches all sides of the unit square."""
    xs, ys = zip(*points, strict=True)
    wide, high = max(xs) - min(xs), max(ys) - min(ys)
    return [((x - min(xs)) / wide, (y - min(ys)) / high) for x, y in points]


_STAR = [1.0, 0.42] * 5  # radius of each corner
_ARM = 1 / 3  # of a cross
_POLYGONS = {
    "square": [(0, 0), (1, 0), (1, 1), (0, 1)],
    "rectangle": [(0, 0), (1, 0), (1, 1), (0, 1)],
    "triangle": [(0.5, 0), (1, 1), (0, 1)],
    "diamond": [(0.5, 0), (1, 0.5), (0.5, 1), (0, 0.5)],
    "hexagon": [(0.25, 0), (0.75, 0), (1, 0.5), (0.75, 1), (0.25, 1), (0, 0.5)],
    "cross": [
        *((_ARM, 0), (1 - _ARM, 0), (1 - _ARM, _ARM), (1, _ARM), (1, 1 - _ARM)),
        *((1 - _ARM, 1 - _ARM), (1 - _ARM, 1), (_ARM, 1), (_ARM, 1 - _ARM), (0, 1 - _ARM)),
        *((0, _ARM), (_ARM, _ARM)),
    ],
}
