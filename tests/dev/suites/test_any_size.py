"""The suite any-size: the same items on every canvas, and pictures that are not shrunk."""

from __future__ import annotations

from collections import Counter, defaultdict
from functools import cache
from itertools import combinations
from pathlib import Path

import pytest

from dev.suites import any_size as freeze
from dev.suites.any_size.canvases import ABSOLUTE_SIDE, CANVASES, Canvas
from qwen2vl.eval.suites.frozen_suite import FrozenItem, open_frozen_suite
from qwen2vl.eval.suites.scoring import score_answer
from qwen2vl.loading import load_processor
from qwen2vl.processor.inputs import ModelInput
from qwen2vl.processor.processor import Processor
from qwen2vl.synth.colors import COLORS
from qwen2vl.synth.compositing import Composite, Icon, ShapeLayer, Text
from qwen2vl.synth.compositing.icons import HELD_OUT_STYLES
from qwen2vl.synth.compositing.text import text_extent
from qwen2vl.weights import resolve_model
from tests.requirements import needs_dataset

# Another digest is another suite: all earlier scores are invalid.
DIGEST = "87c0b664e37b307051c85d240e497cf861596af29d0dc89f32890bad08b770a6"
SUITE = open_frozen_suite("any-size")
UNRESIZED = [part for part in SUITE.parts if part.endswith("_unresized")]
LARGE = ("1600x1200", "2000x2000")  # shrunk at nano's limit of pixels


def items_of(part: str) -> list[FrozenItem]:
    return [item for item in SUITE.frozen_items if item.part == part]


def picture_of(item: FrozenItem) -> Composite:
    (picture,) = item.pictures
    assert isinstance(picture, Composite)
    return picture


def number_of(item: FrozenItem) -> int:
    return int(item.id.removeprefix(f"{item.part}/"))


def is_absolute(item: FrozenItem) -> bool:
    return number_of(item) // 4 % 2 == 1


@cache
def nano() -> Processor:
    return load_processor(resolve_model("nano"))


def prepare(part: str, index: int = 0) -> ModelInput:
    """Draw an item's picture, and preprocess it as nano does."""
    return nano()(SUITE.messages(SUITE.items([part])[index]))


# Canvases and limits of pixels ----------------------------------------------------------------


def test_pictures_have_the_size_of_their_part() -> None:
    for item in SUITE.frozen_items:
        size = item.part.removeprefix("line_").removesuffix("_unresized")
        assert f"{picture_of(item).width}x{picture_of(item).height}" == size
    aspects = [canvas.width / canvas.height for canvas in CANVASES]
    assert min(aspects) == 0.1 and max(aspects) == 20
    sides = [side for canvas in CANVASES for side in (canvas.width, canvas.height)]
    assert min(sides) == 64 and max(sides) == 2000


@pytest.mark.parametrize("canvas", CANVASES, ids=lambda canvas: canvas.name)
def test_only_large_canvases_are_shrunk_and_they_have_parts_without(canvas: Canvas) -> None:
    for prefix in ("", "line_"):
        name = f"{prefix}{canvas.name}"
        tokens = prepare(name).image_tokens
        assert (f"{name}_unresized" in SUITE.parts) == (canvas.name in LARGE)
        if canvas.name in LARGE:
            assert tokens < canvas.tokens / 2
            assert prepare(f"{name}_unresized").image_tokens == canvas.tokens
        elif canvas.name == "64x64":  # enlarged
            assert tokens == 16 > canvas.tokens
        else:
            assert tokens == canvas.tokens


def test_unresized_limits_keep_the_sides() -> None:
    for part in UNRESIZED:
        (picture,) = prepare(part).items
        for side, original in zip(picture.resized_size, picture.original_size, strict=True):
            assert abs(side - original) < 14  # half of a token


@needs_dataset("named-pictures")
def test_the_longest_prompt_and_its_answer_fit_into_the_context() -> None:
    parts = [part for part in SUITE.parts if part.startswith("2000x2000")]
    lengths = [
        len(prepare(part, index).input_ids)
        for part in parts
        for index, item in enumerate(SUITE.items([part]))
        if item.question == max((one.question for one in SUITE.items([part])), key=len)
    ]
    assert SUITE.max_model_len is not None
    longest = max(lengths) + SUITE.max_tokens
    assert longest <= SUITE.max_model_len < longest + 128


# Items ------------------------------------------------------------------------------------------


def test_items_of_a_number_are_the_same_on_every_canvas() -> None:
    by_number: dict[tuple[bool, int], list[FrozenItem]] = defaultdict(list)
    for item in SUITE.frozen_items:
        by_number[item.part.startswith("line_"), number_of(item)].append(item)
    assert len(by_number) == 40 + 8
    for same in by_number.values():
        assert len({(item.kind, item.question, item.answers, item.metric) for item in same}) == 1
        assert len({picture_of(item).ground for item in same}) == 1
        # What is drawn, without its place; text has the same size everywhere.
        drawn = {tuple(_identity(layer) for layer in picture_of(item).layers) for item in same}
        assert len(drawn) == 1
        assert len(same) >= 5


def _identity(layer: object) -> tuple[object, ...]:
    if isinstance(layer, Text):
        return layer.text, layer.font, layer.size, layer.rgb
    if isinstance(layer, Icon):
        return layer.style, layer.name
    assert isinstance(layer, ShapeLayer)
    return layer.kind, layer.rgb


