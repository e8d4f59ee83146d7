"""Epochs: the number of steps after which a stage has read its data a given number of times.

    epochs=3    12 bins of an epoch, 4 in a step: 9 steps

A step reads a number of bins, and how many bins an epoch has is known once the samples are measured
and packed. So the data are opened first, without the model, and what is measured is cached for the
run. A config has steps only: the learning rate, evaluations and resuming depend on them.
"""

from __future__ import annotations

import math
from dataclasses import replace

from qwen2vl.data.lengths import ProgressCallback
from qwen2vl.errors import ConfigError
from qwen2vl.train.config import Stage, TrainConfig
from qwen2vl.train.init import build_processor
from qwen2vl.train.loader.dataloader import open_dataset

__all__ = ["set_epochs"]


def set_epochs(
    config: TrainConfig,
    epochs: float,
    *,
    progress: ProgressCallback = lambda what, done, total: None,
) -> TrainConfig:
    """Set the steps of each stage that reads data so that it reads all of them `epochs` times.

    The last step is completed with the bins that follow.

    Args:
        config: of the run.
        epochs: above 0; need not be whole.
        progress: called while samples are measured.

    Raises:
        ConfigError: no stage reads data, `epochs` is not above 0, or the config has no model.
        InputError: as `PackedDataset.open`.
    """
    if not 0 < epochs < math.inf:
        raise ConfigError(f"epochs={epochs:g}: must be above 0, as epochs=3")
    if all(stage.data is None for stage in config.stages):
        raise ConfigError(
            f"epochs={epochs:g}: no stage of {config.name} reads data, and synthetic samples are "
            "never repeated; give stages.0.steps=N"
        )
    processor = build_processor(config)
    stages: list[Stage] = []
    for stage_index, stage in enumerate(config.stages):
        if stage.data is None or not stage.steps:
            stages.append(stage)
            continue
        dataset = open_dataset(config, stage_index, processor, progress=progress)
        # Rounded, so that 0.1 x 30 bins are 3, not 4.
        steps = max(1, math.ceil(round(epochs / dataset.epochs(1), 6)))
        stages.append(replace(stage, steps=steps))
    return replace(config, stages=tuple(stages))
