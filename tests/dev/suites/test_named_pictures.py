"""The suite named-pictures: names, fair options, balanced scenes, tight boxes, the same file."""

from __future__ import annotations

from collections import Counter
from hashlib import sha256
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from dev.suites.named_pictures import FILE, NUM_SCENES, draw_part, freeze
from dev.suites.named_pictures.icons import CHOICES, WRONG_DRAWINGS
from dev.suites.named_pictures.names import (
    accepted_answers,
    are_confusable,
    plural_of,
    scene_names,
)
from dev.suites.named_pictures.scenes import (
    COMPARISONS,
    CORNERS,
    SCENE_PARTS,
    SIDES,
    STYLES,
    stands_out,
)
from qwen2vl.eval.runner.run import SuiteAnswer, score_item
from qwen2vl.eval.suites.frozen_suite import FrozenItem, open_frozen_suite
from qwen2vl.synth.compositing import Composite, Ground, Icon, draw_composite, icon_names
from tests.requirements import needs_dataset

# Another digest is another suite: all earlier scores are invalid.
DIGEST = "c4e2473aa3a3f2349e8da94c6ef04187e8748ec93eaf75fee103ed8cfdcddffa"
SUITE = open_frozen_suite("named-pictures")
OPEN_PARTS = ("openmoji", "emojione", "emojione_v1")
CHOICE_PARTS = tuple(f"{part}_choice" for part in OPEN_PARTS)


def items(part: str) -> list[FrozenItem]:
    return [item for item in SUITE.frozen_items if item.part == part]


def picture_of(item: FrozenItem) -> Composite:
    (picture,) = item.pictures
    assert isinstance(picture, Composite)
    return picture


def icons_of(item: FrozenItem) -> list[Icon]:
    return [layer for layer in picture_of(item).layers if isinstance(layer, Icon)]


def options_of(item: FrozenItem) -> list[str]:
    listed = item.question.removeprefix("Which of these is it: ").removesuffix("?")
    *first, last = listed.split(", ")
    return [*first, *last.split(" or ")]


def test_file_is_the_frozen_one() -> None:
    assert sha256(FILE.read_bytes()).hexdigest() == DIGEST == SUITE.digest


def test_parts_and_numbers_of_items() -> None:
    assert SUITE.parts == SUITE.blind_parts == (*OPEN_PARTS, *CHOICE_PARTS, *SCENE_PARTS)
    counts = Counter(item.part for item in SUITE.frozen_items)
    assert [counts[part] for part in OPEN_PARTS] == [718, 525, 447]
    assert [counts[part] for part in CHOICE_PARTS] == [718, 525, 447]
    assert {counts[part] for part in SCENE_PARTS} == {NUM_SCENES}


def test_every_basic_name_is_asked_once_with_its_own_style() -> None:
    for style, part in zip(STYLES, OPEN_PARTS, strict=True):
        drawn = {n.name for n in icon_names().values() if n.is_basic and style in n.icons}
        for asked in (items(part), items(f"{part}_choice")):
            shown = [icons_of(item) for item in asked]
            assert all(len(icons) == 1 and icons[0].style == style for icons in shown)
            names = sorted(icons[0].name for icons in shown)
            assert names == sorted(drawn - WRONG_DRAWINGS[style])
            assert all(i.answers[0] == icons_of(i)[0].name for i in asked)


def test_an_oracle_is_always_right_and_the_box_of_another_icon_is_wrong() -> None:
    for item in SUITE.items(SUITE.parts):
        assert score_item(item, SuiteAnswer(text=item.answers[0])).score == 1
        wrong = "<|box_start|>(0,0),(20,20)<|box_end|>" if item.box else "a submarine"
        assert score_item(item, SuiteAnswer(text=wrong)).score == 0


@pytest.mark.parametrize(
    ("name", "answers"),
    [
        ("dog face", {"dog face", "dog"}),
        ("red apple", {"red apple", "apple"}),
        ("eggplant", {"eggplant", "aubergine"}),
        ("woman\N{RIGHT SINGLE QUOTATION MARK}s hat", {"woman's hat", "hat"}),
    ],
)
def test_synonyms_are_accepted(name: str, answers: set[str]) -> None:
    assert answers <= set(accepted_answers(name))


def test_a_wider_class_is_not_accepted() -> None:
    assert "bird" not in accepted_answers("dove")
    assert "animal" not in accepted_answers("dog")


