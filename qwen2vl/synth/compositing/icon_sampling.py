"""Sampling of the names of icons and of how the icons are drawn: style, lines, colors, background.

Every name is about equally frequent, basic ones four times as frequent as the others, and so is
every family of training styles among those that draw a name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from hashlib import sha256
from random import Random

import numpy as np
from numpy.typing import NDArray

from qwen2vl.synth.compositing.icons import (
    LINE_STYLES,
    icon_names,
    icon_raster,
    load_drawings,
    training_styles,
)
from qwen2vl.synth.compositing.layers import Composite, Ground, Icon, Lines, Tone

__all__ = [
    "RASTERS",
    "STYLE_FAMILIES",
    "IconLook",
    "are_near",
    "fit_ground",
    "sample_icon_layer",
    "sample_look",
    "sample_names",
    "sample_other_names",
]

RGB = tuple[int, int, int]
Box = tuple[int, int, int, int]

# Styles drawn by the same hands count as one.
STYLE_FAMILIES: tuple[tuple[str, ...], ...] = (
    ("noto",),
    ("noto-v1",),
    ("twemoji",),
    ("fluent-emoji-flat", "fluent-emoji-3d", "fluent-emoji-high-contrast"),
    ("fxemoji",),
)
RASTERS = (28, 40, 56, 80, 128, 192)  # pixels at which icons are drawn once and cached
_MAX_ENLARGED = 1.4  # boxes that are larger than the last raster are drawn at their size
_BASIC_WEIGHT = 4

_ROTATED_SHARE = 0.25
_MAX_ANGLE = 15  # degrees
_OUTLINED_SHARE = 0.25
_LINE_ART_SHARE = 0.05
_TONED_SHARE = 0.35
_GRAY_SHARE = 0.15  # of those
_UNCHANGED: Tone = (0, 100, 100)

_INK_SIDE = 28  # pixels at which the colors of an icon are read
_NUM_COLORS = 32
_OPAQUE = 128  # alpha from which a pixel is ink
_MIN_DIFFERENCES = (32, 64)  # of a channel, between ink and a light, a dark background ...
_MIN_VISIBLE = 0.25  # ... for so many of the pixels
_LIGHT = 384  # sum of the channels from which black lines are visible on a background
_ATTEMPTS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class IconLook:
    """How an icon is drawn, or all icons of a picture."""

    style: str
    lines: Lines = ""
    tone: Tone = _UNCHANGED


@cache
def _weighted_names(num_names: int) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Return the names of training icons, and their cumulative weights.

    The first `num_names` of an order that mixes all groups, basic ones before the others; 0: all.
    """
    names = tuple(name for name in icon_names() if training_styles(name))
    if num_names:
        names = tuple(sorted(names, key=_curriculum_key)[:num_names])
    weights = [_BASIC_WEIGHT if icon_names()[name].is_basic else 1 for name in names]
    return names, tuple(int(total) for total in np.cumsum(weights))


def _curriculum_key(name: str) -> tuple[bool, bytes]:
    return not icon_names()[name].is_basic, sha256(name.encode()).digest()


@cache
def _colored() -> frozenset[str]:
    return frozenset(load_drawings()["colored"])


def sample_names(rng: Random, count: int, num_names: int = 0) -> list[str]:
    """Sample `count` different names of icons that a training style draws.

    With `num_names`, of so many names only, the same in every call (a curriculum).
    """
    names, totals = _weighted_names(num_names)
    chosen: dict[str, None] = {}
    while len(chosen) < count:
        chosen.setdefault(rng.choices(names, cum_weights=totals)[0])
    return list(chosen)


def sample_other_names(
    rng: Random, names: Sequence[str], count: int, num_names: int = 0
) -> list[str]:
    """Sample names that none of `names` may be called; half the time of the group of one.

    With `num_names` (`sample_names`) of any group, since a group may have too few.
    """
    group = icon_names()[rng.choice(names)].group if rng.random() < 0.5 else ""
    group = "" if num_names else group
    chosen: list[str] = []
    while len(chosen) < count:
        (name,) = sample_names(rng, 1, num_names)
        if group and icon_names()[name].group != group:
            continue
        if not any(are_near(name, other) for other in (*names, *chosen)):
            chosen.append(name)
    return chosen


