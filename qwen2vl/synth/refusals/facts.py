"""Scenes with facts about an object that a note may tell, and questions that no picture answers.

A note has one to three facts, of which some are asked for, as are facts that it lacks, and facts
about an object that is not there.
"""

from __future__ import annotations

from dataclasses import replace
from random import Random

from qwen2vl.synth.colors import COLORS
from qwen2vl.synth.compositing.layers import Layer
from qwen2vl.synth.objects import sample_icon
from qwen2vl.synth.refusals.drafts import NO_PICTURE, ONLY_PICTURES, REFUSAL, Draft, Scene
from qwen2vl.synth.refusals.pictures import (
    cells_of,
    fit_lines,
    pick_colors,
    plain_canvas,
    sized,
)
from qwen2vl.synth.refusals.vocabulary import ALL_KINDS, FACTS, ICON_CATEGORIES, THINGS
from qwen2vl.synth.spec import Box, Mixture

__all__ = ["sample_facts", "sample_no_picture", "sample_unseen"]

_COUNTRIES = """
    Peru Kenya France Japan Brazil Norway Egypt India Canada Spain Ghana Chile Nepal Italy Greece
    Mexico Iceland Morocco Vietnam Austria
""".split()
_NOTELESS_SHARE = 0.1
_TITLED_SHARE = 0.25  # of the notes name the object in place of its picture


def sample_facts(rng: Random, mixture: Mixture) -> Scene:
    """Sample an object with a note of facts about it."""
    canvas = plain_canvas(rng, mixture, sized(rng, mixture, 120, 88))
    thing, *others = rng.sample(THINGS, 3)
    tasks = rng.sample(list(FACTS), 7)
    shown = tasks[: rng.choice((1, 1, 2, 2, 3))] if rng.random() >= _NOTELESS_SHARE else []
    lines: list[str] = []
    drafts: list[Draft] = []
    for task in shown:
        formats, sample_value = FACTS[task]
        value = sample_value(rng)
        lines.append(rng.choice(formats).format(value))
        drafts.append(Draft(task, (thing,), value, (task,)))
        drafts.append(Draft(task, (rng.choice(others),), REFUSAL, (task,)))
    is_titled = bool(shown) and rng.random() < _TITLED_SHARE
    subject_box, note_box = _split(rng, (canvas.width, canvas.height), len(lines))
    layers: tuple[Layer, ...] = ()
    (rgb,) = pick_colors(rng, canvas.ground, 1, of="text").values()
    if is_titled:
        layers += fit_lines(rng, mixture, [rng.choice((thing, thing.upper()))], subject_box, rgb)
    else:
        layers += (sample_icon(rng, thing, _square(rng, subject_box), ground=canvas.ground).layer,)
    if lines:
        layers += fit_lines(rng, mixture, lines, note_box, rgb)
    missing = tasks[len(shown) :]
    drafts += [Draft(task, (thing,), REFUSAL, (task,)) for task in missing]
    # Tasks that the note answers are those that are asked for in other pictures without answer.
    if shown and rng.random() < 0.55:
        return Scene(replace(canvas, layers=layers), drafts, drafts[0])
    first = Draft(missing[0], (thing,), REFUSAL, (missing[0],))
    return Scene(replace(canvas, layers=layers), drafts, first)


def sample_unseen(rng: Random, mixture: Mixture) -> Scene:
    """Sample one or two objects, and ask what no picture of them shows."""
    count = rng.choice((1, 1, 2))
    canvas = plain_canvas(rng, mixture, sized(rng, mixture, 48 * count, 48))
    names = rng.sample(THINGS, count)
    boxes = cells_of(rng, canvas, count, axis="x")
    icons = [
        sample_icon(rng, name, box, ground=canvas.ground)
        for name, box in zip(names, boxes, strict=True)
    ]
    drafts = [Draft("asked_exists", (name,), "yes", (name,), choices=2) for name in names]
    if count == 1:
        drafts.append(Draft("asked_object", (), names[0], (names[0],)))
    else:
        for name, side in zip(names, ("left", "right"), strict=True):
            drafts.append(Draft("asked_side", (name,), side, (name,), choices=2))
    (task,) = rng.choices(
        ("asked_unseen", "asked_country", "asked_use", "asked_chat"), (6, 2, 2, 1)
    )
    answer = ONLY_PICTURES if task == "asked_chat" else REFUSAL
    first = Draft(task, _sample_fields(rng, task, names[0]), answer, (task,))
    picture = replace(canvas, layers=tuple(icon.layer for icon in icons))
    return Scene(picture, drafts, first)


def sample_no_picture(rng: Random, mixture: Mixture) -> Scene:
    """Sample a question without a picture, which is about one or is not."""
    if rng.random() < 0.5:
        task = rng.choice(("asked_country", "asked_use", "asked_chat", "asked_chat"))
        fields = _sample_fields(rng, task, rng.choice(THINGS))
        return Scene(None, [], Draft(task, fields, ONLY_PICTURES))
    kind, other = rng.sample(ALL_KINDS, 2)
    thing, color = rng.choice(THINGS), rng.choice(list(COLORS))
    fields_of: dict[str, tuple[str, ...]] = {
        "asked_color": (kind,),
        "asked_shape_of_color": (color,),
        "asked_number_in": (kind,),
        "asked_word_of_color": (color,),
        "asked_side": (thing,),
        "asked_beside": ("left of", thing),
        "asked_larger": (kind, other),
        "asked_box": (rng.choice((thing, kind)),),
        "asked_exists": (rng.choice((thing, kind)),),
        "asked_category": (rng.choice(list(ICON_CATEGORIES)),),
        "asked_object": (),
        "asked_word": (),
        "asked_unseen": (thing,),
    }
    task = rng.choice(list(fields_of))
    return Scene(None, [], Draft(task, fields_of[task], NO_PICTURE))


def _sample_fields(rng: Random, task: str, thing: str) -> tuple[str, ...]:
    if task == "asked_country":
        return (rng.choice(_COUNTRIES),)
    if task == "asked_chat":
        return (str(rng.randint(2, 40)), str(rng.randint(2, 20)))
    return (thing,)


def _split(rng: Random, size: tuple[int, int], num_lines: int) -> tuple[Box, Box]:
    """Return the boxes of a subject and of a note, above or beside each other."""
    width, height = size
    margin = max(2, min(size) // 24)
    if width > 2 * height:
        cut = int(width * rng.uniform(0.3, 0.42))
        first = (margin, margin, cut, height - margin)
        return first, (cut + margin, margin, width - margin, height - margin)
    cut = int(height * (0.66 - 0.1 * num_lines))
    upper = (margin, margin, width - margin, cut)
    lower = (margin, cut + margin, width - margin, height - margin)
    if rng.random() < 0.25 and num_lines:  # the note is above
        cut = height - cut
        return (margin, cut + margin, width - margin, height - margin), (
            *(margin, margin, width - margin),
            cut,
        )
    return upper, lower


def _square(rng: Random, box: Box) -> Box:
    """Sample a place for the largest square in a box."""
    x1, y1, x2, y2 = box
    side = min(x2 - x1, y2 - y1)
    x, y = rng.randint(x1, x2 - side), rng.randint(y1, y2 - side)
    return (x, y, x + side, y + side)
