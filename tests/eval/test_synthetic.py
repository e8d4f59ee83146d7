"""Synthetic tasks: scoring of answers, chance levels, and the three transforms of cases."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from qwen2vl.eval.synthetic import (
    EvalCase,
    SyntheticTask,
    build_cases,
    chance_levels,
    is_correct,
    pad_to_aspect_ratio,
    shuffle_frames,
    with_mismatched_images,
)
from qwen2vl.grounding import Box
from qwen2vl.synth import Mixture, Question, Spec, sample
from qwen2vl.synth.fonts import BUNDLED_FAMILIES, JUDGE_PACKAGES, FontError
from qwen2vl.synth.spec import Line, Scene
from tests.fonts import hide_system_fonts
from tests.requirements import needs_judge_fonts


def scene(width: int = 200, height: int = 100) -> Scene:
    return Scene(width=width, height=height, ground=(255, 255, 255), shapes=())


def spec(query: Question, *pictures: Scene | Line, index: int = 0, clip: bool = False) -> Spec:
    return Spec(
        family="shapes",
        seed=1,
        index=index,
        questions=(query,),
        pictures=pictures or (scene(),),
        clip=clip,
    )


def line(text: str = "ab", width: int = 90, height: int = 30) -> Line:
    return Line(
        text=text,
        font="nowhere.ttf",
        size=20,
        width=width,
        height=height,
        x=5,
        y=22,
        ink=(0, 0, 0),
        ground=(255, 255, 255),
    )


def question(answer: str, task: str = "color", **more: int) -> Question:
    return Question(task=task, text="?", answer=answer, choices=more.get("choices", 0))


def task_of(*specs: Spec) -> SyntheticTask:
    return SyntheticTask(name="drawn", note="", cases=build_cases(specs, chance_levels(specs)))


def score(query: Question, answer: str, *pictures: Scene | Line) -> float:
    task = task_of(spec(query, *pictures))
    result = task.score(task.cases[0], answer)
    assert is_correct(task.cases[0].spec, answer) == bool(result.score)
    return result.score


@pytest.mark.parametrize(
    ("answer", "right"),
    [("red", 1), ("Red.", 1), (" red\n", 1), ("reddish", 0), ("", 0), ("blue", 0)],
)
def test_short_answers_are_scored_by_normalized_exact_match(answer: str, right: float) -> None:
    assert score(question("red"), answer) == right


@pytest.mark.parametrize(
    ("answer", "right", "edits"),
    [
        ("aB c.", 1, 0),
        (" aB c.\n", 1, 0),
        ("ab c.", 0, 1),
        ("aB c", 0, 1),
        ("", 0, 5),
        ("x" * 9, 0, 9),
    ],
)
def test_recognized_text_is_scored_by_edit_distance(answer: str, right: float, edits: int) -> None:
    task = task_of(spec(question("aB c.", "read"), line()))
    result = task.score(task.cases[0], answer)
    assert (result.score, result.edits, result.length) == (right, edits, 5)


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        (Box(100, 200, 500, 800).to_text(), 1),
        ("<|object_ref_start|>it<|object_ref_end|>" + Box(100, 200, 500, 799).to_text(), 1),
        ("(100,200),(500,800)", 1),
        (Box(100, 200, 301, 800).to_text(), 1),  # an IoU just above 0.5
        (Box(100, 200, 299, 800).to_text(), 0),
        (
            Box(600, 200, 900, 800).to_text() + Box(100, 200, 500, 800).to_text(),
            0,
        ),  # only the first counts
        ("(100,200)", 0),
        ("on the left", 0),
        ("", 0),
    ],
)
def test_boxes_are_scored_by_iou(answer: str, right: float) -> None:
    # In pixels of an image 200 wide and 100 high; the model's coordinates are thousandths.
    find = replace(question("unused", "find"), box=(20, 20, 100, 80))
    assert score(find, answer) == right


def test_example_result_fields() -> None:
    task = task_of(spec(question("red", choices=4)), spec(question("blue", choices=4)))
    result = task.score(task.cases[1], "Blue")
    assert (result.name, result.kind, result.question) == ("drawn/001", "color", "?")
    assert (result.truth, result.answer, result.score) == ("blue", "Blue", 1.0)
    assert result.edits is None and result.chance == 0.5


def test_chance_level_is_the_best_constant_answer_or_one_of_the_choices() -> None:
    colors = [spec(question(c, choices=8)) for c in ("red", "red", "red", "blue")]
    counts = [spec(question(c, "count", choices=2)) for c in "1234"]
    plain = [spec(question(c, "read"), line()) for c in ("a", "A", "b", "c", "d")]
    assert chance_levels([*colors, *counts, *plain]) == [0.75] * 4 + [0.5] * 4 + [0.2] * 5


def test_chance_level_of_boxes_is_the_best_constant_box() -> None:
    boxes = [(0, 0, 100, 50), (0, 0, 100, 60), (100, 50, 200, 100), (150, 0, 200, 20)]
    specs = [spec(replace(question("unused", "find"), box=box)) for box in boxes]
    assert chance_levels(specs) == [0.5] * 4


@pytest.mark.parametrize("aspect", [0.25, 0.5, 1.0, 3.0, 10.0, 25.0])
def test_padded_canvas_has_the_aspect_ratio_and_the_whole_line(aspect: float) -> None:
    old = line()
    (new,) = pad_to_aspect_ratio(spec(question("ab", "read"), old, index=7), aspect).pictures
    assert isinstance(new, Line)
    assert new.width / new.height == pytest.approx(aspect, rel=0.05)
    assert new.width >= old.width and new.height >= old.height
    assert new.width == old.width or new.height == old.height
    assert 0 <= new.x - old.x <= new.width - old.width
    assert 0 <= new.y - old.y <= new.height - old.height
    assert replace(new, width=90, height=30, x=5, y=22) == old


@pytest.mark.parametrize("length", [3, 4, 8])
def test_shuffled_frames_are_neither_in_order_nor_reversed(length: int) -> None:
    frames = tuple(scene(width=100 + i) for i in range(length))
    orders = [
        shuffle_frames(spec(question("left"), *frames, index=index, clip=True))
        for index in range(40)
    ]
    assert all(set(order.pictures) == set(frames) and order.clip for order in orders)
    assert all(order.pictures not in (frames, frames[::-1]) for order in orders)
    assert len({order.pictures for order in orders}) > 3
    assert orders[0] == shuffle_frames(spec(question("left"), *frames, clip=True))


def test_mismatched_images_are_of_another_question_of_the_same_kind() -> None:
    specs = [spec(question(str(i), "ab"[i % 2]), scene(width=100 + i), index=i) for i in range(6)]
    cases = build_cases(specs, chance_levels(specs))
    mismatched = with_mismatched_images(cases)
    assert [case.spec.questions for case in mismatched] == [case.spec.questions for case in cases]
    assert [case.spec.pictures[0].width for case in mismatched] == [102, 103, 104, 105, 100, 101]
    assert [case.chance for case in mismatched] == [case.chance for case in cases]


def test_box_of_a_mismatched_case_is_relative_to_its_own_image() -> None:
    def spec_with_box(width: int, box: tuple[int, int, int, int]) -> Spec:
        return spec(replace(question("unused", "find"), box=box), scene(width=width))

    specs = [spec_with_box(200, (0, 0, 100, 100)), spec_with_box(1000, (900, 0, 1000, 50))]
    task = SyntheticTask(
        name="wrong",
        note="",
        cases=with_mismatched_images(build_cases(specs, chance_levels(specs))),
    )
    assert task.cases[0].spec.pictures[0].width == 1000
    assert task.score(task.cases[0], Box(0, 0, 500, 999).to_text()).score == 1


def test_missing_fonts_error_names_the_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    hide_system_fonts(monkeypatch)
    bundled = {package for package, _ in BUNDLED_FAMILIES.values()}
    packages = [package for package in JUDGE_PACKAGES if package not in bundled]
    with pytest.raises(FontError, match=f"apt-get install {' '.join(packages)}$"):
        task_of(spec(question("ab", "read"), line())).check_fonts()
    task_of(spec(question("red"))).check_fonts()


@pytest.mark.parametrize("fonts", ["bundled", pytest.param("judge", marks=needs_judge_fonts)])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_ink_never_touches_the_border(k: int, fonts: Any) -> None:
    mixture = Mixture(
        weights={"text": 1}, fonts=fonts, padding=(0, 0), plain_share=1, font_size=(12, 20)
    )
    specs = [sample(5, index, mixture).scaled(k) for index in range(12)]
    task = SyntheticTask(name="tight", note="", cases=build_cases(specs, chance_levels(specs)))
    for case in task.cases:
        pixels_HWC = image_of(task, case)
        borders = [pixels_HWC[0], pixels_HWC[-1], pixels_HWC[:, 0], pixels_HWC[:, -1]]
        assert all((edge == 255).all() for edge in borders)
        assert (pixels_HWC < 128).any()


def image_of(task: SyntheticTask, case: EvalCase) -> np.ndarray:
    """Render a case and return the image of its prompt."""
    (message,) = task.prompt(case)
    return message["content"][0]["image"]
