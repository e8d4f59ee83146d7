"""full_finetune: full fine-tuning of a pretrained model on your own conversations.

    qwen2vl train full_finetune model=Qwen/Qwen2-VL-2B-Instruct data=mine.jsonl
    torchrun --nproc-per-node 8 -m qwen2vl train full_finetune model=DIR data=mine.jsonl

A file has one conversation per line, as for `qwen2vl ask`, with the answers (docs/training.md). The
vision tower has a tenth of the learning rate. Weights, gradients and moments take 16 bytes a
parameter, 35 GB for the 2B, sharded over all GPUs; if that is too much, use lora. `stages.0.steps`
is the number of optimizer steps, of 8 bins with up to 8,192 tokens each.
"""

from __future__ import annotations

from qwen2vl.data.config import DataConfig, SourceConfig
from qwen2vl.recipes.stages import fine_tuning_config
from qwen2vl.train.config import TrainConfig

__all__ = ["recipe"]


def recipe() -> TrainConfig:
    """Fine-tune all weights with a low learning rate."""
    return fine_tuning_config(
        "full_finetune",
        stage="finetune",
        steps=1000,
        data=DataConfig(sources=(SourceConfig(path="data.jsonl"),)),
        rules=((r"visual\.(?!merger).*", 0.1), (r".*", 1.0)),
        lr=1e-5,
        warmup_steps=50,
        num_workers=4,
    )
