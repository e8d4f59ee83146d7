"""LoRA adapter folders in PEFT's format, with random factors that change every output."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from qwen2vl.lora.layers import LoraFactors
from qwen2vl.model import Qwen2VL

TEXT = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
VISION = ("qkv", "attn.proj", "fc1", "fc2", "merger.mlp.0", "merger.mlp.2")
ALL_LAYERS = (*TEXT, *VISION, "lm_head")

ALPHA = 6


def random_factors(
    model: Qwen2VL, targets: Sequence[str] = ALL_LAYERS, *, seed: int = 0, rank: int = 4
) -> dict[str, LoraFactors]:
    """Draw factors for every linear layer whose name ends in one of `targets`."""
    generator = torch.Generator().manual_seed(seed)
    factors: dict[str, LoraFactors] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and any(f".{name}".endswith(f".{t}") for t in targets):
            shape_a, shape_b = (rank, layer.in_features), (layer.out_features, rank)
            factors[name] = LoraFactors(
                a_RX=torch.randn(shape_a, generator=generator) / layer.in_features**0.5,
                b_YR=torch.randn(shape_b, generator=generator) / rank**0.5,
                scale=ALPHA / rank,
            )
    return factors


def write_adapter(
    path: Path,
    model: Qwen2VL,
    targets: Sequence[str] = ALL_LAYERS,
    *,
    seed: int = 0,
    rank: int = 4,
) -> Path:
    """Write random factors for the layers of a plain model as PEFT would save them."""
    path.mkdir(parents=True)
    factors = random_factors(model, targets, seed=seed, rank=rank)
    tensors: dict[str, torch.Tensor] = {}
    for name, found in factors.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = found.a_RX
        tensors[f"base_model.model.{name}.lora_B.weight"] = found.b_YR
    save_file(tensors, path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": ALPHA, "target_modules": list(targets)}
    (path / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return path
