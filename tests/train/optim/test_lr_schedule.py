"""Rates follow the plan: warm-up, stable, decay by a line or a cosine, in every stage."""

from itertools import pairwise

import pytest

from qwen2vl.recipes import tiny
from qwen2vl.train.config import override
from qwen2vl.train.optim.lr_schedule import is_warming, rate


def rates(*words: str) -> list[float]:
    config = override(tiny.recipe(), ["optim.warmup=4", *words])
    return [rate(config, step) for step in range(11)]


def test_rate_rises_holds_and_falls_to_a_tenth_in_every_stage() -> None:
    given = rates("stages.0.decay=0.5")
    assert given[:6] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert given[6:10] == pytest.approx([0.82, 0.64, 0.46, 0.28])
    assert given[10] == 0.25  # the next stage warms up again


def test_a_cosine_falls_from_where_the_warm_up_ends() -> None:
    given = rates("stages.0.decay=1", "optim.fall=cosine", "optim.floor=0")
    assert given[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    # Six steps of the fall: half way down in its middle, and slow at both ends.
    assert given[7] == pytest.approx(0.5)
    steps = [a - b for a, b in pairwise(given[4:10])]
    assert steps[0] < steps[1] < steps[2] == pytest.approx(steps[3])
    assert steps[3] > steps[4]


def test_a_cosine_after_a_stable_stretch_ends_at_the_floor() -> None:
    given = rates("stages.0.decay=0.3", "optim.fall=cosine", "optim.floor=0.2")
    assert given[3:8] == [1.0] * 5
    assert 0.2 < given[9] < given[8] < 1.0


def test_a_warm_up_longer_than_the_stage_never_falls() -> None:
    given = rates("stages.0.decay=1", "optim.fall=cosine", "optim.warmup=20")
    assert given[:10] == pytest.approx([(i + 1) / 20 for i in range(10)])


def test_a_stage_warms_until_its_rate_has_reached_the_peak() -> None:
    config = override(tiny.recipe(), ["optim.warmup=4"])
    assert [rate(config, step) < 1 for step in range(5)] == [
        is_warming(config, step + 1) for step in range(5)
    ]
    assert not is_warming(config, 0)
    assert not is_warming(override(config, ["optim.warmup=0"]), 1)
