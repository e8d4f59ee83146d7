"""Scenes of at most one subject: an object, a shape, a character, a word, or a figure without name.

Pictures without any subject are plain, noisy or photos. Half of those that are asked for a subject
of some category have one; the others have none, one of another category, or a figure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from random import Random

from qwen2vl.synth.compositing.layers import Composite
from qwen2vl.synth.refusals.drafts import REFUSAL, Draft, Scene
from qwen2vl.synth.refusals.pictures import (
    Subject,
    blank_canvas,
    cells_of,
    draw_figure,
    draw_label,
    draw_subject,
    noise_canvas,
    photo_canvas,
    plain_canvas,
    sized,
)
from qwen2vl.synth.refusals.vocabulary import ICON_CATEGORIES, TEXTS, are_related
from qwen2vl.synth.spec import Mixture

__all__ = ["sample_blank", "sample_categories", "sample_noise", "sample_photo"]

_REFUSED_SHARE = 0.5
_FIGURE_SHARE = 0.4  # of the pictures that show something else than what is asked for
_COLOR_SHARE = 0.3  # of the first questions ask for the color of the subject
_COLORED = ("shape", "letter", "digit", "number", "word")
_CATEGORIES = (*ICON_CATEGORIES, *_COLORED, "word", "letter", "digit")
# Categories that no object without a category belongs to: some of them are tools or vehicles.
_CLEAR = ("bird", "animal", "fruit", "vegetable", "flower", *_COLORED)


def sample_blank(rng: Random, mixture: Mixture) -> Scene:
    """Sample a plain picture or a gradient of any color, with one subject or without."""
    canvas, color = blank_canvas(rng, mixture)
    categories = (*("object",) * 4, *_COLORED, *_COLORED, "word", "word", *ICON_CATEGORIES)
    return _sample_single(rng, mixture, canvas, categories, empty=0.7, background=color)


def sample_noise(rng: Random, mixture: Mixture) -> Scene:
    """Sample a picture of noise, with one subject or without; it may be on a label."""
    canvas = noise_canvas(rng, mixture)
    is_label = rng.random() < 0.5
    # Large cells are squares themselves, and text is illegible on noise.
    categories = ("object", "object", *("word",) * 4, "letter", "digit", "number", *ICON_CATEGORIES)
    if not is_label:
        categories = ("object", "object", "animal", "vehicle", "fruit", *ICON_CATEGORIES)
        categories += ("shape",) * 4 if canvas.ground.cell < 4 else ()
    return _sample_single(rng, mixture, canvas, categories, empty=0.7, is_label=is_label)


def sample_photo(rng: Random, mixture: Mixture) -> Scene:
    """Sample a photo with a label on it, or without."""
    canvas = photo_canvas(rng, mixture)
    categories = ("word", "word", "word", "object", "letter", "digit", "number", *ICON_CATEGORIES)
    return _sample_single(rng, mixture, canvas, categories, empty=0.7, is_label=True)


def sample_categories(rng: Random, mixture: Mixture) -> Scene:
    """Sample a picture of one subject, which is of the category that is asked for or is not."""
    canvas = plain_canvas(rng, mixture, sized(rng, mixture, 64, 48))
    return _sample_single(rng, mixture, canvas, _CATEGORIES, empty=0.0)


def _sample_single(
    rng: Random,
    mixture: Mixture,
    canvas: Composite,
    categories: Sequence[str],
    *,
    empty: float,
    background: str = "",
    is_label: bool = False,
) -> Scene:
    """Sample the subject of a picture, and what to ask first.

    Args:
        categories: of what is shown or asked for; repeated ones are more frequent.
        empty: share of pictures without a subject among those without an answer.
        background: name of the color of the canvas, if it has one.
        is_label: the subject is on a label.
    """
    asked = rng.choice(categories)
    others = [c for c in categories if c != "object" and not are_related(c, asked)]
    subject: Subject | None = None
    if rng.random() >= _REFUSED_SHARE:
        subject = _draw(rng, mixture, canvas, asked, is_label=is_label)
    elif asked != "object" and rng.random() >= empty:
        is_figure = asked != "shape" and not is_label and rng.random() < _FIGURE_SHARE
        if is_figure:
            subject = draw_figure(rng, canvas)
        else:
            subject = _draw(rng, mixture, canvas, rng.choice(others), is_label=is_label)
    drafts = _ask_subject(rng, subject, dict.fromkeys(categories), is_label=is_label)
    if background:
        drafts.append(Draft("asked_color", ("background",), background, ("background",)))
    first = _choose_first(rng, drafts, asked)
    layers = subject.layers if subject else ()
    picture = replace(canvas, layers=(*canvas.layers, *layers))
    if background and rng.random() < 0.3:
        first = None
    return Scene(picture, drafts, first)


def _draw(
    rng: Random, mixture: Mixture, canvas: Composite, category: str, *, is_label: bool
) -> Subject:
    if not is_label:
        return draw_subject(rng, mixture, canvas, category)
    (box,) = cells_of(rng, canvas, 1, share=(0.5, 0.95))
    if category in ("word", "number"):
        _, y1, _, y2 = box
        # A word needs a wide label: it gets the width of the picture, in part.
        width = int(canvas.width * rng.uniform(0.75, 0.97))
        height = max(16, min(y2 - y1, width // 2))
        x1 = rng.randint(0, canvas.width - width)
        box = (x1, y1, x1 + width, min(canvas.height, y1 + height))
    return draw_label(rng, mixture, box, category)


def _ask_subject(
    rng: Random,
    subject: Subject | None,
    categories: Sequence[str] | dict[str, None],
    *,
    is_label: bool,
) -> list[Draft]:
    """Ask for a subject of each category, which is there, or clearly is not."""
    drafts: list[Draft] = []
    for category in categories:
        shown = _is_shown(category, subject)
        if shown is None:
            continue
        about = (category, *(("subject",) if shown else ()))
        name = subject.name if subject and shown else REFUSAL
        drafts += _ask_name(rng, category, name, about)
        if category in _COLORED:
            color = subject.color if subject and shown else REFUSAL
            drafts.append(Draft("asked_color", (category,), color, about))
            drafts.append(Draft("asked_count", (f"{category}s",), "1" if shown else "0", about))
        drafts.append(
            Draft("asked_exists", (category,), "yes" if shown else "no", about, choices=2)
        )
    if subject and subject.category == "figure":
        field = rng.choice(("figure", "drawing"))
        drafts.append(Draft("asked_color", (field,), subject.color, ("figure",)))
    is_text = subject is not None and subject.category in TEXTS
    text = subject.name if subject and is_text else REFUSAL
    about_text = (*TEXTS, *(("subject",) if is_text else ()))
    drafts.append(Draft("asked_text", (), text, about_text))
    if is_label:
        drafts.append(Draft("asked_label", (), text, about_text))
    return drafts


def _ask_name(rng: Random, category: str, name: str, about: tuple[str, ...]) -> list[Draft]:
    if category == "object":
        return [Draft("asked_object", (), name, about)]
    field = rng.choice((category, "geometric shape")) if category == "shape" else category
    drafts = [Draft("asked_category", (field,), name, about)]
    if category == "word":
        drafts.append(Draft("asked_word", (), name, about))
    return drafts


def _choose_first(rng: Random, drafts: Sequence[Draft], asked: str) -> Draft:
    """Choose a question about the subject that decided what the picture shows."""
    own = [d for d in drafts if asked in d.about and d.task not in ("asked_exists", "asked_count")]
    colors = [draft for draft in own if draft.task == "asked_color"]
    if colors and rng.random() < _COLOR_SHARE:
        return colors[0]
    return rng.choice([draft for draft in own if draft.task != "asked_color"])


def _is_shown(category: str, subject: Subject | None) -> bool | None:
    """Return whether a picture shows a subject of a category; None if that is not clear."""
    if subject is None:
        return False
    if category == "object":  # a letter or figure may be called an object
        return True if subject.category in ("object", *ICON_CATEGORIES) else None
    if category == subject.category:
        return True
    if are_related(category, subject.category):
        return None
    if subject.category == "figure":
        return None if category == "shape" else False
    if subject.category == "object":
        return False if category in _CLEAR else None
    return False