@pytest.mark.parametrize(
    "pair",
    [
        ("dog", "dog face"),
        ("closed book", "green book"),
        ("mouse", "computer mouse"),
        ("optical disk", "dvd"),
        ("ram", "ewe"),
    ],
)
def test_names_that_may_be_confused(pair: tuple[str, str]) -> None:
    assert are_confusable(*pair)
    assert are_confusable(*reversed(pair))
    assert not are_confusable(pair[0], "accordion")


def test_tables_name_known_objects() -> None:
    known = {icon.name for icon in icon_names().values() if icon.is_basic}
    assert set(scene_names()) <= known
    assert {name for name in known if are_confusable(name, name)} == known
    for name, plural in (("wolf", "wolves"), ("bus", "buses"), ("battery", "batteries")):
        assert plural_of(name) == plural


@pytest.mark.parametrize("part", CHOICE_PARTS)
def test_options_are_fair(part: str) -> None:
    positions: Counter[int] = Counter()
    for item in items(part):
        options = options_of(item)
        assert len(set(options)) == item.choices == CHOICES
        assert not any(are_confusable(*pair) for pair in combinations(options, 2))
        answer = item.answers[0]
        positions[options.index(answer)] += 1
        groups = [icon_names()[option].group for option in options if option != answer]
        near = [group == icon_names()[answer].group for group in groups]
        assert all(near) if item.kind == "same_group" else not any(near)
        fits = [option for option in options if set(accepted_answers(option)) & set(item.answers)]
        assert fits == [answer]
    assert max(positions.values()) - min(positions.values()) <= 2
    kinds = Counter(item.kind for item in items(part))
    assert abs(kinds["same_group"] - kinds["other_group"]) <= CHOICES


def test_icons_are_inside_their_picture_and_apart() -> None:
    for item in SUITE.frozen_items:
        picture, icons = picture_of(item), icons_of(item)
        for x1, y1, x2, y2 in (icon.box for icon in icons):
            assert 0 <= x1 < x2 <= picture.width and 0 <= y1 < y2 <= picture.height
            assert x2 - x1 == y2 - y1 >= 44
        for a, b in combinations([icon.box for icon in icons], 2):
            assert a[2] < b[0] or b[2] < a[0] or a[3] < b[1] or b[3] < a[1]


def test_scenes_vary_in_size_style_and_ground() -> None:
    for part in SCENE_PARTS:
        pictures = [picture_of(item) for item in items(part)]
        assert len({(p.width, p.height) for p in pictures}) >= 8
        assert all(224 <= side <= 640 for p in pictures for side in (p.width, p.height))
        styles = Counter(icons_of(item)[0].style for item in items(part))
        assert set(styles) == set(STYLES) and min(styles.values()) >= NUM_SCENES // 3
        assert {p.ground.kind for p in pictures} == {"plain", "gradient", "stripes", "noise"}
        assert 0.15 < np.mean([p.jpeg_quality > 0 for p in pictures]) < 0.45
        for item in items(part):
            names = {icon.name for icon in icons_of(item)}
            assert len({icon.style for icon in icons_of(item)}) == 1
            assert not any(are_confusable(*pair) for pair in combinations(sorted(names), 2))


