"""Scenes of the suite named-pictures: two to eight icons of one held-out style, in any size.

Questions are about position, number, bounding box and name. Boxes of icons do not overlap, icons
stand out from their ground, and names in one picture cannot be confused. A bounding box is that of
the ink: icons have transparent margins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product
from random import Random

import numpy as np
from PIL import Image, ImageFilter, ImageOps

from dev.suites.named_pictures.drafts import Draft
from dev.suites.named_pictures.names import (
    accepted_answers,
    are_confusable,
    plural_of,
    scene_names,
)
from dev.suites.sampling import deal
from qwen2vl.eval.suites.frozen_suite import FrozenItem
from qwen2vl.grounding import Box, ObjectRef
from qwen2vl.synth.compositing import Composite, Ground, Icon, draw_composite, icon_names
from qwen2vl.synth.compositing.icons import render_icon

__all__ = ["SCENE_PARTS", "STYLES", "draw_scenes", "ink_box", "stands_out"]

STYLES = ("openmoji", "emojione", "emojione-v1")
SCENE_PARTS = ("scene_position", "scene_count", "scene_box", "scene_name")

# Width and height; pictures for counting have many icons, and are no smaller than 320 pixels.
CANVASES = (
    *((224, 224), (320, 224), (224, 336), (384, 288), (288, 384), (448, 448), (512, 320)),
    *((320, 512), (640, 360), (360, 640), (640, 480), (480, 640), (640, 640)),
)
GROUNDS = ("plain", "gradient", "stripes", "noise")
JPEG_SHARE = 0.3
NUMBERS = ("zero", "one", "two", "three", "four", "five")

MARGIN = 4  # pixels between icons and the border
GAP = 0.04  # of the shorter side, between icons
MIN_CENTERS = 0.25  # of the width (height), between the centers of compared icons
EDGE = 2  # pixels that an icon's edge is wide
MIN_EDGE = 0.6  # share of an icon's edge that must differ from the ground ...
MIN_DIFFERENCE = 40  # ... by so many shades in a channel
NUM_GROUNDS = 8  # that are tried for the same icons
OPAQUE = 64  # alpha from which a pixel is ink

# Kind of question -> question, axis, and whether the answer has the larger coordinate.
COMPARISONS = {
    "left": ("Which is further left: the {0} or the {1}?", 0, False),
    "right": ("Which is further right: the {0} or the {1}?", 0, True),
    "top": ("Which is closer to the top: the {0} or the {1}?", 1, False),
    "bottom": ("Which is closer to the bottom: the {0} or the {1}?", 1, True),
}
SIDES = {  # axis, and index of the icon along it
    "on the left": (0, 0),
    "on the right": (0, 1),
    "at the top": (1, 0),
    "at the bottom": (1, 1),
}
CORNERS = tuple(product(("top", "bottom"), ("left", "right")))
BOX_QUESTIONS = (
    "Find <|object_ref_start|>the {0}<|object_ref_end|>.",
    "Detect the bounding box of <|object_ref_start|>the {0}<|object_ref_end|>.",
    "Give the bounding box of the {0}.",
)

PixelBox = tuple[int, int, int, int]
# Whether the boxes so far, in a picture of a width and height, are where a question needs them.
Layout = Callable[[Sequence[PixelBox], int, int], bool]


NameSampler = Callable[[Random, str], list[str]]  # of the icons that a style draws


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """What a scene is sampled from: one icon style, a size, and sides of icons."""

    style: str
    canvas: tuple[int, int]
    sides: tuple[float, float]  # smallest and largest, as shares of the shorter side


def draw_scenes(part: str, rng: Random, count: int) -> list[Draft]:
    """Sample `count` items of one of SCENE_PARTS."""
    sample = (_positions, _counts, _boxes, _names)[SCENE_PARTS.index(part)]
    return list(sample(rng, count))


def ink_box(icon: Icon) -> PixelBox:
    """Return the tight box of an icon's opaque pixels, in pixels of the picture."""
    x, y, x2, _ = icon.box
    inside = _opaque(render_icon(icon.style, icon.name, x2 - x)).getbbox()
    assert inside is not None, "icons have ink"
    return x + inside[0], y + inside[1], x + inside[2], y + inside[3]


def stands_out(icon: Icon, ground: Image.Image) -> bool:
    """Return whether enough of an icon's edge differs from the ground.

    Args:
        icon: and where it is in the picture.
        ground: the picture without icons, RGB.
    """
    drawn = render_icon(icon.style, icon.name, icon.box[2] - icon.box[0])
    under = ground.crop(icon.box)
    over = under.copy()
    over.paste(drawn, (0, 0), drawn)
    difference = np.abs(np.asarray(over, np.int16) - np.asarray(under, np.int16)).max(axis=2)
    mask = ImageOps.expand(_opaque(drawn), EDGE)
    inner = mask.filter(ImageFilter.MinFilter(2 * EDGE + 1))
    edge = (np.asarray(mask) > np.asarray(inner))[EDGE:-EDGE, EDGE:-EDGE]
    return bool((difference[edge] >= MIN_DIFFERENCE).mean() >= MIN_EDGE)


