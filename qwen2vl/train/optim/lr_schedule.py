"""LR schedule: linear warmup, stable phase, linear or cosine decay (WSD, cosine), in every stage.

    peak     __________            linear: warmup, stable, decay
            /          \\_
    floor  /              \\__       cosine with decay_ratio=1: decays from the end of the warmup

A pure function of the config and the step number, as the data order is. (arXiv 2404.06395 for
warmup-stable-decay; arXiv 1608.03983 for the cosine.)
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from qwen2vl.train.config import TrainConfig
from qwen2vl.train.loader.data_order import locate_step

__all__ = ["describe_warmup", "is_in_warmup", "lr_factor"]


def lr_factor(config: TrainConfig, step: int) -> float:
    """Return the factor of the peak learning rate at `step` of the run, counted from 0."""
    index, stage_step = locate_step(config, step)
    stage, optim = config.stages[index], config.optim
    warmup = min(1.0, (stage_step + 1) / max(1, optim.warmup_steps))
    decay_steps = stage.decay_ratio * stage.steps
    if optim.decay_type == "cosine":
        decay_steps = min(decay_steps, stage.steps - min(optim.warmup_steps, stage.steps))
    remaining = stage.steps - stage_step
    if remaining >= decay_steps:
        return warmup
    factor = remaining / decay_steps
    if optim.decay_type == "cosine":
        factor = 0.5 - 0.5 * math.cos(math.pi * factor)
    return min(warmup, optim.min_lr_factor + (1 - optim.min_lr_factor) * factor)


def is_in_warmup(config: TrainConfig, num_steps: int) -> bool:
    """Return whether a stage is still in its warmup after `num_steps` of its steps (not at 0)."""
    return 0 < num_steps < config.optim.warmup_steps


def describe_warmup(config: TrainConfig) -> Iterator[str]:
    """Yield a warning for each stage that ends in its warmup, so that the model learns little."""
    for stage in config.stages:
        if is_in_warmup(config, stage.steps):
            yield (
                f"stage {stage.name}: its {stage.steps:,} steps are all warm-up, in which the "
                "learning rate still rises; give fewer, optim.warmup_steps=N"
            )
