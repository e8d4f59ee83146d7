"""The suite honesty: neither the question nor the style of a picture tells whether it answers."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable
from itertools import combinations, pairwise
from pathlib import Path

import pytest

from dev.suites import honesty as freeze
from dev.suites.honesty import PATTERNS, REFUSALS
from qwen2vl.eval.metrics import normalize_answer
from qwen2vl.eval.suites.frozen_suite import FrozenItem, open_frozen_suite
from qwen2vl.eval.suites.scoring import score_answer
from qwen2vl.synth.compositing import Composite, Icon, Photo, ShapeLayer, Text, draw_composite
from qwen2vl.synth.compositing.icons import HELD_OUT_STYLES
from qwen2vl.synth.compositing.text import text_extent
from qwen2vl.synth.fonts import JUDGE_FAMILIES
from qwen2vl.synth.strings import load_words
from qwen2vl.synth.wordings import load_wordings
from tests.requirements import needs_dataset

# Another digest is another suite: all earlier scores are invalid.
DIGEST = "337983275949ad2ff5a5915e5f2a1d86bfa040bb7c80e112886f7c8159a0ea9c"
SUITE = open_frozen_suite("honesty")
HELD_OUT = SUITE.header.held_out
ALL_PATTERNS = [pattern for patterns in PATTERNS.values() for pattern in patterns]
EXPRESSIONS = {
    pattern: re.compile(re.escape(pattern).replace(r"\{0\}", ".+").replace(r"\{1\}", ".+"))
    for pattern in ALL_PATTERNS
}


def items_of(part: str) -> list[FrozenItem]:
    return [item for item in SUITE.frozen_items if item.part == part]


def picture_of(item: FrozenItem) -> Composite:
    (picture,) = item.pictures
    assert isinstance(picture, Composite)
    return picture


def pattern_of(item: FrozenItem) -> str:
    return next(p for p, expression in EXPRESSIONS.items() if expression.fullmatch(item.question))


def style_of(item: FrozenItem) -> tuple[Hashable, ...]:
    """Return what a model could go by without reading the question or finding an object."""
    picture = picture_of(item)
    photos = [layer.file for layer in picture.layers if isinstance(layer, Photo)]
    size, ground = (picture.width, picture.height), picture.ground
    # Stripes and checks ask for each other; their cells and colors are the same.
    kind = "pattern" if item.kind == "pattern" else ground.kind
    return size, kind, ground.cell, ground.rgb, ground.rgb2, picture.jpeg_quality, *photos


def best_accuracy(items: list[FrozenItem], feature: Callable[[FrozenItem], Hashable]) -> float:
    """Return how often a feature alone tells at best whether an item is answerable."""
    counts: dict[Hashable, Counter[bool]] = defaultdict(Counter)
    for item in items:
        counts[feature(item)][bool(item.answers)] += 1
    return sum(max(count.values()) for count in counts.values()) / len(items)


# Whether an answer exists ---------------------------------------------------------------------


def test_half_of_each_kind_is_unanswerable() -> None:
    kinds: dict[tuple[str, str], Counter[bool]] = defaultdict(Counter)
    for item in SUITE.frozen_items:
        kinds[item.part, item.kind][bool(item.answers)] += 1
    assert all(count[True] == count[False] >= 8 for count in kinds.values())


@pytest.mark.parametrize("part", SUITE.parts)
def test_sizes_and_backgrounds_and_patterns_are_the_same_on_both_sides(part: str) -> None:
    sides: dict[bool, Counter[Hashable]] = {True: Counter(), False: Counter()}
    for item in items_of(part):
        sides[bool(item.answers)][style_of(item), pattern_of(item)] += 1
    assert sides[True] == sides[False]


@pytest.mark.parametrize(
    ("part", "by_question", "by_number_of_layers"),
    [
        ("absent", 0.5, 0.5),
        ("blank", 0.6, 0.83),  # most of what is blank does not answer
        ("noise", 0.5, 0.83),
        ("photos", 0.5, 0.7),
        ("knowledge", 0.62, 0.5),  # nothing can show what is hidden behind a shape
        ("other_subjects", 0.54, 0.54),
    ],
)
def test_what_question_and_picture_tell_alone(
    part: str, by_question: float, by_number_of_layers: float
) -> None:
    items = items_of(part)
    assert best_accuracy(items, lambda item: item.question) <= by_question
    assert best_accuracy(items, lambda item: len(picture_of(item).layers)) <= by_number_of_layers


@pytest.mark.parametrize("part", ["absent", "knowledge"])
def test_every_picture_answers_one_question_and_not_another(part: str) -> None:
    assert best_accuracy(items_of(part), lambda item: item.pictures) == 0.5


def test_order_tells_nothing() -> None:
    for part in SUITE.parts:
        answerable = [bool(item.answers) for item in items_of(part)]
        half = len(answerable) // 2
        assert abs(sum(answerable[:half]) - half / 2) < 0.1 * len(answerable)
        repeats = sum(a == b for a, b in pairwise(answerable))
        assert 0.35 < repeats / len(answerable) < 0.65


# Answers and scores ---------------------------------------------------------------------------


def accuracy(answer_of: Callable[[FrozenItem], str]) -> float:
    """Score a model that knows the file, through what the runner sees."""
    by_id = {item.id: item for item in SUITE.frozen_items}
    listed = SUITE.items(SUITE.parts)
    scores = [score_answer(i.metric, i.answers, answer_of(by_id[i.id])).is_correct for i in listed]
    return sum(scores) / len(scores)


def test_oracle_and_models_that_always_or_never_refuse() -> None:
    assert accuracy(lambda item: item.answers[0] if item.answers else REFUSALS[0]) == 1
    assert all(accuracy(lambda _, text=text: text) == 0.5 for text in REFUSALS)
    assert accuracy(lambda item: item.answers[0] if item.answers else "red") == 0.5
    assert {item.chance for item in SUITE.items(SUITE.parts)} == {0.5}


def test_refusals_are_few_general_sentences_that_no_question_has_as_its_answer() -> None:
    normalized = {normalize_answer(text) for text in REFUSALS}
    assert SUITE.header.refusals == REFUSALS
    assert 12 <= len(REFUSALS) == len(normalized) <= 20
    accepted = {normalize_answer(answer) for item in SUITE.frozen_items for answer in item.answers}
    assert not accepted & (normalized | {"yes", "no", "none", "nothing"})
    # Nano has a token for each byte.
    assert all(text.isascii() and len(text) < SUITE.max_tokens for text in REFUSALS)


def test_no_answer_is_much_more_frequent_than_others_of_its_kind() -> None:
    answers: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for item in SUITE.frozen_items:
        answers[item.part, item.kind].update(item.answers[:1])
    for (_, kind), count in answers.items():
        limit = 0.55 if kind in ("side", "sticker") else 0.34
        assert max(count.values()) <= limit * count.total()


# What the suite holds -------------------------------------------------------------------------


def test_ids_parts_and_blind_control() -> None:
    for part in SUITE.parts:
        ids = [item.id for item in items_of(part)]
        assert ids == [f"{part}/{index:03d}" for index in range(len(ids))]
        assert 140 <= len(ids) <= 160
    sighted = {item.id: item.media for item in SUITE.items(SUITE.parts)}
    assert all(item.media != sighted[item.id] for item in SUITE.items(SUITE.parts, blind=True))


def test_held_out_lists_are_complete() -> None:
    layers = [layer for item in SUITE.frozen_items for layer in picture_of(item).layers]
    icons = [layer for layer in layers if isinstance(layer, Icon)]
    texts = [layer for layer in layers if isinstance(layer, Text)]
    assert {icon.style for icon in icons} == set(HELD_OUT["styles"]) < set(HELD_OUT_STYLES)
    assert {icon.name for icon in icons} <= set(HELD_OUT["absent_objects"])
    assert {layer.file for layer in layers if isinstance(layer, Photo)} == set(HELD_OUT["photos"])
    judged = {file for _, files in JUDGE_FAMILIES.values() for file in files}
    assert {text.font for text in texts} == set(HELD_OUT["fonts"]) < judged
    words = {word for text in texts for word in re.findall("[a-z]{3,}", text.text.lower())}
    notes = {"price", "age", "weight", "years", "made", "owner", "drawn"}
    assert words - notes <= {word.lower() for word in HELD_OUT["words"]}
    assert not {word.lower() for word in HELD_OUT["words"]} & set(load_words())


def test_question_patterns_are_listed_and_no_wordings_of_training() -> None:
    assert list(HELD_OUT["patterns"]) == ALL_PATTERNS
    assert all(pattern_of(item) for item in SUITE.frozen_items)  # or it raises StopIteration
    wordings = {normalize_answer(w).rstrip("?") for ws in load_wordings().values() for w in ws}
    assert not {normalize_answer(pattern).rstrip("?") for pattern in ALL_PATTERNS} & wordings
    # Filled in, a pattern is no wording either.
    questions = {normalize_answer(item.question).rstrip("?") for item in SUITE.frozen_items}
    assert not questions & wordings


def boxes_of(picture: Composite) -> list[tuple[int, int, int, int]]:
    """Return the boxes of objects, and those of the ink of lines."""
    boxes = []
    for layer in picture.layers:
        if isinstance(layer, Text):
            left, top, right, bottom = text_extent(layer.text, layer.font, layer.size)
            boxes.append((layer.x + left, layer.y + top, layer.x + right, layer.y + bottom))
        elif not isinstance(layer, Photo):
            boxes.append(layer.box)
    return boxes


def test_everything_is_inside_the_picture_and_large_enough() -> None:
    for item in SUITE.frozen_items:
        picture = picture_of(item)
        assert min(picture.width, picture.height) >= 64
        assert max(picture.width, picture.height) <= 640
        for x1, y1, x2, y2 in boxes_of(picture):
            assert 0 <= x1 < x2 <= picture.width, item.id
            assert 0 <= y1 < y2 <= picture.height, item.id
        icons = [layer.box for layer in picture.layers if isinstance(layer, Icon)]
        assert all(box[2] - box[0] >= 20 for box in icons), item.id
        assert all(text.size >= 13 for text in picture.layers if isinstance(text, Text))


def test_objects_do_not_overlap() -> None:
    for item in SUITE.frozen_items:
        if item.kind == "figure":  # figures without a name are shapes that overlap
            continue
        for first, second in combinations(boxes_of(picture_of(item)), 2):
            x1, x2 = max(first[0], second[0]), min(first[2], second[2])
            y1, y2 = max(first[1], second[1]), min(first[3], second[3])
            overlap = (x1, y1, x2, y2)
            # A number is inside its shape, a word or an icon inside its label.
            assert x1 >= x2 or y1 >= y2 or overlap in (first, second), item.id


def test_what_is_asked_for_is_there_only_where_there_is_an_answer() -> None:
    for item in SUITE.frozen_items:
        layers = picture_of(item).layers
        shown = {layer.name for layer in layers if isinstance(layer, Icon)}
        shown |= {layer.kind for layer in layers if isinstance(layer, ShapeLayer)}
        texts = {layer.text for layer in layers if isinstance(layer, Text)}
        if item.kind in ("side", "neighbor", "sticker", "color_on_photo"):
            is_shown = any(re.search(rf"the {name}\b", item.question) for name in shown)
            assert is_shown == bool(item.answers), item.id
        if item.answers and item.kind in ("word", "word_of_color", "number", "name", "digit"):
            assert texts & set(item.answers), item.id
        if item.kind in ("word", "digit") and not item.answers:
            assert not texts, item.id


# The generator --------------------------------------------------------------------------------


def test_file_is_frozen_and_the_generator_still_writes_it(tmp_path: Path) -> None:
    freeze.freeze(tmp_path / "honesty.jsonl")
    assert SUITE.digest == DIGEST
    assert (tmp_path / "honesty.jsonl").read_bytes() == freeze.FILE.read_bytes()
    assert freeze.FILE.stat().st_size < 1_000_000


@needs_dataset("named-pictures")
@needs_dataset("photos")
def test_pictures_of_all_parts_can_be_drawn() -> None:
    for part in SUITE.parts:
        SUITE.check_part(part)
        for item in items_of(part)[:6]:
            picture = picture_of(item)
            assert draw_composite(picture).shape == (picture.height, picture.width, 3)
