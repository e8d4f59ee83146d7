"""The mini suite is frozen, complete and answerable, and its controls let no guesser pass."""

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
from qwen2vl.eval.mini import PARTS, Verdict, build, judge, select, specs_of
from qwen2vl.eval.task import Ask, Messages, Results, run_task
from qwen2vl.synth import render
from qwen2vl.synth.fonts import JUDGE_FAMILIES
from qwen2vl.synth.scenes import overlap
from qwen2vl.synth.spec import Line, Scene
from qwen2vl.synth.strings import ALPHABETS
from qwen2vl.synth.wordings import WORDINGS, wordings_of
from tests.fonts import needs_judge_fonts

# A changed file is another suite: every figure measured before is void, and this line says so.
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


# A field holds a phrase, a box or a word; "an" may stand where the wording says "a".
HELD_OUT = re.compile(
    "|".join(
        ".+".join(map(re.escape, re.split(r"\{\d\}", form)))
        for task in WORDINGS
        for wording in wordings_of(task, "held_out")
        for form in (wording, wording.replace("a {0}", "an {0}"))
    )
)


@cache
def content() -> bytes:
    return files("qwen2vl.eval").joinpath("suites", "mini.json").read_bytes()


def oracle(task_name: str) -> Ask:
    """Answer every question of a part with its truth, in order."""
    answers = iter(case.question.answer for case in build(task_name).cases)
    return lambda _: next(answers)


def verdict_of(results: Results) -> Verdict:
    return judge({results.task: results})[results.task]


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
def test_drawn_pictures_are_frozen(section: str, digest: str) -> None:
    seen = hashlib.sha256()
    for spec in specs_of(section)[::30]:
        for part in render(spec).prompt[0]["content"]:
            pixels = part.get("image", part.get("video"))
            seen.update(b"" if pixels is None else pixels.tobytes())
    assert seen.hexdigest()[:16] == digest


@needs_judge_fonts
def test_written_pictures_are_frozen_as_far_as_fonts_are() -> None:
    # FreeType's versions differ in the last shade of an edge; sizes and the ink's weight do not.
    task = build("text")
    pictures = [picture_of(task.prompt(task.cases[i])) for i in (0, 50, 100, 150)]
    assert [p.shape[:2] for p in pictures] == [(32, 42), (35, 205), (30, 50), (24, 95)]
    assert [float(p.mean()) for p in pictures] == pytest.approx(
        [219.2, 119.0, 199.6, 212.2], abs=1.5
    )


def picture_of(prompt: Messages) -> np.ndarray:
    return prompt[0]["content"][0]["image"]


# Complete -------------------------------------------------------------------------------------


@pytest.mark.parametrize("section", SECTIONS)
def test_sections_have_their_number_of_different_questions(section: str) -> None:
    specs = specs_of(section)
    assert len(specs) == COUNTS[section]
    assert all(len(spec.questions) == 1 for spec in specs)
    assert len({(spec.pictures, spec.questions) for spec in specs}) == len(specs)


@pytest.mark.parametrize("section", SECTIONS)
def test_wordings_are_held_out(section: str) -> None:
    questions = [spec.questions[0].text for spec in specs_of(section)]
    assert not [q for q in questions if not HELD_OUT.fullmatch(q)]
    assert len(set(questions)) >= 4


def test_lines_are_of_judging_fonts_and_all_lengths_and_sizes() -> None:
    lines = [picture for spec in specs_of("text") for picture in spec.pictures]
    fonts = {file for _, own in JUDGE_FAMILIES.values() for file in own}
    written = [line for line in lines if isinstance(line, Line)]
    assert len(written) == 200 and {line.font for line in written} == fonts
    assert {len(line.text) for line in written} == set(range(1, 17))
    assert all(12 <= line.size <= 40 for line in written)
    assert len({(line.width, line.height) for line in written}) > 190
    old_style = "".join(line.text for line in written if line.font.startswith("EBGaramond"))
    assert old_style and not set(old_style) & set("01")  # nobody could tell its 0 from an o
    assert set("".join(line.text for line in written)) == set(ALPHABETS["all"] + " ")


