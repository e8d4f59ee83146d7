"""Sampling that several frozen suites share: named shapes, icons and texts, grounds.

The icons are of styles that are held out of training, and of objects that are unmistakable in all
of them. Icons have dark outlines, so they belong on light grounds. Texture of a ground is faint: it
changes every pixel, and hides nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Literal, TypeVar

from qwen2vl.synth.colors import COLORS, colors_on, contrast, sample_color, sample_ground
from qwen2vl.synth.compositing import Ground, Icon, ShapeLayer, Text
from qwen2vl.synth.compositing.icons import HELD_OUT_STYLES
from qwen2vl.synth.compositing.text import text_extent
from qwen2vl.synth.shape_masks import SHAPE_KINDS
from qwen2vl.synth.strings import load_words

__all__ = [
    "FONTS",
    "NUMBERS",
    "OBJECTS",
    "PLURALS",
    "GroundKind",
    "NamedLayer",
    "deal",
    "sample_icon",
    "sample_light_ground",
    "sample_shape",
    "sample_text",
    "sample_textured",
    "visible_colors",
    "with_article",
]

T = TypeVar("T")
GroundKind = Literal["plain", "gradient", "noise", "stripes", "checks"]
RGB = tuple[int, int, int]
Box = tuple[int, int, int, int]

# Of names.tsv; recognized by sight in each of the held-out styles, no two alike.
OBJECTS = (
    *("monkey", "elephant", "rabbit", "turtle", "snake", "dolphin", "octopus", "snail"),
    *("crocodile", "frog", "panda", "pig", "camel", "mushroom", "palm tree", "grapes"),
    *("lemon", "cherries", "bus", "tractor", "bicycle", "anchor", "sailboat", "airplane"),
    *("helicopter", "rocket", "rainbow", "balloon", "basketball", "sunglasses", "jeans", "crown"),
    *("bell", "guitar", "trumpet", "telephone", "television", "microscope", "wrench", "rose"),
)
PLURALS = frozenset({"grapes", "cherries", "sunglasses", "jeans"})
FONTS = (  # evaluation families that come with the package
    *("Cabin-Regular.otf", "Cabin-Bold.otf", "Caladea-Regular.ttf", "Caladea-Bold.ttf"),
    *("Courier Prime.otf", "Courier Prime Bold.otf"),
)
NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four"}

_MIN_CONTRAST = 2.0  # of a shape on its ground: yellow on white has 1.1, blue on black 2.4
_MIN_TEXT_CONTRAST = 5.0
_CHARACTERS = "ABDEFGHLMNPQRTabdefghijmnpqrty23456789"  # unambiguous without neighbors
_TEXTURE = 12  # shades of a channel by which the two colors of a textured ground differ


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedLayer:
    """A shape, an icon or a line of text that is not placed yet, and what it is called."""

    name: str  # "red circle", "guitar"; of text, the text
    layer: ShapeLayer | Icon | Text

    @property
    def min_side(self) -> int:
        """Pixels of the smallest one that is recognized by sight."""
        return 16 if isinstance(self.layer, ShapeLayer) else 32

    @property
    def answers(self) -> tuple[str, ...]:
        """Fair forms of its name, where nothing else has its color or kind."""
        if not isinstance(self.layer, ShapeLayer):
            return (self.name,)
        color, kind = self.name.split()
        return self.name, kind, color, f"{color} shape", f"{color} one"

    def at(self, box: Box) -> ShapeLayer | Icon | Text:
        """Return the layer, placed into a box: a square one, or that of the text's ink."""
        if not isinstance(self.layer, Text):
            return replace(self.layer, box=box)
        left, top, _, _ = text_extent(self.layer.text, self.layer.font, self.layer.size)
        return replace(self.layer, x=box[0] - left, y=box[1] - top)


def deal(rng: Random, values: Sequence[T], count: int) -> list[T]:
    """Return `count` values in random order; all are as frequent, as far as `count` allows."""
    dealt: list[T] = []
    while len(dealt) < count:
        dealt += rng.sample(values, len(values))
    dealt = dealt[:count]
    rng.shuffle(dealt)
    return dealt


def sample_light_ground(rng: Random) -> Ground:
    """Sample a light ground of one color, on which icons are visible."""
    if rng.random() < 0.3:
        return Ground()
    base = rng.randint(228, 246)
    return Ground(rgb=_shifted(rng, base, 9))


def sample_textured(
    rng: Random,
    kind: GroundKind,
    *,
    light: bool = False,
) -> Ground:
    """Sample a ground of this kind, light or dark.

    Args:
        rng: source of the choices.
        kind: of the ground.
        light: for icons and text.
    """
    rgb = sample_light_ground(rng).rgb if light else sample_ground(rng)
    if kind == "plain":
        return Ground(rgb=rgb)
    toward_middle = -_TEXTURE if sum(rgb) > 384 else _TEXTURE
    rgb2 = tuple(channel + toward_middle for channel in rgb)
    assert len(rgb2) == 3, "three channels"
    cell = rng.choice((1, 2, 4)) if kind == "noise" else rng.choice((8, 16, 24))
    return Ground(kind=kind, rgb=rgb, rgb2=rgb2, cell=cell, seed=rng.randrange(1000))


def visible_colors(ground: Ground) -> list[str]:
    """Return the names of the colors that have shades which are distinct from a ground."""
    return [
        name
        for name in colors_on(ground.rgb)
        if any(_is_visible(shade, ground) for shade in COLORS[name])
    ]


def sample_shape(
    rng: Random, ground: Ground, *, kind: str | None = None, color: str | None = None
) -> NamedLayer:
    """Sample a shape that is visible on a ground, of a given or any kind and color."""
    kind = kind or rng.choice(SHAPE_KINDS)
    color = color or rng.choice(visible_colors(ground))
    rgb = sample_color(rng, color)
    while not _is_visible(rgb, ground):
        rgb = sample_color(rng, color)
    return NamedLayer(
        name=f"{color} {kind}", layer=ShapeLayer(kind=kind, rgb=rgb, box=(0, 0, 0, 0))
    )


def sample_icon(rng: Random, name: str) -> NamedLayer:
    """Sample an icon of an object, of any held-out style."""
    layer = Icon(style=rng.choice(HELD_OUT_STYLES), name=name, box=(0, 0, 0, 0))
    return NamedLayer(name=name, layer=layer)


def sample_text(rng: Random, ground: Ground, font: str, size: int, length: int) -> NamedLayer:
    """Sample a line of text of strong contrast: `length` random characters; 0: two words."""
    text = "".join(rng.choice(_CHARACTERS) for _ in range(length))
    if not length:
        words = [word for word in load_words() if 4 <= len(word) <= 7 and word.isalpha()]
        text = f"{rng.choice(words)} {rng.choice(words)}".capitalize()
    inks = [rgb for rgb, _ in COLORS.values() if contrast(rgb, ground.rgb) >= _MIN_TEXT_CONTRAST]
    layer = Text(text=text, font=font, size=size, x=0, y=0, rgb=rng.choice(inks))
    return NamedLayer(name=text, layer=layer)


def with_article(name: str) -> str:
    """Return "a guitar", "an owl", "grapes"."""
    if name in PLURALS:
        return name
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def _is_visible(rgb: RGB, ground: Ground) -> bool:
    under = (ground.rgb,) if ground.kind == "plain" else (ground.rgb, ground.rgb2)
    return all(contrast(rgb, one) >= _MIN_CONTRAST for one in under)


def _shifted(rng: Random, base: int, span: int) -> RGB:
    return tuple(base + rng.randint(-span, span) for _ in range(3))  # type: ignore[return-value]
