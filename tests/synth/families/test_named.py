"""Named icons: answers are true of the picture, unambiguous, and evenly distributed."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from random import Random

import numpy as np
import pytest

from qwen2vl import grounding
from qwen2vl.synth.compositing import Composite, Icon, draw_composite, icon_names
from qwen2vl.synth.compositing.icon_sampling import STYLE_FAMILIES
from qwen2vl.synth.compositing.icons import TRAINING_STYLES, load_drawings, training_styles
from qwen2vl.synth.families import named
from qwen2vl.synth.grammar.expansion import count_patterns, list_patterns, load_templates
from qwen2vl.synth.objects import ink_box
from qwen2vl.synth.spec import FamilySample, Mixture, Question
from tests.requirements import needs_dataset

pytestmark = needs_dataset("named-pictures")

MIXTURE = Mixture(max_questions=4)
TASKS = [task for task in load_templates() if task.startswith("named_")]
LISTS = ("named_list", "named_list_line")
# The longest name at each place, in lower case: "black cat", not "cat".
NAME = re.compile(
    rf"\b(?:{'|'.join(sorted(map(str.lower, icon_names()), key=len, reverse=True))})(?!\w)"
)
SIDES = {"right of", "left of", "above", "below"}
ORDINALS = "first second third fourth fifth sixth seventh eighth".split()


def samples(count: int, mixture: Mixture = MIXTURE) -> Iterator[FamilySample]:
    pytest.importorskip("resvg_py")
    rng = Random(count)
    return (named.sample(rng, mixture) for _ in range(count))


@cache
def many_samples() -> list[FamilySample]:
    return list(samples(360))


def picture_of(sampled: FamilySample) -> Composite:
    (picture,) = sampled.pictures
    assert isinstance(picture, Composite)
    return picture


def icons_of(sampled: FamilySample) -> list[Icon]:
    layers = picture_of(sampled).layers
    icons = [layer for layer in layers if isinstance(layer, Icon)]
    assert len(icons) == len(layers) > 0
    return icons


def rows_of(sampled: FamilySample) -> list[list[Icon]]:
    """Return the icons row by row: those of a row follow each other to the right."""
    rows: list[list[Icon]] = []
    for icon in icons_of(sampled):
        if rows and icon.box[0] > rows[-1][-1].box[0] and icon.box[1] < rows[-1][0].box[3]:
            rows[-1].append(icon)
        else:
            rows.append([icon])
    return rows


def test_icons_lie_in_rows_and_columns_of_equal_length() -> None:
    shapes: Counter[tuple[int, int]] = Counter()
    for sampled in many_samples():
        picture, rows = picture_of(sampled), rows_of(sampled)
        columns = len(rows[0])
        shapes[len(rows), columns] += 1
        assert len({len(row) for row in rows}) == 1
        for number, row in enumerate(rows):
            for column, icon in enumerate(row):
                x1, y1, x2, y2 = icon.box
                assert number * picture.height / len(rows) - 1 <= y1 < y2
                assert y2 <= (number + 1) * picture.height / len(rows) + 1
                assert column * picture.width / columns - 1 <= x1 < x2
                assert x2 <= (column + 1) * picture.width / columns + 1
                assert min(x1, y1) >= 0 and x2 <= picture.width and y2 <= picture.height
    assert max(map(max, shapes)) <= 8 and max(rows * columns for rows, columns in shapes) <= 16
    assert shapes[1, 1] > 30 and len(shapes) > 8


def test_names_in_answers_are_those_of_the_icons() -> None:
    tasks: Counter[str] = Counter()
    for sampled in many_samples():
        rows = rows_of(sampled)
        assert 1 <= len(sampled.questions) <= 4
        assert len({question.text for question in sampled.questions}) == len(sampled.questions)
        for question in sampled.questions:
            tasks[question.task] += 1
            check_names(question, [[icon.name for icon in row] for row in rows])
    assert tasks.keys() == set(TASKS)


def check_names(question: Question, rows: list[list[str]]) -> None:
    """Check the answers that numbers or names in the question determine."""
    text, answer, task = question.text.lower(), question.answer, question.task
    names = [name for row in rows for name in row]
    numbers = [int(number) for number in re.findall(r"(?:row|column) (\d+)", text)]
    if task in LISTS:
        assert answer == ", ".join(names)
    elif task == "named_row":
        assert answer == ", ".join(rows[numbers[0] - 1])
    elif task == "named_column":
        assert answer == ", ".join(row[numbers[0] - 1] for row in rows)
    elif task in ("named_cell", "named_cell_choice"):
        row, column = (
            int(re.search(rf"{axis} (\d+)", text)[1])  # type: ignore[index]
            for axis in ("row", "column")
        )
        assert answer == rows[row - 1][column - 1]
    elif task == "named_corner":
        row, column = (-1 if word in text else 0 for word in ("bottom", "right corner"))
        assert answer == rows[row][column]
    elif task == "named_nth":
        (ordinal,) = re.findall(rf"\b({'|'.join(ORDINALS)}|last)\b", text)
        number = len(names) - 1 if ordinal == "last" else ORDINALS.index(ordinal)
        is_end = re.search(r"\b(right|bottom)\b", text)
        assert answer == (names[::-1] if is_end else names)[number]
    elif task == "named_where":
        row, column = (int(number) - 1 for number in re.findall(r"\d+", answer))
        assert rows[row][column].lower() in text and names.count(rows[row][column]) == 1
    elif task in ("named_open", "named_choice", "named_pair"):
        assert [answer] == names


def test_neighbors_counts_and_presence_are_those_of_the_picture() -> None:
    answers: dict[str, Counter[str]] = {task: Counter() for task in TASKS}
    for sampled in many_samples():
        rows = [[icon.name.lower() for icon in row] for row in rows_of(sampled)]
        names = [name for row in rows for name in row]
        for question in sampled.questions:
            answers[question.task][question.answer] += 1
            told = NAME.findall(question.text.lower())
            if question.task == "named_next":
                row, column = divmod(names.index(told[0]), len(rows[0]))
                (word,) = SIDES & set(re.findall(r"right of|left of|above|below", question.text))
                row += {"above": -1, "below": 1}.get(word, 0)
                column += {"left of": -1, "right of": 1}.get(word, 0)
                assert rows[row][column] == question.answer.lower() and min(row, column) >= 0
            elif question.task == "named_count":
                assert question.answer == str(names.count(told[0]))
            elif question.task in ("named_exists", "named_is"):
                assert (question.answer == "yes") == (told[0] in names), question.text
    for task in ("named_exists", "named_is"):
        assert 0.35 < answers[task]["yes"] / answers[task].total() < 0.65
    assert len(answers["named_count"]) >= 4


def test_boxes_are_those_of_the_ink() -> None:
    count = 0
    for sampled in many_samples():
        picture = picture_of(sampled)
        size = (picture.height, picture.width)
        boxes = {ink_box(icon): icon.name for icon in icons_of(sampled)}
        for question in sampled.questions:
            if question.task == "named_find":
                assert question.box is not None
                (found,) = grounding.parse(question.answer)
                assert found.phrase == boxes[question.box]
                assert boxes[question.box].lower() in question.text.lower()
                assert found.shape == grounding.Box.from_pixels(question.box, size)
                count += 1
            elif question.task == "named_box":
                (found,) = grounding.parse(question.text)
                assert isinstance(found.shape, grounding.Box)
                written = [grounding.Box.from_pixels(box, size) for box in boxes]
                assert list(boxes.values())[written.index(found.shape)] == question.answer
                count += 1
    assert count > 30


def test_no_question_about_one_of_several_icons_is_answered_by_an_earlier_one() -> None:
    for sampled in many_samples():
        first, *others = sampled.questions
        if first.task in LISTS or len(icons_of(sampled)) == 1:
            continue
        told = first.text + first.answer
        for question in others:
            if question.answer in icon_names():
                assert question.answer not in told
            told += question.text + question.answer


def test_options_are_equally_likely_and_share_no_word() -> None:
    rng, places = Random(5), Counter[int]()
    for _ in range(150):
        question = named._choice(rng, "black cat", Mixture())
        # "Pick the fitting label" has two names itself.
        options = [n for n in NAME.findall(question.text.lower()) if n not in ("pick", "label")]
        if len(options) == question.choices == 4:
            words = [word for name in options for word in set(name.split())]
            assert len(words) == len(set(words)) and question.answer == "black cat"
            places[options.index("black cat")] += 1
    assert set(places) == {0, 1, 2, 3} and max(places.values()) < 3 * min(places.values())


def test_names_and_style_families_are_about_equally_frequent() -> None:
    names: Counter[str] = Counter()
    families: Counter[int] = Counter()
    lines: Counter[str] = Counter()
    for sampled in many_samples():
        for icon in icons_of(sampled):
            assert icon.style in training_styles(icon.name)
            names[icon.name] += 1
            lines[icon.lines] += 1
            (family,) = (i for i, styles in enumerate(STYLE_FAMILIES) if icon.style in styles)
            families[family] += 1
            if icon.name in load_drawings()["colored"]:
                assert icon.tone == (0, 100, 100) and icon.lines != "line_art"
    assert {style for styles in STYLE_FAMILIES for style in styles} == set(TRAINING_STYLES)
    assert min(families.values()) > 0.04 * families.total()
    assert max(families.values()) < 0.4 * families.total()
    basic = [names[name] for name, row in icon_names().items() if row.is_basic]
    others = [names[name] for name, row in icon_names().items() if not row.is_basic]
    assert sum(count == 0 for count in basic) < 110
    assert np.mean(basic) > 2.5 * np.mean(others) > 0
    assert 0.1 < lines["outlines"] / lines.total() < 0.3 and lines["line_art"] > 0


@pytest.mark.parametrize(
    ("sides", "aspect"), [((56, 56), 1.0), ((56, 64), 20.0), ((700, 900), 20.0)]
)
def test_pictures_of_any_size_are_drawn(sides: tuple[int, int], aspect: float) -> None:
    mixture = replace(MIXTURE, picture_side=sides, max_aspect=aspect)
    for sampled in samples(2, mixture):
        picture = picture_of(sampled)
        assert draw_composite(picture).shape == (picture.height, picture.width, 3)


def test_icons_are_visible() -> None:
    for sampled in samples(30, replace(MIXTURE, degraded_share=0.0)):
        picture = picture_of(sampled)
        empty = draw_composite(replace(picture, layers=())).astype(int)
        difference = np.abs(draw_composite(picture) - empty).max(axis=2)
        for icon in icons_of(sampled):
            x1, y1, x2, y2 = icon.box
            assert (difference[y1:y2, x1:x2] >= 24).mean() > 0.03, icon


def test_a_picture_with_one_question_has_one() -> None:
    for sampled in samples(60, replace(MIXTURE, max_questions=1)):
        assert len(sampled.questions) == 1


def test_held_out_wordings_are_other_ones() -> None:
    train = {q.text for s in samples(60) for q in s.questions if q.task == "named_open"}
    mixture = replace(MIXTURE, split="held_out")
    held_out = {q.text for s in samples(61, mixture) for q in s.questions if q.task == "named_open"}
    assert min(len(train), len(held_out)) > 10 and not train & held_out


def test_every_task_has_many_patterns_that_are_typed_properly() -> None:
    for task in TASKS:
        assert count_patterns(task) > 100, task
        for template in load_templates()[task]:
            for pattern in list_patterns(template):
                assert "  " not in pattern and not re.search(r"[\[\]]| [,.?:]", pattern), pattern
                assert pattern[-1] in ".?}" and "<picture>" not in pattern, pattern


def test_no_pattern_belongs_to_two_tasks() -> None:
    owners: dict[str, str] = {}
    for task in TASKS:
        for template in load_templates()[task]:
            for pattern in set(list_patterns(template)):
                assert owners.setdefault(pattern, task) == task, pattern
