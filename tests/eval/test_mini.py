"""The mini suite: frozen file, complete sections, thresholds, and controls at chance level."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np
import pytest

from qwen2vl.errors import InputError
from qwen2vl.eval.mini import (
    PARTS,
    build_task,
    check_thresholds,
    load_section,
    select_parts,
)
from qwen2vl.eval.suites.thresholds import ThresholdCheck
from qwen2vl.eval.task import AnswerFn, Messages, TaskResults, run_task
from qwen2vl.synth import render
from qwen2vl.synth.fonts import JUDGE_FAMILIES
from qwen2vl.synth.scenes import overlap
from qwen2vl.synth.spec import Line, Scene
from qwen2vl.synth.strings import ALPHABETS
from qwen2vl.synth.wordings import load_wordings, wordings_of
from tests.requirements import needs_judge_fonts

# A changed file is a different suite: all scores measured before are invalid.
FROZEN = "9d98fd43f626ae5c74b1e3dc44efdb095a6c7a986e585a6491a271d7999ec1be"

COUNTS = {
    "text": 200,
    "shapes": 150,
    "counting": 150,
    "relations": 100,
    "find": 150,
    "name_box": 50,
    "motion": 100,
    "two_pictures": 100,
}
SECTIONS = tuple(COUNTS)
WITHOUT_FONTS = tuple(name for name in PARTS if "text" not in name and "two" not in name)


# A field holds a phrase, a box or a word; "an" may replace "a" of the wording.
HELD_OUT = re.compile(
    "|".join(
        ".+".join(map(re.escape, re.split(r"\{\d\}", form)))
        for task in load_wordings()
        for wording in wordings_of(task, "held_out")
        for form in (wording, wording.replace("a {0}", "an {0}"))
    )
)


@cache
def content() -> bytes:
    return files("qwen2vl.eval").joinpath("suites", "mini.json").read_bytes()


def oracle(task_name: str) -> AnswerFn:
    """Return a function that answers the questions of a part with the truth, in order."""
    answers = iter(case.question.answer for case in build_task(task_name).cases)
    return lambda _: next(answers)


def checked(results: TaskResults) -> ThresholdCheck:
    return check_thresholds({results.task: results})[results.task]


# Frozen ---------------------------------------------------------------------------------------


def test_the_file_is_frozen() -> None:
    assert len(content()) < 1_000_000
    assert hashlib.sha256(content()).hexdigest() == FROZEN


@pytest.mark.parametrize(
    ("section", "digest"),
    [
        ("shapes", "a00b1cc740392a6b"),
        ("find", "a777c036f9988ea5"),
        ("motion", "6eba0ded2aa556ea"),
    ],
)
def test_rendered_images_are_frozen(section: str, digest: str) -> None:
    hasher = hashlib.sha256()
    for spec in load_section(section)[::30]:
        for part in render(spec).prompt[0]["content"]:
            pixels = part.get("image", part.get("video"))
            hasher.update(b"" if pixels is None else pixels.tobytes())
    assert hasher.hexdigest()[:16] == digest


@needs_judge_fonts
def test_rendered_text_is_frozen_up_to_font_rasterization() -> None:
    # FreeType versions differ slightly in antialiasing; sizes and mean intensity do not.
    task = build_task("text")
    images = [image_of(task.prompt(task.cases[i])) for i in (0, 50, 100, 150)]
    assert [image.shape[:2] for image in images] == [(32, 42), (35, 205), (30, 50), (24, 95)]
    assert [float(image.mean()) for image in images] == pytest.approx(
        [219.2, 119.0, 199.6, 212.2], abs=1.5
    )


def image_of(prompt: Messages) -> np.ndarray:
    return prompt[0]["content"][0]["image"]


# Complete -------------------------------------------------------------------------------------


@pytest.mark.parametrize("section", SECTIONS)
def test_sections_have_their_number_of_distinct_questions(section: str) -> None:
    specs = load_section(section)
    assert len(specs) == COUNTS[section]
    assert all(len(spec.questions) == 1 for spec in specs)
    assert len({(spec.pictures, spec.questions) for spec in specs}) == len(specs)


@pytest.mark.parametrize("section", SECTIONS)
def test_wordings_are_held_out(section: str) -> None:
    questions = [spec.questions[0].text for spec in load_section(section)]
    assert not [q for q in questions if not HELD_OUT.fullmatch(q)]
    assert len(set(questions)) >= 4


def test_text_lines_cover_held_out_fonts_lengths_and_sizes() -> None:
    lines = [picture for spec in load_section("text") for picture in spec.pictures]
    fonts = {file for _, own in JUDGE_FAMILIES.values() for file in own}
    text_lines = [line for line in lines if isinstance(line, Line)]
    assert len(text_lines) == 200 and {line.font for line in text_lines} == fonts
    assert {len(line.text) for line in text_lines} == set(range(1, 17))
    assert all(12 <= line.size <= 40 for line in text_lines)
    assert len({(line.width, line.height) for line in text_lines}) > 190
    old_style = "".join(line.text for line in text_lines if line.font.startswith("EBGaramond"))
    assert old_style and not set(old_style) & set("01")  # its 0 looks like an o
    assert set("".join(line.text for line in text_lines)) == set(ALPHABETS["all"] + " ")


@pytest.mark.parametrize("section", ["shapes", "counting", "relations", "find", "name_box"])
def test_scenes_are_within_their_limits(section: str) -> None:
    for spec in load_section(section):
        (scene,) = spec.pictures
        assert isinstance(scene, Scene) and 1 <= len(scene.shapes) <= 5
        assert all(shape.side >= 24 for shape in scene.shapes)
        pairs = [(a, b) for a in scene.shapes for b in scene.shapes if a is not b]
        assert all(overlap(a.box, b.box) <= 0.1 for a, b in pairs)


def test_counts_are_balanced_up_to_five() -> None:
    counts = Counter(spec.questions[0].answer for spec in load_section("counting"))
    assert set(counts) == set("012345") and min(counts[n] for n in "12345") >= 20


def test_videos_have_four_to_eight_frames() -> None:
    specs = load_section("motion")
    assert {len(spec.pictures) for spec in specs} == {4, 6, 8} and all(s.clip for s in specs)
    assert all(len(spec.pictures) == 2 and not spec.clip for spec in load_section("two_pictures"))


def test_select_parts_by_pattern() -> None:
    assert select_parts(()) == list(PARTS)
    assert select_parts(("text",)) == ["text"]
    assert select_parts(("motion*", "text_?x")) == [
        "text_2x",
        "text_3x",
        "motion",
        "motion_shuffled",
    ]
    with pytest.raises(
        InputError, match="no part of the mini suite is called letters: text, text_2x"
    ):
        select_parts(("text", "letters"))


def test_transformed_text_parts_differ_only_in_the_canvas() -> None:
    plain = build_task("text").cases
    for name, k in (("text_2x", 2), ("text_3x", 3)):
        cases = build_task(name).cases
        assert [case.spec for case in cases] == [case.spec.scaled(k) for case in plain]
    odd = build_task("text_odd_aspect").cases
    assert [case.question for case in odd] == [case.question for case in plain]
    shapes = [case.spec.pictures[0] for case in odd]
    assert {round(p.width / p.height * 2) / 2 for p in shapes} >= {0.5, 1.0, 10.0, 20.0}


# Answerable -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PARTS)
def test_truth_is_correct_everywhere(name: str) -> None:
    task = build_task(name)
    scores = [task.score(case, case.question.answer) for case in task.cases]
    assert all(result.score == 1.0 for result in scores)
    results = TaskResults(task=name, note=task.note, results=tuple(scores))
    check = checked(results)
    kind = PARTS[name].threshold.kind
    assert check.passed is {"none": None, "relative_cer": None, "chance": False}.get(kind, True)
    assert check.score == (0.0 if check.metric == "character error rate" else 1.0)


@pytest.mark.parametrize("name", WITHOUT_FONTS)
def test_oracle_answers_are_correct(name: str) -> None:
    results = run_task(build_task(name), oracle(name), limit=25)
    assert (results.num_examples, results.accuracy) == (25, 1.0)


@needs_judge_fonts
@pytest.mark.parametrize("name", [name for name in PARTS if name not in WITHOUT_FONTS])
def test_oracle_answers_are_correct_for_rendered_text(name: str) -> None:
    results = run_task(build_task(name), oracle(name), limit=8)
    assert (results.num_examples, results.accuracy) == (8, 1.0)


@pytest.mark.parametrize("section", SECTIONS)
@pytest.mark.parametrize("answer", ["red", "circle", "2", "yes", "left", "first", "", "the"])
def test_constant_answer_does_not_exceed_chance(section: str, answer: str) -> None:
    task = build_task(f"wrong_{section}")
    scores = tuple(task.score(case, answer) for case in task.cases)
    results = TaskResults(task=task.name, note="", results=scores)
    assert results.accuracy <= sum(r.chance for r in scores) / len(scores) + 1e-9
    assert checked(results).passed is True


def test_perfect_answers_about_mismatched_images_do_not_exceed_chance() -> None:
    for section in SECTIONS:
        task = build_task(f"wrong_{section}")
        answer_of = {c.spec.pictures: c.question.answer for c in build_task(section).cases}
        scores = tuple(task.score(c, answer_of[c.spec.pictures]) for c in task.cases)
        check = checked(TaskResults(task=task.name, note="", results=scores))
        assert check.passed is True, (section, check)


def test_perfect_answers_about_shuffled_frames_do_not_exceed_chance() -> None:
    task = build_task("motion_shuffled")
    results = run_task(task, motion_direction)
    directions = [r for r in results.results if r.kind == "direction"]
    accuracy = sum(r.score for r in directions) / len(directions)
    assert 0.3 < accuracy < 0.7
    ordered = [
        r for r in run_task(build_task("motion"), motion_direction).results if r.kind == "direction"
    ]
    assert all(result.score == 1.0 for result in ordered)


def motion_direction(messages: Messages) -> str:
    """Return the direction from the centroid of the first half of the frames to the second's."""
    video: Any = messages[0]["content"][0]["video"]
    half = len(video) // 2
    (x1, y1), (x2, y2) = centroid(video[:half]), centroid(video[-half:])
    if abs(x2 - x1) > abs(y2 - y1):
        return "left" if x2 < x1 else "right"
    return "up" if y2 < y1 else "down"


