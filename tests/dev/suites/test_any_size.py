"""The suite any-size: the same items on every canvas, and pictures that are not shrunk."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from functools import cache
from itertools import combinations
from pathlib import Path

import pytest

from dev.suites import any_size as freeze
from dev.suites.any_size.canvases import ABSOLUTE_SIDE, CANVASES, Canvas
from dev.suites.any_size.items import KINDS, BaseItem, sample_items
from qwen2vl.eval.suites.frozen_suite import FrozenItem, open_frozen_suite
from qwen2vl.eval.suites.scoring import answer_iou, score_answer
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
DIGEST = "707127e666bd1113b244ba34269132e0e12e60f84fdf7f21f56c41c974ff4075"
SUITE = open_frozen_suite("any-size")
UNRESIZED = [part for part in SUITE.parts if part.endswith("_unresized")]
BASES = sample_items(freeze.SEED)
LARGE = ("1600x1200", "2000x2000")  # shrunk at nano's limit of pixels


def items_of(part: str) -> list[FrozenItem]:
    return [item for item in SUITE.frozen_items if item.part == part]


def picture_of(item: FrozenItem) -> Composite:
    (picture,) = item.pictures
    assert isinstance(picture, Composite)
    return picture


def number_of(item: FrozenItem) -> int:
    return int(item.id.removeprefix(f"{item.part}/"))


def base_of(item: FrozenItem) -> BaseItem:
    number = number_of(item) - freeze.FIRST_NUMBERS[item.kind]
    return BASES[item.kind][number]


@cache
def nano() -> Processor:
    return load_processor(resolve_model("nano"))


def prepare(part: str, index: int = 0) -> ModelInput:
    """Draw an item's picture, and preprocess it as nano does."""
    return nano()(SUITE.messages(SUITE.items([part])[index]))


# Canvases and limits of pixels ----------------------------------------------------------------


def test_pictures_have_the_size_of_their_part() -> None:
    for item in SUITE.frozen_items:
        size = re.sub("^(find|line)_|_unresized$", "", item.part)
        assert f"{picture_of(item).width}x{picture_of(item).height}" == size
    aspects = [canvas.width / canvas.height for canvas in CANVASES]
    assert min(aspects) == 0.1 and max(aspects) == 20
    sides = [side for canvas in CANVASES for side in (canvas.width, canvas.height)]
    assert min(sides) == 64 and max(sides) == 2000


@pytest.mark.parametrize("canvas", CANVASES, ids=lambda canvas: canvas.name)
def test_only_large_canvases_are_shrunk_and_they_have_parts_without(canvas: Canvas) -> None:
    for prefix in ("", "find_", "line_"):
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
    parts = [part for part in SUITE.parts if part.endswith("2000x2000_unresized")]
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


def test_parts_have_enough_items_for_small_standard_errors() -> None:
    """Of 120 and 48 items, a share of 90 % has a standard error of 3 and 4 points."""
    counts = Counter(item.part for item in SUITE.frozen_items)
    named = {canvas.name: counts[canvas.name] for canvas in CANVASES}
    fewer = {"64x64": 102, "1024x768": 64, "200x2000": 64, "1600x1200": 48, "2000x2000": 32}
    assert named == {canvas.name: 120 for canvas in CANVASES} | fewer
    finds = {canvas.name: counts[f"find_{canvas.name}"] for canvas in CANVASES}
    assert finds == {name: 24 if name in ("1024x768", *LARGE) else 48 for name in finds}
    lines = {canvas.name: counts[f"line_{canvas.name}"] for canvas in CANVASES}
    fewer = {"64x64": 9, "112x112": 26, "100x1000": 23, "200x2000": 31}  # what they hold
    fewer |= {"1024x768": 16, "1600x1200": 16, "2000x2000": 8}
    assert lines == {canvas.name: 32 for canvas in CANVASES} | fewer
    assert {part: counts[part] for part in UNRESIZED} == {
        "1600x1200_unresized": 32,
        "find_1600x1200_unresized": 24,
        "line_1600x1200_unresized": 8,
        "2000x2000_unresized": 12,
        "find_2000x2000_unresized": 8,
        "line_2000x2000_unresized": 8,
    }


def test_items_of_a_number_are_the_same_on_every_canvas() -> None:
    by_number: dict[tuple[str, int], list[FrozenItem]] = defaultdict(list)
    for item in SUITE.frozen_items:
        by_number[item.kind, number_of(item)].append(item)
    assert len(by_number) == 120 + 48 + 32
    for (kind, _), same in by_number.items():
        assert len({(item.question, item.metric) for item in same}) == 1
        assert len({item.answers for item in same}) == 1 or kind == "find"
        assert len({picture_of(item).ground for item in same}) == 1
        # What is drawn, without its place; text has the same size everywhere.
        drawn = {tuple(_identity(layer) for layer in picture_of(item).layers) for item in same}
        assert len(drawn) == 1
        assert len(same) >= 6


def test_only_what_a_canvas_cannot_hold_is_left_out() -> None:
    shown = {(item.part, item.kind, number_of(item)) for item in SUITE.frozen_items}
    for kind in (*KINDS, "find"):
        first = freeze.FIRST_NUMBERS[kind]
        prefix = "find_" if kind == "find" else ""
        for canvas in CANVASES:
            for index, base in enumerate(BASES[kind][: canvas.counts[kind]]):
                is_shown = (f"{prefix}{canvas.name}", kind, first + index) in shown
                is_crowded = base.is_absolute and (len(base.layers) > 1 or kind == "count")
                assert is_shown != (canvas.name == "64x64" and is_crowded and kind != "find")


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
    by_number = {number_of(item): item for item in items_of(other)}
    for item in items_of(part):
        default = by_number[number_of(item)]
        assert item.pictures == default.pictures and item.question == default.question
        assert item.max_pixels is not None and default.max_pixels is None


