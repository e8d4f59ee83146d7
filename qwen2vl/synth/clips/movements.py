"""Scenarios in which objects move or grow: straight motion or none, two speeds, change of size.

A scenario returns the tracks of its objects and all questions that they answer.
"""

from __future__ import annotations

from random import Random

from qwen2vl.synth.clips.offers import (
    NOT_STILL,
    Clip,
    Offer,
    call_in_any_order,
    offer_as_picture,
    offer_stillness,
)
from qwen2vl.synth.clips.tracks import DIRECTIONS, Motion, Track, place_tracks
from qwen2vl.synth.colors import COLORS, MORE_COLORS
from qwen2vl.synth.compositing.layers import Composite
from qwen2vl.synth.spec import Mixture

__all__ = ["offer_path", "sample_growth", "sample_motion", "sample_race"]

# Numbers of objects that move and that do not -> share of the clips.
_NUM_MOVING = {
    **{(0, 1): 0.08, (0, 2): 0.07, (0, 3): 0.05},
    **{(1, 0): 0.17, (2, 0): 0.07, (3, 0): 0.05},
    **{(1, 1): 0.22, (1, 2): 0.14, (2, 1): 0.15},
}
_TEXT_SHARE = 0.12  # of the clips with a text in place of an object
_IN_TURN_SHARE = 0.4  # of the clips of two moving objects
_OPPOSITE_SHARE = 0.3  # of the questions whether an object moves that ask if it stands still
_PART_SHARE = 0.3  # of the clips of one moving object, which moves for a part of the time

# Shares of the questions whose answer depends on _NUM_MOVING; offers.py says what shares are.
_STILL = {"is_still": 0.15, "anything_changes": 0.1}
_ANYTHING_MOVES = {"no": 0.25, "yes": 0.0625}
_DOES_MOVE = {"no": 0.35, "yes": 0.24}  # if no object moves, if all do
_COUNT_MOVING = {0: 0.15, 1: 0.057, 2: 0.136, 3: 0.6}


def sample_motion(rng: Random, mixture: Mixture) -> Clip:
    """Sample up to three objects, of which some move."""
    ((num_moving, num_still),) = rng.choices(list(_NUM_MOVING), list(_NUM_MOVING.values()))
    num_frames = rng.choice(mixture.num_frames)
    directions = _sample_directions(rng, num_moving)
    spans = _sample_spans(rng, num_moving, num_frames)
    motions = [
        Motion(direction=direction, frames=span)
        for direction, span in zip(directions, spans, strict=True)
    ]
    motions += [Motion()] * num_still
    if rng.random() < _TEXT_SHARE:
        motions[0] = Motion(direction=motions[0].direction, frames=motions[0].frames, kind="text")
    canvas, tracks = place_tracks(rng, mixture, motions, num_frames)
    moving, still = tracks[:num_moving], tracks[num_moving:]
    offers = _offer_whether(rng, moving, still) + _offer_which(rng, moving, still)
    for track, direction in zip(moving, directions, strict=True):
        offers += offer_path(canvas, track, direction)
    if num_moving > 1:
        offers.append(_offer_directions(rng, moving, directions))
        if spans[0] != spans[1]:
            called = call_in_any_order(rng, moving[:2])
            offers.append(Offer("moves_first", moving[0].called, called, 2, weight=6))
    offers += offer_as_picture(rng, canvas, tracks)
    return Clip(canvas, rng.sample(tracks, len(tracks)), offers)


def sample_race(rng: Random, mixture: Mixture) -> Clip:
    """Sample two objects, of which one is at least twice as fast."""
    slow = rng.uniform(0.12, 0.3)
    fast = min(0.7, slow * rng.uniform(2.2, 4))
    axis = rng.choice((DIRECTIONS[:2], DIRECTIONS[2:]))
    directions = [rng.choice(axis), rng.choice(axis)]
    motions = [
        Motion(direction=direction, travel=(share, share))
        for direction, share in zip(directions, (fast, slow), strict=True)
    ]
    num_frames = rng.choice(mixture.num_frames)
    canvas, tracks = place_tracks(rng, mixture, motions, num_frames, largest=0.45)
    called = call_in_any_order(rng, tracks)
    offers = [
        Offer("faster", tracks[0].called, called, 2, "speed", 6),
        Offer("slower", tracks[1].called, called, 2, "speed", 6),
        _offer_directions(rng, tracks, directions),
        *offer_stillness(NOT_STILL, is_still=False),
        *offer_as_picture(rng, canvas, tracks),
    ]
    for track, direction in zip(tracks, directions, strict=True):
        offers += offer_path(canvas, track, direction)
    return Clip(canvas, rng.sample(tracks, 2), offers)


