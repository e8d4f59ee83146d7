"""The suite clips: answers need the order of the frames, and are what the frames show."""

from __future__ import annotations

from collections import Counter
from itertools import groupby, pairwise
from pathlib import Path

import pytest

from dev.suites import clips as freeze
from qwen2vl.eval.suites.frozen_suite import FrozenItem, open_frozen_suite
from qwen2vl.eval.suites.scoring import score_answer
from qwen2vl.eval.suites.thresholds import CHANCE
from qwen2vl.processor.video import VIDEO_PRESETS
from qwen2vl.synth.compositing import Composite, Icon, ShapeLayer, Text
from qwen2vl.synth.compositing.icons import HELD_OUT_STYLES
from qwen2vl.synth.compositing.text import text_extent
from tests.requirements import needs_dataset

# Another digest is another suite: all earlier scores are invalid.
DIGEST = "6e2978a64ddba595c974e02beace1517609d3f68ba684a8536d92effbd034425"
SUITE = open_frozen_suite("clips")
VECTORS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}

Layer = ShapeLayer | Icon | Text


def items_of(part: str) -> list[FrozenItem]:
    return [item for item in SUITE.frozen_items if item.part == part]


def frames_of(item: FrozenItem) -> list[Composite]:
    return [frame for frame in item.pictures if isinstance(frame, Composite)]


def layers_of(frame: Composite) -> list[Layer]:
    return [layer for layer in frame.layers if isinstance(layer, (ShapeLayer, Icon, Text))]


def key_of(layer: Layer) -> tuple[object, ...]:
    """Return what identifies an object in a clip."""
    if isinstance(layer, Text):
        return (layer.text,)
    return (layer.name,) if isinstance(layer, Icon) else (layer.kind, layer.rgb)


def box_of(layer: Layer) -> tuple[int, int, int, int]:
    if not isinstance(layer, Text):
        return layer.box
    left, top, right, bottom = text_extent(layer.text, layer.font, layer.size)
    return layer.x + left, layer.y + top, layer.x + right, layer.y + bottom


def tracks_of(item: FrozenItem) -> dict[tuple[object, ...], dict[int, tuple[int, int, int, int]]]:
    """Return the boxes of each object by frame."""
    tracks: dict[tuple[object, ...], dict[int, tuple[int, int, int, int]]] = {}
    for index, frame in enumerate(frames_of(item)):
        for layer in layers_of(frame):
            tracks.setdefault(key_of(layer), {})[index] = box_of(layer)
    return tracks


def is_named(key: tuple[object, ...], text: str) -> bool:
    """Return whether a name means this object; kinds and colors of a clip are distinct."""
    return str(key[0]) in text


def travel(boxes: dict[int, tuple[int, int, int, int]]) -> tuple[int, int]:
    first, last = boxes[min(boxes)], boxes[max(boxes)]
    return last[0] - first[0], last[1] - first[1]


# All clips ---------------------------------------------------------------------------------------


def test_clips_are_of_many_lengths_sizes_and_aspects() -> None:
    counts = Counter(len(item.pictures) for item in SUITE.frozen_items)
    assert min(counts) == 4 and max(counts) == 16
    odd = sum(number for count, number in counts.items() if count % 2)
    assert 0.35 < odd / sum(counts.values()) < 0.65
    sizes = {(f.width, f.height) for item in SUITE.frozen_items for f in frames_of(item)}
    assert min(min(size) for size in sizes) == 64 and max(max(size) for size in sizes) == 448
    assert {w / h < 0.5 or w / h > 2 for w, h in sizes} == {True, False}
    assert all(item.clip for item in SUITE.frozen_items)


def test_frames_of_a_clip_have_one_size_and_ground() -> None:
    for item in SUITE.frozen_items:
        assert len({(f.width, f.height, f.ground) for f in frames_of(item)}) == 1


def test_every_frame_is_seen() -> None:
    """No preset samples fewer frames than a clip has."""
    most = max(len(item.pictures) for item in SUITE.frozen_items)
    assert all(preset.max_frames >= most for preset in VIDEO_PRESETS.values())
    largest = max(
        len(item.pictures) * f.width * f.height
        for item in SUITE.frozen_items
        for f in frames_of(item)[:1]
    )
    budget = min(preset.total_tokens for preset in VIDEO_PRESETS.values()) * 28**2
    assert largest / 2 <= budget


