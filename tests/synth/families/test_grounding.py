"""Grounding: boxes and phrases that refer to the same unique shape."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest

from qwen2vl import grounding
from qwen2vl.synth import Mixture, sample
from qwen2vl.synth.colors import COLORS
from qwen2vl.synth.draw import draw_image
from qwen2vl.synth.scenes import left_to_right
from qwen2vl.synth.shape_masks import SHAPE_KINDS
from qwen2vl.synth.spec import Scene, Shape

MIXTURE = Mixture(weights={"grounding": 1.0}, max_questions=4, textured_share=0.0)


def _box_in(text: str, scene: Scene) -> tuple[float, ...]:
    (found,) = grounding.parse(text)
    assert isinstance(found.shape, grounding.Box)
    return found.shape.to_pixels((scene.height, scene.width))


def test_answers_have_the_official_box_format() -> None:
    tasks: Counter[str] = Counter()
    for index in range(300):
        spec = sample(31, index, MIXTURE)
        (scene,) = spec.pictures
        assert isinstance(scene, Scene)
        assert 2 <= len(scene.shapes) <= 5
        by_box = {shape.box: shape for shape in scene.shapes}
        for question in spec.questions:
            tasks[question.task] += 1
            if question.task == "find":
                assert question.box is not None
                shape = by_box[question.box]
                (found,) = grounding.parse(question.answer)
                assert found.phrase is not None
                assert found.phrase in question.text
                assert (
                    question.answer
                    == grounding.ObjectRef(found.phrase).to_text() + found.shape.to_text()
                )
                written = _box_in(question.answer, scene)
            else:
                written = _box_in(question.text, scene)
                shape = min(
                    by_box.values(), key=lambda s: np.abs(np.subtract(s.box, written)).max()
                )
                assert question.answer == shape.phrase
            # A thousandth of the largest canvas is 0.22 pixels; the border itself is 999.
            assert np.abs(np.subtract(written, shape.box)).max() <= 0.25
    assert min(tasks["find"], tasks["name_box"]) > 100


def _phrase_fits(text: str, shape: Shape) -> bool:
    """Return whether a phrase fits a shape: its kind or "shape", and its color if given."""
    words = set(re.findall(r"[a-z]+", text.replace("object_ref", "")))
    kinds, colors = words & set(SHAPE_KINDS), words & set(COLORS)
    return (not kinds or shape.kind in kinds) and (not colors or shape.color in colors)


def test_phrases_are_unique() -> None:
    for index in range(300):
        spec = sample(32, index, MIXTURE)
        (scene,) = spec.pictures
        assert isinstance(scene, Scene)
        for question in spec.questions:
            if question.task == "find":
                meant = [shape for shape in scene.shapes if _phrase_fits(question.text, shape)]
                assert {shape.box for shape in meant} == {question.box}, question
            else:
                assert [s.phrase for s in scene.shapes].count(question.answer) == 1


def test_box_encloses_the_pixels_of_its_color() -> None:
    for index in range(100):
        spec = sample(33, index, MIXTURE)
        (scene,) = spec.pictures
        assert isinstance(scene, Scene)
        image = draw_image(scene).astype(int)
        for shape in scene.shapes:
            if sum(s.color == shape.color for s in scene.shapes) > 1:
                continue
            same = (image == np.array(shape.rgb)).all(axis=-1)
            ys, xs = np.nonzero(same)
            x1, y1, x2, y2 = shape.box
            assert x1 <= xs.min()
            assert y1 <= ys.min()
            assert xs.max() < x2
            assert ys.max() < y2


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_phrases_occur_with_and_without_ref_tokens(split: str) -> None:
    mixture = Mixture(weights={"grounding": 1.0}, split=split)  # type: ignore[arg-type]
    asked = [sample(1, i, mixture).questions[0] for i in range(200)]
    marked = sum("<|object_ref_start|>" in q.text for q in asked if q.task == "find")
    assert 0 < marked < sum(q.task == "find" for q in asked)


def test_each_question_is_about_another_shape() -> None:
    for index in range(200):
        spec = sample(34, index, MIXTURE)
        keys = [q.answer if q.box else q.text.split("box_start")[1] for q in spec.questions]
        assert len(set(keys)) == len(keys)


def test_find_each_answers_in_the_order_of_the_question() -> None:
    mixture = Mixture(weights={"grounding": 1.0}, list_share=1.0)
    asked = orders = 0
    for index in range(200):
        spec = sample(36, index, mixture)
        (scene,) = spec.pictures
        assert isinstance(scene, Scene)
        (question, *_) = spec.questions
        if question.task != "find_each":
            continue
        asked += 1
        found = grounding.parse(question.answer)
        places = [question.text.index(f"the {f.phrase}") for f in found]
        assert places == sorted(places)
        assert len(found) >= 2
        for one in found:
            meant = [s for s in scene.shapes if _phrase_fits(one.phrase or "", s)]
            (shape,) = meant
            box = one.shape.to_pixels((scene.height, scene.width))
            assert np.abs(np.subtract(box, shape.box)).max() <= 0.25
        lefts = [f.shape.to_pixels((1, 1))[0] for f in found]
        orders += lefts != sorted(lefts)
    assert asked > 80
    assert orders > asked / 3  # otherwise the answer would follow from the positions


def test_find_all_lists_each_shape_with_its_box_from_left_to_right() -> None:
    mixture = Mixture(weights={"grounding": 1.0}, list_share=1.0)
    lists = 0
    for index in range(300):
        spec = sample(35, index, mixture)
        (scene,) = spec.pictures
        assert isinstance(scene, Scene)
        question = spec.questions[0]
        if question.task != "find_all":
            continue
        lists += 1
        found = grounding.parse(question.answer)
        assert [f.phrase for f in found] == [s.phrase for s in left_to_right(scene) or ()]
        boxes = [f.shape.to_pixels((scene.height, scene.width)) for f in found]
        assert boxes == sorted(boxes, key=lambda box: box[0] + box[2])
        truth = sorted((shape.box for shape in scene.shapes), key=lambda box: box[0] + box[2])
        assert np.abs(np.subtract(boxes, truth)).max() <= 0.25
    assert lists > 50
