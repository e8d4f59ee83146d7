"""Pictures of the task family `refusals`: canvases, single subjects, labels, and notes with facts.

No picture has what the frozen suite `honesty` holds out: its objects, words, kinds of facts and of
backgrounds (stripes, checks). A subject, label or note is the same whether the question that is
asked has an answer in it or not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from random import Random
from typing import Literal

from qwen2vl.synth.canvas import sample_canvas, sample_size
from qwen2vl.synth.colors import COLORS, MORE_COLORS, contrast, sample_color
from qwen2vl.synth.compositing.generated import FIGURE_KINDS
from qwen2vl.synth.compositing.layers import Composite, Generated, Ground, Layer, Rect, Text
from qwen2vl.synth.compositing.text import has_cached_glyphs, text_extent
from qwen2vl.synth.fonts import files_of
from qwen2vl.synth.objects import sample_icon, sample_shape
from qwen2vl.synth.refusals.vocabulary import (
    ALL_KINDS,
    CHARACTERS,
    ICON_CATEGORIES,
    TEXTS,
    THINGS,
    category_of,
    sample_word,
)
from qwen2vl.synth.spec import RGB, Box, Mixture

__all__ = [
    "Subject",
    "blank_canvas",
    "cells_of",
    "draw_figure",
    "draw_label",
    "draw_subject",
    "fit_lines",
    "noise_canvas",
    "photo_canvas",
    "pick_colors",
    "plain_canvas",
    "sized",
]

_SATURATED = ("red", "green", "blue", "yellow", "orange", "purple", "white", "black")
_MIN_DISTANCE = 110  # of a color from its background, in RGB
_MIN_CONTRAST = 2.2  # of text
_MIN_FONT_SIZE = 9  # pixels per em
_MAX_FONT_SIZE = 240
_LEAST_SIZE = (64, 48)  # pixels, of a picture of one subject
_MEASURED_SIZE = 64  # pixels per em at which text is measured


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What a picture shows of one category: "animal", "letter", "shape", "figure", ..."""

    category: str
    name: str  # empty for a figure, which has none
    color: str = ""  # empty for icons
    layers: tuple[Layer, ...]


def sized(rng: Random, mixture: Mixture, width: int, height: int) -> tuple[int, int]:
    """Sample a size that is at least (width, height), in pixels."""
    sampled = sample_size(rng, mixture)
    return max(sampled[0], width), max(sampled[1], height)


def plain_canvas(rng: Random, mixture: Mixture, size: tuple[int, int] | None = None) -> Composite:
    """Sample a canvas, some of which have strong patterns."""
    return sample_canvas(rng, mixture, size=size, strong=0.2)


def blank_canvas(rng: Random, mixture: Mixture) -> tuple[Composite, str]:
    """Sample a canvas for at most one subject, and the name of its color if it has one color."""
    canvas = plain_canvas(rng, mixture, sized(rng, mixture, *_LEAST_SIZE))
    how = rng.random()
    if how < 0.4:
        color = rng.choice((*COLORS, *MORE_COLORS))
        return replace(canvas, ground=Ground(rgb=sample_color(rng, color))), color
    if how < 0.6:
        first, second = _any_rgb(rng), _any_rgb(rng)
        ground = Ground(kind="gradient", rgb=first, rgb2=second, seed=rng.randrange(1000))
        return replace(canvas, ground=ground), ""
    return canvas, ""


def noise_canvas(rng: Random, mixture: Mixture) -> Composite:
    """Sample a canvas of strong or faint noise, or of clouds."""
    canvas = sample_canvas(rng, mixture, size=sized(rng, mixture, *_LEAST_SIZE))
    first = canvas.ground.rgb
    how = rng.random()
    if how < 0.3:
        first, second = (0, 0, 0), (255, 255, 255)
    elif how < 0.6:
        first, second = _any_rgb(rng), _any_rgb(rng)
    else:
        change = rng.randint(25, 70) * (-1 if sum(first) > 384 else 1)
        r, g, b = (min(255, max(0, channel + change)) for channel in first)
        second = (r, g, b)
    shorter = min(canvas.width, canvas.height)
    cells = [cell for cell in (1, 1, 2, 3, 4, 6, 8, 12) if 8 * cell <= shorter]
    ground = Ground(
        kind=rng.choice(("noise", "noise", "clouds")),
        rgb=first,
        rgb2=second,
        cell=rng.choice(cells or [1]),
        seed=rng.randrange(1, 1_000_000),
    )
    return replace(canvas, ground=ground)


