"""How fast weights move at a step: up over the warm-up, flat, down over the decay, stage by stage.

    peak     __________            linear: warm-up, stable, decay
            /          \\_
    floor  /              \\__       cosine with decay=1: the fall begins where the warm-up ends

A pure function of the config and the step's number, as the schedule of samples is. It knows no
optimizer. (arXiv 2404.06395 for stable-decay; arXiv 1608.03983 for the cosine.)
Next room: optim.py.
"""

from __future__ import annotations

import math

from qwen2vl.train.config import TrainConfig
from qwen2vl.train.loader.data_order import locate

__all__ = ["is_warming", "rate"]


def rate(config: TrainConfig, step: int) -> float:
    """Give the multiple of the peak rate at which `step` (from 0) moves."""
    index, inner = locate(config, step)
    stage, optim = config.stages[index], config.optim
    up = min(1.0, (inner + 1) / max(1, optim.warmup))
    falling = stage.decay * stage.steps
    if optim.fall == "cosine":
        falling = min(falling, stage.steps - min(optim.warmup, stage.steps))
    left = stage.steps - inner
    if left >= falling:
        return up
    share = left / falling
    if optim.fall == "cosine":
        share = 0.5 - 0.5 * math.cos(math.pi * share)
    return min(up, optim.floor + (1 - optim.floor) * share)


def is_warming(config: TrainConfig, taken: int) -> bool:
    """Say whether a stage is below its peak rate still, `taken` steps into it; not before any."""
    return 0 < taken < config.optim.warmup