@pytest.mark.parametrize("part", UNRESIZED)
def test_unresized_parts_pair_with_the_same_pictures(part: str) -> None:
    other = SUITE.header.parts[part].compared_with
    assert other == part.removesuffix("_unresized")
    assert [number_of(i) for i in items_of(part)] == [number_of(i) for i in items_of(other)]
    for item, default in zip(items_of(part), items_of(other), strict=True):
        assert item.pictures == default.pictures
        assert item.max_pixels is not None and default.max_pixels is None


def test_sizes_are_absolute_or_a_share_of_the_canvas() -> None:
    shares: set[float] = set()
    for item in SUITE.frozen_items:
        picture = picture_of(item)
        for layer in picture.layers:
            if isinstance(layer, Text):
                continue
            side = layer.box[2] - layer.box[0]
            assert side == layer.box[3] - layer.box[1]
            assert side >= (32 if isinstance(layer, Icon) else 16)
            if is_absolute(item):
                assert side == ABSOLUTE_SIDE
            else:
                shares.add(round(side / min(picture.width, picture.height), 2))
    assert min(shares) <= 0.05 and max(shares) >= 0.9


def test_layers_are_inside_and_apart() -> None:
    for item in SUITE.frozen_items:
        picture = picture_of(item)
        boxes = [_box(layer) for layer in picture.layers]
        for x1, y1, x2, y2 in boxes:
            assert 0 <= x1 < x2 <= picture.width and 0 <= y1 < y2 <= picture.height
        for a, b in combinations(boxes, 2):
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


def _box(layer: object) -> tuple[int, int, int, int]:
    if isinstance(layer, Text):
        left, top, right, bottom = text_extent(layer.text, layer.font, layer.size)
        return layer.x + left, layer.y + top, layer.x + right, layer.y + bottom
    assert isinstance(layer, (ShapeLayer, Icon))
    return layer.box


def test_answers_are_what_the_picture_shows() -> None:
    for item in SUITE.frozen_items:
        layers = picture_of(item).layers
        answer = item.answers[0]
        kinds = [layer.kind for layer in layers if isinstance(layer, ShapeLayer)]
        names = [
            f"{_color(layer)} {layer.kind}" for layer in layers if isinstance(layer, ShapeLayer)
        ]
        if item.kind == "shape":
            assert kinds == [answer]
        elif item.kind == "color":
            assert names[0].split()[0] == answer
        elif item.kind == "exists":
            assert (answer == "yes") == any(name in item.question for name in names)
        elif item.kind == "count":
            assert len(kinds) == int(answer)
        else:
            (layer,) = layers
            assert isinstance(layer, (Icon, Text))
            assert answer == (layer.name if isinstance(layer, Icon) else layer.text)


def _color(layer: ShapeLayer) -> str:
    """Return the name of the color whose segment of RGB values is the nearest."""

    def distance(name: str) -> float:
        low, high = COLORS[name]
        return min(
            sum(
                abs(c - (a + (b - a) * step / 20))
                for c, a, b in zip(layer.rgb, low, high, strict=True)
            )
            for step in range(21)
        )

    return min(COLORS, key=distance)


def test_answers_are_balanced_and_chance_is_known() -> None:
    for part in SUITE.parts:
        items = SUITE.items([part])
        kinds = {item.kind for item in items}
        for kind in kinds - {"line"}:
            counts = Counter(item.answers[0] for item in items if item.kind == kind)
            assert len(set(counts.values())) == 1 or part == "64x64"
            assert len(counts) == (2 if kind == "exists" else 4)
        if "_" not in part:
            chance = sum(item.chance for item in items) / len(items)
            assert chance == pytest.approx(0.25 if part == "2000x2000" else 0.3, abs=0.01)


def test_an_option_of_the_question_is_the_answer() -> None:
    for item in SUITE.frozen_items:
        if item.kind == "object":
            assert item.answers[0] in item.question
            assert item.question.count(",") == 2 and item.choices == 4


def test_style_fonts_and_patterns_are_declared_as_held_out() -> None:
    held_out = SUITE.header.held_out
    layers = [layer for item in SUITE.frozen_items for layer in picture_of(item).layers]
    styles = {layer.style for layer in layers if isinstance(layer, Icon)}
    assert styles == set(held_out["styles"]) == set(HELD_OUT_STYLES)
    fonts = {layer.font for layer in layers if isinstance(layer, Text)}
    assert fonts <= set(held_out["fonts"])
    starts = tuple(pattern.split("{")[0] for pattern in held_out["patterns"])
    assert all(item.question.startswith(starts) for item in SUITE.frozen_items)


# The suite and its generator --------------------------------------------------------------------


def test_the_reference_answers_are_correct() -> None:
    for item in SUITE.frozen_items:
        assert score_answer(item.metric, item.answers, item.answers[0]).is_correct


def test_the_blind_control_shows_another_item() -> None:
    for part in SUITE.blind_parts:
        pairs = zip(SUITE.items([part]), SUITE.items([part], blind=True), strict=True)
        same_answer = 0
        for item, blind in pairs:
            assert item.media != blind.media
            shown = next(i for i in SUITE.items([part]) if i.media == blind.media)
            same_answer += shown.answers == item.answers
        assert same_answer <= len(SUITE.items([part])) / 8


def test_file_is_frozen_and_the_generator_still_writes_it(tmp_path: Path) -> None:
    freeze.freeze(tmp_path / "any-size.jsonl")
    assert SUITE.digest == DIGEST
    assert (tmp_path / "any-size.jsonl").read_bytes() == freeze.FILE.read_bytes()
    assert freeze.FILE.stat().st_size < 1_000_000


@needs_dataset("named-pictures")
def test_every_part_can_be_drawn() -> None:
    for part in SUITE.parts:
        SUITE.check_part(part)