def test_sizes_are_absolute_or_a_share_of_the_canvas() -> None:
    shares: set[float] = set()
    sizes: dict[str, Counter[bool]] = defaultdict(Counter)
    for item in SUITE.frozen_items:
        picture, base = picture_of(item), base_of(item)
        if item.kind == "line":
            continue
        sizes[item.part][base.is_absolute] += 1
        short = min(picture.width, picture.height)
        for layer in picture.layers:
            box = _box(layer)
            side = box[2] - box[0]
            assert side == box[3] - box[1]
            assert side >= (32 if isinstance(layer, Icon) else 16)
            if not base.is_absolute:
                shares.add(round(side / short, 2))
            elif item.kind != "find" or short >= 3 * ABSOLUTE_SIDE:
                assert side == ABSOLUTE_SIDE
    assert min(shares) <= 0.05 and max(shares) >= 0.9
    sizes.pop("64x64")  # cannot hold several that are absolute
    assert all(abs(count[True] - count[False]) <= 2 for count in sizes.values())


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
        elif item.kind == "find":
            assert sum(f"the {name}" in item.question for name in names) == 1
            assert f"the {names[0]}" in item.question  # the shape of the box
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


def test_boxes_are_those_of_the_shape_to_find_on_the_canvas() -> None:
    for item in SUITE.frozen_items:
        assert (item.box is not None) == (item.kind == "find") == (item.metric == "box_iou")
        if item.box is None:
            continue
        picture = picture_of(item)
        size = (picture.width, picture.height) * 2
        pixels = [fraction * length for fraction, length in zip(item.box, size, strict=True)]
        assert pixels == pytest.approx(_box(picture.layers[0]), abs=0.1)
        assert answer_iou(item.box, item.answers[0]) > 0.8  # thousandths of thin canvases


def test_answers_are_balanced_and_chance_is_known() -> None:
    for part in SUITE.parts:
        items = SUITE.items([part])
        chance = sum(item.chance for item in items) / len(items)
        if part.startswith("find_"):
            assert chance < 0.17, part
            continue
        for kind in {item.kind for item in items} & {"shape", "color", "exists", "count"}:
            counts = Counter(item.answers[0] for item in items if item.kind == kind)
            assert len(set(counts.values())) == 1, (part, kind)
            assert len(counts) == {"shape": 6, "color": 8, "exists": 2, "count": 4}[kind]
        if not part.startswith("line_"):
            assert chance == pytest.approx(0.25, abs=0.01)


def test_objects_are_answers_once_and_wrong_options_three_times() -> None:
    questions = [base.question for base in BASES["object"]]
    answers = [base.answers[0] for base in BASES["object"]]
    assert len(set(answers)) == len(answers) == 24
    for answer in answers:
        assert sum(bool(re.search(rf"\b{answer}\b", one)) for one in questions) == 4


def test_wordings_and_sizes_do_not_tell_the_answer() -> None:
    for kind in ("shape", "color", "exists", "count"):
        answers = Counter(base.answers[0] for base in BASES[kind])
        for wording in (0, 1):
            start = freeze.HELD_OUT_QUESTIONS[kind][wording].split("{")[0]
            asked = [base for base in BASES[kind] if base.question.startswith(start)]
            assert len(asked) == 12
            told = Counter(base.answers[0] for base in asked)
            assert all(abs(told[one] - number / 2) <= 0.5 for one, number in answers.items())
        large = Counter(base.answers[0] for base in BASES[kind] if base.is_absolute)
        assert all(abs(large[one] - number / 2) <= 0.5 for one, number in answers.items())


def test_finds_have_one_to_three_shapes_that_share_a_color_or_a_kind() -> None:
    for canvas in CANVASES:
        items = items_of(f"find_{canvas.name}")
        numbers = Counter(len(picture_of(item).layers) for item in items)
        assert set(numbers) == {1, 2, 3} and len(set(numbers.values())) == 1
        asked = Counter(item.question.split("the ")[0].split("<")[0] for item in items)
        assert len(asked) == 3 and max(asked.values()) - min(asked.values()) <= len(items) // 6
    for base in BASES["find"]:
        (color, kind), *others = [layer.name.split() for layer in base.layers]
        assert all((one[0] == color) != (one[1] == kind) for one in others)


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
    asked = [item for item in SUITE.frozen_items if item.kind != "find"]
    assert all(item.question.startswith(starts) for item in asked)


# The suite and its generator --------------------------------------------------------------------


def test_the_reference_answers_are_correct() -> None:
    for item in SUITE.frozen_items:
        score = score_answer(item.metric, item.answers, item.answers[0], box=item.box)
        assert score.is_correct


def test_the_blind_control_shows_another_item() -> None:
    for part in SUITE.blind_parts:
        pairs = zip(SUITE.items([part]), SUITE.items([part], blind=True), strict=True)
        same_answer = 0
        for item, blind in pairs:
            assert item.media != blind.media
            shown = next(i for i in SUITE.items([part]) if i.media == blind.media)
            same_answer += shown.answers == item.answers
        assert same_answer == 0


def test_file_is_frozen_and_the_generator_still_writes_it(tmp_path: Path) -> None:
    freeze.freeze(tmp_path / "any-size.jsonl")
    assert SUITE.digest == DIGEST
    assert (tmp_path / "any-size.jsonl").read_bytes() == freeze.FILE.read_bytes()
    assert freeze.FILE.stat().st_size < 1_000_000


@needs_dataset("named-pictures")
def test_every_part_can_be_drawn() -> None:
    for part in SUITE.parts:
        SUITE.check_part(part)