def sample_growth(rng: Random, mixture: Mixture) -> Clip:
    """Sample an object that gets larger or smaller, and perhaps one that does not."""
    small = rng.uniform(0.4, 0.7)
    answer = rng.choice(("larger", "smaller"))
    motions = [Motion(sizes=(small, 1.0) if answer == "larger" else (1.0, small))]
    motions += [Motion()] * rng.randrange(2)
    canvas, tracks = place_tracks(
        rng, mixture, motions, rng.choice(mixture.num_frames), largest=0.8
    )
    offers = [
        Offer("grows", answer, (tracks[0].called,), 2, "growth", 3),
        *offer_stillness(NOT_STILL, is_still=False),
        *offer_as_picture(rng, canvas, tracks),
    ]
    if len(tracks) > 1:
        asked = rng.choice(tracks)
        changes = "yes" if asked is tracks[0] else "no"
        offers.append(Offer("size_changes", changes, (asked.called,), 2, "growth", 2))
        offers.append(Offer("which_changes_size", tracks[0].what.phrase, group="growth"))
    return Clip(canvas, rng.sample(tracks, len(tracks)), offers)


def offer_path(canvas: Composite, track: Track, direction: str) -> list[Offer]:
    """Offer the questions of direction, start and end of a moving object."""
    called, group = (track.called,), f"path of the {track.called}"
    offers = [Offer("direction", direction, called, 4, group, 6)]
    axis = 0 if direction in ("left", "right") else 1
    size = (canvas.width, canvas.height)[axis]
    start, end = (track.center(frame)[axis] / size for frame in (0, -1))
    if min(start, end) < 0.42 and max(start, end) > 0.58:
        sides = ("left", "right") if axis == 0 else ("top", "bottom")
        first, last = sides if start < end else sides[::-1]
        offers.append(Offer("start", first, called, 4, group))
        offers.append(Offer("end", last, called, 4, group))
    return offers


def _sample_directions(rng: Random, count: int) -> list[str]:
    """Sample directions; the second is as often that of the first as not."""
    if not count:
        return []
    first, *others = rng.sample(DIRECTIONS, len(DIRECTIONS))
    return [first, first if rng.random() < 0.5 else others[0], others[1]][:count]


def _sample_spans(rng: Random, num_moving: int, num_frames: int) -> list[tuple[int, int] | None]:
    """Sample the frames between which each object moves; two may move one after the other."""
    last = num_frames - 1
    if num_moving == 2 and rng.random() < _IN_TURN_SHARE:
        half = last // 2
        return [(0, half), (last - half, last)]
    if num_moving == 1 and rng.random() < _PART_SHARE:
        length = rng.randint(min(2, last - 1), last - 1)
        return [rng.choice(((0, length), (last - length, last)))]
    return [None] * num_moving


def _offer_whether(rng: Random, moving: list[Track], still: list[Track]) -> list[Offer]:
    """Offer the questions whether, and how many, objects move."""
    num_moving = str(len(moving))
    share = _COUNT_MOVING[len(moving)]
    offers = [Offer("count_moving", num_moving, (), 4, "moves", share=share)]
    answer = "yes" if moving else "no"
    share = _ANYTHING_MOVES[answer]
    offers.append(Offer("anything_moves", answer, (), 2, "moves", share=share))
    offers += offer_stillness(NOT_STILL if moving else _STILL, is_still=not moving)
    share = _DOES_MOVE[answer]
    if moving and still:
        answer, share = rng.choice(("yes", "no")), 0.0
    called = (rng.choice(moving if answer == "yes" else still).called,)
    task = "does_move"
    if rng.random() < _OPPOSITE_SHARE:
        task, answer = "stands_still", "no" if answer == "yes" else "yes"
    return [*offers, Offer(task, answer, called, 2, "moves", 4, share)]


def _offer_which(rng: Random, moving: list[Track], still: list[Track]) -> list[Offer]:
    """Offer the questions which object moves, and which does not."""
    offers: list[Offer] = []
    if len(moving) == 1 and still:
        called = call_in_any_order(rng, [moving[0], rng.choice(still)])
        what = moving[0].what
        offers.append(Offer("which_moves", what.phrase, (), 0, "moves", 2))
        offers.append(Offer("which_moves_of", moving[0].called, called, 2, "moves", 2))
        if what.color:
            num_colors = len(COLORS) + len(MORE_COLORS)
            offers.append(Offer("color_of_moving", what.color, (), num_colors, "moves"))
    if len(still) == 1 and moving:
        offers.append(Offer("which_stands_still", still[0].what.phrase, (), 0, "moves"))
    return offers


def _offer_directions(rng: Random, moving: list[Track], directions: list[str]) -> Offer:
    """Offer the question whether the first two objects move in the same direction."""
    answer = "yes" if directions[0] == directions[1] else "no"
    return Offer("same_direction", answer, call_in_any_order(rng, moving[:2]), 2)