def photo_canvas(rng: Random, mixture: Mixture, *, least: tuple[int, int] = (64, 64)) -> Composite:
    """Sample a canvas of at least `least` pixels (width, height) that a generated photo fills."""
    width, height = sized(rng, mixture, *least)
    photo = Generated(kind="photo", seed=rng.randrange(1_000_000), box=(0, 0, width, height))
    # Colors that differ from gray are visible on most photos.
    ground = Ground(rgb=(128, 128, 128))
    return Composite(width=width, height=height, ground=ground, layers=(photo,))


def pick_colors(
    rng: Random, ground: Ground, count: int, *, of: Literal["shape", "text"] = "shape"
) -> dict[str, RGB]:
    """Sample colors by name that are visible on a background, fewer if the others are not."""
    seconds = () if ground.kind == "plain" else (ground.rgb2,)
    names = _SATURATED if ground.kind == "noise" else (*COLORS, *MORE_COLORS)
    chosen: dict[str, RGB] = {}
    shades = {name: sample_color(rng, name) for name in rng.sample(names, len(names))}
    for name, rgb in shades.items():
        if all(_is_visible(rgb, other, of) for other in (ground.rgb, *seconds)):
            chosen[name] = rgb
            if len(chosen) == count:
                return chosen
    if not chosen:  # a gradient from black to white has a place of every brightness
        grounds = (ground.rgb, *seconds)
        name = max(shades, key=lambda name: min(_distance(shades[name], g) for g in grounds))
        chosen[name] = shades[name]
    return chosen


