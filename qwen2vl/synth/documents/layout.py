"""Layout of documents: style, measured text, and the picture around a sheet of layers.

    budget = sample_budget(rng, mixture)           pixels that the picture may have
    style = sample_style(rng, mixture, budget)     font, text size, colors
    sheet = Sheet(width=..., height=..., layers=..., facts=...)
    if budget.admits(sheet): place_sheet(rng, mixture, budget, style, sheet)

A document is laid out first and its picture is made to fit, so that no text is cut and most of the
pixels are content. `Fact` is what can be asked about it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from random import Random
from typing import NamedTuple

from qwen2vl.synth.canvas import degrade, sample_canvas
from qwen2vl.synth.colors import COLORS, MORE_COLORS, is_light, sample_ground, shades_of
from qwen2vl.synth.compositing.layers import Composite, Ground, Layer, Rect, Text
from qwen2vl.synth.compositing.text import has_cached_glyphs, text_extent
from qwen2vl.synth.fonts import files_of
from qwen2vl.synth.spec import RGB, Box, Mixture

__all__ = [
    "Budget",
    "DocumentSample",
    "Fact",
    "Sheet",
    "Style",
    "distinct_colors",
    "draw_frame",
    "largest_width",
    "mix_colors",
    "place_sheet",
    "sample_budget",
    "sample_ink",
    "sample_style",
    "shift_box",
    "shift_layer",
    "text_size",
    "text_width",
    "write",
]

_USUAL_SIDE = 340  # pixels; the area is 150 vision tokens
_LARGE_SHARE = 0.12  # of the pictures may be larger, where the mixture admits it
_TEXT_SIZES = (11, 23)  # pixels per em
_FINE_SIZE = 16  # smallest size of fonts with hairlines and narrow spaces
_ANY_SIZE_SHARE = 0.08  # of the documents have text that is drawn line by line, which is slow
_BOLD_SHARE = 0.6  # of the documents have lines in a bold face, where the family has one
_BARE_SHARE = 0.4  # of the documents are drawn on the background itself
_NO_MARGIN_SHARE = 0.3
_MAX_MARGIN = 24  # pixels on each side, for text of usual size
_LOOSE_SHARE = 0.1  # of the pictures have as much background as the budget admits
_MIN_SIDE = 28
_BLUR_PER_SIZE = 1 / 24  # largest blur for a text size
_DISTINCT = 60  # smallest difference of a channel by which a color is visible on paper


@dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """One thing that can be asked about a document, before it is worded.

    If `box` is given, the question asks for it, and `answer` is the name of what is in it.
    """

    task: str  # a key of the grammar
    answer: str
    fields: tuple[str, ...] = ()  # names that the question contains
    about: frozenset[str] = frozenset()  # facts that share one of these are not asked together
    box: Box | None = None
    choices: int = 0  # number of equally likely answers; 0 = undefined


@dataclass(frozen=True, slots=True, kw_only=True)
class Sheet:
    """A document without its picture: layers from (0, 0) on, and facts."""

    width: int
    height: int
    layers: tuple[Layer, ...]
    facts: tuple[Fact, ...]


class DocumentSample(NamedTuple):
    """A document as a picture, and its facts."""

    picture: Composite
    facts: tuple[Fact, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """The pixels that a picture may have."""

    area: int  # at most
    least: int  # area at least
    aspect: float  # of width to height, and of height to width, at most
    zoom: float  # factor of all sizes, for pictures larger than the usual ones

    def admits(self, sheet: Sheet) -> bool:
        """Return whether a picture of the sheet is small enough."""
        return math.prod(self.grow(sheet.width, sheet.height)) <= self.area

    def grow(self, width: int, height: int) -> tuple[int, int]:
        """Return the smallest picture that holds `width` x `height` and has the aspect ratio."""
        narrow = max(_MIN_SIDE, math.ceil(max(width, height) / self.aspect))
        return max(width, narrow), max(height, narrow)


@dataclass(frozen=True, slots=True, kw_only=True)
class Style:
    """Font, text size and colors of a document."""

    ground: Ground
    paper: RGB  # the color below the text
    is_bare: bool  # the document is drawn on the background, whose color is that of the paper
    ink: RGB
    font: str
    bold: str  # of titles and sums; may be the same
    size: int  # pixels per em

    @property
    def is_light(self) -> bool:
        """Return whether the paper is light."""
        return is_light(self.paper)

    def pixels(self, share: float) -> int:
        """Return a share of the text size, at least one pixel."""
        return max(1, round(share * self.size))


def sample_budget(rng: Random, mixture: Mixture) -> Budget:
    """Sample the size limits of a picture: mostly 150 vision tokens or less."""
    low, high = mixture.picture_side
    usual = min(high, _USUAL_SIDE)
    zoom = 1.0
    if high > _USUAL_SIDE and (low >= _USUAL_SIDE or rng.random() < _LARGE_SHARE):
        first = max(low, _USUAL_SIDE)
        usual = round(math.exp(rng.uniform(math.log(first), math.log(high))))
        zoom = (usual / _USUAL_SIDE) ** rng.random()
    return Budget(area=usual**2, least=min(low, usual) ** 2, aspect=mixture.max_aspect, zoom=zoom)


def sample_style(
    rng: Random, mixture: Mixture, budget: Budget, *, attempt: int = 0, light: float = 0.7
) -> Style:
    """Sample a style; the text shrinks with each attempt.

    Args:
        attempt: number of the attempt, from 0 on.
        light: share of light paper.

    Raises:
        FontError: a font of the mixture is not installed.
    """
    ground = sample_canvas(rng, mixture, size=(1, 1)).ground
    is_bare = rng.random() < _BARE_SHARE
    wants_light = rng.random() < light
    paper = ground.rgb
    while not is_bare and is_light(paper := sample_ground(rng)) != wants_light:
        pass
    low, high = _TEXT_SIZES
    size = low + (high - low) * rng.random() ** 2 * 0.6**attempt
    family = rng.choice(files_of(mixture.fonts))
    font = rng.choice(family)
    bolds = [file for file in family if "Bold" in file and "Italic" not in file]
    size = round(max(size, _FINE_SIZE if "Display" in font else 0) * budget.zoom)
    return Style(
        ground=ground,
        paper=paper,
        is_bare=is_bare,
        ink=sample_ink(rng, paper),
        font=font,
        bold=bolds[0] if bolds and rng.random() < _BOLD_SHARE else font,
        size=size if rng.random() < _ANY_SIZE_SHARE else text_size(size, font),
    )


@lru_cache(maxsize=8192)
def text_size(size: int, font: str) -> int:
    """Return the nearest size at which glyphs of the font are cached; `size` if there is none."""
    low, far = _TEXT_SIZES[0], 2 * _TEXT_SIZES[0]
    near = sorted(range(max(low, size - far), size + far), key=lambda own: abs(own - size))
    return next((own for own in near if has_cached_glyphs(font, own)), max(low, size))


def distinct_colors(paper: RGB) -> list[str]:
    """Return the names of the colors that are visible on paper of a color, in all their shades."""
    return [
        name
        for name in (*COLORS, *MORE_COLORS)
        if all(
            max(abs(a - b) for a, b in zip(shade, paper, strict=True)) >= _DISTINCT
            for shade in shades_of(name)
        )
    ]


def sample_ink(rng: Random, paper: RGB) -> RGB:
    """Sample a text color: half are black or white, the others any dark or light color."""
    light = is_light(paper)
    if rng.random() < 0.5:
        return (0, 0, 0) if light else (255, 255, 255)
    low, high = (0, 105) if light else (180, 255)
    return rng.randint(low, high), rng.randint(low, high), rng.randint(low, high)


def place_sheet(
    rng: Random, mixture: Mixture, budget: Budget, style: Style, sheet: Sheet
) -> DocumentSample:
    """Place a sheet on a picture with margins of background, blur and compress some of them."""
    width, height = _sample_picture_size(rng, budget, style, sheet)
    dx, dy = rng.randint(0, width - sheet.width), rng.randint(0, height - sheet.height)
    layers = list(sheet.layers)
    if not style.is_bare:
        layers.insert(0, Rect(rgb=style.paper, box=(0, 0, sheet.width, sheet.height)))
    picture = Composite(
        width=width,
        height=height,
        ground=style.ground,
        layers=tuple(shift_layer(layer, dx, dy) for layer in layers),
    )
    picture = degrade(rng, picture, mixture)
    # Small text would be illegible.
    picture = replace(picture, blur=min(picture.blur, round(style.size * _BLUR_PER_SIZE, 2)))
    facts = tuple(
        replace(fact, box=shift_box(fact.box, dx, dy)) if fact.box else fact for fact in sheet.facts
    )
    return DocumentSample(picture, facts)


def _sample_picture_size(
    rng: Random, budget: Budget, style: Style, sheet: Sheet
) -> tuple[int, int]:
    """Sample the margins; the picture is within the budget if the sheet is."""
    width, height = sheet.width, sheet.height
    if style.is_bare or rng.random() >= _NO_MARGIN_SHARE:
        scale = max(1.0, style.size / 16)
        width += round(rng.uniform(0, 2 * _MAX_MARGIN) * scale)
        height += round(rng.uniform(0, 2 * _MAX_MARGIN) * scale)
    width, height = budget.grow(width, height)
    if width * height > budget.area:
        width, height = budget.grow(sheet.width, sheet.height)
    wanted = budget.least
    if rng.random() < _LOOSE_SHARE:
        wanted = max(wanted, round(budget.area * rng.uniform(0.5, 1)))
    growth = max(1.0, wanted / (width * height))
    share = rng.uniform(0, 1)
    wide, high = int(width * growth**share), int(height * growth ** (1 - share))
    if max(wide / high, high / wide) > budget.aspect:
        wide, high = int(width * growth**0.5), int(height * growth**0.5)
    return wide, high


def shift_layer(layer: Layer, dx: int, dy: int) -> Layer:
    """Move a rectangle or a line of text."""
    # dataclasses.replace takes several times as long, and a picture has up to 300 layers.
    if isinstance(layer, Rect):
        x1, y1, x2, y2 = layer.box
        return Rect(rgb=layer.rgb, box=(x1 + dx, y1 + dy, x2 + dx, y2 + dy))
    assert isinstance(layer, Text)
    return Text(
        text=layer.text,
        font=layer.font,
        size=layer.size,
        x=layer.x + dx,
        y=layer.y + dy,
        rgb=layer.rgb,
    )


def shift_box(box: Box, dx: int, dy: int) -> Box:
    """Move a box."""
    return box[0] + dx, box[1] + dy, box[2] + dx, box[3] + dy


def draw_frame(box: Box, rgb: RGB, width: int = 1) -> list[Layer]:
    """Return the four sides of a rectangle, inside of its box."""
    x1, y1, x2, y2 = box
    sides = (
        (x1, y1, x2, y1 + width),
        (x1, y2 - width, x2, y2),
        (x1, y1, x1 + width, y2),
        (x2 - width, y1, x2, y2),
    )
    return [Rect(rgb=rgb, box=side) for side in sides]


def mix_colors(a: RGB, b: RGB, share: float) -> RGB:
    """Return the color between `a` (share 0) and `b` (share 1)."""
    red, green, blue = (round(p + (q - p) * share) for p, q in zip(a, b, strict=True))
    return red, green, blue


@lru_cache(maxsize=8192)
def _char_widths(font: str, size: int) -> dict[str, int]:
    return {}


def text_width(text: str, font: str, size: int) -> int:
    """Compute the width of a line, in pixels; kerning may make it a little narrower."""
    widths = _char_widths(font, size)
    total = 0
    for char in text:
        width = widths.get(char)
        if width is None:
            width = widths[char] = text_extent(char, font, size)[2]
        total += width
    return total


def write(
    text: str,
    box: Box,
    rgb: RGB,
    *,
    font: str,
    size: int,
    align: str = "left",
) -> Text:
    """Write a line into a box, centered in height.

    Args:
        text: the line.
        box: (x1, y1, x2, y2) in pixels; text that is wider extends over its end.
        rgb: color.
        font: file name.
        size: pixels per em.
        align: "left", "right" or "center".
    """
    x1, y1, x2, y2 = box
    _, top, _, bottom = _cap_extent(font, size)
    free = (x2 - x1) - text_width(text, font, size) if align != "left" else 0
    x = x1 + (free // 2 if align == "center" else free)
    return Text(text=text, font=font, size=size, x=x, y=(y1 + y2 - top - bottom) // 2, rgb=rgb)


@lru_cache(maxsize=8192)
def _cap_extent(font: str, size: int) -> tuple[int, int, int, int]:
    return text_extent("Hx", font, size)


def largest_width(texts: Iterable[str], font: str, size: int) -> int:
    """Return the width of the widest of some lines, 0 if there is none."""
    return max((text_width(text, font, size) for text in texts), default=0)
