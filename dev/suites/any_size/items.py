"""What the items of `any-size` show and ask, before they are placed on a canvas.

Four items of each kind, of which each has another answer: shape, color, existence, count, object;
and eight lines of text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random

from dev.suites.sampling import (
    FONTS,
    NUMBERS,
    OBJECTS,
    GroundKind,
    NamedLayer,
    deal,
    sample_shape,
    sample_text,
    sample_textured,
    visible_colors,
    with_article,
)
from qwen2vl.synth.colors import COLORS, is_light
from qwen2vl.synth.compositing import Ground, Icon
from qwen2vl.synth.compositing.icons import HELD_OUT_STYLES
from qwen2vl.synth.shape_masks import SHAPE_KINDS

__all__ = ["KINDS", "LINES", "NUM_ITEMS", "QUESTIONS", "BaseItem", "sample_items", "sample_lines"]

KINDS = ("shape", "color", "exists", "count", "object")
NUM_ITEMS = 4  # of a kind
# Share of the short side, by item; several shapes are smaller.
SHARES = {
    "shape": (0.9, 0.2, 0.05, 0.5),
    "color": (0.05, 0.5, 0.9, 0.2),
    "exists": (0.9, 0.05, 0.3, 0.12),
    "count": (0.6, 0.12, 0.3, 0.06),
    "object": (0.5, 0.1, 0.9, 0.25),
}
GROUNDS: Mapping[GroundKind, int] = {  # number of the 20 items
    "plain": 13,
    "gradient": 2,
    "noise": 3,
    "checks": 1,
    "stripes": 1,
}
SYNONYMS = {"cross": ("plus", "plus sign"), "diamond": ("rhombus",)}
QUESTIONS = {
    "shape": (
        "Which shape is in the picture? Answer with one word.",
        "What kind of shape is shown? Answer with one word.",
    ),
    "color": (
        "What is the color of the shape? Answer with one word.",
        "Which colour does the shape have? Answer with one word.",
    ),
    "exists": (
        "Does the picture show {0}? Answer yes or no.",
        "Does the image contain {0}? Answer yes or no.",
    ),
    "count": (
        "How many shapes are there in this image? Answer with a number.",
        "What is the number of shapes? Answer with a number.",
    ),
    "object": (
        "Which of these is in the picture: {0}, {1}, {2} or {3}? Answer with its name.",
        "What does the picture show: {0}, {1}, {2} or {3}? Answer with its name.",
    ),
    "line": ("What text is in the picture?", "Copy the text from the image."),
}
# Pixels per em, and characters of a random string; 0: two words.
LINES = ((14, 3), (16, 4), (18, 8), (20, 0), (24, 10), (28, 5), (34, 0), (40, 9))


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseItem:
    """What an item shows on every canvas."""

    kind: str
    question: str
    answers: tuple[str, ...]
    choices: int = 0
    ground: Ground
    layers: tuple[NamedLayer, ...]
    share: float = 0.0  # side of each layer, of the short side of the canvas
    cells: tuple[int, ...] = ()  # order in which the cells of the canvas are filled
    places: tuple[tuple[float, float], ...]  # in the free space of a cell, 0 to 1


def sample_items(rng: Random) -> dict[str, list[BaseItem]]:
    """Sample the items of each kind."""
    samplers = {
        "shape": _sample_shapes,
        "color": _sample_colors,
        "exists": _sample_exists,
        "count": _sample_counts,
        "object": _sample_objects,
    }
    listed: list[GroundKind] = [kind for kind, number in GROUNDS.items() for _ in range(number)]
    grounds = iter(rng.sample(listed, len(listed)))
    return {kind: samplers[kind](rng, grounds) for kind in KINDS}


def _sample_shapes(rng: Random, grounds: Iterator[GroundKind]) -> list[BaseItem]:
    items: list[BaseItem] = []
    for kind in rng.sample(SHAPE_KINDS, NUM_ITEMS):
        ground = sample_textured(rng, next(grounds))
        shape = sample_shape(rng, ground, kind=kind)
        answers = (kind, *SYNONYMS.get(kind, ()))
        items.append(_item(rng, "shape", len(items), answers, len(SHAPE_KINDS), ground, [shape]))
    return items


def _sample_colors(rng: Random, grounds: Iterator[GroundKind]) -> list[BaseItem]:
    items: list[BaseItem] = []
    for color in rng.sample(tuple(COLORS), NUM_ITEMS):
        kind = next(grounds)
        ground = sample_textured(rng, kind)
        while color not in visible_colors(ground):
            ground = sample_textured(rng, kind)
        shape = sample_shape(rng, ground, color=color)
        items.append(_item(rng, "color", len(items), (color,), len(COLORS), ground, [shape]))
    return items


def _sample_exists(rng: Random, grounds: Iterator[GroundKind]) -> list[BaseItem]:
    """Sample one and two shapes, with what is asked for and with something similar."""
    items: list[BaseItem] = []
    for answer, num_shapes in (("yes", 1), ("no", 1), ("yes", 2), ("no", 2)):
        ground = sample_textured(rng, next(grounds))
        color, other_color = rng.sample(visible_colors(ground), 2)
        kind, other_kind = rng.sample(SHAPE_KINDS, 2)
        shown = [(color, kind), (other_color, other_kind)]
        if answer == "no":
            shown = [(color, other_kind), (other_color, kind)]
        shapes = [sample_shape(rng, ground, kind=k, color=c) for c, k in shown[:num_shapes]]
        name = with_article(f"{color} {kind}")
        items.append(_item(rng, "exists", len(items), (answer,), 2, ground, shapes, name))
    return items


def _sample_counts(rng: Random, grounds: Iterator[GroundKind]) -> list[BaseItem]:
    items: list[BaseItem] = []
    for number, word in NUMBERS.items():
        ground = sample_textured(rng, next(grounds))
        shapes = [sample_shape(rng, ground) for _ in range(number)]
        answers = (str(number), word)
        items.append(_item(rng, "count", len(items), answers, NUM_ITEMS, ground, shapes))
    return items


def _sample_objects(rng: Random, grounds: Iterator[GroundKind]) -> list[BaseItem]:
    items: list[BaseItem] = []
    positions = deal(rng, range(NUM_ITEMS), NUM_ITEMS)
    options = rng.sample(OBJECTS, NUM_ITEMS * NUM_ITEMS)
    for position, style in zip(positions, rng.sample(HELD_OUT_STYLES, NUM_ITEMS), strict=True):
        ground = sample_textured(rng, next(grounds), light=True)
        listed = [options.pop() for _ in range(NUM_ITEMS)]
        name = listed[position]
        icon = NamedLayer(name=name, layer=Icon(style=style, name=name, box=(0, 0, 0, 0)))
        shown = [with_article(one) for one in listed]
        items.append(
            _item(rng, "object", len(items), icon.answers, NUM_ITEMS, ground, [icon], *shown)
        )
    return items


def _item(
    rng: Random,
    kind: str,
    index: int,
    answers: tuple[str, ...],
    choices: int,
    ground: Ground,
    layers: Sequence[NamedLayer],
    *names: str,
) -> BaseItem:
    """Create an item of a kind; `names` fill in its question."""
    return BaseItem(
        kind=kind,
        question=QUESTIONS[kind][index // 2].format(*names),
        answers=answers,
        choices=choices,
        ground=ground,
        layers=tuple(layers),
        share=SHARES[kind][index],
        cells=tuple(rng.sample(range(4), 4)),
        places=tuple((rng.random(), rng.random()) for _ in layers),
    )


def sample_lines(rng: Random) -> list[BaseItem]:
    """Sample the lines of text: random characters, and words; in fonts held out of training."""
    lines: list[BaseItem] = []
    fonts = deal(rng, FONTS, len(LINES))
    grounds: list[GroundKind] = ["plain", "plain", "noise", "gradient"]
    kinds = deal(rng, grounds, len(LINES))
    for (size, length), font, kind in zip(LINES, fonts, kinds, strict=True):
        ground = sample_textured(rng, kind, light=True)
        while len(lines) % 2 and is_light(ground.rgb):
            ground = sample_textured(rng, kind)
        text = sample_text(rng, ground, font, size, length)
        lines.append(
            BaseItem(
                kind="line",
                question=QUESTIONS["line"][len(lines) // 2 % 2],
                answers=text.answers,
                ground=ground,
                layers=(text,),
                places=((rng.random(), rng.random()),),
            )
        )
    return lines
