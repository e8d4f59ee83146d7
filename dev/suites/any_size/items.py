"""What the items of `any-size` show and ask, before they are placed on a canvas.

The items of a kind come in rounds, each of which has every answer once, so that any first few of
them are balanced. Of an answer's items, half are relative and half absolute in size, half are asked
in one wording and half in the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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

__all__ = ["HELD_OUT_QUESTIONS", "KINDS", "NUM_ITEMS", "BaseItem", "sample_items"]

# Kind -> number of its items. All but the last two are one part of a canvas, of 24 items a kind.
NUM_ITEMS = {"shape": 24, "color": 24, "exists": 24, "count": 24, "object": 24}
NUM_ITEMS |= {"find": 48, "line": 32}
KINDS = ("shape", "color", "exists", "count", "object")

SHARES = {  # side of what is shown, of the canvas's short side
    "shape": (0.9, 0.2, 0.05, 0.5),
    "color": (0.9, 0.2, 0.05, 0.5),
    "exists": (0.9, 0.05, 0.3, 0.12),
    "count": (0.6, 0.12, 0.3, 0.06),
    "object": (0.5, 0.1, 0.9, 0.25),
    "find": (0.2, 0.25, 0.3, 0.36),
}
GROUNDS: Mapping[GroundKind, int] = {  # number of 24 items
    "plain": 16,
    "gradient": 2,
    "noise": 4,
    "checks": 1,
    "stripes": 1,
}
SYNONYMS = {"cross": ("plus", "plus sign"), "diamond": ("rhombus",)}
HELD_OUT_QUESTIONS = {
    "shape": (
        "Which shape is in the picture? Answer with one word.",
        "What kind of shape is shown? Answer with one word.",
    ),
    "color": (
        "What is the color of the shape? Answer with one word.",
        "Which colour does the shape have? Answer with one word.",  # codespell:ignore colour
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
# Not held out: of the official form, to which models answer with a box.
FIND_QUESTIONS = (
    "Find <|object_ref_start|>the {0}<|object_ref_end|>.",
    "Detect the bounding box of <|object_ref_start|>the {0}<|object_ref_end|>.",
    "Give the bounding box of the {0}.",
)
QUESTIONS = {**HELD_OUT_QUESTIONS, "find": FIND_QUESTIONS}
# Whether the first answer of a round is absolute in size; the next answer is the opposite.
IS_ABSOLUTE = (0, 0, 1, 1, 0, 1)
OPTIONS = (0, 1, 5, 11)  # of the objects, in random order: the answer, and wrong options after it
LINE_SIZES = (14, 28, 18, 40, 16, 34, 20, 24)  # pixels per em
LINE_LENGTHS = (3, 8, 5, 0)  # random characters; 0: two words


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseItem:
    """What an item shows on every canvas."""

    kind: str
    question: str
    answers: tuple[str, ...]  # of "find", a name: boxes are of a canvas
    choices: int = 0
    ground: Ground
    layers: tuple[NamedLayer, ...]  # the first is the one to find
    share: float = 0.0  # side of each layer, of the canvas's short side
    is_absolute: bool = False  # the same side in pixels on every canvas instead
    cells: tuple[int, ...] = ()  # order in which the cells of the canvas are filled
    places: tuple[tuple[float, float], ...]  # in the free space of a cell, 0 to 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """What is sampled by a kind's own rules: all but size, wording and place."""

    answers: tuple[str, ...]
    ground: Ground
    layers: Sequence[NamedLayer]
    choices: int = 0
    names: Sequence[str] = ()  # that fill in the question


def sample_items(seed: str) -> dict[str, list[BaseItem]]:
    """Sample the items of each kind."""
    samplers = {
        "shape": (_sample_shapes, len(SHAPE_KINDS)),
        "color": (_sample_colors, len(COLORS)),
        "exists": (_sample_exists, 4),
        "count": (_sample_counts, len(NUMBERS)),
        "object": (_sample_objects, 4),
        "find": (_sample_finds, 6),
    }
    items: dict[str, list[BaseItem]] = {}
    for kind, (sampler, num_answers) in samplers.items():
        rng = Random(f"{seed}/{kind}")
        drafts = sampler(rng, _sample_ground_kinds(rng, NUM_ITEMS[kind]))
        assert len(drafts) == NUM_ITEMS[kind], kind
        items[kind] = _complete(rng, kind, drafts, num_answers)
    return {**items, "line": _sample_lines(Random(f"{seed}/line"))}


def _complete(rng: Random, kind: str, drafts: Sequence[Draft], num_answers: int) -> list[BaseItem]:
    """Give each draft of a kind its size, wording and place."""
    items: list[BaseItem] = []
    shares = deal(rng, SHARES[kind], len(drafts))
    questions = QUESTIONS[kind]
    for index, (draft, share) in enumerate(zip(drafts, shares, strict=True)):
        turn, answer = divmod(index, num_answers)
        if kind == "exists":  # a "yes" and a "no" of the same size and wording
            answer //= 2
        is_absolute = (answer + IS_ABSOLUTE[turn % len(IS_ABSOLUTE)]) % 2 == 1
        items.append(
            BaseItem(
                kind=kind,
                question=questions[(answer + turn) % len(questions)].format(*draft.names),
                answers=draft.answers,
                choices=draft.choices,
                ground=draft.ground,
                layers=tuple(draft.layers),
                share=share,
                is_absolute=is_absolute,
                cells=tuple(rng.sample(range(4), 4)),
                places=tuple((rng.random(), rng.random()) for _ in draft.layers),
            )
        )
    return items


def _sample_ground_kinds(rng: Random, count: int) -> list[GroundKind]:
    return deal(rng, [kind for kind, number in GROUNDS.items() for _ in range(number)], count)


