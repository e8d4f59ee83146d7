"""Family `objects`: scenes of all sorts and sizes, distinct questions, true answers."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from random import Random

import numpy as np
import pytest

from qwen2vl.synth.colors import COLORS, MORE_COLORS, shades_of
from qwen2vl.synth.compositing import Composite, Icon, Text
from qwen2vl.synth.draw import draw_image
from qwen2vl.synth.families.objects import sample, sample_scene
from qwen2vl.synth.grammar.holdout import is_held_out
from qwen2vl.synth.spec import Mixture, Spec
from tests.requirements import needs_dataset

MIXTURE = Mixture(max_questions=5, fonts="bundled", list_share=0.1)
pytestmark = needs_dataset("named-pictures")


@pytest.fixture(autouse=True)
def _drawing() -> None:
    pytest.importorskip("resvg_py")


def test_scenes_are_of_all_sorts() -> None:
    sorts: Counter[str] = Counter()
    for seed in range(160):
        scene = sample_scene(Random(seed), MIXTURE)
        sorts[f"{len(scene.objects)} objects"] += 1
        sorts["shapes" if not scene.icons else "mixed" if scene.shapes else "icons"] += 1
        texts = [layer for layer in scene.picture.layers if isinstance(layer, Text)]
        assert len(texts) == len(scene.texts) and (not texts or len(scene.objects) > 1)
        sorts["texts"] += len(texts)
        sorts["colored"] += scene.ground_color not in ("", "white", "black")
        assert len(scene.picture.layers) == len(scene.objects) + len(texts)
    assert {"1 objects", "6 objects"} <= sorts.keys() and min(sorts["texts"], sorts["colored"]) > 3
    assert min(sorts[sort] for sort in ("shapes", "mixed", "icons")) > 20


def test_questions_are_distinct_and_specs_survive_json() -> None:
    tasks: Counter[str] = Counter()
    for seed in range(120):
        sampled = sample(Random(seed), MIXTURE)
        texts = [question.text for question in sampled.questions]
        assert 1 <= len(texts) == len(set(texts)) <= 5
        assert all(text[0].strip() and "{" not in text for text in texts)
        tasks.update(question.task for question in sampled.questions)
        spec = Spec(
            family="shapes",
            seed=0,
            index=seed,
            questions=sampled.questions,
            pictures=sampled.pictures,
        )
        assert Spec.from_json(spec.to_json()) == spec
        assert sample(Random(seed), MIXTURE) == sampled
    assert len(tasks) > 28


def test_the_color_in_the_answer_is_that_of_the_pixels() -> None:
    names = [*COLORS, *MORE_COLORS]
    seen = 0
    for seed in range(260):
        scene = sample_scene(Random(seed), replace(MIXTURE, degraded_share=0.0))
        one = scene.objects[0]
        if not one.color or one.name not in ("circle", "square", "oval", "rectangle"):
            continue
        x, y = (int(value) for value in one.center)
        pixel = draw_image(scene.picture)[y, x].astype(float)
        distances = []
        for name in names:
            low, high = (np.array(end, float) for end in shades_of(name))
            t = np.clip((pixel - low) @ (high - low) / ((high - low) @ (high - low)), 0, 1)
            distances.append(np.linalg.norm(pixel - (low + t * (high - low))))
        assert names[int(np.argmin(distances))] == one.color
        seen += 1
    assert seen > 25


@pytest.mark.parametrize("side", [(56, 64), (700, 760)])
def test_pictures_of_small_and_large_sizes(side: tuple[int, int]) -> None:
    mixture = replace(MIXTURE, picture_side=side, max_aspect=6.0, degraded_share=1.0)
    for seed in range(8):
        sampled = sample(Random(seed), mixture)
        (picture,) = sampled.pictures
        assert isinstance(picture, Composite) and sampled.questions
        assert draw_image(picture).shape == (picture.height, picture.width, 3)
        for layer in picture.layers:
            if isinstance(layer, Icon):
                assert layer.box[2] - layer.box[0] >= 20


def test_held_out_wordings_are_not_those_of_training() -> None:
    held_out = replace(MIXTURE, split="held_out", max_questions=1)
    for seed in range(60):
        (question,) = sample(Random(seed), held_out).questions
        if question.task in ("name_shape", "color", "count_all", "describe", "count_objects"):
            assert is_held_out(question.text)


def test_answers_are_balanced() -> None:
    answers: Counter[tuple[str, str]] = Counter()
    mixture = replace(MIXTURE, list_share=0.0)
    for seed in range(260):
        for question in sample(Random(seed), mixture).questions:
            task = "count" if question.task.startswith("count") else question.task
            answers[task, question.answer] += 1
    for task in ("exists", "lacks", "is_relation"):
        yes, no = answers[task, "yes"], answers[task, "no"]
        assert abs(yes - no) < 4 * (yes + no) ** 0.5, task  # four standard deviations
    counts = [answers["count", str(number)] for number in range(7)]
    assert min(counts) > 6 and max(counts) < 0.4 * sum(counts)
    assert abs(answers["left_or_right", "left"] - answers["left_or_right", "right"]) < 20
