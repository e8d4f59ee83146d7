"""Clips in which objects move: the offered answers are what the frames show."""

from __future__ import annotations

from collections import Counter
from functools import cache
from itertools import pairwise
from random import Random

import pytest

from qwen2vl.synth.clips import tracks as tracks_module
from qwen2vl.synth.clips.movements import sample_growth, sample_motion, sample_race
from qwen2vl.synth.clips.offers import Clip, Offer
from qwen2vl.synth.clips.tracks import Track
from qwen2vl.synth.spec import Box, Mixture

MIXTURE = Mixture(fonts="bundled")


@pytest.fixture(autouse=True)
def only_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Icons need a dataset."""
    monkeypatch.setattr(tracks_module, "ICON_SHARE", 0.0)


def _boxes(track: Track) -> list[Box]:
    """Return the boxes of the layers, from which nothing else is computed."""
    boxes: list[Box] = []
    for layer in track.layers:
        assert layer is not None
        boxes.append(layer.box if hasattr(layer, "box") else (layer.x, layer.y, 0, 0))  # type: ignore[union-attr]
    return boxes


def _direction(track: Track) -> str:
    boxes = _boxes(track)
    (x1, y1), (x2, y2) = boxes[0][:2], boxes[-1][:2]
    if x1 == x2 and y1 == y2:
        return ""
    assert x1 == x2 or y1 == y2
    if x1 == x2:
        return "down" if y2 > y1 else "up"
    return "right" if x2 > x1 else "left"


def _named(clip: Clip, called: str) -> Track:
    (found,) = (track for track in clip.tracks if track.called == called)
    return found


def _offers(clip: Clip, task: str) -> list[Offer]:
    return [offer for offer in clip.offers if offer.task == task]


@cache
def _motions(count: int) -> list[Clip]:
    return [sample_motion(Random(seed), MIXTURE) for seed in range(count)]


def test_objects_move_in_the_direction_of_the_answer() -> None:
    answers: Counter[str] = Counter()
    for clip in _motions(250):
        for offer in _offers(clip, "direction"):
            assert _direction(_named(clip, offer.fields[0])) == offer.answer
            answers[offer.answer] += 1
    assert set(answers) == {"left", "right", "up", "down"}
    assert min(answers.values()) > 0.17 * answers.total()


def test_whether_objects_move() -> None:
    for clip in _motions(250):
        moving = [track for track in clip.tracks if _direction(track)]
        (count,) = _offers(clip, "count_moving")
        assert count.answer == str(len(moving))
        (anything,) = _offers(clip, "anything_moves")
        (is_still,) = _offers(clip, "is_still")
        (changes,) = _offers(clip, "anything_changes")
        expected = ("yes", "no", "yes") if moving else ("no", "yes", "no")
        assert (anything.answer, is_still.answer, changes.answer) == expected
        (asked,) = _offers(clip, "does_move") + _offers(clip, "stands_still")
        does_move = _named(clip, asked.fields[0]) in moving
        assert asked.answer == ("yes" if does_move == (asked.task == "does_move") else "no")


def test_which_object_moves() -> None:
    num_asked = 0
    for clip in _motions(250):
        moving = [track for track in clip.tracks if _direction(track)]
        for offer in _offers(clip, "which_moves"):
            assert [offer.answer] == [track.what.phrase for track in moving]
        for offer in _offers(clip, "which_moves_of"):
            assert [offer.answer] == [track.called for track in moving]
            assert offer.answer in offer.fields
            num_asked += 1
        for offer in _offers(clip, "which_stands_still"):
            still = [track for track in clip.tracks if not _direction(track)]
            assert [offer.answer] == [track.what.phrase for track in still]
    assert num_asked > 50


def test_which_object_moves_first() -> None:
    num_asked = 0
    for clip in _motions(250):
        for offer in _offers(clip, "moves_first"):
            one, other = (_boxes(_named(clip, called)) for called in offer.fields)
            # Nothing moves in the middle of an odd number of steps.
            steps = list(zip(pairwise(one), pairwise(other), strict=True))
            moves = [(a != b, c != d) for (a, b), (c, d) in steps if a != b or c != d]
            assert all(sum(pair) == 1 for pair in moves)
            assert offer.answer == offer.fields[moves[0].index(True)]
            num_asked += 1
    assert num_asked > 8


def test_start_and_end_are_sides_of_the_canvas() -> None:
    num_asked = 0
    for clip in _motions(250):
        width, height = clip.canvas.width, clip.canvas.height
        for frame, task in ((0, "start"), (-1, "end")):
            for offer in _offers(clip, task):
                x, y = _named(clip, offer.fields[0]).center(frame)
                is_on = {"left": 2 * x < width, "right": 2 * x > width}
                is_on |= {"top": 2 * y < height, "bottom": 2 * y > height}
                assert is_on[offer.answer]
                num_asked += 1
    assert num_asked > 40


def test_unordered_frames_do_not_tell_the_direction() -> None:
    """Positions of a clip and of its reverse have the same distribution: mean positions agree."""
    positions: dict[str, list[float]] = {"left": [], "right": [], "up": [], "down": []}
    for clip in _motions(250):
        for track in clip.tracks:
            if direction := _direction(track):
                axis = 0 if direction in ("left", "right") else 1
                size = (clip.canvas.width, clip.canvas.height)[axis]
                mean = sum(track.center(i)[axis] for i in range(len(track.boxes)))
                positions[direction].append(mean / len(track.boxes) / size)
    for low, high in (("left", "right"), ("up", "down")):
        means = [sum(positions[name]) / len(positions[name]) for name in (low, high)]
        assert len(positions[low]) > 50
        assert abs(means[0] - means[1]) < 0.08


def test_one_of_a_race_is_twice_as_fast() -> None:
    directions: Counter[str] = Counter()
    for seed in range(150):
        clip = sample_race(Random(seed), MIXTURE)
        (faster,), (slower,) = _offers(clip, "faster"), _offers(clip, "slower")
        assert {faster.answer, slower.answer} == set(faster.fields) == set(slower.fields)
        paths = [_named(clip, offer.answer) for offer in (faster, slower)]
        fast, slow = (
            sum(abs(a - b) for a, b in zip(track.center(0), track.center(-1), strict=True))
            for track in paths
        )
        assert fast >= 1.9 * slow > 0  # pixels are whole
        (same,) = _offers(clip, "same_direction")
        is_same = _direction(paths[0]) == _direction(paths[1])
        assert same.answer == ("yes" if is_same else "no")
        directions[same.answer] += 1
    assert min(directions.values()) > 50


def test_growth_keeps_the_center() -> None:
    answers: Counter[str] = Counter()
    for seed in range(60):
        clip = sample_growth(Random(seed), MIXTURE)
        (grows,) = _offers(clip, "grows")
        track = _named(clip, grows.fields[0])
        sides = [box[2] - box[0] for box in track.boxes]
        assert sides == sorted(sides, reverse=grows.answer == "smaller")
        assert max(sides) >= 1.3 * min(sides)
        assert all(abs(a - b) <= 1 for a, b in zip(track.center(0), track.center(-1), strict=True))
        for offer in _offers(clip, "size_changes"):
            asked = _named(clip, offer.fields[0])
            assert offer.answer == ("yes" if asked is track else "no")
            assert (len(set(asked.boxes)) > 1) == (offer.answer == "yes")
        answers[grows.answer] += 1
    assert min(answers.values()) > 15
