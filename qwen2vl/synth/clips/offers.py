"""Questions that may be asked about a clip, and the selection of those that are asked.

A scenario offers all questions that it can answer. Where the answer depends on the scenario (only a
still clip answers "Does anything move?" with no), the offer has a share: the probability of being
the first question that is selected, chosen such that all answers are about as frequent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from random import Random
from typing import NamedTuple

from qwen2vl.synth.clips.names import ObjectName, sample_names
from qwen2vl.synth.clips.tracks import Track
from qwen2vl.synth.colors import COLORS, MORE_COLORS
from qwen2vl.synth.compositing.layers import Composite, Text

__all__ = [
    "NOT_STILL",
    "Clip",
    "Offer",
    "call_in_any_order",
    "offer_as_picture",
    "offer_stillness",
    "select_offers",
]

# Shares of the questions whether a clip is still; a fifteenth of all are.
NOT_STILL: Mapping[str, float] = {"is_still": 0.011, "anything_changes": 0.007}
_TEXT_SHARES = {"yes": 0.085, "no": 0.0138}  # a seventh of all clips have text
_PICTURE_WEIGHT = 0.3  # of questions that a single picture would answer, too
_PICTURE_SHARE = 0.6  # of the clips with such a question
_MAX_CLOSED = 4  # choices of a question that names its answers


class Offer(NamedTuple):
    """A question that may be asked."""

    task: str
    answer: str
    fields: tuple[str, ...] = ()
    choices: int = 0
    group: str = (
        ""  # at most one of a group is asked, since one answer reveals another; empty: task
    )
    weight: float = 1.0  # relative probability of being selected
    share: float = 0.0  # absolute probability of being the first, and none of being a later one

    def reveals(self, other: Offer) -> bool:
        """Return whether the question has a word of another one's answer, a name or a color."""
        is_open = other.choices == 0 or other.choices > _MAX_CLOSED
        words = {word for field in self.fields for word in field.split()}
        return is_open and not words.isdisjoint(other.answer.replace(",", "").split())

    def excludes(self, other: Offer) -> bool:
        """Return whether only one of the two may be asked."""
        if (self.group or self.task) == (other.group or other.task):
            return True
        return self.reveals(other) or other.reveals(self)


class Clip(NamedTuple):
    """What a scenario has sampled."""

    canvas: Composite
    tracks: Sequence[Track]
    offers: Sequence[Offer]


def select_offers(rng: Random, offers: Sequence[Offer], count: int) -> list[Offer]:
    """Select up to `count` questions, in random order."""
    free = [one for one in offers if not one.share]
    shared: list[Offer | None] = [one for one in offers if one.share]
    shares = [one.share for one in offers if one.share]
    (first,) = rng.choices([*shared, None], [*shares, max(0.0, 1 - sum(shares))])
    selected = [first] if first else []
    # Weighted sampling without replacement: Efraimidis and Spirakis, 2006.
    for one in sorted(free, key=lambda one: rng.random() ** (1 / one.weight), reverse=True):
        if len(selected) < count and not any(one.excludes(other) for other in selected):
            selected.append(one)
    rng.shuffle(selected)
    return selected


def call_in_any_order(rng: Random, tracks: Sequence[Track]) -> tuple[str, ...]:
    """Return what objects are called, in random order."""
    return tuple(rng.sample([one.called for one in tracks], len(tracks)))


def offer_stillness(shares: Mapping[str, float], *, is_still: bool) -> list[Offer]:
    """Offer the questions whether a clip is still."""
    still, changes = ("yes", "no") if is_still else ("no", "yes")
    return [
        Offer("is_still", still, (), 2, "moves", share=shares["is_still"]),
        Offer("anything_changes", changes, (), 2, "moves", share=shares["anything_changes"]),
    ]


def offer_as_picture(
    rng: Random, canvas: Composite, tracks: Sequence[Track], *, is_countable: bool = True
) -> list[Offer]:
    """Offer questions about a clip as about a picture.

    Args:
        rng: source of the choices.
        canvas: of the clip.
        tracks: all objects of the clip, and texts.
        is_countable: whether all objects are visible in all frames.
    """
    objects = [one for one in tracks if not isinstance(_layer_of(one), Text)]
    answer = "yes" if len(objects) < len(tracks) else "no"
    offers = [Offer("has_text", answer, (), 2, share=_TEXT_SHARES[answer])]
    # The others are called by their color in other questions.
    shapes = [one for one in objects if one.what.color and one.what.color not in one.called]
    if shapes:
        one = rng.choice(shapes)
        num_colors = len(COLORS) + len(MORE_COLORS)
        offers.append(Offer("color", one.what.color, (one.called,), num_colors, "color"))
    if objects and len(objects) == len(tracks) and is_countable:
        offers.append(Offer("count", str(len(objects)), (), 4))
    if len(objects) == len(tracks) == 1:
        offers.append(Offer("name", objects[0].what.phrase, (), 0, "name", 3))
    if objects and rng.random() < _PICTURE_SHARE:
        offers.append(_offer_existence(rng, canvas, objects))
    return [one._replace(weight=one.weight * _PICTURE_WEIGHT) for one in offers]


def _offer_existence(rng: Random, canvas: Composite, objects: Sequence[Track]) -> Offer:
    if rng.random() < 0.5:
        one = rng.choice(objects)
        # Otherwise the question would tell the answer to that of the color.
        name = one.what.phrase if one.called == one.what.phrase else one.what.name
        return Offer("exists", "yes", (name,), 2, "name")
    shapes = [one.what for one in objects if one.what.color]
    if len(shapes) > 1 and rng.random() < 0.5:
        one, other = rng.sample(shapes, 2)
        absent = ObjectName(one.name, other.color)
    else:
        (absent,) = sample_names(rng, canvas, [""], others=[one.what for one in objects])
    name = absent.phrase if rng.random() < 0.6 or absent.color in _colors(shapes) else absent.name
    return Offer("exists", "no", (name,), 2, "name")


def _colors(shapes: Sequence[ObjectName]) -> set[str]:
    return {shape.color for shape in shapes}


def _layer_of(track: Track) -> object:
    return next(layer for layer in track.layers if layer is not None)
