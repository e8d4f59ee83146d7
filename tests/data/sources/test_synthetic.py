"""The world as a source: counted, named, the same in every pass; sizes cost no pixels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from qwen2vl.data.formats import Conversation
from qwen2vl.data.sources.synthetic import World, with_system
from qwen2vl.synth import Mixture

SHAPES = Mixture(weights={"shapes": 1.0}, canvas=(56, 84), num_shapes=(1, 2))
WORLD = World(SHAPES, 12, seed=3, default_system=0.5)

ASKED = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def pictures(conversation: Conversation) -> list[np.ndarray]:
    parts = [p for m in conversation.messages for p in m["content"] if isinstance(p, dict)]
    return [np.asarray(part["image"]) for part in parts if part.get("type") == "image"]


def test_a_sample_is_named_by_the_numbers_that_make_it() -> None:
    assert len(WORLD) == 12
    assert WORLD.name(4) == "world 3/4"
    assert WORLD.read(4).id == "shapes 3/4"
    assert WORLD.base == ""


def test_the_same_sample_comes_in_every_pass_and_another_from_another_seed() -> None:
    one, again = (pictures(WORLD.read(5)) for _ in range(2))
    assert np.array_equal(one[0], again[0])
    other = pictures(World(SHAPES, 12, seed=4, default_system=0.5).read(5))
    assert other[0].shape != one[0].shape or not np.array_equal(one[0], other[0])


@pytest.mark.parametrize(
    "other",
    [
        World(replace(SHAPES, num_shapes=(1, 3)), 12, seed=3, default_system=0.5),
        World(SHAPES, 13, seed=3, default_system=0.5),
        World(SHAPES, 12, seed=4, default_system=0.5),
        World(SHAPES, 12, seed=3, default_system=0.4),
    ],
    ids=["mixture", "count", "seed", "system"],
)
def test_all_that_decides_a_sample_is_in_the_fingerprint(other: World) -> None:
    assert other.fingerprint() != WORLD.fingerprint()
    assert World(SHAPES, 12, seed=3, default_system=0.5).fingerprint() == WORLD.fingerprint()


def test_without_pixels_words_and_sizes_are_the_same() -> None:
    for index in range(4):
        drawn, measured = WORLD.read(index), WORLD.read(index, pixels=False)
        assert [p.shape for p in pictures(drawn)] == [p.shape for p in pictures(measured)]
        assert not any(p.any() for p in pictures(measured))
        assert len(drawn.messages) == len(measured.messages)
        assert drawn.messages[-1] == measured.messages[-1]


def test_a_share_keeps_the_default_system_sentence() -> None:
    plain = sum(with_system(ASKED, 0.3, 7, index) is ASKED for index in range(400))
    assert 80 < plain < 160
    assert with_system(ASKED, 1.0, 7, 0) is ASKED
    (system, *rest) = with_system(ASKED, 0.0, 7, 0)
    assert system == {"role": "system", "content": ""} and rest == ASKED


def test_who_keeps_the_default_sentence_is_the_same_in_every_process() -> None:
    def kept(share: float, seed: int) -> set[int]:
        return {i for i in range(40) if with_system(ASKED, share, seed, i) is ASKED}

    assert kept(0.3, 7) == {12, 16, 18, 20, 21, 22, 24, 27}
    assert kept(0.3, 7) < kept(0.6, 7)  # a larger share takes nobody's away
    assert kept(0.3, 7) != kept(0.3, 8)
