"""Synthetic data: deterministic in (seed, index, mixture), and well-formed conversations."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from qwen2vl.synth import FAMILIES, Mixture, Spec, SyntheticExample, render, sample
from qwen2vl.synth.spec import FAMILY_NAMES
from tests.requirements import needs_training_fonts
from tests.synth.family_parameters import FAMILY_PARAMETERS

_HASH = """
import sys
from tests.synth.test_world import fingerprint_of
print(fingerprint_of(sys.argv[1]))
"""


# Of 600 samples a family. Another hash means other training data: a wording, a word or the order of
# the random draws has changed.
FROZEN_QUESTIONS = {
    "text": "c326ff361c44eb9a",
    "shapes": "4cfbc465c4587d39",
    "grounding": "dedf7f8eb71445f7",
    "two_pictures": "bf28b47d1e7fe72b",
    "motion": "f678d9f5c2295509",
    "text_only": "930b62514b01719e",
    "objects": "56cb2782d1cdb492",
    "named": "36fbfa747de35fad",
    "lines": "b7206bf429998276",
    "documents": "a4d4e53df0c7b481",
    "refusals": "1891d13c95a5923d",
    "clips": "ce0f2ddadff7afe7",
}


def media_of(example: SyntheticExample) -> list[np.ndarray[Any, Any]]:
    return [
        part.get("image", part.get("video"))
        for message in example.messages
        if isinstance(message["content"], list)
        for part in message["content"]
        if part["type"] != "text"
    ]


def fingerprint(examples: list[SyntheticExample]) -> str:
    digest = hashlib.sha256()
    for example in examples:
        digest.update(repr(example.spec.to_json()).encode())
        for array in media_of(example):
            digest.update(repr(array.shape).encode() + array.tobytes())
    return digest.hexdigest()


def fingerprint_of(fonts: Any) -> str:
    mixture = Mixture(max_questions=2, fonts=fonts)
    return fingerprint([render(sample(7, i, mixture)) for i in range(40)])


def test_every_named_family_exists() -> None:
    assert tuple(FAMILIES) == FAMILY_NAMES


@pytest.mark.parametrize("family", FAMILY_PARAMETERS)
def test_sampled_questions_are_frozen(family: str) -> None:
    hasher = hashlib.sha256()
    for split in ("train", "held_out", "all"):
        mixture = Mixture(
            weights={family: 1.0},
            split=split,
            fonts="bundled",
            max_questions=3,
            list_share=0.4,
            page_share=0.3,
        )
        for index in range(200):
            for question in sample(3, index, mixture).questions:
                hasher.update(repr((question.task, question.text, question.answer)).encode())
    assert hasher.hexdigest()[:16] == FROZEN_QUESTIONS[family]


@pytest.mark.parametrize("fonts", ["bundled", pytest.param("all", marks=needs_training_fonts)])
def test_another_process_renders_identical_pixels(fonts: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _HASH, fonts], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == fingerprint_of(fonts)


def test_sampling_order_does_not_matter() -> None:
    mixture = Mixture(fonts="bundled")
    forward = [sample(1, i, mixture) for i in range(20)]
    backward = [sample(1, i, mixture) for i in reversed(range(20))]
    assert forward == backward[::-1]


def test_seeds_and_indices_are_uncorrelated() -> None:
    mixture = Mixture(weights={"text": 1.0}, text_length=(8, 8), random_share=1.0, fonts="bundled")
    texts = {sample(s, i, mixture).questions[0].answer for s in range(10) for i in range(30)}
    assert len(texts) == 300


def test_weights_are_family_probabilities() -> None:
    mixture = Mixture(weights={"text_only": 3.0, "motion": 1.0, "text": 0.0})
    counts = Counter(sample(0, i, mixture).family for i in range(800))
    assert set(counts) == {"text_only", "motion"}
    assert 540 <= counts["text_only"] <= 660  # 600 +- 5 standard deviations


@pytest.mark.parametrize("family", FAMILY_PARAMETERS)
def test_conversations_are_well_formed(family: str) -> None:
    mixture = Mixture(weights={family: 1.0}, max_questions=3, fonts="bundled")
    for index in range(40):
        spec = sample(2, index, mixture)
        example = render(spec)
        assert 1 <= len(spec.questions) <= 3
        assert example.truth == spec.questions
        assert [m["role"] for m in example.messages] == ["user", "assistant"] * len(spec.questions)
        for turn, question in enumerate(spec.questions):
            user, assistant = example.messages[2 * turn : 2 * turn + 2]
            assert user["content"][-1] == {"type": "text", "text": question.text}
            assert (len(user["content"]) > 1) == (turn == 0 and bool(spec.pictures))
            assert assistant["content"] == question.answer
            assert question.answer == question.answer.strip()
            assert question.answer
        assert spec.pictures or family in ("text_only", "refusals")
        assert example.prompt == example.messages[:1]
        _check_media(spec, media_of(example))


def _check_media(spec: Spec, media: list[np.ndarray[Any, Any]]) -> None:
    for array in media:
        assert array.dtype == np.uint8
        assert array.ndim == (4 if spec.clip else 3)
        assert array.shape[-1] == 3
        assert array.flags.writeable


def test_one_question_is_the_default() -> None:
    mixture = Mixture(fonts="bundled")
    assert all(len(sample(0, i, mixture).questions) == 1 for i in range(100))


def test_any_task_may_be_the_first_question() -> None:
    """Otherwise a model would learn some tasks only after others in a conversation."""
    for family in ("shapes", "grounding", "two_pictures", "motion"):
        single = Mixture(weights={family: 1.0}, fonts="bundled")
        several = replace(single, max_questions=4)
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
