"""qlora: as lora, over weights of 4 bits: for models that would not fit otherwise.

    qwen2vl train qlora model=Qwen/Qwen2-VL-7B-Instruct data=mine.jsonl

The adapted layers' own weights are NormalFloat codes with magnitudes of 8 bits, 4.13 bits a weight,
widened in every forward and backward. What is exported merges into the widened codes, which is
what was trained beside; PEFT's folder may also be put on the whole weights, which answer nearly
the same. (Dettmers et al. 2023, QLoRA.)
"""

from __future__ import annotations

from dataclasses import replace

from qwen2vl.recipes import lora
from qwen2vl.train.config import TrainConfig

__all__ = ["recipe"]


def recipe() -> TrainConfig:
    """Fine-tune low-rank factors over 4-bit weights."""
    plain = lora.recipe()
    assert plain.adapter is not None
    return replace(plain, name="qlora", adapter=replace(plain.adapter, quantize_base="nf4_double"))