@lru_cache(maxsize=65536)
def are_near(name: str, other: str) -> bool:
    """Return whether two names share a word, so that both may be said of one drawing."""
    return bool(set(name.lower().split()) & set(other.lower().split()))


def sample_look(rng: Random, name: str) -> IconLook:
    """Sample the style and the changes of an icon, or of all icons if it is the first of them."""
    drawn = [own for family in STYLE_FAMILIES if (own := _right_styles(family, name))]
    style = rng.choice(rng.choice(drawn))
    how = rng.random()
    lines: Lines = ""
    if style in LINE_STYLES and how < _OUTLINED_SHARE + _LINE_ART_SHARE:
        lines = "outlines" if how < _OUTLINED_SHARE else "line_art"
    tone = _UNCHANGED
    if rng.random() < _TONED_SHARE:
        saturation = 0 if rng.random() < _GRAY_SHARE else rng.randint(50, 140)
        tone = (rng.randint(-30, 30), saturation, rng.randint(75, 125))
    return IconLook(style=style, lines=lines, tone=tone)


@lru_cache(maxsize=8192)
def _right_styles(family: tuple[str, ...], name: str) -> tuple[str, ...]:
    return tuple(style for style in family if style in training_styles(name))


def sample_icon_layer(rng: Random, name: str, box: Box, look: IconLook) -> Icon:
    """Sample an icon; colored names keep their colors, and styles that lack a name are replaced."""
    if look.style not in training_styles(name):
        look = sample_look(rng, name)
    if name in _colored():
        look = replace(look, lines="" if look.lines == "line_art" else look.lines, tone=_UNCHANGED)
    angle = rng.randint(-_MAX_ANGLE, _MAX_ANGLE) if rng.random() < _ROTATED_SHARE else 0
    side = box[2] - box[0]
    raster = next((r for r in RASTERS if side <= r), RASTERS[-1])
    if side > _MAX_ENLARGED * raster:
        raster = 0
    return Icon(
        style=look.style,
        name=name,
        box=box,
        angle=angle,
        raster=raster,
        lines=look.lines,
        tone=look.tone,
    )


def fit_ground(rng: Random, canvas: Composite, icons: Sequence[Icon]) -> Composite:
    """Return a canvas on which the icons are visible: this one, or one of a plain gray or white."""
    inks = np.stack([_ink_colors(icon.style, icon.name) for icon in icons])
    lines = np.array([icon.lines for icon in icons])
    for _ in range(_ATTEMPTS):
        ground = canvas.ground
        colors = {ground.rgb} if ground.kind == "plain" else {ground.rgb, ground.rgb2}
        if all(_are_visible(inks, lines, rgb) for rgb in colors):
            break
        light = rng.choice((255, 255, rng.randint(120, 250)))
        canvas = replace(canvas, ground=Ground(rgb=(light, light, light)))
    return canvas


def _are_visible(inks: NDArray[np.int16], lines: NDArray[np.str_], ground: RGB) -> bool:
    """Return whether enough of every icon differs from a color.

    Args:
        inks: colors of the icons, (icons, colors, 3).
        lines: that are added to each icon, (icons).
        ground: the color.
    """
    is_dark = sum(ground) <= _LIGHT
    differences = np.abs(inks - np.array(ground, np.int16)).max(axis=2)
    visible = (differences >= _MIN_DIFFERENCES[is_dark]).mean(axis=1) >= _MIN_VISIBLE
    visible |= (lines == "line_art") if is_dark else (lines != "")
    return bool(visible.all())


@lru_cache(maxsize=8192)
def _ink_colors(style: str, name: str) -> NDArray[np.int16]:
    """Return colors from all over an icon, (colors, 3)."""
    pixels = np.asarray(icon_raster(style, name, _INK_SIDE).convert("RGBA"), np.int16)
    ink = pixels[pixels[..., 3] >= _OPAQUE][:, :3]
    return ink[np.linspace(0, len(ink) - 1, _NUM_COLORS).astype(int)]
