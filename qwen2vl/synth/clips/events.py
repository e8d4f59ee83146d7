"""Scenarios in which something happens in place: objects come, go, flash or change their color.

Texts are shown as well. A scenario returns the tracks of its objects and all questions that they
answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from random import Random

from qwen2vl.synth.clips.movements import offer_path
from qwen2vl.synth.clips.names import sample_names
from qwen2vl.synth.clips.offers import (
    NOT_STILL,
    Clip,
    Offer,
    call_in_any_order,
    offer_as_picture,
    offer_stillness,
)
from qwen2vl.synth.clips.tracks import DIRECTIONS, Motion, Track, place_tracks
from qwen2vl.synth.colors import sample_color
from qwen2vl.synth.compositing.layers import Composite, ShapeLayer, Text
from qwen2vl.synth.objects import visible_colors
from qwen2vl.synth.spec import Mixture

__all__ = [
    "sample_changes",
    "sample_flashes",
    "sample_recoloring",
    "sample_texts",
    "sample_turns",
]

_MAX_COUNT = 4  # of flashes, and of objects
_COUNT_SHARE = 0.45  # of the first questions about objects in turn, whatever their number
_TWO_TEXTS_SHARE = 0.3
_MOVING_TEXT_SHARE = 0.25  # of the clips of one text
_ONE_FRAME_SHARE = 0.4  # of the other clips of one text


def sample_turns(rng: Random, mixture: Mixture) -> Clip:
    """Sample one to four objects that are shown one after another."""
    num_frames = rng.choice(mixture.num_frames)
    count = min(rng.randint(1, _MAX_COUNT), num_frames)
    motions = [Motion()] * count
    canvas, tracks = place_tracks(rng, mixture, motions, num_frames, largest=0.9, apart=False)
    cuts = sorted(rng.sample(range(num_frames + 1), count + 1))
    tracks = [one.visible_in(range(*cut)) for one, cut in zip(tracks, pairwise(cuts), strict=True)]
    offers = [
        Offer("count_in_turn", str(count), (), _MAX_COUNT, share=_COUNT_SHARE),
        *(_offer_order(rng, tracks) if count > 1 else []),
        *offer_stillness(NOT_STILL, is_still=False),
        *offer_as_picture(rng, canvas, tracks, is_countable=False),
    ]
    return Clip(canvas, tracks, offers)


def sample_changes(rng: Random, mixture: Mixture) -> Clip:
    """Sample one to four objects: some appear, some disappear, the others stay."""
    num_frames = rng.choice(mixture.num_frames)
    at_start, at_end, num_stay = _sample_numbers(rng, num_frames)
    num_come, num_go = at_end - num_stay, at_start - num_stay
    motions = [Motion()] * (num_stay + num_come + num_go)
    canvas, tracks = place_tracks(rng, mixture, motions, num_frames)
    if len(tracks) == 1:  # it is named among others, so it cannot be called "object"
        tracks = [replace(tracks[0], called=tracks[0].what.phrase)]
    times = sorted(rng.sample(range(1, num_frames), num_come))
    come = [one.visible_in(range(t, num_frames)) for one, t in zip(tracks, times, strict=False)]
    times = sorted(rng.sample(range(1, num_frames), num_go))
    go = [one.visible_in(range(t)) for one, t in zip(tracks[num_come:], times, strict=False)]
    stay = tracks[num_come + num_go :]
    offers = [
        Offer("count_start", str(at_start), (), _MAX_COUNT, weight=2),
        Offer("count_end", str(at_end), (), _MAX_COUNT, weight=2),
        *_offer_appearance(rng, canvas, come, go, stay),
        *_offer_disappearance(rng, canvas, come, go, stay),
        *offer_stillness(NOT_STILL, is_still=False),
        *offer_as_picture(rng, canvas, tracks, is_countable=False),
    ]
    if len(stay) == 1:
        offers.append(Offer("stays", stay[0].what.phrase, group="come"))
    return Clip(canvas, rng.sample([*come, *go, *stay], len(tracks)), offers)


def sample_flashes(rng: Random, mixture: Mixture) -> Clip:
    """Sample an object that is shown one to four times, and perhaps one that stays."""
    count = rng.randint(1, _MAX_COUNT)
    longest = max(mixture.num_frames)
    count = min(count, longest // 2)
    num_frames = rng.choice([number for number in mixture.num_frames if number // 2 >= count])
    motions = [Motion()] * rng.choice((1, 2))
    canvas, tracks = place_tracks(rng, mixture, motions, num_frames)
    while True:
        cuts = sorted(rng.sample(range(num_frames + 1), 2 * count))
        spans = [range(*cut) for cut in zip(cuts[::2], cuts[1::2], strict=True)]
        if max(len(span) for span in spans) <= num_frames // 2:
            break
    flashing = tracks[0].visible_in({frame for span in spans for frame in span})
    offers = [
        Offer("flashes", str(count), (flashing.called,), _MAX_COUNT, weight=6),
        *offer_stillness(NOT_STILL, is_still=False),
        *offer_as_picture(rng, canvas, tracks, is_countable=False),
    ]
    if len(tracks) > 1:
        offers.append(Offer("which_flashes", flashing.what.phrase, group="flashes"))
    return Clip(canvas, rng.sample([flashing, *tracks[1:]], len(tracks)), offers)


def sample_texts(rng: Random, mixture: Mixture) -> Clip:
    """Sample a text, or two that are shown one after the other, and perhaps an object."""
    num_frames = rng.choice(mixture.num_frames)
    num_texts = 2 if rng.random() < _TWO_TEXTS_SHARE else 1
    is_moving = num_texts == 1 and rng.random() < _MOVING_TEXT_SHARE
    direction = rng.choice(DIRECTIONS) if is_moving else ""
    motions = [Motion(kind="text", direction=direction)] * num_texts + [Motion()] * rng.randrange(2)
    canvas, tracks = place_tracks(rng, mixture, motions, num_frames)
    texts, objects = tracks[:num_texts], tracks[num_texts:]
    if not is_moving:
        cuts = sorted(rng.sample(range(num_frames + 1), num_texts + 1))
        if num_texts == 1 and rng.random() < _ONE_FRAME_SHARE:
            cuts = [cuts[0], cuts[0] + 1]
        spans = [range(*cut) for cut in pairwise(cuts)]
        texts = [one.visible_in(span) for one, span in zip(texts, spans, strict=True)]
    contents = [_read(one) for one in texts]
    offers = offer_as_picture(rng, canvas, [*texts, *objects], is_countable=False)
    if num_texts == 1:
        is_brief = sum(layer is not None for layer in texts[0].layers) <= num_frames // 2
        task = "read_moment" if is_brief and rng.random() < 0.5 else "read"
        offers.append(Offer(task, contents[0], weight=8))
    else:
        offers.append(Offer("read_first", contents[0], weight=4))
        offers.append(Offer("read_last", contents[1], weight=4))
    if is_moving:
        offers += offer_path(canvas, texts[0], direction)
    return Clip(canvas, rng.sample([*texts, *objects], len(tracks)), offers)


def sample_recoloring(rng: Random, mixture: Mixture) -> Clip:
    """Sample a shape that changes its color, and perhaps an object that does not."""
    num_frames = rng.choice(mixture.num_frames)
    motions = [Motion(kind="shape")] * rng.choice((1, 2))
    canvas, tracks = place_tracks(rng, mixture, motions, num_frames)
    # Its full name has a color, so it is called by its kind.
    tracks = [replace(one, called=rng.choice((one.what.name, one.called))) for one in tracks]
    tracks = [replace(one, called=_without_color(one)) for one in tracks]
    taken = {one.what.color for one in tracks}
    before = tracks[0].what.color
    after = rng.choice([color for color in visible_colors(canvas.ground) if color not in taken])
    changing = _recolor(rng, tracks[0], after, rng.randrange(1, num_frames))
    called = (changing.called,)
    offers = [
        Offer("color_change", f"from {before} to {after}", called, 0, "colors", 2),
        Offer("color_start", before, called, 0, "colors", 2),
        Offer("color_end", after, called, 0, "colors", 2),
        *offer_stillness(NOT_STILL, is_still=False),
    ]
    if len(tracks) > 1:
        asked = rng.choice(tracks)
        answer = "yes" if asked is tracks[0] else "no"
        offers.append(Offer("color_changes", answer, (asked.called,), 2, "colors", 2))
        offers.append(Offer("which_changes_color", changing.what.name, group="colors"))
    return Clip(canvas, rng.sample([changing, *tracks[1:]], len(tracks)), offers)


def _offer_order(rng: Random, tracks: Sequence[Track]) -> list[Offer]:
    """Offer the questions in which order objects are shown."""
    early, late = sorted(rng.sample(range(len(tracks)), 2))
    pair = [tracks[early], tracks[late]]
    called, names = call_in_any_order(rng, pair), [one.what.phrase for one in tracks]
    at = rng.randrange(len(tracks) - 1)
    return [
        Offer("first", names[0], group="order", weight=2),
        Offer("last", names[-1], group="order", weight=2),
        Offer("first_of", pair[0].called, called, 2, "order", 2),
        Offer("last_of", pair[1].called, called, 2, "order", 2),
        Offer("order", ", ".join(names), group="order"),
        Offer("after", names[at + 1], (tracks[at].called,), 0, "order"),
        Offer("before", names[at], (tracks[at + 1].called,), 0, "order"),
    ]


def _sample_numbers(rng: Random, num_frames: int) -> tuple[int, int, int]:
    """Sample how many objects are visible at the start, at the end, and in all frames."""
    while True:
        at_start, at_end = rng.randrange(_MAX_COUNT), rng.randrange(_MAX_COUNT)
        stay = [
            number
            for number in range(min(at_start, at_end) + 1)
            if number < at_start + at_end - number <= _MAX_COUNT
            and max(at_start, at_end) - number < num_frames
        ]
        if stay:
            return at_start, at_end, rng.choice(stay)


def _offer_appearance(
    rng: Random, canvas: Composite, come: list[Track], go: list[Track], stay: list[Track]
) -> list[Offer]:
    """Offer the questions which objects appear, and when."""
    offers: list[Offer] = []
    if len(come) == 1:
        names = _add_absent(rng, canvas, [*come, *go, *stay])
        offers.append(Offer("appears", come[0].what.phrase, (), 0, "come", 2))
        offers.append(Offer("appears_of", come[0].called, names, 4, "come", 3))
    if len(come) > 1:
        called = call_in_any_order(rng, come[:2])
        offers.append(Offer("appears_first", come[0].called, called, 2, "come", 2))
        offers.append(Offer("appears_last", come[1].called, called, 2, "come", 2))
    if come and (go or stay):
        answer = rng.choice(("yes", "no"))
        asked = rng.choice([*go, *stay] if answer == "yes" else come)
        offers.append(Offer("at_start", answer, (asked.called,), 2, "come"))
    return offers


def _offer_disappearance(
    rng: Random, canvas: Composite, come: list[Track], go: list[Track], stay: list[Track]
) -> list[Offer]:
    """Offer the questions which objects disappear, and when."""
    offers: list[Offer] = []
    if len(go) == 1:
        names = _add_absent(rng, canvas, [*come, *go, *stay])
        offers.append(Offer("disappears", go[0].what.phrase, (), 0, "go", 2))
        offers.append(Offer("disappears_of", go[0].called, names, 4, "go", 3))
    if len(go) > 1:
        called = call_in_any_order(rng, go[:2])
        offers.append(Offer("disappears_first", go[0].called, called, 2, "go", 2))
        offers.append(Offer("disappears_last", go[1].called, called, 2, "go", 2))
    if go and (come or stay):
        answer = rng.choice(("yes", "no"))
        asked = rng.choice([*come, *stay] if answer == "yes" else go).called
        offers.append(Offer("at_end", answer, (asked,), 2, "go"))
        answer = rng.choice(("yes", "no"))
        asked = rng.choice(go if answer == "yes" else [*come, *stay]).called
        offers.append(Offer("does_disappear", answer, (asked,), 2, "go"))
    return offers


def _add_absent(rng: Random, canvas: Composite, tracks: Sequence[Track]) -> tuple[str, ...]:
    """Return what the objects are called, with names of absent ones: four in random order."""
    kinds = [""] * (_MAX_COUNT - len(tracks))
    absent = sample_names(rng, canvas, kinds, others=[one.what for one in tracks])
    names = [*(one.called for one in tracks), *(one.phrase for one in absent)]
    return tuple(rng.sample(names, len(names)))


def _without_color(track: Track) -> str:
    return track.what.name if track.what.color in track.called else track.called


def _recolor(rng: Random, track: Track, color: str, frame: int) -> Track:
    """Change the color of a shape, from a frame on."""
    rgb = sample_color(rng, color)
    layers = [
        replace(layer, rgb=rgb) if i >= frame and isinstance(layer, ShapeLayer) else layer
        for i, layer in enumerate(track.layers)
    ]
    return replace(track, layers=tuple(layers))


def _read(track: Track) -> str:
    return next(layer.text for layer in track.layers if isinstance(layer, Text))