@pytest.mark.parametrize("section", ["shapes", "counting", "relations", "find", "name_box"])
def test_shapes_keep_the_rules(section: str) -> None:
    for spec in specs_of(section):
        (scene,) = spec.pictures
        assert isinstance(scene, Scene) and 1 <= len(scene.shapes) <= 5
        assert all(shape.side >= 24 for shape in scene.shapes)
        pairs = [(a, b) for a in scene.shapes for b in scene.shapes if a is not b]
        assert all(overlap(a.box, b.box) <= 0.1 for a, b in pairs)


def test_counts_reach_five_evenly() -> None:
    counts = Counter(spec.questions[0].answer for spec in specs_of("counting"))
    assert set(counts) == set("012345") and min(counts[n] for n in "12345") >= 20


def test_clips_have_four_to_eight_frames() -> None:
    specs = specs_of("motion")
    assert {len(spec.pictures) for spec in specs} == {4, 6, 8} and all(s.clip for s in specs)
    assert all(len(spec.pictures) == 2 and not spec.clip for spec in specs_of("two_pictures"))


def test_parts_are_chosen_by_pattern() -> None:
    assert select(()) == list(PARTS)
    assert select(("text",)) == ["text"]
    assert select(("motion*", "text_?x")) == ["text_2x", "text_3x", "motion", "motion_shuffled"]
    with pytest.raises(
        InputError, match="no part of the mini suite is called letters: text, text_2x"
    ):
        select(("text", "letters"))


def test_repeated_lines_differ_only_in_their_canvas() -> None:
    plain = build("text").cases
    for name, k in (("text_2x", 2), ("text_3x", 3)):
        cases = build(name).cases
        assert [case.spec for case in cases] == [case.spec.scaled(k) for case in plain]
    odd = build("text_odd_aspect").cases
    assert [case.question for case in odd] == [case.question for case in plain]
    shapes = [case.spec.pictures[0] for case in odd]
    assert {round(p.width / p.height * 2) / 2 for p in shapes} >= {0.5, 1.0, 10.0, 20.0}


# Answerable -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PARTS)
def test_truth_scores_everything(name: str) -> None:
    task = build(name)
    scores = [task.score(case, case.question.answer) for case in task.cases]
    assert all(result.score == 1.0 for result in scores)
    results = Results(task=name, note=task.note, results=tuple(scores))
    verdict = verdict_of(results)
    bar = PARTS[name].bar.kind
    assert verdict.met is {"none": None, "near": None, "chance": False}.get(bar, True)
    assert verdict.score == (0.0 if verdict.measure == "character errors" else 1.0)


@pytest.mark.parametrize("name", WITHOUT_FONTS)
def test_an_oracle_walks_through(name: str) -> None:
    results = run_task(build(name), oracle(name), limit=25)
    assert (results.count, results.mean) == (25, 1.0)


@needs_judge_fonts
@pytest.mark.parametrize("name", [name for name in PARTS if name not in WITHOUT_FONTS])
def test_an_oracle_walks_through_what_is_written(name: str) -> None:
    results = run_task(build(name), oracle(name), limit=8)
    assert (results.count, results.mean) == (8, 1.0)


@pytest.mark.parametrize("section", SECTIONS)
@pytest.mark.parametrize("answer", ["red", "circle", "2", "yes", "left", "first", "", "the"])
def test_one_answer_to_everything_is_worth_chance(section: str, answer: str) -> None:
    task = build(f"wrong_{section}")
    scores = tuple(task.score(case, answer) for case in task.cases)
    results = Results(task=task.name, note="", results=scores)
    assert results.mean <= sum(r.chance for r in scores) / len(scores) + 1e-9
    assert verdict_of(results).met is True


