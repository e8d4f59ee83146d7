"""Objects of composite pictures: shapes and icons with their names, colors, sizes and places.

    canvas = sample_canvas(rng, mixture)
    objects = sample_objects(rng, canvas, 3, icons=0.4)
    picture = replace(canvas, layers=tuple(object_.layer for object_ in objects))
    unique_names(objects)        {"red circle": ..., "circle": ..., "guitar": ...}

Sides are 5 to 90 % of the picture's shorter side. Boxes are those of the ink, a few pixels apart.
Colors and styles are visible on the background. A name is used only if it refers to one object.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from random import Random

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from qwen2vl.synth.colors import COLORS, MORE_COLORS, is_light, sample_color, shades_of
from qwen2vl.synth.compositing.icon_sampling import (
    IconLook,
    are_near,
    sample_icon_layer,
    sample_look,
    sample_names,
)
from qwen2vl.synth.compositing.icons import icon_names, icon_raster, training_styles
from qwen2vl.synth.compositing.layers import Composite, Ground, Icon, Lines, ShapeLayer
from qwen2vl.synth.shape_masks import MORE_SHAPE_KINDS, SHAPE_KINDS, shape_extent
from qwen2vl.synth.spec import RGB, Box

__all__ = [
    "RASTER",
    "SceneObject",
    "colors_for",
    "ink_box",
    "place_box",
    "sample_icon",
    "sample_objects",
    "sample_shape",
    "training_names",
    "unique_names",
    "visible_colors",
]

RASTER = 128  # pixels at which an icon is drawn once and cached
_MIN_SIDE = 10  # pixels
_MIN_ICON_SIDE = 20
_MIN_ICON_SHARE = 0.08  # of the shorter side of the picture
_SIDES = (0.05, 0.9)  # of the shorter side of the picture
_GAP = 2  # pixels between objects; those of one color would merge
_ROTATED_SHARE = 0.3
# Largest angle of a shape. A square at 45 degrees is a diamond.
_MAX_ANGLES = {"circle": 0, "square": 6, "diamond": 6, "cross": 20, "heart": 45}
_MIN_ROTATED_SIDE = 20  # pixels
_MAX_ELONGATED = 0.75  # shorter side of a rectangle or an oval, in shares of the longer
_MIN_ELONGATED = 0.35
# Kinds that are the same in a box that is nearly square.
_STRETCHED = ("triangle", "diamond", "pentagon", "hexagon", "heart")
_OPAQUE = 64  # alpha from which a pixel is ink
_VISIBLE_SHADES = 60  # smallest difference of a channel from the background
_VISIBLE_INK = 0.5  # share of an icon's ink that must be
_INK_SIDE = 28  # pixels at which the colors of an icon are read
_STYLES_TRIED = 4  # of an icon
_ATTEMPTS = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class SceneObject:
    """A shape or an icon of a picture."""

    name: str  # "circle", "guitar"
    color: str  # "red"; empty for icons
    layer: ShapeLayer | Icon
    box: Box  # of its ink

    @property
    def phrase(self) -> str:
        """Its full name: "red circle", "guitar"."""
        return f"{self.color} {self.name}" if self.color else self.name

    @property
    def center(self) -> tuple[float, float]:
        """Center of the box, (x, y)."""
        x1, y1, x2, y2 = self.box
        return (x1 + x2) / 2, (y1 + y2) / 2

    @property
    def side(self) -> float:
        """Square root of the area of the box, in pixels."""
        x1, y1, x2, y2 = self.box
        return ((x2 - x1) * (y2 - y1)) ** 0.5


@cache
def training_names() -> tuple[str, ...]:
    """Return the names of all objects that a training style draws; basic ones come three times."""
    drawn = [(name, row.is_basic) for name, row in icon_names().items() if training_styles(name)]
    return tuple(name for name, basic in drawn for _ in range(3 if basic else 1))


def sample_objects(
    rng: Random, canvas: Composite, count: int, *, icons: float = 0.0, few_kinds: bool = False
) -> list[SceneObject]:
    """Sample objects and their places; fewer than `count` if the picture has no space for more.

    Names of different icons have no word in common, so that "the cat" is not the black cat.

    Args:
        rng: source of the choices.
        canvas: the picture without them.
        count: how many.
        icons: share of icons among the objects.
        few_kinds: repeat kinds and colors, so that counts are above one.

    Raises:
        DatasetNotFoundError, ConfigError: icons cannot be drawn (`check_icons`).
    """
    shorter = min(canvas.width, canvas.height)
    largest = _SIDES[1] * shorter
    if count > 1:
        largest = min(largest, 0.8 * (canvas.width * canvas.height / count) ** 0.5)
    colors = visible_colors(canvas.ground)
    kinds: Sequence[str] = (*SHAPE_KINDS, *MORE_SHAPE_KINDS)
    names: list[str] | None = None
    if few_kinds:
        kinds = rng.sample(kinds, rng.choice((1, 1, 2, 3)))
        colors = rng.sample(colors, rng.choice((1, 2, 3)))
        names = sample_names(rng, rng.choice((1, 1, 2, 3)))
    objects: list[SceneObject] = []
    for _ in range(count):
        is_icon = rng.random() < icons
        smallest = round(max(_MIN_ICON_SIDE, _MIN_ICON_SHARE * shorter)) if is_icon else _MIN_SIDE
        box = place_box(rng, canvas, largest, [other.box for other in objects], smallest=smallest)
        if box is None:
            break
        if is_icon:
            icon, attempts = None, 0
            while icon is None or (attempts < _ATTEMPTS and not _is_visible(icon, canvas.ground)):
                name = _sample_name(rng, names, [one.name for one in objects if not one.color])
                icon = sample_icon(rng, name, box, ground=canvas.ground)
                attempts += 1
            objects.append(icon)
        else:
            objects.append(sample_shape(rng, rng.choice(kinds), rng.choice(colors), box))
    return objects


def sample_shape(rng: Random, kind: str, color: str, box: Box) -> SceneObject:
    """Sample a shape within a square box: rectangles and ovals are shorter in one direction.

    Some shapes are rotated, and some triangles and others slightly stretched.
    """
    if kind in ("rectangle", "oval"):
        box = _shorten(rng, box, rng.uniform(_MIN_ELONGATED, _MAX_ELONGATED))
    elif kind in _STRETCHED and rng.random() < 0.4:
        box = _shorten(rng, box, rng.uniform(0.8, 1))
    limit = _MAX_ANGLES.get(kind, 180)
    wide, high = box[2] - box[0], box[3] - box[1]
    angle = 0
    if min(wide, high) >= _MIN_ROTATED_SIDE and rng.random() < _ROTATED_SHARE:
        angle = rng.randint(-limit, limit)
    layer = ShapeLayer(kind=kind, rgb=sample_color(rng, color), box=box, angle=angle)
    left, top, right, bottom = shape_extent(kind, wide, high, angle)
    ink = (box[0] + left, box[1] + top, box[0] + right, box[1] + bottom)
    return SceneObject(name=kind, color=color, layer=layer, box=ink)


def sample_icon(
    rng: Random, name: str, box: Box, *, style: str = "", ground: Ground | None = None
) -> SceneObject:
    """Sample an icon of a training style that draws `name`; some are rotated, outlined or toned.

    Args:
        rng: source of the choices.
        name: of the object, as in names.tsv.
        box: of the icon with its margins.
        style: in place of a sampled one.
        ground: the background, on which the icon is visible if it can be.

    Raises:
        DatasetNotFoundError, ConfigError: icons cannot be drawn (`check_icons`).
    """
    icon, attempts = None, 0
    while icon is None or (ground and attempts < _STYLES_TRIED and not _is_visible(icon, ground)):
        look = IconLook(style=style) if style else sample_look(rng, name)
        layer = sample_icon_layer(rng, name, box, look)
        icon = SceneObject(name=name, color="", layer=layer, box=ink_box(layer))
        attempts += 1
    return icon


def ink_box(icon: Icon) -> Box:
    """Return the tight box of an icon's opaque pixels, in pixels of the picture."""
    x1, y1, x2, y2 = icon.box
    left, top, right, bottom = _ink_shares(icon.style, icon.name, icon.angle, icon.lines)
    wide, high = x2 - x1, y2 - y1
    return (
        x1 + round(left * wide),
        y1 + round(top * high),
        x1 + round(right * wide),
        y1 + round(bottom * high),
    )


