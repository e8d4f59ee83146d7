"""Synthetic source: counted, named, the same in every epoch; sizes are known without pixels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from qwen2vl.data.formats import Conversation
from qwen2vl.data.sources.synthetic import SyntheticSource, with_default_system
from qwen2vl.synth import Mixture

SHAPES = Mixture(weights={"shapes": 1.0}, canvas=(56, 84), num_shapes=(1, 2))
SOURCE = SyntheticSource(SHAPES, 12, seed=3, default_system=0.5)

MESSAGES = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def images(conversation: Conversation) -> list[np.ndarray]:
    parts = [part for m in conversation.messages for part in m["content"] if isinstance(part, dict)]
    return [np.asarray(part["image"]) for part in parts if part.get("type") == "image"]


def test_a_sample_is_named_by_seed_and_index() -> None:
    assert len(SOURCE) == 12
    assert SOURCE.name(4) == "world 3/4"
    assert SOURCE.read(4).id == "shapes 3/4"
    assert SOURCE.media_root == ""


def test_samples_are_the_same_in_every_epoch_and_differ_by_seed() -> None:
    one, again = (images(SOURCE.read(5)) for _ in range(2))
    assert np.array_equal(one[0], again[0])
    other = images(SyntheticSource(SHAPES, 12, seed=4, default_system=0.5).read(5))
    assert other[0].shape != one[0].shape or not np.array_equal(one[0], other[0])


@pytest.mark.parametrize(
    "other",
    [
        SyntheticSource(replace(SHAPES, num_shapes=(1, 3)), 12, seed=3, default_system=0.5),
        SyntheticSource(SHAPES, 13, seed=3, default_system=0.5),
        SyntheticSource(SHAPES, 12, seed=4, default_system=0.5),
        SyntheticSource(SHAPES, 12, seed=3, default_system=0.4),
    ],
    ids=["mixture", "count", "seed", "system"],
)
def test_the_fingerprint_depends_on_all_settings_of_a_sample(other: SyntheticSource) -> None:
    assert other.fingerprint() != SOURCE.fingerprint()
    assert (
        SyntheticSource(SHAPES, 12, seed=3, default_system=0.5).fingerprint()
        == SOURCE.fingerprint()
    )


def test_without_pixels_text_and_sizes_are_the_same() -> None:
    for index in range(4):
        rendered, measured = SOURCE.read(index), SOURCE.read(index, pixels=False)
        assert [image.shape for image in images(rendered)] == [
            image.shape for image in images(measured)
        ]
        assert not any(image.any() for image in images(measured))
        assert len(rendered.messages) == len(measured.messages)
        assert rendered.messages[-1] == measured.messages[-1]


def test_a_fraction_keeps_the_default_system_prompt() -> None:
    num_default = sum(
        with_default_system(MESSAGES, 0.3, 7, index) is MESSAGES for index in range(400)
    )
    assert 80 < num_default < 160
    assert with_default_system(MESSAGES, 1.0, 7, 0) is MESSAGES
    (system, *rest) = with_default_system(MESSAGES, 0.0, 7, 0)
    assert system == {"role": "system", "content": ""} and rest == MESSAGES


def test_which_samples_keep_the_default_prompt_is_deterministic() -> None:
    def indices_with_default_prompt(share: float, seed: int) -> set[int]:
        return {i for i in range(40) if with_default_system(MESSAGES, share, seed, i) is MESSAGES}

    assert indices_with_default_prompt(0.3, 7) == {12, 16, 18, 20, 21, 22, 24, 27}
    # A larger fraction contains the samples of a smaller one.
    assert indices_with_default_prompt(0.3, 7) < indices_with_default_prompt(0.6, 7)
    assert indices_with_default_prompt(0.3, 7) != indices_with_default_prompt(0.3, 8)
