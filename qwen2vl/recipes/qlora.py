"""qlora: QLoRA, LoRA over 4-bit (NF4) base weights, for models that would not fit otherwise.

    qwen2vl train qlora model=Qwen/Qwen2-VL-7B-Instruct data=mine.jsonl

The base weights of the adapted layers are NormalFloat codes with 8-bit scales (double
quantization), 4.13 bits a weight, dequantized in every forward and backward. The exported model
merges the adapter into the dequantized weights, which it was trained with; the PEFT folder may also
be applied to the unquantized weights, with nearly the same outputs. (Dettmers et al. 2023, QLoRA.)
"""

from __future__ import annotations

from dataclasses import replace

from qwen2vl.recipes import lora
from qwen2vl.train.config import TrainConfig

__all__ = ["recipe"]


def recipe() -> TrainConfig:
    """Fine-tune low-rank adapters over 4-bit weights."""
    config = lora.recipe()
    assert config.adapter is not None
    return replace(
        config, name="qlora", adapter=replace(config.adapter, quantize_base="nf4_double")
    )