def cells_of(
    rng: Random,
    canvas: Composite,
    count: int,
    *,
    axis: Literal["x", "y"] | None = None,
    share: tuple[float, float] = (0.5, 0.95),
) -> list[Box]:
    """Sample square boxes, each in its own cell of a grid, from left to right and downward.

    Args:
        axis: of a single row or column; None: a grid, of which cells may stay empty.
        share: least and largest part of a cell's shorter side that a box takes.
    """
    columns, rows = (count, 1) if axis == "x" else (1, count) if axis == "y" else (1, 1)
    while columns * rows < count:
        if canvas.width / columns > canvas.height / rows:
            columns += 1
        else:
            rows += 1
    wide, high = canvas.width / columns, canvas.height / rows
    boxes: list[Box] = []
    for cell in sorted(rng.sample(range(columns * rows), count)):
        side = max(4, int(min(wide, high) * rng.uniform(*share)))
        x = int(cell % columns * wide + rng.uniform(0, wide - side))
        y = int(cell // columns * high + rng.uniform(0, high - side))
        boxes.append((x, y, x + side, y + side))
    return boxes


def draw_subject(rng: Random, mixture: Mixture, canvas: Composite, category: str) -> Subject:
    """Draw a subject of a category into a free place of a canvas that has no other."""
    (box,) = cells_of(rng, canvas, 1, share=(0.45, 0.9))
    if category == "shape":
        ((color, _),) = pick_colors(rng, canvas.ground, 1).items()
        shape = sample_shape(rng, rng.choice(ALL_KINDS), color, box)
        return Subject(category=category, name=shape.name, color=color, layers=(shape.layer,))
    if category not in TEXTS:
        name = _name_of(rng, category)
        icon = sample_icon(rng, name, box, ground=canvas.ground)
        return Subject(category=category_of(name), name=name, layers=(icon.layer,))
    text = _text_of(rng, category)
    ((color, rgb),) = pick_colors(rng, canvas.ground, 1, of="text").items()
    if category in ("word", "number"):
        margin = max(2, canvas.width // 20)
        high = int(canvas.height * rng.uniform(0.3, 0.6))
        top = rng.randint(0, canvas.height - high)
        box = (margin, top, canvas.width - margin, top + high)
    lines = fit_lines(rng, mixture, [text], box, rgb)
    return Subject(category=category, name=text, color=color, layers=lines)


def draw_label(rng: Random, mixture: Mixture, box: Box, category: str, name: str = "") -> Subject:
    """Draw a subject on a light patch that fills a box, visible on any background."""
    name = name or (_text_of(rng, category) if category in TEXTS else _name_of(rng, category))
    light = rng.randint(225, 255)
    rgb = (light, light, rng.choice((light, light - 60)))
    x1, y1, x2, y2 = box
    inset = max(2, (min(x2 - x1, y2 - y1)) // 10)
    inner = (x1 + inset, y1 + inset, x2 - inset, y2 - inset)
    is_framed = rng.random() < 0.3
    frame = (Rect(rgb=sample_color(rng, "black"), box=box),) if is_framed else ()
    patch = (x1 + 1, y1 + 1, x2 - 1, y2 - 1) if is_framed else box
    layers: tuple[Layer, ...] = (*frame, Rect(rgb=rgb, box=patch))
    color = ""
    if category in TEXTS:
        color = rng.choice(("black", "black", "blue", "red"))
        layers += fit_lines(rng, mixture, [name], inner, sample_color(rng, color))
    else:
        category = category_of(name)
        layers += (sample_icon(rng, name, _square(inner), ground=Ground(rgb=rgb)).layer,)
    return Subject(category=category, name=name, color=color, layers=layers)


def draw_figure(rng: Random, canvas: Composite) -> Subject:
    """Draw a figure that has no name."""
    (box,) = cells_of(rng, canvas, 1, share=(0.5, 0.9))
    ((color, rgb),) = pick_colors(rng, canvas.ground, 1).items()
    kind = rng.choice(FIGURE_KINDS)
    assert kind != "photo"
    figure = Generated(kind=kind, seed=rng.randrange(1_000_000), rgb=rgb, box=box)
    return Subject(category="figure", name="", color=color, layers=(figure,))


def fit_lines(
    rng: Random, mixture: Mixture, lines: Sequence[str], box: Box, rgb: RGB
) -> tuple[Text, ...]:
    """Set lines of one font and size below each other, centered in a box that they fill mostly."""
    font = rng.choice(rng.choice(files_of(mixture.fonts)))
    measured = _cached_size(font, _MEASURED_SIZE)
    extents = [text_extent(line, font, measured) for line in lines]
    x1, y1, x2, y2 = box
    row = (y2 - y1) / len(lines)
    widest = max(right - left for left, _, right, _ in extents)
    highest = max(bottom - top for _, top, _, bottom in extents)
    largest = measured * min((x2 - x1) / widest, row / highest)
    size = min(_MAX_FONT_SIZE, int(largest * rng.uniform(0.7, 0.97)))
    size = _cached_size(font, max(_MIN_FONT_SIZE, size))
    scale = size / measured
    texts: list[Text] = []
    for number, (line, (left, top, right, bottom)) in enumerate(zip(lines, extents, strict=True)):
        x = (x1 + x2 - scale * (left + right)) / 2
        y = y1 + (number + 0.5) * row - scale * (top + bottom) / 2
        texts.append(Text(text=line, font=font, size=size, x=round(x), y=round(y), rgb=rgb))
    return tuple(texts)


@cache
def _cached_size(font: str, size: int) -> int:
    """Return a size slightly below `size` at which text is drawn faster, or `size`."""
    sizes = range(size, max(_MIN_FONT_SIZE, int(0.86 * size)) - 1, -1)
    return next((own for own in sizes if has_cached_glyphs(font, own)), size)


def _name_of(rng: Random, category: str) -> str:
    return rng.choice(THINGS if category == "object" else ICON_CATEGORIES[category])


def _text_of(rng: Random, category: str) -> str:
    if category == "word":
        return sample_word(rng)
    if category == "number":
        return str(rng.randint(10, 999))
    return rng.choice(CHARACTERS[category])


def _square(box: Box) -> Box:
    """Return the largest square in the middle of a box."""
    x1, y1, x2, y2 = box
    side = min(x2 - x1, y2 - y1)
    x, y = (x1 + x2 - side) // 2, (y1 + y2 - side) // 2
    return (x, y, x + side, y + side)


def _any_rgb(rng: Random) -> RGB:
    return (rng.randrange(256), rng.randrange(256), rng.randrange(256))


def _is_visible(rgb: RGB, ground: RGB, of: str) -> bool:
    if _distance(rgb, ground) < _MIN_DISTANCE:
        return False
    return of == "shape" or contrast(rgb, ground) >= _MIN_CONTRAST


def _distance(rgb: RGB, other: RGB) -> float:
    return math.dist(rgb, other)