def test_who_sees_the_wrong_picture_well_is_still_no_better_than_chance() -> None:
    for section in SECTIONS:
        task = build(f"wrong_{section}")
        answer_of = {c.spec.pictures: c.question.answer for c in build(section).cases}
        scores = tuple(task.score(c, answer_of[c.spec.pictures]) for c in task.cases)
        verdict = verdict_of(Results(task=task.name, note="", results=scores))
        assert verdict.met is True, (section, verdict)


def test_who_sees_shuffled_frames_well_is_no_better_than_chance() -> None:
    task = build("motion_shuffled")
    results = run_task(task, way_of_motion)
    directions = [r for r in results.results if r.kind == "direction"]
    right = sum(r.score for r in directions) / len(directions)
    assert 0.3 < right < 0.7
    sound = [r for r in run_task(build("motion"), way_of_motion).results if r.kind == "direction"]
    assert all(result.score == 1.0 for result in sound)


def way_of_motion(messages: Messages) -> str:
    """Tell the direction from the middle of the first half of frames to that of the second."""
    video: Any = messages[0]["content"][0]["video"]
    half = len(video) // 2
    (x1, y1), (x2, y2) = middle(video[:half]), middle(video[-half:])
    if abs(x2 - x1) > abs(y2 - y1):
        return "left" if x2 < x1 else "right"
    return "up" if y2 < y1 else "down"


def middle(frames: np.ndarray) -> tuple[float, float]:
    """Average the place of what differs from the corners' color."""
    ground = frames[0, 0, 0].astype(int)
    for corner in (frames[0, -1, -1], frames[0, 0, -1], frames[0, -1, 0]):
        ground = ground if (ground == frames[-1, 0, 0]).all() else corner.astype(int)
    inked = np.abs(frames.astype(int) - ground).sum(-1) > 60
    _, ys, xs = np.nonzero(inked)
    return float(xs.mean()), float(ys.mean())


# Judged -----------------------------------------------------------------------------------------


def errors(name: str, wrong: int) -> Results:
    """Get so many lines of 200 wrong by one character more."""
    task = build(name)
    scores = [
        task.score(case, case.question.answer + ("#" if i < wrong else ""))
        for i, case in enumerate(task.cases)
    ]
    return Results(task=name, note=task.note, results=tuple(scores))


def test_text_is_held_against_floor_and_goal() -> None:
    characters = sum(len(case.question.answer) for case in build("text").cases)
    floor = int(0.04 * characters)
    under, over = (verdict_of(errors("text", wrong)) for wrong in (floor, floor + 1))
    assert (under.met, over.met) == (True, False)
    assert (under.floor, under.goal, under.at_most) == (0.04, 0.02, True)
    assert under.interval[0] < under.score == floor / characters < under.interval[1]


def test_other_sizes_are_held_against_the_first() -> None:
    characters = sum(len(case.question.answer) for case in build("text").cases)
    near = int(0.02 * characters)
    plain = errors("text", 5)
    for wrong, met in ((0, True), (5 + near, True), (6 + near, False)):
        verdicts = judge({"text": plain, "text_2x": errors("text_2x", wrong)})
        assert verdicts["text_2x"].met is met
    alone = judge({"text_2x": errors("text_2x", 0)})["text_2x"]
    assert (alone.met, alone.floor) == (None, None)


@pytest.mark.parametrize(
    ("name", "floor"),
    [("shapes", 0.99), ("counting", 0.95), ("find", 0.9), ("motion", 0.95), ("two_pictures", 0.9)],
)
def test_shares_are_held_against_their_floors(name: str, floor: float) -> None:
    task = build(name)
    allowed = int((1 - floor) * len(task.cases) + 1e-6)
    for wrong, met in ((allowed, True), (allowed + 1, False)):
        scores = tuple(
            task.score(case, "" if i < wrong else case.question.answer)
            for i, case in enumerate(task.cases)
        )
        assert verdict_of(Results(task=name, note="", results=scores)).met is met