def _positions(rng: Random, count: int) -> Iterator[Draft]:
    variants = deal(rng, tuple(product(COMPARISONS, (False, True))), count)
    for (kind, is_first), frame in zip(variants, _frames(rng, count, (0.26, 0.42)), strict=True):
        question, axis, is_larger = COMPARISONS[kind]
        picture = _sample_picture(rng, frame, _distinct(2), _apart(axis))
        low, high = sorted(_icons(picture), key=lambda icon: icon.box[axis])
        answer, other = (high, low) if is_larger else (low, high)
        asked = (answer.name, other.name) if is_first else (other.name, answer.name)
        yield Draft(
            item=FrozenItem(
                id="",
                part="scene_position",
                kind=kind,
                question=question.format(*asked),
                answers=accepted_answers(answer.name),
                pictures=(picture,),
                choices=2,
            ),
            asked=asked,
        )


def _counts(rng: Random, count: int) -> Iterator[Draft]:
    numbers = deal(rng, (1, 2, 3, 4, 5), count)
    frames = _frames(rng, count, (0.16, 0.23), min_side=320)
    for number, frame in zip(numbers, frames, strict=True):
        num_others = rng.randint(6, 8) - number  # so that the total does not tell the answer
        picture = _sample_picture(rng, frame, _repeated(number, num_others))
        name = _icons(picture)[0].name
        yield Draft(
            item=FrozenItem(
                id="",
                part="scene_count",
                kind="count",
                question=f"How many {plural_of(name)} are there?",
                answers=(str(number), NUMBERS[number]),
                pictures=(picture,),
                choices=5,
            ),
            asked=(name,),
        )


def _boxes(rng: Random, count: int) -> Iterator[Draft]:
    variants = deal(rng, tuple(product(BOX_QUESTIONS, (2, 3, 4))), count)
    for (question, number), frame in zip(variants, _frames(rng, count, (0.2, 0.4)), strict=True):
        picture = _sample_picture(rng, frame, _distinct(number))
        icon = rng.choice(_icons(picture))
        x1, y1, x2, y2 = ink_box(icon)
        size = (picture.height, picture.width)
        phrase = ObjectRef(f"the {icon.name}").to_text()
        yield Draft(
            item=FrozenItem(
                id="",
                part="scene_box",
                kind="box",
                question=question.format(icon.name),
                answers=(phrase + Box.from_pixels((x1, y1, x2, y2), size).to_text(),),
                metric="box_iou",
                pictures=(picture,),
                box=(
                    *(round(x1 / picture.width, 4), round(y1 / picture.height, 4)),
                    *(round(x2 / picture.width, 4), round(y2 / picture.height, 4)),
                ),
            ),
            asked=(icon.name,),
        )


def _names(rng: Random, count: int) -> Iterator[Draft]:
    num_sides = count // 2
    sides = deal(rng, tuple(SIDES), num_sides)
    for where, frame in zip(sides, _frames(rng, num_sides, (0.24, 0.4)), strict=True):
        axis, index = SIDES[where]
        picture = _sample_picture(rng, frame, _distinct(2), _in_halves(axis))
        icon = sorted(_icons(picture), key=lambda one: one.box[axis])[index]
        yield _name_draft("side", where, icon, picture)
    corners = deal(rng, CORNERS, count - num_sides)
    frames = _frames(rng, count - num_sides, (0.2, 0.36))
    for corner, frame in zip(corners, frames, strict=True):
        picture = _sample_picture(rng, frame, _distinct(len(CORNERS)), _in_corners)
        icon = _icons(picture)[CORNERS.index(corner)]
        yield _name_draft("corner", f"in the {corner[0]} {corner[1]} corner", icon, picture)


def _name_draft(kind: str, where: str, icon: Icon, picture: Composite) -> Draft:
    item = FrozenItem(
        id="",
        part="scene_name",
        kind=kind,
        question=f"What is {where}? Answer with its name only.",
        answers=accepted_answers(icon.name),
        pictures=(picture,),
    )
    return Draft(item=item, asked=(icon.name,))


def _frames(
    rng: Random, count: int, sides: tuple[float, float], min_side: int = 0
) -> Iterator[Frame]:
    canvases = [canvas for canvas in CANVASES if min(canvas) >= min_side]
    styles = deal(rng, STYLES, count)
    for style, canvas in zip(styles, deal(rng, canvases, count), strict=True):
        yield Frame(style=style, canvas=canvas, sides=sides)


def _distinct(count: int) -> NameSampler:
    """Sample names that a style draws, no two of which may be confused."""

    def sample(rng: Random, style: str) -> list[str]:
        drawn = [name for name in scene_names() if style in icon_names()[name].icons]
        while True:
            names = rng.sample(drawn, count)
            if not any(are_confusable(*pair) for pair in combinations(names, 2)):
                return names

    return sample


def _repeated(number: int, num_others: int) -> NameSampler:
    """Sample `number` times one name, and then two or three other ones, `num_others` in all."""

    def sample(rng: Random, style: str) -> list[str]:
        num_names = 1 + min(num_others, rng.randint(2, 3))
        name, *others = _distinct(num_names)(rng, style)
        return [name] * number + deal(rng, others, num_others)

    return sample


