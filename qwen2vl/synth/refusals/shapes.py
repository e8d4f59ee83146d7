"""Scenes of shapes: those that are asked for are there, or they are not.

A scene asks for colors, kinds and numbers of its shapes, and of others; for the color of a kind
that has another color; and for the third shape where there are two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from random import Random

from qwen2vl.synth.colors import COLORS, MORE_COLORS, contrast, sample_color
from qwen2vl.synth.compositing.layers import Composite, Layer, ShapeLayer
from qwen2vl.synth.families.shapes import plural
from qwen2vl.synth.objects import SceneObject
from qwen2vl.synth.refusals.drafts import REFUSAL, Draft, Scene
from qwen2vl.synth.refusals.pictures import (
    fit_lines,
    photo_canvas,
    pick_colors,
    plain_canvas,
    sized,
)
from qwen2vl.synth.refusals.placing import (
    Axis,
    ask_absent,
    ask_place,
    list_absent_kinds,
    paint_objects,
    place_objects,
    sample_absent_names,
)
from qwen2vl.synth.spec import Mixture

__all__ = [
    "sample_numbers",
    "sample_pattern",
    "sample_row",
    "sample_shapes",
    "sample_shapes_on_photo",
]

_ALL_COLORS = (*COLORS, *MORE_COLORS)
_PATTERN_KINDS = ("circle", "triangle", "star", "cross", "heart", "hexagon")
_ORDINALS = ("first", "second", "third", "fourth", "fifth")
_WORDED_AS_PHOTO = {
    "asked_color": "asked_color_on_photo",
    "asked_shape_of_color": "asked_shape_on_photo",
}


def sample_shapes(rng: Random, mixture: Mixture) -> Scene:
    """Sample one to four shapes of different kinds and colors."""
    canvas = plain_canvas(rng, mixture)
    objects = place_objects(rng, canvas, rng.choice((1, 2, 2, 3, 3, 4)))
    return Scene(paint_objects(canvas, objects), _ask_shapes(rng, canvas, objects))


def sample_shapes_on_photo(rng: Random, mixture: Mixture) -> Scene:
    """Sample a photo with up to three shapes on it."""
    canvas = photo_canvas(rng, mixture)
    objects = place_objects(rng, canvas, rng.choice((0, 1, 1, 1, 2, 2, 3)))
    drafts = _ask_shapes(rng, canvas, objects)
    if rng.random() < 0.6:
        drafts = [d._replace(task=_WORDED_AS_PHOTO.get(d.task, d.task)) for d in drafts]
    return Scene(paint_objects(canvas, objects), drafts)


def sample_row(rng: Random, mixture: Mixture) -> Scene:
    """Sample a row of shapes, and ask for more of them than there are."""
    axis: Axis = rng.choice(("x", "y"))
    count = rng.randint(1, 4)
    least = (24 * count, 28) if axis == "x" else (28, 24 * count)
    canvas = plain_canvas(rng, mixture, sized(rng, mixture, *least))
    objects = place_objects(rng, canvas, count, axis=axis)
    starts = ("left", "right") if axis == "x" else ("top", "bottom")
    drafts: list[Draft] = []
    for start, ordered in zip(starts, (objects, objects[::-1]), strict=True):
        for number, ordinal in enumerate(_ORDINALS[: len(ordered) + 2]):
            is_there = number < len(ordered)
            answer = ordered[number].color if is_there else REFUSAL
            about = (answer,) if is_there else (ordinal,)
            drafts.append(Draft("asked_nth", (ordinal, start), answer, about))
    drafts.append(Draft("asked_count", ("shapes",), str(len(objects)), ("shapes", *_ORDINALS)))
    return Scene(paint_objects(canvas, objects), drafts)


def sample_pattern(rng: Random, mixture: Mixture) -> Scene:
    """Sample a grid of shapes of one kind and color."""
    canvas = plain_canvas(rng, mixture)
    kind, *others = rng.sample(_PATTERN_KINDS, 3)
    ((color, rgb),) = pick_colors(rng, canvas.ground, 1).items()
    cell = max(14, int(min(canvas.width, canvas.height) / rng.uniform(1.5, 5)))
    side = int(cell * rng.uniform(0.45, 0.85))
    layers = tuple(
        ShapeLayer(kind=kind, rgb=rgb, box=(x, y, x + side, y + side))
        for y in range(cell // 8, canvas.height - side, cell)
        for x in range(cell // 8, canvas.width - side, cell)
    )
    drafts = [Draft("asked_color_of_all", (plural(kind),), color, (kind,))]
    drafts += [Draft("asked_color_of_all", (plural(k),), REFUSAL, (k,)) for k in others]
    drafts.append(Draft("asked_exists", (kind,), "yes", (kind,), choices=2))
    drafts += [Draft("asked_exists", (k,), "no", (k,), choices=2) for k in others]
    return Scene(replace(canvas, layers=layers), drafts)


def sample_numbers(rng: Random, mixture: Mixture) -> Scene:
    """Sample shapes with numbers in them; some have a letter or nothing."""
    canvas = plain_canvas(rng, mixture, sized(rng, mixture, 80, 72))
    objects = place_objects(rng, canvas, rng.choice((1, 2, 2, 3)), share=(0.75, 0.97))
    names = [rng.choice((one.name, one.phrase)) for one in objects]
    numbers = [str(number) for number in rng.sample(range(2, 99), len(objects) + 2)]
    layers: list[Layer] = []
    drafts: list[Draft] = []
    for one, name, number in zip(objects, names, numbers, strict=False):
        inside = number
        if len(objects) > 1 and rng.random() < 0.25:
            inside = rng.choice(("", rng.choice("ABEFHKMR")))
        layers += _draw_inside(rng, mixture, one, inside)
        about = (one.name, one.color, number)
        answer = number if inside == number else REFUSAL
        drafts.append(Draft("asked_number_in", (name,), answer, about))
        if inside == number:
            drafts.append(Draft("asked_shape_with_number", (number,), one.name, about))
        else:
            drafts.append(Draft("asked_shape_with_number", (number,), REFUSAL, about))
    for name in sample_absent_names(rng, objects, names):
        drafts.append(Draft("asked_number_in", (name,), REFUSAL, (name,)))
    for number in numbers[len(objects) :]:
        drafts.append(Draft("asked_shape_with_number", (number,), REFUSAL, (number,)))
    return Scene(replace(canvas, layers=tuple(layers)), drafts)


def _ask_shapes(rng: Random, canvas: Composite, objects: Sequence[SceneObject]) -> list[Draft]:
    """Ask for colors, kinds, places and numbers of shapes that are there and that are not."""
    kinds, colors = [one.name for one in objects], [one.color for one in objects]
    absent_kinds = list_absent_kinds(kinds)
    visible = pick_colors(rng, canvas.ground, len(_ALL_COLORS))
    absent_colors = [color for color in visible if color not in colors]
    drafts: list[Draft] = []
    for one in objects:
        both = (one.name, one.color)
        drafts += [
            Draft("asked_color", (one.name,), one.color, both),
            Draft("asked_shape_of_color", (one.color,), one.name, both),
            Draft("asked_count", (plural(rng.choice((one.name, one.phrase))),), "1", both),
            *ask_place(canvas, one, rng.choice((one.name, one.phrase)), both),
        ]
        if len(objects) > 1:  # the color of one shape with the kind of another
            kind = rng.choice([other.name for other in objects if other is not one])
            drafts += ask_absent(f"{one.color} {kind}", (one.color, kind))
    for kind in rng.sample(absent_kinds, 3):
        color = rng.choice((*colors, *absent_colors))
        name = rng.choice((kind, f"{color} {kind}"))
        drafts.append(Draft("asked_color", (kind,), REFUSAL, (kind,)))
        drafts.append(Draft("asked_count", (plural(name),), "0", (kind,)))
        drafts += ask_absent(name, (kind,))
    for color in rng.sample(absent_colors, min(3, len(absent_colors))):
        drafts.append(Draft("asked_shape_of_color", (color,), REFUSAL, (color,)))
        drafts.append(Draft("asked_count", (f"{color} shapes",), "0", (color,)))
    about = ("shapes", *kinds, *colors)
    drafts.append(Draft("asked_count", ("shapes",), str(len(objects)), about))
    return drafts


def _draw_inside(rng: Random, mixture: Mixture, one: SceneObject, text: str) -> list[Layer]:
    """Draw a shape, and a number or letter in its middle."""
    if not text or not isinstance(one.layer, ShapeLayer):
        return [one.layer]
    is_dark = contrast(one.layer.rgb, (255, 255, 255)) > 3
    x1, y1, x2, y2 = one.box
    dx, dy = int(0.29 * (x2 - x1)), int(0.32 * (y2 - y1))
    middle = (x1 + dx, y1 + dy, x2 - dx, y2 - dy)
    rgb = sample_color(rng, "white" if is_dark else "black")
    return [one.layer, *fit_lines(rng, mixture, [text], middle, rgb)]
