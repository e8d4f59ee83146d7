"""Which samples a step sees: a pure function of the run's config and the step's number.

Nothing is counted along the way, so seeking to any step is arithmetic and the whole state of the
data is one integer. Every stage draws from its own stretch of an endless world, so no sample comes
twice. It knows no pixels, no tensors and no clock. Next room: pack.py.
"""

from __future__ import annotations

from typing import NamedTuple

from qwen2vl.train.config import Stage, TrainConfig

__all__ = ["Draw", "draw", "locate"]


class Draw(NamedTuple):
    """The samples of one optimiser step: `stage.mixture` at (seed, each index)."""

    stage: Stage
    seed: int
    indices: range


def locate(config: TrainConfig, step: int) -> tuple[int, int]:
    """Find (index of the stage, step inside it) of a step of the run."""
    assert 0 <= step < config.steps, f"step {step} of {config.steps}"
    for index, stage in enumerate(config.stages):
        if step < stage.steps:
            return index, step
        step -= stage.steps
    raise AssertionError("unreachable: step lies below the sum of all stages")


def draw(config: TrainConfig, step: int, *, rank: int = 0, ranks: int = 1) -> Draw:
    """Choose the samples of a step; ranks take every `ranks`-th one."""
    index, inner = locate(config, step)
    stage = config.stages[index]
    first = inner * stage.examples
    # A stage's own seed keeps its samples apart from those of every other stage.
    seed = config.seed * 1_000 + index
    return Draw(stage, seed, range(first + rank, first + stage.examples, ranks))