def test_position_answers_are_right_and_balanced() -> None:
    first_named: Counter[tuple[str, bool]] = Counter()
    for item in items("scene_position"):
        _, axis, is_larger = COMPARISONS[item.kind]
        ordered = sorted(icons_of(item), key=lambda icon: icon.box[axis])
        assert ordered[0].box[axis + 2] <= ordered[1].box[axis]
        assert ordered[is_larger].name == item.answers[0]
        where = item.question.index(f"the {item.answers[0]}")
        other = item.question.index(f"the {ordered[not is_larger].name}")
        first_named[item.kind, where < other] += 1
    assert set(first_named.values()) == {NUM_SCENES // (2 * len(COMPARISONS))}


def test_counts_are_right_and_balanced() -> None:
    totals: dict[str, list[int]] = {}
    for item in items("scene_count"):
        plural = item.question.removeprefix("How many ").removesuffix(" are there?")
        counts = Counter(icon.name for icon in icons_of(item))
        (name,) = [name for name in counts if plural_of(name) == plural]
        assert str(counts[name]) == item.answers[0]
        totals.setdefault(item.answers[0], []).append(sum(counts.values()))
    assert {number: len(own) for number, own in totals.items()} == dict.fromkeys("12345", 40)
    assert all({6, 7, 8} == set(own) for own in totals.values())  # the total tells nothing


def test_named_places_are_right_and_balanced() -> None:
    asked: Counter[str] = Counter()
    for item in items("scene_name"):
        place = item.question.removeprefix("What is ").removesuffix("? Answer with its name only.")
        asked[place] += 1
        picture, icons = picture_of(item), {icon.name: icon.box for icon in icons_of(item)}
        x1, y1, x2, y2 = icons[item.answers[0]]
        x, y = (x1 + x2) / 2 / picture.width, (y1 + y2) / 2 / picture.height
        assert ("left" not in place or x < 0.36) and ("right" not in place or x > 0.64)
        assert ("top" not in place or y < 0.36) and ("bottom" not in place or y > 0.64)
        assert len(icons) == (2 if item.kind == "side" else 4)
    assert set(asked.values()) == {NUM_SCENES // (len(SIDES) + len(CORNERS))}


def test_chance_levels() -> None:
    for item in SUITE.items(SUITE.parts):
        if item.part in CHOICE_PARTS:
            assert item.chance == 1 / CHOICES
        elif item.part in ("scene_position", "scene_count"):
            assert item.chance == {"scene_position": 0.5, "scene_count": 0.2}[item.part]
        else:
            assert item.chance <= 0.06


def test_blind_control_shows_nothing_that_is_asked_for() -> None:
    own = {item.id: item for item in SUITE.items(SUITE.parts)}
    frozen = {item.id: item for item in SUITE.frozen_items}
    for item in SUITE.items(SUITE.parts, blind=True):
        assert item.media != own[item.id].media
        (picture,) = item.media.pictures
        shown = {layer.name for layer in picture.layers}
        question, asked = item.question, {icon.name for icon in icons_of(frozen[item.id])}
        if item.part in CHOICE_PARTS:
            asked = set(options_of(frozen[item.id]))
        elif item.part in ("scene_box", "scene_position"):
            asked = {name for name in asked if f"the {name}" in question}
        elif item.part == "scene_count":
            asked = {name for name in asked if f" {plural_of(name)} " in question}
        elif item.part == "scene_name":
            asked = {item.answers[0]}
        assert not any(are_confusable(a, b) for a in asked for b in shown), item.id


@needs_dataset("named-pictures")
def test_boxes_are_tight_around_the_ink() -> None:
    for item in items("scene_box")[:30]:
        assert item.box is not None
        (icon,) = [one for one in icons_of(item) if f"the {one.name}" in item.question]
        alpha = measure_alpha(icon, picture_of(item))
        rows, columns = np.nonzero(alpha > 100)
        seen = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        height, width = alpha.shape
        drawn = np.array(item.box) * (width, height, width, height)
        assert np.abs(drawn - seen).max() <= 1.1, item.id


def measure_alpha(icon: Icon, picture: Composite) -> NDArray[np.int16]:
    """Measure the opacity of an icon by what it leaves of a white and of a black ground."""
    white, black = (
        draw_composite(
            Composite(
                width=picture.width, height=picture.height, ground=Ground(rgb=rgb), layers=(icon,)
            )
        ).astype(np.int16)
        for rgb in ((255, 255, 255), (0, 0, 0))
    )
    return 255 - (white - black).max(axis=2)


@needs_dataset("named-pictures")
def test_generator_makes_the_same_items_again() -> None:
    assert draw_part("emojione_v1") == items("emojione_v1")


@needs_dataset("named-pictures")
@pytest.mark.parametrize("part", ["emojione_v1_choice", "scene_box"])
def test_small_draw_is_deterministic(part: str) -> None:
    drawn = draw_part(part, 16)
    assert drawn == draw_part(part, 16)
    assert len({item.id for item in drawn}) == 16


@needs_dataset("named-pictures")
def test_black_outline_stands_out_on_white_only() -> None:
    icon = Icon(style="openmoji", name="snowflake", box=(0, 0, 80, 80))
    assert stands_out(icon, Image.new("RGB", (80, 80), "white"))
    assert not stands_out(icon, Image.new("RGB", (80, 80), "black"))


@pytest.mark.slow
@needs_dataset("named-pictures")
def test_generator_writes_the_same_file(tmp_path: Path) -> None:
    freeze(tmp_path / "again.jsonl")
    assert (tmp_path / "again.jsonl").read_bytes() == FILE.read_bytes()
