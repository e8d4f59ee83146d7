"""Scenes of objects beside each other, of stickers on photos, and of words.

They ask for places, neighbors and sizes, of what is there and of what is not, and for what no
picture shows: what is behind an object, inside it, or beyond the edge of the picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from random import Random

from qwen2vl.synth.compositing.layers import Layer
from qwen2vl.synth.objects import SceneObject
from qwen2vl.synth.refusals.drafts import REFUSAL, Draft, Scene
from qwen2vl.synth.refusals.pictures import (
    cells_of,
    draw_label,
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
    is_confusable,
    paint_objects,
    place_objects,
    sample_absent_names,
)
from qwen2vl.synth.refusals.vocabulary import THINGS, sample_word
from qwen2vl.synth.spec import Mixture

__all__ = ["sample_stickers", "sample_things", "sample_words"]

_CLEARLY_LARGER = 1.35  # ratio of sides


def sample_things(rng: Random, mixture: Mixture) -> Scene:
    """Sample two or three objects beside or above each other."""
    count = rng.choice((2, 2, 2, 3))
    axis: Axis = rng.choice(("x", "y"))
    least = (48 * count, 48) if axis == "x" else (48, 48 * count)
    canvas = plain_canvas(rng, mixture, sized(rng, mixture, *least))
    objects = place_objects(rng, canvas, count, icons=rng.choice((0, 0.6, 0.6, 1)), axis=axis)
    names = [rng.choice((one.name, one.phrase)) for one in objects]
    absent = sample_absent_names(rng, objects, names)
    drafts: list[Draft] = []
    for one, name in zip(objects, names, strict=True):
        drafts += ask_place(canvas, one, name, (name,))
    for name in absent:
        drafts += ask_absent(name, (name,))
    drafts += _ask_sizes(rng, objects, names, absent)
    drafts += _ask_neighbors(rng, objects, names, absent, axis)
    return Scene(paint_objects(canvas, objects), drafts)


def sample_stickers(rng: Random, mixture: Mixture) -> Scene:
    """Sample a photo with two stickers on it, left and right, or with none."""
    canvas = photo_canvas(rng, mixture, least=(96, 56))
    names = rng.sample(THINGS, 4)
    shown = names[:2] if rng.random() < 0.85 else []
    layers: list[Layer] = []
    drafts: list[Draft] = []
    boxes = cells_of(rng, canvas, 2, axis="x", share=(0.6, 0.95))
    for name, side, box in zip(shown, ("left", "right"), boxes, strict=False):
        layers += draw_label(rng, mixture, box, "object", name).layers
        drafts += _ask_sticker(rng, name, side)
        drafts.append(Draft("asked_exists", (name,), "yes", (name,), choices=2))
    for name in names[len(shown) :]:
        if not is_confusable(name, shown):
            drafts += _ask_sticker(rng, name, REFUSAL)
            drafts.append(Draft("asked_exists", (name,), "no", (name,), choices=2))
    drafts.append(Draft("asked_count", ("stickers",), str(len(shown)), ("stickers", *names)))
    return Scene(replace(canvas, layers=(*canvas.layers, *layers)), drafts)


def sample_words(rng: Random, mixture: Mixture) -> Scene:
    """Sample one to three words of different colors."""
    count = rng.choice((1, 2, 2, 3))
    canvas = plain_canvas(rng, mixture, sized(rng, mixture, 72, 24 * count))
    colors = pick_colors(rng, canvas.ground, count + 2, of="text")
    inks = list(colors)[: max(1, min(count, len(colors) - 1))]
    words: dict[str, str] = {}  # in lower case -> as written
    while len(words) < len(inks) + 2:
        word = sample_word(rng)
        words.setdefault(word.lower(), word)
    written = list(words.values())
    layers: list[Layer] = []
    drafts: list[Draft] = []
    high, margin = canvas.height / len(inks), max(2, canvas.width // 24)
    for row, (word, color) in enumerate(zip(written, inks, strict=False)):
        box = (margin, int((row + 0.1) * high), canvas.width - margin, int((row + 0.9) * high))
        layers += fit_lines(rng, mixture, [word], box, colors[color])
        drafts.append(Draft("asked_word_of_color", (color,), word, (color, word)))
        drafts.append(Draft("asked_color_of_word", (word,), color, (color, word)))
        drafts.append(Draft("asked_exists", (f'word "{word}"',), "yes", (word, color), choices=2))
    for word in written[len(inks) :]:
        drafts.append(Draft("asked_color_of_word", (word,), REFUSAL, (word,)))
        drafts.append(Draft("asked_exists", (f'word "{word}"',), "no", (word,), choices=2))
    for color in list(colors)[len(inks) :]:
        drafts.append(Draft("asked_word_of_color", (color,), REFUSAL, (color,)))
    return Scene(replace(canvas, layers=tuple(layers)), drafts)


def _ask_sticker(rng: Random, name: str, side: str) -> list[Draft]:
    field = rng.choice((name, f"sticker with the {name}", f"sticker of the {name}"))
    return [Draft("asked_side", (field,), side, (name,), choices=2)]


def _ask_sizes(
    rng: Random, objects: Sequence[SceneObject], names: Sequence[str], absent: Sequence[str]
) -> list[Draft]:
    drafts: list[Draft] = []
    pairs = list(zip(objects, names, strict=True))
    for large, large_name in pairs:
        for small, small_name in pairs:
            if large.side > _CLEARLY_LARGER * small.side:
                both = tuple(rng.sample((large_name, small_name), 2))
                drafts.append(Draft("asked_larger", both, large_name, both, choices=2))
    if drafts:
        for name in absent:
            both = tuple(rng.sample((name, rng.choice(names)), 2))
            drafts.append(Draft("asked_larger", both, REFUSAL, both, choices=2))
    return drafts


def _ask_neighbors(
    rng: Random,
    objects: Sequence[SceneObject],
    names: Sequence[str],
    absent: Sequence[str],
    axis: Axis,
) -> list[Draft]:
    """Ask what is beside an object; nothing is beyond the first and the last one."""
    before, after = ("left of", "right of") if axis == "x" else ("above", "below")
    if rng.random() < 0.3:
        before, after = ("to the left of", "to the right of") if axis == "x" else ("above", "under")
    relations = (before, after) if len(objects) > 2 else (before, after, "next to", "beside")
    drafts: list[Draft] = []
    for (one, name), (other, other_name) in pairwise(zip(objects, names, strict=True)):
        about = (name, other_name)
        drafts += _ask_beside(before, other_name, one, about)
        drafts += _ask_beside(after, name, other, about)
        for relation in relations[2:]:
            drafts += _ask_beside(relation, name, other, about)
            drafts += _ask_beside(relation, other_name, one, about)
    for name in absent:
        for relation in relations:
            drafts += _ask_beside(relation, name, None, (name,))
    unseen = ((before, names[0]), (after, names[-1]), ("behind", names[0]), ("inside", names[-1]))
    for relation, name in unseen:
        drafts += _ask_beside(relation, name, None, (name,))
    ends = ("left edge", "right edge") if axis == "x" else ("upper edge", "lower edge")
    for edge, one, name in zip(ends, (objects[0], objects[-1]), (names[0], names[-1]), strict=True):
        drafts += _ask_beside("closest to", edge, one, (edge, name))
        drafts += _ask_beside(rng.choice(("beyond", "outside", "past")), edge, None, (edge,))
    if not any(one.color for one in objects):
        drafts = [draft for draft in drafts if draft.task != "asked_shape_beside"]
    return drafts


def _ask_beside(
    relation: str, name: str, answer: SceneObject | None, about: tuple[str, ...]
) -> list[Draft]:
    """Ask for the object, and for the shape, that has a relation to something."""
    object_name = answer.name if answer else REFUSAL
    shape_name = answer.name if answer and answer.color else REFUSAL
    return [
        Draft("asked_beside", (relation, name), object_name, about),
        Draft("asked_shape_beside", (relation, name), shape_name, about),
    ]