def test_objects_are_inside_apart_and_recognizable() -> None:
    for item in SUITE.frozen_items:
        for frame in frames_of(item):
            boxes = [box_of(layer) for layer in layers_of(frame)]
            for x1, y1, x2, y2 in boxes:
                assert 0 <= x1 < x2 <= frame.width and 0 <= y1 < y2 <= frame.height
            for index, a in enumerate(boxes):
                for b in boxes[:index]:
                    assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
            for layer in layers_of(frame):
                if not isinstance(layer, Text):
                    minimum = 32 if isinstance(layer, Icon) else 16
                    assert layer.box[2] - layer.box[0] >= minimum


def test_answers_are_balanced_and_chance_is_known() -> None:
    expected = {
        "direction": 0.25,
        "direction_shuffled": 0.5,
        "still": 0.5,
        "order": 0.5,
        "appearance": 0.25,
        "count_over_time": 0.25,
        "speed": 0.5,
    }
    for part, chance in expected.items():
        items = SUITE.items([part])
        assert len(items) == 64
        assert {item.chance for item in items} == {chance}
    assert set(expected) | {"text_over_time"} == set(SUITE.parts)
    for part in ("direction", "still", "count_over_time"):
        counts = Counter((item.kind, item.answers[0]) for item in items_of(part))
        assert len(set(counts.values())) == 1


# Motion ------------------------------------------------------------------------------------------


def test_direction_is_the_sign_of_the_travel() -> None:
    for item in items_of("direction"):
        ((key, boxes),) = tracks_of(item).items()
        dx, dy = travel(boxes)
        x, y = VECTORS[item.answers[0]]
        assert (dx > 0, dx < 0, dy > 0, dy < 0) == (x > 0, x < 0, y > 0, y < 0)
        assert abs(dx + dy) >= 1.5 * (len(boxes) - 1) - 1
        assert "the text" in item.question or is_named(key, item.question)
    texts = [item for item in items_of("direction") if "the text" in item.question]
    assert len(texts) == 16


def test_shuffled_frames_are_the_same_frames_without_a_direction() -> None:
    later: Counter[tuple[str, bool]] = Counter()
    for item, plain in zip(items_of("direction_shuffled"), items_of("direction"), strict=True):
        assert item.id.rpartition("/")[2] == plain.id.rpartition("/")[2]
        assert item.question == plain.question and item.answers == plain.answers
        order = [plain.pictures.index(frame) for frame in item.pictures]
        assert sorted(order) == list(range(len(order)))
        reversed_pairs = sum(a > b for i, a in enumerate(order) for b in order[i + 1 :])
        pairs = len(order) * (len(order) - 1) // 2
        assert abs(2 * reversed_pairs - pairs) <= 1
        later[item.answers[0], order[-1] > order[0]] += 1
    assert set(later.values()) == {8}  # 4 answers, later or earlier
    assert SUITE.threshold("direction_shuffled") == CHANCE
    assert "direction_shuffled" not in SUITE.blind_parts
    assert SUITE.paired_parts == (("direction_shuffled", "direction"),)


def test_an_object_moves_or_stands_still_as_the_answer_says() -> None:
    cases: Counter[tuple[str, int]] = Counter()
    for item in items_of("still"):
        tracks = tracks_of(item)
        (asked,) = [key for key in tracks if is_named(key, item.question)]
        moves = {key: travel(boxes) != (0, 0) for key, boxes in tracks.items()}
        assert moves.pop(asked) == (item.answers[0] == "yes")
        assert all(other != (item.answers[0] == "yes") for other in moves.values())
        cases[item.answers[0], len(tracks)] += 1
    assert set(cases.values()) == {16}


def test_speed_differs_by_a_factor_and_objects_change_places() -> None:
    pairs: dict[str, list[FrozenItem]] = {}
    for item in items_of("speed"):
        speeds = {key: abs(sum(travel(boxes))) for key, boxes in tracks_of(item).items()}
        slow, fast = sorted(speeds, key=lambda key: speeds[key])
        assert speeds[fast] >= 2 * speeds[slow] > 0
        answer = fast if "faster" in item.question else slow
        assert is_named(answer, item.answers[0])
        pairs.setdefault(item.question, []).append(item)
    for first, second in pairs.values():
        assert first.answers != second.answers
        assert sorted(tracks_of(first).values(), key=str) == sorted(
            tracks_of(second).values(), key=str
        )


# Events ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["order", "appearance"])
def test_each_clip_is_also_shown_backward_with_another_answer(part: str) -> None:
    clips = {(item.question, item.pictures): item for item in items_of(part)}
    for item in items_of(part):
        twin = clips[item.question, item.pictures[::-1]]
        assert twin.answers != item.answers


