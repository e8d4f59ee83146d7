"""Videos: pixels move as the answer states, and shuffled frames do not reveal the answer."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from random import Random
from typing import Any

import numpy as np

from qwen2vl.synth import Mixture, Spec, render, sample
from qwen2vl.synth.families.motion import _path
from qwen2vl.synth.spec import Scene

MIXTURE = Mixture(weights={"motion": 1.0})


def _specs(task: str, count: int = 400) -> list[Spec]:
    specs = [sample(51, i, MIXTURE) for i in range(count)]
    return [spec for spec in specs if spec.questions[0].task == task]


def _clip(spec: Spec) -> np.ndarray[Any, Any]:
    return render(spec).messages[0]["content"][0]["video"]


def _center(frame: np.ndarray[Any, Any], ground: tuple[int, int, int]) -> np.ndarray[Any, Any]:
    far = np.abs(frame.astype(int) - np.array(ground)).max(axis=-1) > 30
    return np.argwhere(far).mean(axis=0)[::-1]


def _scenes(spec: Spec) -> list[Scene]:
    return [picture for picture in spec.pictures if isinstance(picture, Scene)]


def test_pixels_move_in_the_direction_of_the_answer() -> None:
    unit = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
    answers: Counter[str] = Counter()
    for spec in _specs("direction"):
        ground = _scenes(spec)[0].ground
        centers = np.array([_center(frame, ground) for frame in _clip(spec)])
        along = np.diff(centers, axis=0) @ np.array(unit[spec.questions[0].answer])
        across = np.diff(centers, axis=0) @ np.array(unit[spec.questions[0].answer])[::-1]
        assert (along > 0.5).all(), spec
        assert np.abs(across).max() < 0.5
        answers[spec.questions[0].answer] += 1
    assert min(answers.values()) > 0.15 * answers.total()
    assert len(answers) == 4


def test_shapes_stay_inside_the_frame() -> None:
    for index in range(300):
        for scene in _scenes(sample(52, index, MIXTURE)):
            for shape in scene.shapes:
                x1, y1, x2, y2 = shape.box
                assert 0 <= x1 < x2 <= scene.width
                assert 0 <= y1 < y2 <= scene.height


def test_number_of_frames_is_even_and_at_most_eight() -> None:
    lengths = {len(sample(53, i, MIXTURE).pictures) for i in range(200)}
    assert lengths == {4, 6, 8}


def test_unordered_frames_do_not_reveal_the_direction() -> None:
    """Positions of a video and of its reverse have the same distribution: mean positions agree."""
    positions: dict[str, list[float]] = {"left": [], "right": [], "up": [], "down": []}
    for spec in _specs("direction", 2500):
        scenes = _scenes(spec)
        axis = 0 if spec.questions[0].answer in ("left", "right") else 1
        size = (scenes[0].width, scenes[0].height)[axis]
        mean = float(np.mean([scene.shapes[0].center[axis] for scene in scenes]))
        positions[spec.questions[0].answer].append(mean / size)
    for low, high in (("left", "right"), ("up", "down")):
        assert abs(np.mean(positions[low]) - np.mean(positions[high])) < 0.03


def _moved_first(scenes: list[Scene]) -> str:
    """Return the shape whose box changes first, from the frames only."""
    for before, after in pairwise(scenes):
        for a, b in zip(before.shapes, after.shapes, strict=True):
            if a.box != b.box:
                return b.phrase
    raise AssertionError("nothing moves")


def test_reversing_a_video_swaps_which_shape_moves_first() -> None:
    specs = _specs("moved_first")
    assert len(specs) > 40
    for spec in specs:
        scenes = _scenes(spec)
        names = {shape.phrase for shape in scenes[0].shapes}
        assert _moved_first(scenes) == spec.questions[0].answer
        assert _moved_first(scenes[::-1]) in names - {spec.questions[0].answer}


def test_both_lanes_move_first_equally_often() -> None:
    """Otherwise a single frame would reveal the answer."""
    upper = []
    for spec in _specs("moved_first", 1200):
        first, second = _scenes(spec)[0].shapes  # the one that moves first is listed first
        upper.append(sum(first.center) < sum(second.center))
    assert len(upper) > 150
    assert 0.38 < np.mean(upper) < 0.62


def test_two_shapes_move_one_at_a_time_and_never_touch() -> None:
    for spec in _specs("moved_first"):
        scenes = _scenes(spec)
        for before, after in pairwise(scenes):
            moved = [a.box != b.box for a, b in zip(before.shapes, after.shapes, strict=True)]
            assert sum(moved) <= 1
        for scene in scenes:
            one, two = (shape.box for shape in scene.shapes)
            apart = one[2] <= two[0] or two[2] <= one[0] or one[3] <= two[1] or two[3] <= one[1]
            assert apart


def test_each_color_is_shown_for_half_of_the_video() -> None:
    mixture = Mixture(weights={"motion": 1.0}, max_questions=2)
    seen = 0
    for index in range(300):
        spec = sample(54, index, mixture)
        answers = {q.task: q.answer for q in spec.questions}
        if "appeared_first" not in answers:
            continue
        seen += 1
        scenes = _scenes(spec)
        colors = [scene.shapes[0].color for scene in scenes]
        half = len(colors) // 2
        assert colors == [answers["appeared_first"]] * half + [answers["appeared_last"]] * half
        assert answers["appeared_first"] != answers["appeared_last"]
    assert seen > 40


def test_single_questions_are_about_motion() -> None:
    tasks = {sample(55, i, MIXTURE).questions[0].task for i in range(400)}
    assert tasks == {"direction", "appeared_first", "appeared_last", "moved_first"}


def test_a_path_runs_along_one_axis() -> None:
    boxes = _path(Random(1), (0, 0, 100, 60), 24, 0, [0, 0.5, 1])
    assert len({box[1] for box in boxes}) == 1
    steps = np.diff([box[0] for box in boxes])
    assert (steps > 0).all()
