"""Pairs of items of the frozen suite `honesty`: a question that one of two pictures answers.

`crossed` asks two questions of two pictures each of which answers one of them, so that neither the
question nor the picture alone tells whether there is an answer. `paired` asks one question of a
picture with and without what it presupposes. Both pictures have the same size and background.
The functions `ask_...` sample the two pictures of a crossed pair.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random

from dev.suites.honesty_scenes import (
    CATEGORIES,
    THINGS,
    WORDS,
    add_layers,
    distinct_colors,
    icon_layer,
    labeled,
    overlapping_shapes,
    split_boxes,
    text_layer,
    text_row,
)
from qwen2vl.eval.suites.frozen_suite import FrozenItem
from qwen2vl.synth.colors import contrast, sample_color
from qwen2vl.synth.compositing import Composite, Ground, ShapeLayer
from qwen2vl.synth.compositing.layers import Layer
from qwen2vl.synth.shape_masks import SHAPE_KINDS

__all__ = [
    "SUBJECTS",
    "Items",
    "Query",
    "accepted_names",
    "ask",
    "ask_background",
    "ask_categories",
    "ask_color",
    "ask_color_of_figure",
    "ask_larger",
    "ask_name_of_figure",
    "ask_neighbor",
    "ask_number",
    "ask_pattern",
    "ask_shape_of_color",
    "ask_side",
    "ask_single_color",
    "ask_single_subject",
    "ask_word_of_color",
    "crossed",
    "paired",
]

Items = list[FrozenItem]

# Other names of shapes and colors that are accepted as answers.
_SYNONYMS = {"diamond": ("rhombus",), "cross": ("plus", "plus sign"), "purple": ("violet",)}
_SIDES = {side: (side, f"on the {side}", f"{side} side") for side in ("left", "right")}
_NUMBERED = ("circle", "square", "diamond")  # shapes that are wide enough for a number


_DIGIT_NAMES = "zero one two three four five six seven eight nine".split()
# What a picture may show, by category, with other accepted answers. Characters that look like
# another one or like a shape are left out.
SUBJECTS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    **CATEGORIES,
    "letter": {letter: (f"letter {letter}",) for letter in "AEFHKMNPRT"},
    "digit": {digit: (_DIGIT_NAMES[int(digit)],) for digit in "2345679"},
    "geometric shape": {shape: _SYNONYMS.get(shape, ()) for shape in SHAPE_KINDS},
    "object": THINGS,
    "word": dict.fromkeys(WORDS, ()),
}
_TEXTS = ("letter", "digit", "word")


@dataclass(frozen=True, slots=True)
class Query:
    """A question, and the answers that are accepted where the picture has one."""

    pattern: str  # "Who owns the {0}?"
    fields: tuple[str, ...]
    answers: tuple[str, ...]


def accepted_names(name: str) -> tuple[str, ...]:
    """Return the name of a shape or color, and its synonyms."""
    return (name, *_SYNONYMS.get(name, ()))


def crossed(kind: str, pictures: Sequence[Composite], queries: Sequence[Query]) -> Items:
    """Ask both questions of both pictures; each picture answers the question at its index."""
    first, second = pictures
    return paired(kind, first, second, queries[0]) + paired(kind, second, first, queries[1])


def paired(kind: str, shown: Composite, other: Composite, query: Query) -> Items:
    """Ask a question of a picture that answers it, and of one that does not."""
    return [ask(kind, shown, query), ask(kind, other, replace(query, answers=()))]


def ask(kind: str, picture: Composite, query: Query) -> FrozenItem:
    """Ask a question of a picture. Id and part are filled in when all items of a part are known."""
    return FrozenItem(
        id="",
        part="",
        kind=kind,
        question=query.pattern.format(*query.fields),
        answers=query.answers,
        pictures=(picture,),
    )


def ask_color(
    rng: Random,
    kind: str,
    canvas: Composite,
    pattern: str,
    *,
    shapes: Sequence[str] = SHAPE_KINDS,
) -> Items:
    """Ask for the color of a shape that only one picture has."""
    count = 2 if min(canvas.width, canvas.height) < 96 else 3
    first, second, *rest = rng.sample(shapes, count + 1)
    pictures: list[Composite] = []
    queries: list[Query] = []
    for asked in (first, second):
        kinds = rng.sample([asked, *rest], count)
        colors = distinct_colors(rng, canvas.ground, count)
        boxes = split_boxes(rng, canvas, count)
        layers = [
            ShapeLayer(kind=shape, rgb=rgb, box=box)
            for shape, rgb, box in zip(kinds, colors.values(), boxes, strict=True)
        ]
        pictures.append(add_layers(canvas, *layers))
        queries.append(Query(pattern, (asked,), accepted_names(list(colors)[kinds.index(asked)])))
    return crossed(kind, pictures, queries)


def ask_shape_of_color(
    rng: Random,
    kind: str,
    canvas: Composite,
    pattern: str,
    *,
    shapes: Sequence[str] = SHAPE_KINDS,
) -> Items:
    """Ask for the shape that has a color which only one picture has."""
    colors = distinct_colors(rng, canvas.ground, 3)
    first, second, third = colors
    pictures: list[Composite] = []
    queries: list[Query] = []
    for asked in (first, second):
        names, kinds = rng.sample([asked, third], 2), rng.sample(shapes, 2)
        layers = [
            ShapeLayer(kind=shape, rgb=colors[name], box=box)
            for shape, name, box in zip(kinds, names, split_boxes(rng, canvas, 2), strict=True)
        ]
        pictures.append(add_layers(canvas, *layers))
        queries.append(Query(pattern, (asked,), accepted_names(kinds[names.index(asked)])))
    return crossed(kind, pictures, queries)


def ask_number(rng: Random, kind: str, canvas: Composite, pattern: str) -> Items:
    """Ask for the number inside a shape that only one picture has."""
    first, second, third = rng.sample(_NUMBERED, 3)
    pictures: list[Composite] = []
    queries: list[Query] = []
    for asked in (first, second):
        kinds = rng.sample([asked, third], 2)
        numbers = [str(number) for number in rng.sample(range(12, 99), 2)]
        fills = distinct_colors(rng, canvas.ground, 2).values()
        boxes = split_boxes(rng, canvas, 2, share=(0.8, 0.95))
        layers: list[Layer] = []
        for shape, number, rgb, box in zip(kinds, numbers, fills, boxes, strict=True):
            inset = (box[2] - box[0]) // 4
            inner = (box[0] + inset, box[1] + inset, box[2] - inset, box[3] - inset)
            is_dark = contrast(rgb, (255, 255, 255)) > contrast(rgb, (0, 0, 0))
            ink = (255, 255, 255) if is_dark else (0, 0, 0)
            layers.append(ShapeLayer(kind=shape, rgb=rgb, box=box))
            layers.append(text_layer(rng, number, inner, ink))
        pictures.append(add_layers(canvas, *layers))
        queries.append(Query(pattern, (asked,), (numbers[kinds.index(asked)],)))
    return crossed(kind, pictures, queries)


def ask_word_of_color(rng: Random, kind: str, canvas: Composite, pattern: str) -> Items:
    """Ask for the word in a color which only one picture has."""
    colors = distinct_colors(rng, canvas.ground, 3, of="text")
    first, second, third = colors
    pictures: list[Composite] = []
    queries: list[Query] = []
    for asked in (first, second):
        names, words = rng.sample([asked, third], 2), rng.sample(WORDS, 2)
        layers = [
            text_layer(rng, word, text_row(canvas, top, top + 0.36), colors[name])
            for word, name, top in zip(words, names, (0.08, 0.54), strict=True)
        ]
        pictures.append(add_layers(canvas, *layers))
        queries.append(Query(pattern, (asked,), (words[names.index(asked)],)))
    return crossed(kind, pictures, queries)


def ask_side(
    rng: Random, kind: str, canvas: Composite, pattern: str, *, on_label: bool = False
) -> Items:
    """Ask for the side of an object that only one picture has; one is left, the other right."""
    first, second, third = rng.sample(sorted(THINGS), 3)
    pictures: list[Composite] = []
    queries: list[Query] = []
    for asked, side in zip((first, second), rng.sample(sorted(_SIDES), 2), strict=True):
        names = (asked, third) if side == "left" else (third, asked)
        layers: list[Layer] = []
        for name, box in zip(names, split_boxes(rng, canvas, 2, axis="x"), strict=True):
            layers += labeled(rng, name, box) if on_label else [icon_layer(rng, name, box)]
        pictures.append(add_layers(canvas, *layers))
        queries.append(Query(pattern, (asked,), _SIDES[side]))
    return crossed(kind, pictures, queries)


def ask_neighbor(rng: Random, kind: str, canvas: Composite, pattern: str) -> Items:
    """Ask for the shape beside an object that only one picture has."""
    pictures: list[Composite] = []
    queries: list[Query] = []
    things = rng.sample(sorted(THINGS), 2)
    for asked, shape in zip(things, rng.sample(SHAPE_KINDS, 2), strict=True):
        (rgb,) = distinct_colors(rng, canvas.ground, 1).values()
        boxes = split_boxes(rng, canvas, 2)
        rng.shuffle(boxes)
        layers = (icon_layer(rng, asked, boxes[0]), ShapeLayer(kind=shape, rgb=rgb, box=boxes[1]))
        pictures.append(add_layers(canvas, *layers))
        queries.append(Query(pattern, (asked,), accepted_names(shape)))
    return crossed(kind, pictures, queries)


def ask_larger(rng: Random, kind: str, canvas: Composite, pattern: str) -> Items:
    """Ask whether a shape that both pictures have, or one that only one has, is larger."""
    first, second, third = rng.sample(SHAPE_KINDS, 3)
    pictures: list[Composite] = []
    queries: list[Query] = []
    for asked, third_is_large in zip((first, second), rng.sample((True, False), 2), strict=True):
        large = third if third_is_large else asked
        kinds = rng.sample([asked, third], 2)
        fills = distinct_colors(rng, canvas.ground, 2).values()
        small_boxes = split_boxes(rng, canvas, 2, axis="x", share=(0.42, 0.5))
        large_boxes = split_boxes(rng, canvas, 2, axis="x", share=(0.8, 0.95))
        layers = [
            ShapeLayer(kind=shape, rgb=rgb, box=(large_boxes if shape == large else small_boxes)[i])
            for i, (shape, rgb) in enumerate(zip(kinds, fills, strict=True))
        ]
        pictures.append(add_layers(canvas, *layers))
        queries.append(Query(pattern, tuple(rng.sample([asked, third], 2)), accepted_names(large)))
    return crossed(kind, pictures, queries)


def ask_single_subject(
    rng: Random,
    canvas: Composite,
    pattern: str,
    category: str,
    name: str,
    *,
    on_label: bool = False,
) -> Items:
    """Ask for the name of the only subject, and the same where there is none."""
    if on_label:
        (box,) = split_boxes(rng, canvas, 1, share=(0.75, 0.95))
        layers = labeled(rng, name, box, is_text=category in _TEXTS)
    else:
        layers = _sample_subject(rng, canvas, category, name)
    query = Query(pattern, (category,), (name, *SUBJECTS[category][name]))
    return paired(category, add_layers(canvas, *layers), canvas, query)


def ask_single_color(rng: Random, canvas: Composite, pattern: str, shape: str) -> Items:
    """Ask for the color of the only shape, and the same where there is none."""
    ((color, rgb),) = distinct_colors(rng, canvas.ground, 1).items()
    (box,) = split_boxes(rng, canvas, 1, share=(0.4, 0.9))
    shown = add_layers(canvas, ShapeLayer(kind=shape, rgb=rgb, box=box))
    return paired("color", shown, canvas, Query(pattern, ("shape",), accepted_names(color)))


def ask_background(rng: Random, canvas: Composite, pattern: str, color: str) -> Items:
    """Ask for the color of a background without anything, or of a word where there is a shape."""
    rgb = sample_color(rng, color)
    canvas = replace(canvas, ground=Ground(rgb=rgb, rgb2=rgb))
    category, absent = rng.choice((("word", "shape"), ("geometric shape", "word")))
    name = rng.choice(sorted(SUBJECTS[category]))
    other = add_layers(canvas, *_sample_subject(rng, canvas, category, name))
    (answerable, _) = paired(
        "color", canvas, other, Query(pattern, ("background",), accepted_names(color))
    )
    (_, unanswerable) = paired("color", canvas, other, Query(pattern, (absent,), ()))
    return [answerable, unanswerable]


def ask_pattern(rng: Random, canvas: Composite, pattern: str, color: str) -> Items:
    """Ask for the color of stripes and of squares, where the background has one of them."""
    base = rng.choice(("white", "black"))
    rgb, rgb2 = sample_color(rng, base), sample_color(rng, color)
    ground = replace(canvas.ground, rgb=rgb, rgb2=rgb2)
    pictures = [
        replace(canvas, ground=replace(ground, kind="stripes")),
        replace(canvas, ground=replace(ground, kind="checks")),
    ]
    answers = (*accepted_names(color), f"{color} and {base}", f"{base} and {color}")
    queries = [Query(pattern, (name,), answers) for name in ("stripes", "squares")]
    return crossed("pattern", pictures, queries)


def ask_categories(
    rng: Random, kind: str, canvas: Composite, pattern: str, categories: Sequence[str]
) -> Items:
    """Ask two pictures of one subject each for the category of the other one."""
    pictures: list[Composite] = []
    queries: list[Query] = []
    for category in categories:
        name = rng.choice(sorted(SUBJECTS[category]))
        pictures.append(add_layers(canvas, *_sample_subject(rng, canvas, category, name)))
        queries.append(Query(pattern, (category,), (name, *SUBJECTS[category][name])))
    return crossed(kind, pictures, queries)


def ask_name_of_figure(rng: Random, canvas: Composite, pattern: str, category: str) -> Items:
    """Ask for the name of a subject, and the same of a figure that has no name."""
    name = rng.choice(sorted(SUBJECTS[category]))
    shown = add_layers(canvas, *_sample_subject(rng, canvas, category, name))
    query = Query(pattern, (category,), (name, *SUBJECTS[category][name]))
    return paired("figure", shown, _sample_figure(rng, canvas)[0], query)


def ask_color_of_figure(rng: Random, canvas: Composite, pattern: str) -> Items:
    """Ask for the color of a figure that has no name, and for that of an animal: it is a letter."""
    figure, color = _sample_figure(rng, canvas)
    name = rng.choice(sorted(SUBJECTS["letter"]))
    letter = add_layers(canvas, *_sample_subject(rng, canvas, "letter", name))
    (answerable, _) = paired(
        "figure", figure, letter, Query(pattern, ("figure",), accepted_names(color))
    )
    (_, unanswerable) = paired("figure", figure, letter, Query(pattern, ("animal",), ()))
    return [answerable, unanswerable]


def _sample_subject(rng: Random, canvas: Composite, category: str, name: str) -> list[Layer]:
    """Draw a subject in a color that is visible; a word gets the width of the picture."""
    (box,) = split_boxes(rng, canvas, 1, share=(0.5, 0.9))
    if category in _TEXTS:
        (rgb,) = distinct_colors(rng, canvas.ground, 1, of="text").values()
        place = text_row(canvas, 0.3, 0.7) if category == "word" else box
        return [text_layer(rng, name, place, rgb)]
    if category == "geometric shape":
        (rgb,) = distinct_colors(rng, canvas.ground, 1).values()
        return [ShapeLayer(kind=name, rgb=rgb, box=box)]
    return [icon_layer(rng, name, box)]


def _sample_figure(rng: Random, canvas: Composite) -> tuple[Composite, str]:
    """Draw a figure without a name; return its color too."""
    ((color, rgb),) = distinct_colors(rng, canvas.ground, 1).items()
    (box,) = split_boxes(rng, canvas, 1, share=(0.6, 0.9))
    return add_layers(canvas, *overlapping_shapes(rng, rgb, box)), color