def test_order_is_that_of_the_frames() -> None:
    named_first = 0
    for item in items_of("order"):
        tracks = tracks_of(item)
        first, last = sorted(tracks, key=lambda key: min(tracks[key]))
        assert max(tracks[first]) < min(tracks[last])
        answer = first if "first" in item.question else last
        assert is_named(answer, item.answers[0])
        other = last if answer == first else first
        named_first += item.question.index(str(answer[0])) < item.question.index(str(other[0]))
    assert named_first == 32


def test_one_of_four_named_objects_appears_or_disappears() -> None:
    for item in items_of("appearance"):
        tracks, last = tracks_of(item), len(item.pictures) - 1
        changed = {
            key: ("appears" if last in frames else "disappears")
            for key, frames in tracks.items()
            if len(frames) <= last
        }
        word = "disappears" if "disappears" in item.question else "appears"
        (answer,) = [key for key, change in changed.items() if change == word]
        assert is_named(answer, item.answers[0])
        assert item.question.count(" the ") >= 4 and item.choices == 4
        assert all(is_named(key, item.question) for key in tracks) and len(tracks) == 3


def test_numbers_of_objects_and_of_flashes() -> None:
    for item in items_of("count_over_time"):
        shown = [tuple(key_of(layer) for layer in layers_of(f)) for f in frames_of(item)]
        runs = [keys for keys, _ in groupby(shown) if keys]
        assert len(runs) == int(item.answers[0])
        assert len(set(runs)) == (len(runs) if item.kind == "objects" else 1)


def test_text_is_in_one_frame_and_the_same_text_is_the_answer() -> None:
    with_shape = 0
    for item in items_of("text_over_time"):
        texts = [
            layer.text for f in frames_of(item) for layer in f.layers if isinstance(layer, Text)
        ]
        assert texts == [*item.answers] and 3 <= len(texts[0]) <= 6
        with_shape += any(isinstance(layer, ShapeLayer) for layer in item.pictures[0].layers)  # type: ignore[union-attr]
    assert with_shape == 32
    places = [
        next(n for n, f in enumerate(frames_of(item)) if any(isinstance(x, Text) for x in f.layers))
        / (len(item.pictures) - 1)
        for item in items_of("text_over_time")
    ]
    assert min(places) == 0 and max(places) == 1 and 0.35 < sum(places) / len(places) < 0.65


# The suite and its generator ---------------------------------------------------------------------


def test_styles_and_fonts_are_declared_as_held_out() -> None:
    held_out = SUITE.header.held_out
    layers = [x for item in SUITE.frozen_items for f in frames_of(item) for x in f.layers]
    assert {x.style for x in layers if isinstance(x, Icon)} == set(HELD_OUT_STYLES)
    assert set(held_out["styles"]) == set(HELD_OUT_STYLES)
    assert {x.font for x in layers if isinstance(x, Text)} <= set(held_out["fonts"])


def test_the_reference_answers_are_correct() -> None:
    for item in SUITE.frozen_items:
        assert score_answer(item.metric, item.answers, item.answers[0]).is_correct


def test_the_blind_control_shows_another_clip() -> None:
    plain = {item.id: item.media for item in SUITE.items(SUITE.blind_parts)}
    for item in SUITE.items(SUITE.blind_parts, blind=True):
        assert item.media != plain[item.id]


def test_file_is_frozen_and_the_generator_still_writes_it(tmp_path: Path) -> None:
    freeze.freeze(tmp_path / "clips.jsonl")
    assert SUITE.digest == DIGEST
    assert (tmp_path / "clips.jsonl").read_bytes() == freeze.FILE.read_bytes()
    assert freeze.FILE.stat().st_size < 1_000_000


def test_paths_are_straight_and_of_constant_speed() -> None:
    for part in ("direction", "speed"):
        for item in items_of(part):
            for boxes in tracks_of(item).values():
                steps = [
                    (b[0] - a[0], b[1] - a[1]) for a, b in pairwise(boxes[n] for n in sorted(boxes))
                ]
                for axis in (0, 1):
                    values = [step[axis] for step in steps]
                    assert max(values) - min(values) <= 1  # rounding


@needs_dataset("named-pictures")
def test_every_part_can_be_drawn() -> None:
    for part in SUITE.parts:
        SUITE.check_part(part)
        (content,) = [
            c for c in SUITE.messages(SUITE.items([part])[0])[0]["content"] if c["type"] == "video"
        ]
        frames = SUITE.items([part])[0].media.pictures
        assert content["video"].shape == (len(frames), frames[0].height, frames[0].width, 3)
