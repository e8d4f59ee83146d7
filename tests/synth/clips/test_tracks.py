"""Objects of clips: places that are apart, names that share no word, frames, texts that fit."""

from __future__ import annotations

from itertools import combinations
from random import Random

import pytest

from qwen2vl.synth.canvas import sample_canvas
from qwen2vl.synth.clips import tracks as tracks_module
from qwen2vl.synth.clips.names import ObjectName, sample_names
from qwen2vl.synth.clips.tracks import Motion, Track, build_frames, place_tracks
from qwen2vl.synth.compositing import Icon, ShapeLayer, Text
from qwen2vl.synth.compositing.text import text_extent
from qwen2vl.synth.scenes import overlap
from qwen2vl.synth.spec import Mixture
from tests.requirements import needs_dataset

MIXTURE = Mixture(fonts="bundled")
MOTIONS = (Motion(direction="left"), Motion(direction="down"), Motion(), Motion(kind="text"))


@pytest.fixture(autouse=True)
def only_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Icons need a dataset."""
    monkeypatch.setattr(tracks_module, "ICON_SHARE", 0.0)


def _hull(track: Track) -> tuple[int, int, int, int]:
    x1, y1, x2, y2 = zip(*track.boxes, strict=True)
    return min(x1), min(y1), max(x2), max(y2)


@pytest.mark.parametrize("canvas", [(56, 56), (56, 112), (56, 448), (300, 300)])
def test_objects_are_apart_and_inside(canvas: tuple[int, int]) -> None:
    mixture = Mixture(fonts="bundled", clip_canvas=canvas)
    for seed in range(12):
        picture, tracks = place_tracks(Random(seed), mixture, MOTIONS, 6)
        width, height = picture.width, picture.height
        assert canvas[0] <= min(width, height) <= max(width, height) <= canvas[1]
        assert max(width, height) <= 3.1 * min(width, height)
        assert [len(track.layers) for track in tracks] == [6] * len(MOTIONS)
        for track in tracks:
            x1, y1, x2, y2 = _hull(track)
            assert 0 <= x1 < x2 <= width
            assert 0 <= y1 < y2 <= height
        assert all(overlap(_hull(a), _hull(b)) == 0 for a, b in combinations(tracks, 2))


def test_independent_objects_may_overlap() -> None:
    def overlaps(seed: int) -> bool:
        _, (a, b) = place_tracks(Random(seed), MIXTURE, [Motion()] * 2, 4, apart=False)
        return overlap(a.boxes[0], b.boxes[0]) > 0

    assert any(overlaps(seed) for seed in range(20))


def test_layers_fill_their_boxes() -> None:
    for seed in range(40):
        _, tracks = place_tracks(Random(seed), MIXTURE, MOTIONS, 5)
        for track in tracks:
            for layer, (x1, y1, x2, y2) in zip(track.layers, track.boxes, strict=True):
                if isinstance(layer, Text):
                    left, top, right, bottom = text_extent(layer.text, layer.font, layer.size)
                    ink = (layer.x + left, layer.y + top, layer.x + right, layer.y + bottom)
                else:
                    assert isinstance(layer, ShapeLayer)
                    ink = layer.box
                assert x1 <= ink[0] < ink[2] <= x2
                assert y1 <= ink[1] < ink[3] <= y2


def test_an_object_moves_within_its_frames_only() -> None:
    motion = Motion(direction="right", frames=(2, 4))
    _, (track,) = place_tracks(Random(1), MIXTURE, [motion], 7)
    xs = [box[0] for box in track.boxes]
    assert xs[0] == xs[1] == xs[2] < xs[3] < xs[4] == xs[5] == xs[6]


def test_equal_limits_of_travel_are_exact() -> None:
    motion = Motion(direction="up", travel=(0.3, 0.3))
    for seed in range(10):
        picture, (track,) = place_tracks(Random(seed), MIXTURE, [motion], 5)
        assert track.center(0)[1] - track.center(-1)[1] == round(0.3 * picture.height)


def test_frames_have_the_visible_layers() -> None:
    picture, tracks = place_tracks(Random(3), MIXTURE, [Motion(), Motion()], 4)
    tracks = [tracks[0].visible_in({1, 2}), tracks[1]]
    frames = build_frames(picture, tracks)
    assert [len(frame.layers) for frame in frames] == [1, 2, 2, 1]
    assert all(frame.ground == picture.ground and frame.blur == picture.blur for frame in frames)


def test_one_object_may_be_called_object() -> None:
    called = {place_tracks(Random(seed), MIXTURE, [Motion()], 4)[1][0].called for seed in range(40)}
    assert "object" in called
    pairs = [place_tracks(Random(seed), MIXTURE, [Motion()] * 2, 4)[1] for seed in range(40)]
    assert all(track.called != "object" for pair in pairs for track in pair)


def test_what_objects_are_called_identifies_them() -> None:
    for seed in range(40):
        _, tracks = place_tracks(Random(seed), MIXTURE, [Motion()] * 3, 4)
        for track in tracks:
            words = set(track.called.split()) - {"shape"}
            assert [one for one in tracks if words <= one.what.words] == [track]


def test_no_two_names_share_a_word() -> None:
    for seed in range(100):
        rng = Random(seed)
        canvas = sample_canvas(rng, MIXTURE)
        others = [ObjectName("star", "red"), ObjectName("dog face")]
        names = [*others, *sample_names(rng, canvas, ["", "shape", "", ""], others=others)]
        assert all(a.words.isdisjoint(b.words) for a, b in combinations(names, 2))
        assert names[3].color
        assert not any(
            name.name.endswith("s") for name in names if name.name[-2:] not in ("ss", "us")
        )


@needs_dataset("named-pictures")
def test_icons_are_drawn_large_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracks_module, "ICON_SHARE", 1.0)
    for seed in range(3):
        _, (track,) = place_tracks(Random(seed), MIXTURE, [Motion(direction="left")], 4)
        assert all(
            isinstance(layer, Icon) and layer.name == track.what.name for layer in track.layers
        )
        assert min(box[2] - box[0] for box in track.boxes) >= 26
