"""lora: LoRA fine-tuning of a pretrained model on your own conversations.

    qwen2vl train lora model=Qwen/Qwen2-VL-2B-Instruct data=mine.jsonl
    qwen2vl train lora model=nano data=mine.jsonl optim.lr=1e-3 stages.0.steps=200
    qwen2vl train lora model=DIR data=FILE 'adapter.target_modules=["visual.*", "model.*q_proj"]'

Adapters of rank 16 on the seven linear layers of every decoder block; `adapter.target_modules` are
patterns of other layers' names, also in the vision tower. The run ends with two folders:
`adapter-STEPS` in PEFT's format, and `model-STEPS` with merged weights. A step has one bin of up to
8,192 tokens; under torchrun set `data.global_batch_size` to the number of GPUs.
"""

from __future__ import annotations

from qwen2vl.data.config import DataConfig, SourceConfig
from qwen2vl.lora.layers import LoraConfig
from qwen2vl.recipes import default_device
from qwen2vl.train.config import (
    FROZEN,
    EvaluationConfig,
    OptimConfig,
    Stage,
    TrainConfig,
)

__all__ = ["RULES", "recipe"]

RULES = ((r".*\.lora_[AB]", 1.0), (r".*", FROZEN))


def recipe() -> TrainConfig:
    """Fine-tune low-rank adapters."""
    return TrainConfig(
        name="lora",
        device=default_device(),
        adapter=LoraConfig(rank=16, alpha=32.0, dropout=0.05),
        optim=OptimConfig(
            name="adamw",
            lr=2e-4,
            warmup_steps=20,
            beta2=0.95,
            weight_decay=0.0,
            decay_type="cosine",
        ),
        stages=(
            Stage(
                name="lora",
                steps=500,
                data=DataConfig(sources=(SourceConfig(path="data.jsonl"),), global_batch_size=1),
                rules=RULES,
                decay_ratio=1.0,
                weighting="sample",
            ),
        ),
        evaluation=EvaluationConfig(eval_steps=0),
        num_workers=2,
    )
