"""Clips in which objects come and go, or change: the offered answers are what the frames show."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from random import Random

import pytest

from qwen2vl.synth.clips import tracks as tracks_module
from qwen2vl.synth.clips.events import (
    sample_changes,
    sample_flashes,
    sample_recoloring,
    sample_texts,
    sample_turns,
)
from qwen2vl.synth.clips.offers import Clip, Offer
from qwen2vl.synth.clips.tracks import Track
from qwen2vl.synth.colors import shades_of
from qwen2vl.synth.compositing import ShapeLayer, Text
from qwen2vl.synth.spec import RGB, Mixture

MIXTURE = Mixture(fonts="bundled")
NUM_CLIPS = 120


@pytest.fixture(autouse=True)
def only_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Icons need a dataset."""
    monkeypatch.setattr(tracks_module, "ICON_SHARE", 0.0)


def _visible(track: Track) -> list[bool]:
    return [layer is not None for layer in track.layers]


def _num_spans(track: Track) -> int:
    shown = [False, *_visible(track)]
    return sum(not before and now for before, now in pairwise(shown))


def _answers(clip: Clip, task: str) -> list[str]:
    return [offer.answer for offer in clip.offers if offer.task == task]


def _offers(clip: Clip, task: str) -> list[Offer]:
    return [offer for offer in clip.offers if offer.task == task]


def _named(clip: Clip, called: str) -> Track:
    (found,) = (track for track in clip.tracks if track.called == called)
    return found


def test_objects_in_turn_are_shown_one_at_a_time() -> None:
    counts: Counter[str] = Counter()
    for seed in range(NUM_CLIPS):
        clip = sample_turns(Random(seed), MIXTURE)
        visible = [_visible(track) for track in clip.tracks]
        assert all(sum(frame) <= 1 for frame in zip(*visible, strict=True))
        assert all(_num_spans(track) == 1 for track in clip.tracks)
        (count,) = _answers(clip, "count_in_turn")
        assert count == str(len(clip.tracks))
        counts[count] += 1
        ordered = sorted(clip.tracks, key=lambda track: _visible(track).index(True))
        names = [track.what.phrase for track in ordered]
        if len(names) > 1:
            assert _answers(clip, "order") == [", ".join(names)]
            assert _answers(clip, "first") + _answers(clip, "last") == [names[0], names[-1]]
            called = [track.called for track in ordered]
            for task, is_first in (("first_of", True), ("last_of", False)):
                (offer,) = _offers(clip, task)
                other = next(field for field in offer.fields if field != offer.answer)
                assert (called.index(offer.answer) < called.index(other)) == is_first
            for task, step in (("after", 1), ("before", -1)):
                (offer,) = _offers(clip, task)
                assert names[called.index(offer.fields[0]) + step] == offer.answer
    assert set(counts) == {"1", "2", "3", "4"}
    assert min(counts.values()) > NUM_CLIPS / 8


def test_objects_appear_and_disappear_as_the_answers_say() -> None:
    counts: dict[str, Counter[str]] = {"count_start": Counter(), "count_end": Counter()}
    asked: Counter[str] = Counter()
    for seed in range(NUM_CLIPS):
        clip = sample_changes(Random(seed), MIXTURE)
        assert all(_num_spans(track) == 1 for track in clip.tracks)
        for task, frame in (("count_start", 0), ("count_end", -1)):
            (count,) = _answers(clip, task)
            assert count == str(sum(_visible(track)[frame] for track in clip.tracks))
            counts[task][count] += 1
        come = [track for track in clip.tracks if not _visible(track)[0]]
        go = [track for track in clip.tracks if not _visible(track)[-1]]
        stay = [track for track in clip.tracks if all(_visible(track))]
        for task, tracks in (("appears", come), ("disappears", go), ("stays", stay)):
            for answer in _answers(clip, task):
                assert [answer] == [track.what.phrase for track in tracks]
            for offer in _offers(clip, f"{task}_of"):
                assert [offer.answer] == [track.called for track in tracks]
                assert len(set(offer.fields)) == 4
                assert offer.answer in offer.fields
                asked[offer.task] += 1
    for counted in counts.values():
        assert set(counted) == {"0", "1", "2", "3"}
        assert min(counted.values()) > NUM_CLIPS / 9
    assert min(asked["appears_of"], asked["disappears_of"]) > 20