def _sample_picture(
    rng: Random, frame: Frame, sample_names: NameSampler, layout: Layout = lambda *_: True
) -> Composite:
    """Sample icons, boxes that `layout` accepts, and a ground on which all icons stand out."""
    width, height = frame.canvas
    kind = rng.choice(GROUNDS)
    quality = rng.randint(55, 90) if rng.random() < JPEG_SHARE else 0
    while True:
        names = sample_names(rng, frame.style)
        boxes = _sample_boxes(rng, frame, len(names), layout)
        placed = zip(names, boxes, strict=True)
        icons = tuple(Icon(style=frame.style, name=name, box=box) for name, box in placed)
        for _ in range(NUM_GROUNDS):
            empty = Composite(width=width, height=height, ground=_sample_ground(rng, kind))
            drawn = Image.fromarray(draw_composite(empty))
            if all(stands_out(icon, drawn) for icon in icons):
                return replace(empty, layers=icons, jpeg_quality=quality)


def _sample_boxes(rng: Random, frame: Frame, count: int, layout: Layout) -> list[PixelBox]:
    width, height = frame.canvas
    shorter = min(frame.canvas)
    gap = round(GAP * shorter)
    while True:
        boxes: list[PixelBox] = []
        for _ in range(40 * count):
            side = round(rng.uniform(*frame.sides) * shorter)
            x = rng.randint(MARGIN, width - MARGIN - side)
            y = rng.randint(MARGIN, height - MARGIN - side)
            box = (x, y, x + side, y + side)
            if all(_are_apart(box, other, gap) for other in boxes):
                extended = [*boxes, box]
                boxes = extended if layout(extended, width, height) else boxes
            if len(boxes) == count:
                return boxes


def _icons(picture: Composite) -> list[Icon]:
    return [layer for layer in picture.layers if isinstance(layer, Icon)]


def _are_apart(a: PixelBox, b: PixelBox, gap: int) -> bool:
    return any(a[i] >= b[i + 2] + gap or b[i] >= a[i + 2] + gap for i in (0, 1))


def _centers(boxes: Sequence[PixelBox], axis: int, length: int) -> list[float]:
    """Return the centers of boxes along an axis, as fractions of its length."""
    return [(box[axis] + box[axis + 2]) / 2 / length for box in boxes]


def _apart(axis: int) -> Layout:
    """Accept two boxes that do not overlap along an axis, and are far apart on it."""

    def accepts(boxes: Sequence[PixelBox], width: int, height: int) -> bool:
        if len(boxes) < 2:
            return True
        first, second = sorted(boxes, key=lambda box: box[axis])
        low, high = sorted(_centers(boxes, axis, (width, height)[axis]))
        return first[axis + 2] <= second[axis] and high - low >= MIN_CENTERS

    return accepts


def _in_halves(axis: int) -> Layout:
    """Accept two boxes in the outer parts of the two halves."""

    def accepts(boxes: Sequence[PixelBox], width: int, height: int) -> bool:
        centers = sorted(_centers(boxes, axis, (width, height)[axis]))
        return len(boxes) < 2 or (centers[0] <= 0.35 and centers[1] >= 0.65)

    return accepts


def _in_corners(boxes: Sequence[PixelBox], width: int, height: int) -> bool:
    """Accept boxes in the order of CORNERS, each near its corner."""
    ys, xs = _centers(boxes, 1, height), _centers(boxes, 0, width)
    return all(
        _is_at(y, vertical == "bottom") and _is_at(x, horizontal == "right")
        for (vertical, horizontal), x, y in zip(CORNERS, xs, ys, strict=False)
    )


def _is_at(center: float, is_end: bool) -> bool:
    return center >= 0.66 if is_end else center <= 0.34


def _sample_ground(rng: Random, kind: str) -> Ground:
    """Sample a ground; the two colors of stripes and noise differ little, to hide nothing."""
    rgb = _sample_pastel(rng)
    if kind == "plain":
        return Ground(rgb=rgb)
    if kind == "gradient":
        return Ground(kind="gradient", rgb=rgb, rgb2=_sample_pastel(rng), seed=rng.randrange(2))
    red, green, blue = (channel - rng.randint(14, 30) for channel in rgb)
    cell = rng.choice((8, 16, 24)) if kind == "stripes" else rng.choice((1, 2, 4))
    return Ground(
        kind="stripes" if kind == "stripes" else "noise",
        rgb=rgb,
        rgb2=(red, green, blue),
        cell=cell,
        seed=rng.randrange(1000) if kind == "noise" else 0,
    )


def _sample_pastel(rng: Random) -> tuple[int, int, int]:
    low = rng.randint(120, 235)
    return rng.randint(low, 255), rng.randint(low, 255), rng.randint(low, 255)


def _opaque(icon: Image.Image) -> Image.Image:
    """Return a mask of an icon's ink, 0 or 255."""
    alpha = np.asarray(icon.getchannel("A"))
    return Image.fromarray(np.where(alpha >= OPAQUE, 255, 0).astype(np.uint8))