def visible_colors(ground: Ground) -> list[str]:
    """Return the names of the colors all of whose shades are distinct from a background."""
    ends = (ground.rgb,) if ground.kind == "plain" else (ground.rgb, ground.rgb2)
    return list(_visible_colors(ends))


def colors_for(ground: RGB) -> list[str]:
    """Return the names of the colors that are distinct from a plain background."""
    return visible_colors(Ground(rgb=ground))


def place_box(
    rng: Random,
    canvas: Composite,
    largest: float,
    placed: Sequence[Box],
    *,
    smallest: int = _MIN_SIDE,
) -> Box | None:
    """Sample a square box of up to `largest` pixels apart from others; None without space."""
    shorter = min(canvas.width, canvas.height)
    low = max(smallest, _SIDES[0] * shorter)
    largest = min(largest, shorter)
    for attempt in range(_ATTEMPTS):
        high = max(low, largest * (1 - attempt / _ATTEMPTS))
        # Log-uniform sides are mostly small ones; half are uniform.
        is_log = rng.random() < 0.5
        side = round(
            math.exp(rng.uniform(math.log(low), math.log(high)))
            if is_log
            else rng.uniform(low, high)
        )
        if side > shorter:
            return None
        x, y = rng.randint(0, canvas.width - side), rng.randint(0, canvas.height - side)
        box = (x, y, x + side, y + side)
        if not any(_are_close(box, other) for other in placed):
            return box
    return None


