"""Family `two_pictures`: answers follow from both images, and all answers are equally likely."""

from __future__ import annotations

from collections import Counter, defaultdict

import pytest

from qwen2vl.synth import Mixture, Question, Spec, sample
from qwen2vl.synth.spec import Line, Scene

MIXTURE = Mixture(weights={"two_pictures": 1.0}, max_questions=3, fonts="bundled")
ORDINALS = ("first", "second")


def _specs(count: int) -> list[Spec]:
    return [sample(41, i, MIXTURE) for i in range(count)]


def _truth(question: Question, one: Scene, two: Scene) -> str:
    a, b = one.shapes[0], two.shapes[0]
    yes_or_no = {
        "same_shape": a.kind == b.kind,
        "same_color": a.color == b.color,
        "same_number": len(one.shapes) == len(two.shapes),
    }
    if question.task in yes_or_no:
        return "yes" if yes_or_no[question.task] else "no"
    if question.task == "which_has_more":
        return ORDINALS[len(two.shapes) > len(one.shapes)]
    if question.task == "which_shows":
        shown = [any(s.phrase in question.text for s in scene.shapes) for scene in (one, two)]
        assert sum(shown) == 1
        return ORDINALS[shown[1]]
    scene = two if "second" in question.text else one
    return {
        "color_of_one": scene.shapes[0].color,
        "shape_of_one": scene.shapes[0].kind,
        "count_in_one": str(len(scene.shapes)),
    }[question.task]


def test_answers_follow_from_the_scenes() -> None:
    tasks: Counter[str] = Counter()
    for spec in _specs(800):
        one, two = spec.pictures
        for question in spec.questions:
            tasks[question.task] += 1
            if isinstance(one, Scene) and isinstance(two, Scene):
                assert question.answer == _truth(question, one, two), question
    assert min(tasks.values()) > 40
    assert len(tasks) == 10


def test_answers_follow_from_the_lines() -> None:
    for spec in _specs(500):
        one, two = spec.pictures
        if not (isinstance(one, Line) and isinstance(two, Line)):
            continue
        for question in spec.questions:
            if question.task == "same_text":
                assert question.answer == ("yes" if one.text == two.text else "no")
            else:
                assert question.answer == (two if "second" in question.text else one).text


@pytest.mark.parametrize(
    "task",
    ["same_shape", "same_color", "same_number", "same_text", "which_has_more", "which_shows"],
)
def test_both_answers_are_equally_frequent(task: str) -> None:
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for spec in _specs(1200):
        for question in spec.questions:
            answers[question.task][question.answer] += 1
    counted = answers[task]
    assert len(counted) == 2
    assert min(counted.values()) > 0.38 * counted.total(), counted


def test_different_texts_differ_beyond_case() -> None:
    for spec in _specs(500):
        one, two = spec.pictures
        if isinstance(one, Line) and isinstance(two, Line) and one.text != two.text:
            assert one.text.lower() != two.text.lower()


def test_comparisons_describe_both_images_and_give_the_verdict() -> None:
    mixture = Mixture(weights={"two_pictures": 1.0}, list_share=1.0, fonts="bundled")
    verdicts: Counter[tuple[str, str]] = Counter()
    for index in range(300):
        spec = sample(42, index, mixture)
        one, two = spec.pictures
        (question,) = spec.questions
        fields = dict(part.split(": ") for part in question.answer.split(", "))
        first, second = fields.pop("first"), fields.pop("second")
        if isinstance(one, Scene) and isinstance(two, Scene):
            a, b = one.shapes[0], two.shapes[0]
            truth = {
                "color": (a.color, b.color),
                "shape": (a.kind, b.kind),
                "number": (str(len(one.shapes)), str(len(two.shapes))),
            }
            shown = truth["number"] if "number" in fields else (a.phrase, b.phrase)
        else:
            assert isinstance(one, Line)
            assert isinstance(two, Line)
            shown = (one.text, two.text)
            truth = {"text": shown}
        assert (first, second) == shown
        for name, verdict in fields.items():
            left, right = truth[name]
            assert verdict == ("same" if left == right else "different")
            verdicts[name, verdict] += 1
    assert len(verdicts) == 8
    assert min(verdicts.values()) > 15