def _sample_shapes(rng: Random, grounds: Sequence[GroundKind]) -> list[Draft]:
    drafts: list[Draft] = []
    kinds = rng.sample(SHAPE_KINDS, len(SHAPE_KINDS))
    for index, ground_kind in enumerate(grounds):
        kind = kinds[index % len(kinds)]
        ground = sample_textured(rng, ground_kind)
        shape = sample_shape(rng, ground, kind=kind)
        answers = (kind, *SYNONYMS.get(kind, ()))
        drafts.append(Draft(answers=answers, ground=ground, layers=[shape], choices=len(kinds)))
    return drafts


def _sample_colors(rng: Random, grounds: Sequence[GroundKind]) -> list[Draft]:
    drafts: list[Draft] = []
    colors = rng.sample(tuple(COLORS), len(COLORS))
    for index, ground_kind in enumerate(grounds):
        color = colors[index % len(colors)]
        ground = sample_textured(rng, ground_kind)
        while color not in visible_colors(ground):
            ground = sample_textured(rng, ground_kind)
        shape = sample_shape(rng, ground, color=color)
        drafts.append(Draft(answers=(color,), ground=ground, layers=[shape], choices=len(colors)))
    return drafts


def _sample_exists(rng: Random, grounds: Sequence[GroundKind]) -> list[Draft]:
    """Sample one and two shapes, with what is asked for and with something similar."""
    drafts: list[Draft] = []
    for index, ground_kind in enumerate(grounds):
        answer, num_shapes = ("yes", "no")[index % 2], 1 + index // 2 % 2
        ground = sample_textured(rng, ground_kind)
        color, other_color = rng.sample(visible_colors(ground), 2)
        kind, other_kind = rng.sample(SHAPE_KINDS, 2)
        shown = [(color, kind), (other_color, other_kind)]
        if answer == "no":
            shown = [(color, other_kind), (other_color, kind)]
            rng.shuffle(shown)
        shapes = [sample_shape(rng, ground, kind=k, color=c) for c, k in shown[:num_shapes]]
        name = with_article(f"{color} {kind}")
        drafts.append(
            Draft(answers=(answer,), ground=ground, layers=shapes, choices=2, names=[name])
        )
    return drafts


def _sample_counts(rng: Random, grounds: Sequence[GroundKind]) -> list[Draft]:
    drafts: list[Draft] = []
    for index, ground_kind in enumerate(grounds):
        number = 1 + index % len(NUMBERS)
        ground = sample_textured(rng, ground_kind)
        shapes = [sample_shape(rng, ground) for _ in range(number)]
        answers = (str(number), NUMBERS[number])
        drafts.append(Draft(answers=answers, ground=ground, layers=shapes, choices=len(NUMBERS)))
    return drafts


def _sample_objects(rng: Random, grounds: Sequence[GroundKind]) -> list[Draft]:
    """Sample objects: each is the answer once, and a wrong option three times."""
    drafts: list[Draft] = []
    names = rng.sample(OBJECTS, len(grounds))
    styles = deal(rng, HELD_OUT_STYLES, len(grounds))
    positions = deal(rng, range(len(OPTIONS)), len(grounds))
    for index, (ground_kind, style, position) in enumerate(
        zip(grounds, styles, positions, strict=True)
    ):
        name, *others = (names[(index + step) % len(names)] for step in OPTIONS)
        rng.shuffle(others)
        listed = [*others[:position], name, *others[position:]]
        icon = NamedLayer(name=name, layer=Icon(style=style, name=name, box=(0, 0, 0, 0)))
        drafts.append(
            Draft(
                answers=icon.answers,
                ground=sample_textured(rng, ground_kind, light=True),
                layers=[icon],
                choices=len(listed),
                names=[with_article(one) for one in listed],
            )
        )
    return drafts


def _sample_finds(rng: Random, grounds: Sequence[GroundKind]) -> list[Draft]:
    """Sample the shape to find, alone or with one of its kind, one of its color, or both."""
    drafts: list[Draft] = []
    for index, ground_kind in enumerate(grounds):
        ground = sample_textured(rng, ground_kind)
        color, other_color = rng.sample(visible_colors(ground), 2)
        kind, other_kind = rng.sample(SHAPE_KINDS, 2)
        others = [(other_color, kind), (color, other_kind)]
        rng.shuffle(others)
        shown = [(color, kind), *others[: index // 2 % 3]]
        shapes = [sample_shape(rng, ground, kind=k, color=c) for c, k in shown]
        name = f"{color} {kind}"
        drafts.append(Draft(answers=(name,), ground=ground, layers=shapes, names=[name]))
    return drafts


def _sample_lines(rng: Random) -> list[BaseItem]:
    """Sample the lines of text: random characters, and words; in fonts held out of training."""
    lines: list[BaseItem] = []
    fonts = deal(rng, FONTS, NUM_ITEMS["line"])
    kinds: list[GroundKind] = ["plain", "plain", "noise", "gradient"]
    grounds = deal(rng, kinds, NUM_ITEMS["line"])
    for index, (font, ground_kind) in enumerate(zip(fonts, grounds, strict=True)):
        turn, number = divmod(index, len(LINE_SIZES))
        ground = sample_textured(rng, ground_kind, light=True)
        while index % 2 and is_light(ground.rgb):
            ground = sample_textured(rng, ground_kind)
        length = LINE_LENGTHS[(number + turn) % len(LINE_LENGTHS)]
        text = sample_text(rng, ground, font, LINE_SIZES[number], length)
        lines.append(
            BaseItem(
                kind="line",
                question=QUESTIONS["line"][index // 2 % 2],
                answers=text.answers,
                ground=ground,
                layers=(text,),
                places=((rng.random(), rng.random()),),
            )
        )
    return lines
