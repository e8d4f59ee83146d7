"""Training stages of Qwen2-VL: what the published three and the fine-tuning recipes share.

The paper pretrains the vision tower (stage 1), then all weights (stage 2), and fine-tunes the
language model on instructions (stage 3). Here pretraining runs for a number of tokens, with a
constant learning rate and the same loss weight for every target token; fine-tuning runs for a
number of steps, with cosine decay and the same loss weight for every conversation. Published are
the trained parameters and the numbers of tokens; optimizer, schedule and loss weights are choices
of this project. (Qwen2-VL sec. 2.2.)
"""

from __future__ import annotations

import torch

from qwen2vl.data.config import DataConfig
from qwen2vl.lora.layers import LoraConfig
from qwen2vl.train.config import (
    FROZEN,
    EvaluationConfig,
    OptimConfig,
    Rules,
    Stage,
    TrainConfig,
)

__all__ = [
    "TRAIN_ALL",
    "TRAIN_DECODER_AND_MERGER",
    "TRAIN_VISION",
    "fine_tuning_config",
    "pretraining_config",
]

TRAIN_VISION: Rules = ((r"visual\..*", 1.0), (r".*", FROZEN))  # stage 1: vision tower and merger
TRAIN_ALL: Rules = ((r".*", 1.0),)  # stage 2: everything
TRAIN_DECODER_AND_MERGER: Rules = (  # stage 3: the vision tower is frozen
    (r"visual\.(?!merger).*", FROZEN),
    (r".*", 1.0),
)


def pretraining_config(
    name: str, *, stage: str, num_tokens: float, data: DataConfig, rules: Rules, lr: float
) -> TrainConfig:
    """Configure a run of one pretraining stage, of `num_tokens` tokens if all bins are full."""
    return TrainConfig(
        name=name,
        device=_default_device(),
        optim=OptimConfig(name="adamw", lr=lr, warmup_steps=2000, beta2=0.95, weight_decay=0.05),
        stages=(
            Stage(
                name=stage,
                steps=int(num_tokens / (data.global_batch_size * data.max_tokens)),
                data=data,
                rules=rules,
                weighting="token",
            ),
        ),
        evaluation=EvaluationConfig(eval_steps=0),
        num_workers=8,
        save_steps=1000,
    )


def fine_tuning_config(
    name: str,
    *,
    stage: str,
    steps: int,
    data: DataConfig,
    rules: Rules,
    lr: float,
    warmup_steps: int,
    weight_decay: float = 0.0,
    num_workers: int,
    adapter: LoraConfig | None = None,
) -> TrainConfig:
    """Configure a run of one stage of instruction tuning or fine-tuning, with cosine decay."""
    return TrainConfig(
        name=name,
        adapter=adapter,
        device=_default_device(),
        optim=OptimConfig(
            name="adamw",
            lr=lr,
            warmup_steps=warmup_steps,
            beta2=0.95,
            weight_decay=weight_decay,
            decay_type="cosine",
        ),
        stages=(
            Stage(
                name=stage,
                steps=steps,
                data=data,
                rules=rules,
                decay_ratio=1.0,
                weighting="sample",
            ),
        ),
        evaluation=EvaluationConfig(eval_steps=0),
        num_workers=num_workers,
    )


def _default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