def test_which_of_two_appears_or_disappears_first() -> None:
    asked: Counter[str] = Counter()
    for seed in range(NUM_CLIPS):
        clip = sample_changes(Random(seed), MIXTURE)
        for event, value in (("appears", True), ("disappears", False)):
            for word in ("first", "last"):
                for offer in _offers(clip, f"{event}_{word}"):
                    shown = [_visible(_named(clip, called)) for called in offer.fields]
                    times = [frames.index(value) for frames in shown]
                    chosen = (min if word == "first" else max)(times)
                    assert offer.answer == offer.fields[times.index(chosen)]
                    assert times[0] != times[1]
                    asked[offer.task] += 1
    assert len(asked) == 4


def test_visible_at_start_and_at_end() -> None:
    answers: Counter[str] = Counter()
    for seed in range(NUM_CLIPS):
        clip = sample_changes(Random(seed), MIXTURE)
        for task, frame in (("at_start", 0), ("at_end", -1)):
            for offer in _offers(clip, task):
                is_visible = _visible(_named(clip, offer.fields[0]))[frame]
                assert offer.answer == ("yes" if is_visible else "no")
                answers[offer.answer] += 1
        for offer in _offers(clip, "does_disappear"):
            is_visible = _visible(_named(clip, offer.fields[0]))[-1]
            assert offer.answer == ("no" if is_visible else "yes")
    assert min(answers.values()) > 0.35 * answers.total()


def test_flashes_are_spans_of_frames() -> None:
    counts: Counter[str] = Counter()
    for seed in range(NUM_CLIPS):
        clip = sample_flashes(Random(seed), MIXTURE)
        (offer,) = _offers(clip, "flashes")
        track = _named(clip, offer.fields[0])
        assert offer.answer == str(_num_spans(track))
        assert not all(_visible(track))
        others = [one for one in clip.tracks if one is not track]
        assert all(all(_visible(one)) for one in others)
        assert _answers(clip, "which_flashes") == [track.what.phrase] * len(others)
        counts[offer.answer] += 1
    assert set(counts) == {"1", "2", "3", "4"}
    assert min(counts.values()) > NUM_CLIPS / 8


def test_flashes_fit_into_few_frames() -> None:
    mixture = Mixture(fonts="bundled", num_frames=(4,))
    answers = {sample_flashes(Random(seed), mixture).offers[0].answer for seed in range(30)}
    assert answers == {"1", "2"}


def test_texts_are_answers() -> None:
    num_moving = 0
    for seed in range(NUM_CLIPS):
        clip = sample_texts(Random(seed), MIXTURE)
        texts = [track for track in clip.tracks if track.what.name == "text"]
        texts.sort(key=lambda track: _visible(track).index(True))
        contents = [{one.text for one in track.layers if isinstance(one, Text)} for track in texts]
        tasks = ("read", "read_moment", "read_first", "read_last")
        answers = [answer for task in tasks for answer in _answers(clip, task)]
        assert [{answer} for answer in answers] == contents
        if _answers(clip, "read_moment"):
            assert sum(_visible(texts[0])) <= len(texts[0].layers) // 2
        for offer in _offers(clip, "direction"):
            assert offer.fields == ("text",)
            assert texts[0].center(0) != texts[0].center(-1)
            num_moving += 1
        assert _answers(clip, "has_text") == ["yes"]
    assert num_moving > 10


def _color_of(rgb: RGB, names: set[str]) -> str:
    """Return the name of the nearest color."""

    def distance(name: str) -> float:
        a, b = shades_of(name)
        middle = [(x + y) / 2 for x, y in zip(a, b, strict=True)]
        return sum((x - y) ** 2 for x, y in zip(rgb, middle, strict=True))

    return min(names, key=distance)


def test_colors_change_as_the_answers_say() -> None:
    num_asked = 0
    for seed in range(NUM_CLIPS):
        clip = sample_recoloring(Random(seed), MIXTURE)
        (start,), (end,) = _offers(clip, "color_start"), _offers(clip, "color_end")
        assert start.answer != end.answer
        assert _answers(clip, "color_change") == [f"from {start.answer} to {end.answer}"]
        track = _named(clip, start.fields[0])
        layers = [layer for layer in track.layers if isinstance(layer, ShapeLayer)]
        both = {start.answer, end.answer}
        assert _color_of(layers[0].rgb, both) == start.answer
        assert _color_of(layers[-1].rgb, both) == end.answer
        assert not both & set(track.called.split())  # its name does not have the answer
        for offer in _offers(clip, "color_changes"):
            shown = {one.rgb for one in _named(clip, offer.fields[0]).layers if one is not None}  # type: ignore[union-attr]
            assert (len(shown) > 1) == (offer.answer == "yes")
            num_asked += 1
    assert num_asked > NUM_CLIPS / 3
