"""Cases that are drawn: how answers are judged, what a guess is worth, and the three twists."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from qwen2vl.eval.drawn import (
    Case,
    DrawnTask,
    cases_of,
    chances_of,
    is_right,
    on_canvas,
    out_of_order,
    with_wrong_pictures,
)
from qwen2vl.grounding import Box
from qwen2vl.synth import Mixture, Question, Spec, sample
from qwen2vl.synth.fonts import JUDGE_PACKAGES, FontError
from qwen2vl.synth.spec import Line, Scene
from tests.eval.fontless import hide_fonts
from tests.fonts import needs_judge_fonts


def scene(width: int = 200, height: int = 100) -> Scene:
    return Scene(width=width, height=height, ground=(255, 255, 255), shapes=())


def spec(question: Question, *pictures: Scene | Line, index: int = 0, clip: bool = False) -> Spec:
    return Spec(
        family="shapes",
        seed=1,
        index=index,
        questions=(question,),
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


def asked(answer: str, task: str = "color", **more: int) -> Question:
    return Question(task=task, text="?", answer=answer, choices=more.get("choices", 0))


def task_of(*specs: Spec) -> DrawnTask:
    return DrawnTask(name="drawn", note="", cases=cases_of(specs, chances_of(specs)))


def score(question: Question, answer: str, *pictures: Scene | Line) -> float:
    task = task_of(spec(question, *pictures))
    result = task.score(task.cases[0], answer)
    assert is_right(task.cases[0].spec, answer) == bool(result.score)
    return result.score


@pytest.mark.parametrize(
    ("answer", "right"),
    [("red", 1), ("Red.", 1), (" red\n", 1), ("reddish", 0), ("", 0), ("blue", 0)],
)
def test_words_are_compared_after_what_does_not_count_is_gone(answer: str, right: float) -> None:
    assert score(asked("red"), answer) == right


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
def test_text_is_compared_letter_by_letter(answer: str, right: float, edits: int) -> None:
    task = task_of(spec(asked("aB c.", "read"), line()))
    result = task.score(task.cases[0], answer)
    assert (result.score, result.edits, result.length) == (right, edits, 5)


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        (Box(100, 200, 500, 800).to_text(), 1),
        ("<|object_ref_start|>it<|object_ref_end|>" + Box(100, 200, 500, 799).to_text(), 1),
        ("(100,200),(500,800)", 1),
        (Box(100, 200, 301, 800).to_text(), 1),  # half of the truth and a little more
        (Box(100, 200, 299, 800).to_text(), 0),
        (Box(600, 200, 900, 800).to_text() + Box(100, 200, 500, 800).to_text(), 0),  # first counts
        ("(100,200)", 0),
        ("on the left", 0),
        ("", 0),
    ],
)
def test_a_box_is_right_where_it_covers_half(answer: str, right: float) -> None:
    # In pixels of a picture 200 wide and 100 high; the model's numbers are thousandths.
    question = replace(asked("unused", "find"), box=(20, 20, 100, 80))
    assert score(question, answer) == right


def test_a_result_says_what_was_asked_and_what_luck_is_worth() -> None:
    task = task_of(spec(asked("red", choices=4)), spec(asked("blue", choices=4)))
    result = task.score(task.cases[1], "Blue")
    assert (result.name, result.kind, result.question) == ("drawn/001", "color", "?")
    assert (result.truth, result.answer, result.score) == ("blue", "Blue", 1.0)
    assert result.edits is None and result.chance == 0.5


def test_chance_is_the_best_single_answer_of_a_kind_or_one_of_the_choices() -> None:
    colors = [spec(asked(c, choices=8)) for c in ("red", "red", "red", "blue")]
    counts = [spec(asked(c, "count", choices=2)) for c in "1234"]
    plain = [spec(asked(c, "read"), line()) for c in ("a", "A", "b", "c", "d")]
    assert chances_of([*colors, *counts, *plain]) == [0.75] * 4 + [0.5] * 4 + [0.2] * 5


def test_chance_of_a_box_is_that_of_the_best_place() -> None:
    boxes = [(0, 0, 100, 50), (0, 0, 100, 60), (100, 50, 200, 100), (150, 0, 200, 20)]
    specs = [spec(replace(asked("unused", "find"), box=box)) for box in boxes]
    assert chances_of(specs) == [0.5] * 4


@pytest.mark.parametrize("aspect", [0.25, 0.5, 1.0, 3.0, 10.0, 25.0])
def test_a_canvas_takes_the_aspect_and_keeps_the_line_whole(aspect: float) -> None:
    old = line()
    (new,) = on_canvas(spec(asked("ab", "read"), old, index=7), aspect).pictures
    assert isinstance(new, Line)
    assert new.width / new.height == pytest.approx(aspect, rel=0.05)
    assert new.width >= old.width and new.height >= old.height
    assert new.width == old.width or new.height == old.height
    assert 0 <= new.x - old.x <= new.width - old.width
    assert 0 <= new.y - old.y <= new.height - old.height
    assert replace(new, width=90, height=30, x=5, y=22) == old


@pytest.mark.parametrize("length", [3, 4, 8])
def test_shuffled_frames_keep_no_order(length: int) -> None:
    frames = tuple(scene(width=100 + i) for i in range(length))
    orders = [
        out_of_order(spec(asked("left"), *frames, index=index, clip=True)) for index in range(40)
    ]
    assert all(set(order.pictures) == set(frames) and order.clip for order in orders)
    assert all(order.pictures not in (frames, frames[::-1]) for order in orders)
    assert len({order.pictures for order in orders}) > 3
    assert orders[0] == out_of_order(spec(asked("left"), *frames, clip=True))


def test_wrong_pictures_come_from_another_question_of_the_same_kind() -> None:
    specs = [spec(asked(str(i), "ab"[i % 2]), scene(width=100 + i), index=i) for i in range(6)]
    cases = cases_of(specs, chances_of(specs))
    wrong = with_wrong_pictures(cases)
    assert [case.spec.questions for case in wrong] == [case.spec.questions for case in cases]
    assert [case.spec.pictures[0].width for case in wrong] == [102, 103, 104, 105, 100, 101]
    assert [case.chance for case in wrong] == [case.chance for case in cases]


def test_a_box_is_judged_in_the_picture_that_it_belongs_to() -> None:
    def boxed(width: int, box: tuple[int, int, int, int]) -> Spec:
        return spec(replace(asked("unused", "find"), box=box), scene(width=width))

    specs = [boxed(200, (0, 0, 100, 100)), boxed(1000, (900, 0, 1000, 50))]
    task = DrawnTask(
        name="wrong", note="", cases=with_wrong_pictures(cases_of(specs, chances_of(specs)))
    )
    assert task.cases[0].spec.pictures[0].width == 1000
    assert task.score(task.cases[0], Box(0, 0, 500, 999).to_text()).score == 1


def test_missing_fonts_are_named_with_the_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    hide_fonts(monkeypatch)
    with pytest.raises(FontError, match=f"apt-get install {' '.join(JUDGE_PACKAGES)}"):
        task_of(spec(asked("ab", "read"), line())).check_fonts()
    task_of(spec(asked("red"))).check_fonts()


@needs_judge_fonts
@pytest.mark.parametrize("k", [1, 2, 3])
def test_ink_never_touches_the_border(k: int) -> None:
    mixture = Mixture(
        weights={"text": 1}, fonts="judge", padding=(0, 0), plain_share=1, font_size=(12, 20)
    )
    specs = [sample(5, index, mixture).scaled(k) for index in range(12)]
    task = DrawnTask(name="tight", note="", cases=cases_of(specs, chances_of(specs)))
    for case in task.cases:
        pixels_HWC = picture_of(task, case)
        frame = [pixels_HWC[0], pixels_HWC[-1], pixels_HWC[:, 0], pixels_HWC[:, -1]]
        assert all((edge == 255).all() for edge in frame)
        assert (pixels_HWC < 128).any()


def picture_of(task: DrawnTask, case: Case) -> np.ndarray:
    """Draw a case and take its picture out of the prompt."""
    (message,) = task.prompt(case)
    return message["content"][0]["image"]
