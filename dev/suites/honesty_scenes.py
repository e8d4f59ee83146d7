"""Scenes of the frozen suite `honesty`: sizes, backgrounds, colors, objects, words, photos.

A canvas is a picture without layers. Whoever adds layers keeps its size and its kind of background,
so that pictures which answer a question and pictures which do not are alike in both.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from random import Random
from typing import Literal, TypeVar

from qwen2vl.synth.colors import COLORS, contrast, sample_color
from qwen2vl.synth.compositing import Composite, Ground, Icon, Photo, ShapeLayer, Text
from qwen2vl.synth.compositing.icons import icon_names
from qwen2vl.synth.compositing.layers import Layer
from qwen2vl.synth.compositing.text import text_extent
from qwen2vl.synth.shape_masks import SHAPE_KINDS
from qwen2vl.synth.spec import RGB, Box

__all__ = [
    "ALL_TONES",
    "CATEGORIES",
    "FONTS",
    "PEOPLE",
    "PHOTO_SIZES",
    "STYLES",
    "THINGS",
    "TOWNS",
    "WORDS",
    "GroundKind",
    "Tone",
    "add_layers",
    "deck",
    "distinct_colors",
    "icon_layer",
    "labeled",
    "overlapping_shapes",
    "photo_canvas",
    "sample_canvas",
    "split_boxes",
    "text_layer",
    "text_row",
]

GroundKind = Literal["plain", "gradient", "noise", "stripes", "checks"]
Tone = Literal["light", "dark", "strong"]
_T = TypeVar("_T")

ALL_TONES: tuple[Tone, ...] = ("light", "dark", "strong")

STYLES = ("openmoji", "emojione", "emojione-v1")  # held out; streamline draws few of the objects
FONTS = ("Cabin-Bold.otf", "Caladea-Bold.ttf", "Courier Prime Bold.otf")
_SIZES = (
    *((64, 64), (96, 64), (64, 96), (96, 96), (128, 96), (112, 168), (160, 120), (128, 128)),
    *((192, 96), (168, 224), (224, 168), (224, 224), (320, 128), (320, 240), (240, 320)),
    *((384, 288), (448, 252), (336, 448), (512, 512), (640, 160), (640, 480), (480, 640)),
)
# Of the dataset photos; text and flags in some of them limit what is asked.
PHOTO_SIZES = {
    "astronaut.png": (512, 512),
    "brick.png": (512, 512),
    "camera.png": (512, 512),
    "cell.png": (550, 660),
    "chelsea.png": (451, 300),
    "clock_motion.png": (400, 300),
    "coffee.png": (600, 400),
    "coins.png": (384, 303),
    "grass.png": (512, 512),
    "gravel.png": (512, 512),
    "hubble_deep_field.jpg": (1000, 872),
    "ihc.png": (512, 512),
    "moon.png": (512, 512),
    "retina.jpg": (1411, 1411),
    "rocket.jpg": (640, 427),
}
# Objects of names.tsv, with what else they may be called.
THINGS: Mapping[str, tuple[str, ...]] = {
    "key": (),
    "umbrella": ("parasol",),
    "candle": (),
    "bell": (),
    "pencil": (),
    "mushroom": ("toadstool",),
    "cactus": ("cactus plant",),
    "balloon": (),
    "crown": (),
    "anchor": (),
    "envelope": ("letter", "mail"),
    "rose": ("flower",),
    "top hat": ("hat",),
    "light bulb": ("bulb", "lightbulb"),
    "hammer": (),
    "snowman": ("snow man",),
}
CATEGORIES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "animal": {
        **dict.fromkeys(("elephant", "frog", "owl", "octopus", "penguin", "snail", "fish"), ()),
        "turtle": ("tortoise",),
    },
    "fruit": {
        **dict.fromkeys(("banana", "strawberry", "pineapple", "lemon", "watermelon", "pear"), ()),
        "cherries": ("cherry",),
        "grapes": ("grape", "bunch of grapes"),
    },
    "vehicle": {
        "bus": ("school bus",),
        "bicycle": ("bike",),
        "tractor": (),
        "helicopter": (),
        "sailboat": ("boat", "sailing boat", "ship", "sailing ship", "sail boat"),
        "airplane": ("plane", "aeroplane", "aircraft", "jet"),
    },
    "musical instrument": {
        "guitar": ("electric guitar", "acoustic guitar"),
        "violin": ("fiddle",),
        "trumpet": (),
        "drum": ("snare drum",),
        "saxophone": ("sax",),
    },
}
WORDS = tuple(
    """
    lamp rope clay bench moss pearl torch velvet canal ferry glove hazel ivory jacket kettle
    linen nickel olive parcel quilt raft saddle tulip vapor walnut yarn basket copper dune fern
    harbor kiosk marble
    """.split()
)
PEOPLE = ("Ada", "Bruno", "Clara", "Dora", "Frida", "Gus", "Hugo", "Jonas", "Karl", "Mira", "Otto")
TOWNS = ("Oslo", "Bern", "Quito", "Turin", "Cork", "Derby", "Porto", "Sofia", "Tampa", "Warsaw")

# Pairs of colors of which one may be called by the other's name.
_SIMILAR = {("red", "orange"), ("orange", "yellow"), ("blue", "purple"), ("red", "purple")}
_MIN_CONTRAST = {"shape": 1.8, "text": 2.8}  # of luminances, against both colors of the background
_TONES: dict[Tone, tuple[int, int]] = {"light": (205, 255), "dark": (0, 50), "strong": (0, 255)}
_FAINT_LINES: dict[Tone, tuple[RGB, RGB]] = {
    "light": ((255, 255, 255), (205, 205, 205)),
    "dark": ((0, 0, 0), (45, 45, 45)),
}
_MIN_FONT_SIZE = 13  # pixels per em


def deck(rng: Random, values: Sequence[_T]) -> Iterator[_T]:
    """Repeat the values without end, in a new order each time: all are drawn equally often."""
    while True:
        yield from rng.sample(values, len(values))


def sample_canvas(
    rng: Random,
    kind: GroundKind,
    *,
    tone: Tone | None = None,
    min_size: tuple[int, int] = (64, 64),
    cells: Sequence[int] = (1, 2, 4, 8, 16),
) -> Composite:
    """Sample a picture without layers.

    Args:
        rng: random numbers.
        kind: of the background.
        tone: of its colors; None: light or dark. Strong noise has all colors.
        min_size: least (width, height), pixels.
        cells: widths of the cells of noise, stripes and checks, pixels; those are sampled of which
            eight fit into the shorter side.
    """
    sizes = [size for size in _SIZES if size[0] >= min_size[0] and size[1] >= min_size[1]]
    width, height = rng.choice(sizes)
    tone = tone or rng.choice(("light", "dark"))
    first, second = _tint(rng, tone), _tint(rng, tone)
    if kind == "noise" and tone == "strong":
        first, second = (0, 0, 0), (255, 255, 255)
    elif kind in ("stripes", "checks") and tone != "strong":  # random tints may be alike
        first, second = _FAINT_LINES[tone]
    if kind == "plain":
        second = first
    fitting = [cell for cell in cells if 8 * cell <= min(width, height)]
    ground = Ground(
        kind=kind,
        rgb=first,
        rgb2=second,
        cell=1 if kind in ("plain", "gradient") else rng.choice(fitting or cells[:1]),
        seed=rng.randrange(1000),
    )
    quality = rng.choice((0, rng.randint(60, 95)))
    return Composite(width=width, height=height, ground=ground, jpeg_quality=quality)


def photo_canvas(rng: Random, file: str) -> Composite:
    """Sample a picture that is a part of a photo: between half and all of what fits."""
    photo_width, photo_height = PHOTO_SIZES[file]
    width, height = rng.choice([size for size in _SIZES if min(size) >= 96 and max(size) <= 512])
    scale = min(photo_width / width, photo_height / height) * rng.uniform(0.5, 1)
    crop_width, crop_height = int(width * scale), int(height * scale)
    x = rng.randint(0, photo_width - crop_width)
    y = rng.randint(0, photo_height - crop_height)
    crop = (x, y, x + crop_width, y + crop_height)
    layer = Photo(file=file, crop=crop, box=(0, 0, width, height))
    return Composite(width=width, height=height, layers=(layer,))


def add_layers(canvas: Composite, *layers: Layer) -> Composite:
    """Paint layers on a picture."""
    return replace(canvas, layers=(*canvas.layers, *layers))


def split_boxes(
    rng: Random,
    canvas: Composite,
    count: int,
    *,
    axis: Literal["x", "y"] | None = None,
    share: tuple[float, float] = (0.55, 0.88),
) -> list[Box]:
    """Sample square boxes in strips of a picture, from left to right or from top to bottom.

    Args:
        rng: random numbers.
        canvas: the picture.
        count: of boxes.
        axis: along which they follow each other; None: the longer side.
        share: least and largest part of a strip's shorter side that a box takes.
    """
    width, height = canvas.width, canvas.height
    if axis is None:
        axis = rng.choice(("x", "y")) if width == height else "x" if width > height else "y"
    wide, high = (width / count, height) if axis == "x" else (width, height / count)
    boxes: list[Box] = []
    for index in range(count):
        side = int(min(wide, high) * rng.uniform(*share))
        left, top = (index * wide, 0) if axis == "x" else (0, index * high)
        x = int(left + rng.uniform(0.5, max(0.5, wide - side - 0.5)))
        y = int(top + rng.uniform(0.5, max(0.5, high - side - 0.5)))
        boxes.append((x, y, x + side, y + side))
    return boxes


def distinct_colors(
    rng: Random, ground: Ground, count: int, *, of: Literal["shape", "text"] = "shape"
) -> dict[str, RGB]:
    """Sample colors by name that are visible on a background and have no similar name."""
    while True:
        names = rng.sample(sorted(COLORS), count)
        colors = {name: sample_color(rng, name) for name in names}
        pairs = {(a, b) for a in names for b in names}
        if not pairs & _SIMILAR and all(_is_visible(c, ground, of) for c in colors.values()):
            return colors


def icon_layer(rng: Random, name: str, box: Box) -> Icon:
    """Draw an object into a box, in one of the styles that have it."""
    styles = [style for style in STYLES if style in icon_names()[name].icons]
    return Icon(style=rng.choice(styles), name=name, box=box)


def text_layer(rng: Random, text: str, box: Box, rgb: RGB) -> Text:
    """Center a line of text in a box, in the largest size that fits, at most 72 pixels per em."""
    font = rng.choice(FONTS)
    size = _fitting_size(text, font, box)
    assert size >= _MIN_FONT_SIZE, f"{text} has to be legible in {box}: {size} pixels per em"
    left, top, right, bottom = text_extent(text, font, size)
    x = (box[0] + box[2] - right - left) // 2
    y = (box[1] + box[3] - bottom - top) // 2
    return Text(text=text, font=font, size=size, x=x, y=y, rgb=rgb)


def text_row(canvas: Composite, top: float, bottom: float) -> Box:
    """Return the box of a row of a picture, between two fractions of its height."""
    margin = max(3, canvas.width // 24)
    return (margin, int(top * canvas.height), canvas.width - margin, int(bottom * canvas.height))


def labeled(rng: Random, content: str, box: Box, *, is_text: bool = False) -> list[Layer]:
    """Draw a white square with an object or a word on it, visible on any background."""
    x1, y1, x2, y2 = box
    inset = max(2, (x2 - x1) // 12)
    inner = (x1 + inset, y1 + inset, x2 - inset, y2 - inset)
    label = ShapeLayer(kind="square", rgb=(255, 255, 255), box=box)
    if is_text:
        return [label, text_layer(rng, content, inner, (0, 0, 0))]
    return [label, icon_layer(rng, content, inner)]


def overlapping_shapes(rng: Random, rgb: RGB, box: Box) -> list[ShapeLayer]:
    """Draw a figure without a name: five small shapes of one color around a larger one."""
    x1, y1, x2, _ = box
    side = x2 - x1
    center = x1 + side / 2, y1 + side / 2
    start = rng.uniform(0, math.tau)
    kinds = rng.sample(SHAPE_KINDS, len(SHAPE_KINDS))
    core = int(0.45 * side)
    layers = [ShapeLayer(kind=kinds[0], rgb=rgb, box=_centered(center, core))]
    for index, kind in enumerate(kinds[1:]):
        angle = start + math.tau * (index + rng.uniform(-0.25, 0.25)) / 5
        small = int(side * rng.uniform(0.26, 0.4))
        distance = rng.uniform(0.26, 0.3) * side
        at = center[0] + distance * math.cos(angle), center[1] + distance * math.sin(angle)
        layers.append(ShapeLayer(kind=kind, rgb=rgb, box=_centered(at, small)))
    return layers


def _centered(center: tuple[float, float], side: int) -> Box:
    x, y = int(center[0] - side / 2), int(center[1] - side / 2)
    return (x, y, x + side, y + side)


def _tint(rng: Random, tone: Tone) -> RGB:
    low, high = _TONES[tone]
    return (rng.randint(low, high), rng.randint(low, high), rng.randint(low, high))


def _is_visible(rgb: RGB, ground: Ground, of: Literal["shape", "text"]) -> bool:
    return all(contrast(rgb, other) >= _MIN_CONTRAST[of] for other in (ground.rgb, ground.rgb2))


def _fitting_size(text: str, font: str, box: Box) -> int:
    for size in range(72, _MIN_FONT_SIZE - 1, -1):
        left, top, right, bottom = text_extent(text, font, size)
        if right - left <= box[2] - box[0] and bottom - top <= box[3] - box[1]:
            return size
    return 0
