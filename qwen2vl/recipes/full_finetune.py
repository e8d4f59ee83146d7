"""full_finetune: move every weight of a finished model, on your own conversations.

    qwen2vl train full_finetune model=Qwen/Qwen2-VL-2B-Instruct data=mine.jsonl
    torchrun --nproc-per-node 8 -m qwen2vl train full_finetune model=DIR data=mine.jsonl

A file holds one conversation a line, as for `qwen2vl ask`, with the answers (docs/training.md).
The tower moves a tenth as fast as the rest. Weights, gradients and moments take 16 bytes a
parameter, 35 GB for the 2B, shared by all GPUs; where that is too much, take lora. `stages.0.steps`
says for how long: one step reads 8 bins of 8,192 tokens.
"""

from __future__ import annotations

from qwen2vl.data.config import DataConfig, Source
from qwen2vl.recipes import best_device
from qwen2vl.train.config import (
    OptimConfig,
    ProbeConfig,
    Stage,
    TrainConfig,
)

__all__ = ["recipe"]


def recipe() -> TrainConfig:
    """Fine-tune everything, gently."""
    return TrainConfig(
        name="full_finetune",
        device=best_device(),
        optim=OptimConfig(
            method="adamw", lr=1e-5, warmup=50, beta2=0.95, weight_decay=0.0, fall="cosine"
        ),
        stages=(
            Stage(
                name="finetune",
                steps=1000,
                data=DataConfig(sources=(Source(path="data.jsonl"),)),
                rules=((r"visual\.(?!merger).*", 0.1), (r".*", 1.0)),
                decay=1.0,
                weighting="sample",
            ),
        ),
        probe=ProbeConfig(every=0),
        workers=4,
    )
