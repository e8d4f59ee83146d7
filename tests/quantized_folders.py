"""GPTQ and AWQ folders in the format of the official repositories, with random integers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qwen2vl.model import Qwen2VL
from qwen2vl.weights import packing_module
from qwen2vl.weights.quantization_config import QuantizationConfig, QuantizedMatrix
from tests.folders import edit_json, write_tiny

GPTQ = {"quant_method": "gptq", "desc_act": False, "sym": True, "true_sequential": True}
AWQ = {"quant_method": "awq", "version": "gemm", "zero_point": True}


def write_quantized(
    path: Path, settings: dict[str, Any], *, model: Qwen2VL | None = None, seed: int = 0
) -> Qwen2VL:
    """Write a folder with a quantized decoder; return its dequantized model."""
    plain = write_tiny(path, model=model)
    config = QuantizationConfig.from_dict(settings, "test")
    tensors = load_file(path / "model.safetensors")
    generator = torch.Generator().manual_seed(seed)
    for name, layer in decoder_linears(plain):
        matrix = random_matrix(layer.weight.shape, config, generator)
        parts = packing_module(config).pack(matrix, config)
        del tensors[f"{name}.weight"]
        tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
        if layer.bias is None and config.method == "gptq":  # AutoGPTQ adds a bias of zeros
            tensors[f"{name}.bias"] = torch.zeros(layer.out_features, dtype=torch.float16)
        with torch.no_grad():
            layer.weight.copy_(matrix.dequantize())
    save_file(tensors, path / "model.safetensors")
    edit_json(path / "config.json", quantization_config=settings)
    return plain


def decoder_linears(model: Qwen2VL) -> Iterator[tuple[str, nn.Linear]]:
    """Iterate over the linear layers that the official repositories quantize."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.startswith("model."):
            yield name, module


def random_matrix(
    shape: tuple[int, ...], config: QuantizationConfig, generator: torch.Generator
) -> QuantizedMatrix:
    """Draw integers and scales, so that weights have a realistic size."""
    outputs, inputs = shape
    size = config.group_size if config.group_size > 0 else inputs
    groups, levels = -(-inputs // size), 1 << config.bits

    def draw(low: int, high: int, *of: int) -> Tensor:
        return torch.randint(low, high, of, generator=generator)

    scale_GO = (0.5 + torch.rand(groups, outputs, generator=generator)) / levels / inputs**0.5
    middle = torch.full((groups, outputs), levels // 2)
    zero_GO = middle if config.is_symmetric else draw(1, levels, groups, outputs)
    group_I = torch.arange(inputs) // size
    if not config.has_contiguous_groups:
        group_I = group_I[torch.randperm(inputs, generator=generator)]
    return QuantizedMatrix(
        ints_OI=draw(0, levels, outputs, inputs).to(torch.uint8),
        scale_GO=scale_GO.half(),
        zero_GO=zero_GO.to(torch.int16),
        group_I=group_I,
    )


def read_quantization_config(path: Path) -> dict[str, Any]:
    """Read quantization_config from a folder's config.json."""
    return json.loads((path / "config.json").read_text(encoding="utf-8"))["quantization_config"]