def unique_names(objects: Sequence[SceneObject]) -> dict[str, SceneObject]:
    """Return every name that refers to exactly one object: "red circle", "circle", "red shape"."""
    named: list[tuple[str, SceneObject]] = []
    for one in objects:
        named += [(name, one) for name in dict.fromkeys((one.phrase, one.name))]
        named += [(f"{one.color} shape", one)] if one.color else []
    uses = Counter(name for name, _ in named)
    return {name: one for name, one in named if uses[name] == 1}


def _sample_name(rng: Random, names: Sequence[str] | None, shown: Sequence[str]) -> str:
    """Sample a name, of `names` if any, that no kind of shape and none of the shown resembles."""
    others = [*SHAPE_KINDS, *MORE_SHAPE_KINDS, *shown]
    for _ in range(_ATTEMPTS):
        name = rng.choice(names) if names else sample_names(rng, 1)[0]
        if name in shown or not any(are_near(name, other) for other in others):
            return name
    return rng.choice(shown or ["guitar"])


def _are_close(a: Box, b: Box) -> bool:
    apart = a[2] + _GAP <= b[0] or b[2] + _GAP <= a[0] or a[3] + _GAP <= b[1] or b[3] + _GAP <= a[1]
    return not apart


def _shorten(rng: Random, box: Box, share: float) -> Box:
    """Shorten a square in one of its directions."""
    x1, y1, x2, y2 = box
    shorter = max(4, round((x2 - x1) * share))
    return (x1, y1, x1 + shorter, y2) if rng.random() < 0.5 else (x1, y1, x2, y1 + shorter)


@lru_cache(maxsize=1024)
def _visible_colors(ends: tuple[RGB, ...]) -> tuple[str, ...]:
    # Three colors of a blend stand for all.
    mixed = np.linspace(ends[0], ends[-1], 3)
    visible: list[str] = []
    for name in (*COLORS, *MORE_COLORS):
        shades = np.linspace(*shades_of(name), 3)
        if np.abs(shades[:, None] - mixed).max(axis=-1).min() >= _VISIBLE_SHADES:
            visible.append(name)
    return tuple(visible)


def _is_visible(icon: SceneObject, ground: Ground) -> bool:
    """Return whether enough of an icon's ink differs clearly from the colors of a background."""
    assert isinstance(icon.layer, Icon)
    lines = icon.layer.lines
    if lines == "line_art" or (lines and is_light(ground.rgb)):
        return True  # black around white, black on light
    ink = _ink_colors(icon.layer.style, icon.name)
    ends = (ground.rgb,) if ground.kind == "plain" else (ground.rgb, ground.rgb2)
    for end in ends:
        is_distinct = np.abs(ink - np.array(end, np.int16)).max(axis=1) >= _VISIBLE_SHADES
        if np.count_nonzero(is_distinct) < _VISIBLE_INK * len(ink):
            return False
    return True


@lru_cache(maxsize=8192)
def _ink_colors(style: str, name: str) -> NDArray[np.int16]:
    """Return the colors of some pixels of an icon's ink, (pixels, 3)."""
    pixels = np.asarray(icon_raster(style, name, _INK_SIDE).convert("RGBA"), np.int16)
    return pixels[pixels[..., 3] >= _OPAQUE][::4, :3]


@lru_cache(maxsize=65536)
def _ink_shares(
    style: str, name: str, angle: int, lines: Lines
) -> tuple[float, float, float, float]:
    """Return the box of an icon's ink as shares of its side."""
    alpha = icon_raster(style, name, RASTER, lines).getchannel(3)
    alpha = alpha.rotate(angle, Image.Resampling.BILINEAR) if angle else alpha
    box = alpha.point([0] * _OPAQUE + [255] * (256 - _OPAQUE)).getbbox()
    left, top, right, bottom = box or (0, 0, RASTER, RASTER)
    return left / RASTER, top / RASTER, right / RASTER, bottom / RASTER
