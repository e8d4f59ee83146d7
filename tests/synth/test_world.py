"""The world is a pure function of its numbers, for everybody, everywhere."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections import Counter
from typing import Any

import numpy as np
import pytest

from qwen2vl.synth import FAMILIES, Example, Mixture, Spec, render, sample
from qwen2vl.synth.spec import FAMILY_NAMES
from tests.fonts import needs_training_fonts

pytestmark = needs_training_fonts

_HASH = """
import hashlib
from qwen2vl.synth import Mixture, render, sample
from tests.synth.test_world import fingerprint
print(fingerprint([render(sample(7, i, Mixture(questions=2))) for i in range(40)]))
"""


def media_of(example: Example) -> list[np.ndarray[Any, Any]]:
    return [
        part.get("image", part.get("video"))
        for message in example.messages
        if isinstance(message["content"], list)
        for part in message["content"]
        if part["type"] != "text"
    ]


def fingerprint(examples: list[Example]) -> str:
    digest = hashlib.sha256()
    for example in examples:
        digest.update(repr(example.spec.to_json()).encode())
        for array in media_of(example):
            digest.update(repr(array.shape).encode() + array.tobytes())
    return digest.hexdigest()


def test_every_named_family_exists() -> None:
    assert tuple(FAMILIES) == FAMILY_NAMES


def test_same_numbers_same_pixels_in_another_process() -> None:
    here = fingerprint([render(sample(7, i, Mixture(questions=2))) for i in range(40)])
    done = subprocess.run(
        [sys.executable, "-c", _HASH], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == here


def test_order_of_asking_does_not_matter() -> None:
    mixture = Mixture()
    forward = [sample(1, i, mixture) for i in range(20)]
    backward = [sample(1, i, mixture) for i in reversed(range(20))]
    assert forward == backward[::-1]


def test_seeds_and_indices_are_independent() -> None:
    mixture = Mixture(weights={"text": 1.0}, text_length=(8, 8), random_share=1.0)
    texts = {sample(s, i, mixture).questions[0].answer for s in range(10) for i in range(30)}
    assert len(texts) == 300


def test_weights_choose_the_families() -> None:
    mixture = Mixture(weights={"text_only": 3.0, "motion": 1.0, "text": 0.0})
    counts = Counter(sample(0, i, mixture).family for i in range(800))
    assert set(counts) == {"text_only", "motion"}
    assert 540 <= counts["text_only"] <= 660  # 600 +- 5 standard deviations


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_conversation_has_its_form(family: str) -> None:
    mixture = Mixture(weights={family: 1.0}, questions=3)
    for index in range(40):
        spec = sample(2, index, mixture)
        example = render(spec)
        assert 1 <= len(spec.questions) <= 3
        assert example.truth == spec.questions
        assert [m["role"] for m in example.messages] == ["user", "assistant"] * len(spec.questions)
        for turn, question in enumerate(spec.questions):
            user, assistant = example.messages[2 * turn : 2 * turn + 2]
            assert user["content"][-1] == {"type": "text", "text": question.text}
            assert (len(user["content"]) > 1) == (turn == 0 and family != "text_only")
            assert assistant["content"] == question.answer
            assert question.answer == question.answer.strip()
            assert question.answer
        assert example.prompt == example.messages[:1]
        _check_media(spec, media_of(example))


def _check_media(spec: Spec, media: list[np.ndarray[Any, Any]]) -> None:
    for array in media:
        assert array.dtype == np.uint8
        assert array.ndim == (4 if spec.clip else 3)
        assert array.shape[-1] == 3
        assert array.flags.writeable


def test_one_question_is_the_default() -> None:
    assert all(len(sample(0, i, Mixture()).questions) == 1 for i in range(100))


def test_any_task_may_be_the_first_question() -> None:
    """Or a model would learn some tasks only behind others."""
    for family in ("shapes", "grounding", "two_pictures", "motion"):
        several = Mixture(weights={family: 1.0}, questions=4)
        single = Mixture(weights={family: 1.0})
        first = {sample(0, i, several).questions[0].task for i in range(900)}
        assert first >= {sample(1, i, single).questions[0].task for i in range(400)}


def test_canvases_vary_within_their_limits() -> None:
    mixture = Mixture(weights={"shapes": 1.0}, canvas=(60, 150))
    sizes = [(p.width, p.height) for i in range(200) for p in sample(0, i, mixture).pictures]
    assert len(set(sizes)) > 150
    assert all(60 <= side <= 150 for size in sizes for side in size)
    aspects = [width / height for width, height in sizes]
    assert min(aspects) < 0.6
    assert max(aspects) > 1.6
