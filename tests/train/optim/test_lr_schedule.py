"""LR schedule: warmup, stable phase, linear or cosine decay, in every stage."""

from itertools import pairwise

import pytest

from qwen2vl.recipes import tiny
from qwen2vl.train.config import override
from qwen2vl.train.optim.lr_schedule import describe_warmup, is_in_warmup, lr_factor


def lr_factors(*overrides: str) -> list[float]:
    config = override(tiny.recipe(), ["optim.warmup_steps=4", *overrides])
    return [lr_factor(config, step) for step in range(11)]


def test_warmup_stable_and_linear_decay_in_every_stage() -> None:
    factors = lr_factors("stages.0.decay_ratio=0.5")
    assert factors[:6] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert factors[6:10] == pytest.approx([0.82, 0.64, 0.46, 0.28])
    assert factors[10] == 0.25  # the next stage warms up again


def test_cosine_decay_from_the_end_of_the_warmup() -> None:
    factors = lr_factors(
        "stages.0.decay_ratio=1", "optim.decay_type=cosine", "optim.min_lr_factor=0"
    )
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    # Six steps of decay: half of it in the middle, and slow at both ends.
    assert factors[7] == pytest.approx(0.5)
    steps = [a - b for a, b in pairwise(factors[4:10])]
    assert steps[0] < steps[1] < steps[2] == pytest.approx(steps[3])
    assert steps[3] > steps[4]


def test_cosine_decay_after_a_stable_phase_ends_at_the_minimum() -> None:
    factors = lr_factors(
        "stages.0.decay_ratio=0.3", "optim.decay_type=cosine", "optim.min_lr_factor=0.2"
    )
    assert factors[3:8] == [1.0] * 5
    assert 0.2 < factors[9] < factors[8] < 1.0


def test_a_warmup_longer_than_the_stage_never_decays() -> None:
    factors = lr_factors(
        "stages.0.decay_ratio=1", "optim.decay_type=cosine", "optim.warmup_steps=20"
    )
    assert factors[:10] == pytest.approx([(i + 1) / 20 for i in range(10)])


def test_warmup_ends_at_the_peak_learning_rate() -> None:
    config = override(tiny.recipe(), ["optim.warmup_steps=4"])
    assert [lr_factor(config, step) < 1 for step in range(5)] == [
        is_in_warmup(config, step + 1) for step in range(5)
    ]
    assert not is_in_warmup(config, 0)
    assert not is_in_warmup(override(config, ["optim.warmup_steps=0"]), 1)


@pytest.mark.parametrize(("warmup_steps", "stages"), [(10, []), (11, ["words", "see"])])
def test_stages_that_are_all_warmup_are_described(warmup_steps: int, stages: list[str]) -> None:
    overrides = [f"stages.{i}.steps={n}" for i, n in enumerate((10, 10, 11, 0))]
    config = override(tiny.recipe(), [*overrides, f"optim.warmup_steps={warmup_steps}"])
    assert [text.split(":")[0] for text in describe_warmup(config)] == [
        f"stage {name}" for name in stages
    ]
