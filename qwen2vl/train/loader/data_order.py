"""Which samples a step sees: a pure function of the run's config and the step's number.

Nothing is counted along the way, so seeking to any step is arithmetic and the whole state of the
data is one integer. A stage of the world draws from its own stretch, so no sample comes twice. A
stage of data reads the groups of its plan's bins, in another order in every pass; the bins of a
step are the same for any number of ranks. It knows no pixels and no clock. Next room: pack.py.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from qwen2vl.data.packing import Plan, shuffled
from qwen2vl.errors import ConfigError
from qwen2vl.train.config import Stage, TrainConfig

__all__ = ["Draw", "bins_of", "check_shares", "deal", "draw", "locate", "stage_seed"]


class Draw(NamedTuple):
    """The samples of one optimizer step: `stage.mixture` at (seed, each index)."""

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


def check_shares(config: TrainConfig, ranks: int) -> None:
    """Refuse steps that the ranks' batches cannot share, before anything is read.

    Raises:
        ConfigError: bins of data do not divide, or there are fewer conversations than batches.
    """
    parts = ranks * config.accumulate
    among = f"{ranks} ranks x {config.accumulate} batches"
    for stage in config.stages:
        if not stage.steps:
            continue
        if stage.data is not None and stage.data.bins % parts:
            raise ConfigError(
                f"stage {stage.name}: data.bins is {stage.data.bins}, which {among} cannot share "
                f"evenly; make it a multiple of {parts}"
            )
        if stage.data is None and stage.examples < parts:
            raise ConfigError(
                f"stage {stage.name}: {stage.examples} examples a step cannot be dealt out to "
                f"{among}; raise examples to {parts} or more"
            )


def draw(config: TrainConfig, step: int, *, rank: int = 0, ranks: int = 1) -> Draw:
    """Choose the samples of a step; ranks take every `ranks`-th one."""
    index, inner = locate(config, step)
    stage = config.stages[index]
    first = inner * stage.examples
    seed = stage_seed(config, index)
    return Draw(stage, seed, range(first + rank, first + stage.examples, ranks))


def stage_seed(config: TrainConfig, index: int) -> int:
    """Give a stage its own seed, which keeps its samples apart from those of every other one."""
    return config.seed * 1_000 + index


def bins_of(plan: Plan, step: int, *, bins: int, seed: int) -> np.ndarray:
    """Choose the bins of a stage's step, dearest first: whole groups, each once in a pass.

    A step may end one pass and begin the next.
    """
    groups, wanted = len(plan) // plan.group, bins // plan.group
    chosen = []
    for place in range(step * wanted, (step + 1) * wanted):
        number, inner = divmod(place, groups)
        group = int(_order(groups, seed, number)[inner])
        chosen.append(np.arange(group * plan.group, (group + 1) * plan.group))
    return np.sort(np.concatenate(chosen))  # a plan numbers its bins by their cost


def deal(numbers: np.ndarray, *, rank: int, ranks: int, turn: int, turns: int) -> np.ndarray:
    """Pick the bins of one rank's batch: `turn` of `turns` in the step.

    Ranks that work at the same time get neighbors in cost; where a batch holds several bins, who
    had the dearest of one round has the cheapest of the next.
    """
    assert len(numbers) % (ranks * turns) == 0, "see check_shares"
    rounds_JR = numbers.reshape(turns, -1, ranks)[turn].copy()
    rounds_JR[1::2] = rounds_JR[1::2, ::-1]
    return rounds_JR[:, rank]


@lru_cache(maxsize=4)
def _order(groups: int, seed: int, number: int) -> np.ndarray:
    """Shuffle the groups for one pass."""
    return shuffled(groups, "pass", seed, number)
