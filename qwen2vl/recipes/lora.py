"""lora: LoRA fine-tuning of a pretrained model on your own conversations.

    qwen2vl train lora model=Qwen/Qwen2-VL-2B-Instruct data=mine.jsonl
    qwen2vl train lora model=nano data=mine.jsonl optim.lr=1e-3 stages.0.steps=200
    qwen2vl train lora model=DIR data=FILE epochs=3 validation=0.05
    qwen2vl train lora model=nano data=easy-vqa optim.lr=2e-3
    qwen2vl train lora model=DIR data=FILE 'adapter.target_modules=["visual.*", "model.*q_proj"]'

Adapters of rank 16 on the seven linear layers of every decoder block; `adapter.target_modules` are
patterns of other layers' names, also in the vision tower. The run ends with two folders:
`adapter-STEPS` in PEFT's format, and `model-STEPS` with merged weights. A step has one bin of up to
8,192 tokens; under torchrun set `data.global_batch_size` to the number of GPUs.
"""

from __future__ import annotations

from qwen2vl.data.config import DataConfig, SourceConfig
from qwen2vl.lora.layers import LoraConfig
from qwen2vl.recipes.stages import fine_tuning_config
from qwen2vl.train.config import FROZEN, TrainConfig

__all__ = ["RULES", "recipe"]

RULES = ((r".*\.lora_[AB]", 1.0), (r".*", FROZEN))


def recipe() -> TrainConfig:
    """Fine-tune low-rank adapters."""
    return fine_tuning_config(
        "lora",
        stage="lora",
        steps=500,
        data=DataConfig(sources=(SourceConfig(path="data.jsonl"),), global_batch_size=1),
        rules=RULES,
        lr=2e-4,
        warmup_steps=20,
        num_workers=2,
        adapter=LoraConfig(rank=16, alpha=32.0, dropout=0.05),
    )
