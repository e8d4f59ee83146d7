"""Data order: the samples of a step as a pure function of the run's config and the step number.

There is no sampler state: seeking to any step is arithmetic, and the data state of a checkpoint is
one integer. A stage with a synthetic mixture uses indices of its own seed, none of them twice. A
stage with data reads the groups of its plan's bins, shuffled in every epoch; the bins of a step are
the same for any number of ranks.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from qwen2vl.data.bin_packing import BinPlan, seeded_permutation
from qwen2vl.errors import ConfigError
from qwen2vl.train.config import Stage, TrainConfig

__all__ = [
    "StepSamples",
    "bins_of_rank",
    "bins_of_step",
    "check_global_batch_sizes",
    "locate_step",
    "samples_of_step",
    "stage_seed",
]


class StepSamples(NamedTuple):
    """Samples of one optimizer step: those of `stage.mixture` with this seed and these indices."""

    stage: Stage
    seed: int
    indices: range


def locate_step(config: TrainConfig, step: int) -> tuple[int, int]:
    """Return (stage index, step in the stage) of a step of the run."""
    assert 0 <= step < config.steps, f"step {step} of {config.steps}"
    for index, stage in enumerate(config.stages):
        if step < stage.steps:
            return index, step
        step -= stage.steps
    raise AssertionError("unreachable: step is less than the sum of all stages")


def check_global_batch_sizes(config: TrainConfig, world_size: int) -> None:
    """Check that the batches of all ranks can share each step, before any data are read.

    Raises:
        ConfigError: bins do not divide evenly, or there are fewer conversations than batches.
    """
    num_batches = world_size * config.gradient_accumulation_steps
    ranks = f"{world_size} rank" + "s" * (world_size != 1)
    among = (
        f"{num_batches} batches ({ranks} x "
        f"gradient_accumulation_steps={config.gradient_accumulation_steps})"
    )
    for stage in config.stages:
        if not stage.steps:
            continue
        if stage.data is not None and stage.data.global_batch_size % num_batches:
            raise ConfigError(
                f"stage {stage.name}: data.global_batch_size is {stage.data.global_batch_size}, "
                f"which {among} cannot share evenly; make it a multiple of {num_batches}"
            )
        if stage.data is None and stage.global_batch_size < num_batches:
            raise ConfigError(
                f"stage {stage.name}: global_batch_size is {stage.global_batch_size}, too few "
                f"conversations for {among}; raise it to {num_batches} or more"
            )


def samples_of_step(
    config: TrainConfig, step: int, *, rank: int = 0, world_size: int = 1
) -> StepSamples:
    """Return the samples of a step; a rank has every `world_size`-th one."""
    index, stage_step = locate_step(config, step)
    stage = config.stages[index]
    first = stage_step * stage.global_batch_size
    seed = stage_seed(config, index)
    return StepSamples(
        stage, seed, range(first + rank, first + stage.global_batch_size, world_size)
    )


def stage_seed(config: TrainConfig, index: int) -> int:
    """Return a stage's own seed, so that no two stages share samples."""
    return config.seed * 1_000 + index


def bins_of_step(plan: BinPlan, step: int, *, num_bins: int, seed: int) -> np.ndarray:
    """Return the bins of a stage's step, most expensive first: whole groups, each once an epoch.

    A step may end one epoch and begin the next.
    """
    num_groups, groups_per_step = len(plan) // plan.group_size, num_bins // plan.group_size
    bins = []
    for position in range(step * groups_per_step, (step + 1) * groups_per_step):
        epoch, index_in_epoch = divmod(position, num_groups)
        group = int(_epoch_permutation(num_groups, seed, epoch)[index_in_epoch])
        bins.append(np.arange(group * plan.group_size, (group + 1) * plan.group_size))
    return np.sort(np.concatenate(bins))  # bins are numbered in descending order of cost


def bins_of_rank(
    bin_numbers: np.ndarray, *, rank: int, world_size: int, microbatch: int, num_microbatches: int
) -> np.ndarray:
    """Return the bins of one rank's microbatch in a step.

    Ranks that run at the same time get bins that are adjacent in cost; if a microbatch has several
    bins, the order of ranks alternates, which evens out their sums.
    """
    assert len(bin_numbers) % (world_size * num_microbatches) == 0, "see check_global_batch_sizes"
    rounds_JR = bin_numbers.reshape(num_microbatches, -1, world_size)[microbatch].copy()
    rounds_JR[1::2] = rounds_JR[1::2, ::-1]
    return rounds_JR[:, rank]


@lru_cache(maxsize=4)
def _epoch_permutation(num_groups: int, seed: int, epoch: int) -> np.ndarray:
    """Permute the groups for one epoch."""
    return seeded_permutation(num_groups, "pass", seed, epoch)