def centroid(frames: np.ndarray) -> tuple[float, float]:
    """Return the mean position of the pixels that differ from the color of the corners."""
    background = frames[0, 0, 0].astype(int)
    for corner in (frames[0, -1, -1], frames[0, 0, -1], frames[0, -1, 0]):
        background = background if (background == frames[-1, 0, 0]).all() else corner.astype(int)
    foreground = np.abs(frames.astype(int) - background).sum(-1) > 60
    _, ys, xs = np.nonzero(foreground)
    return float(xs.mean()), float(ys.mean())


# Thresholds -------------------------------------------------------------------------------------


def results_with_errors(name: str, num_errors: int) -> TaskResults:
    """Return results in which the first `num_errors` answers have one surplus character."""
    task = build_task(name)
    scores = [
        task.score(case, case.question.answer + ("#" if i < num_errors else ""))
        for i, case in enumerate(task.cases)
    ]
    return TaskResults(task=name, note=task.note, results=tuple(scores))


def test_threshold_and_goal_of_text() -> None:
    characters = sum(len(case.question.answer) for case in build_task("text").cases)
    limit = int(0.04 * characters)
    under, over = (checked(results_with_errors("text", wrong)) for wrong in (limit, limit + 1))
    assert (under.passed, over.passed) == (True, False)
    assert (under.limit, under.goal, under.lower_is_better) == (0.04, 0.02, True)
    assert under.interval[0] < under.score == limit / characters < under.interval[1]


def test_thresholds_relative_to_text() -> None:
    characters = sum(len(case.question.answer) for case in build_task("text").cases)
    distance = int(0.02 * characters)
    plain = results_with_errors("text", 5)
    for wrong, passed in ((0, True), (5 + distance, True), (6 + distance, False)):
        checks = check_thresholds({"text": plain, "text_2x": results_with_errors("text_2x", wrong)})
        assert checks["text_2x"].passed is passed
    alone = check_thresholds({"text_2x": results_with_errors("text_2x", 0)})["text_2x"]
    assert (alone.passed, alone.limit) == (None, None)


@pytest.mark.parametrize(
    ("name", "limit"),
    [("shapes", 0.99), ("counting", 0.95), ("find", 0.9), ("motion", 0.95), ("two_pictures", 0.9)],
)
def test_accuracy_thresholds(name: str, limit: float) -> None:
    task = build_task(name)
    allowed = int((1 - limit) * len(task.cases) + 1e-6)
    for wrong, passed in ((allowed, True), (allowed + 1, False)):
        scores = tuple(
            task.score(case, "" if i < wrong else case.question.answer)
            for i, case in enumerate(task.cases)
        )
        assert checked(TaskResults(task=name, note="", results=scores)).passed is passed
