"""lora: learn a small change beside a finished model, on your own conversations.

    qwen2vl train lora model=Qwen/Qwen2-VL-2B-Instruct data=mine.jsonl
    qwen2vl train lora model=nano data=mine.jsonl optim.lr=1e-3 stages.0.steps=200
    qwen2vl train lora model=DIR data=mine.jsonl 'adapter.targets=["visual.*", "model.*q_proj"]'

Factors of rank 16 beside the seven linear layers of every block of the decoder; patterns of
`adapter.targets` name others, of either tower. At the end there are two folders: `adapter-STEPS`,
in PEFT's format, and `model-STEPS`, merged. One step reads one bin of 8,192 tokens; under torchrun
give `data.bins` as many as there are GPUs.
"""

from __future__ import annotations

from qwen2vl.data.config import DataConfig, Source
from qwen2vl.lora.layers import LoraConfig
from qwen2vl.recipes import best_device
from qwen2vl.train.config import (
    FROZEN,
    OptimConfig,
    ProbeConfig,
    Stage,
    TrainConfig,
)

__all__ = ["RULES", "recipe"]

RULES = ((r".*\.lora_[AB]", 1.0), (r".*", FROZEN))


def recipe() -> TrainConfig:
    """Fine-tune low-rank factors."""
    return TrainConfig(
        name="lora",
        device=best_device(),
        adapter=LoraConfig(rank=16, alpha=32.0, dropout=0.05),
        optim=OptimConfig(
            method="adamw", lr=2e-4, warmup=20, beta2=0.95, weight_decay=0.0, fall="cosine"
        ),
        stages=(
            Stage(
                name="lora",
                steps=500,
                data=DataConfig(sources=(Source(path="data.jsonl"),), bins=1),
                rules=RULES,
                decay=1.0,
                weighting="sample",
            ),
        ),
        probe=ProbeConfig(every=0),
        workers=2,
    )
