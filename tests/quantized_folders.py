"""Quantized folders as other programs write them, with random integers.

GPTQ and AWQ as the official repositories have them, compressed-tensors as llm-compressor does.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qwen2vl.model import Qwen2VL
from qwen2vl.weights import PackedFormat, QuantizationConfig, QuantizedMatrix
from tests.folders import edit_json, write_tiny
from tests.packing import pack

GPTQ = {"quant_method": "gptq", "desc_act": False, "sym": True, "true_sequential": True}
AWQ = {"quant_method": "awq", "version": "gemm", "zero_point": True}

_ARGUMENTS = {
    **{"num_bits": 8, "type": "int", "symmetric": True, "group_size": None},
    **{"strategy": "channel", "block_structure": None, "dynamic": False, "actorder": None},
    **{"observer": "minmax", "observer_kwargs": {}},
}


def compressed_tensors(packing: str, **weights: Any) -> dict[str, Any]:
    """Return the quantization_config of W8A8, or of W4A16 with arguments of its weights."""
    activations = None
    if packing == "int-quantized":
        activations = _ARGUMENTS | {"strategy": "token", "dynamic": True, "observer": None}
    group = {
        "targets": ["Linear"],
        "weights": _ARGUMENTS | weights,
        "input_activations": activations,
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": packing,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["re:visual.*", "lm_head"],
        "kv_cache_scheme": None,
        "global_compression_ratio": 1.5,
        "sparsity_config": {},
        "transform_config": {},
        "version": "0.12.2",
    }


W8A8 = compressed_tensors("int-quantized")


def w4a16(group_size: int, *, symmetric: bool) -> dict[str, Any]:
    """Return the quantization_config of 4-bit weights."""
    return compressed_tensors(
        "pack-quantized",
        **{"num_bits": 4, "strategy": "group", "group_size": group_size, "symmetric": symmetric},
    )


def write_quantized(
    path: Path, settings: dict[str, Any], *, model: Qwen2VL | None = None, seed: int = 0
) -> Qwen2VL:
    """Write a folder with a quantized decoder; return its dequantized model."""
    plain = write_tiny(path, model=model)
    (packed_format,) = QuantizationConfig.from_dict(settings, "test").formats
    tensors = load_file(path / "model.safetensors")
    generator = torch.Generator().manual_seed(seed)
    for name, layer in decoder_linears(plain):
        matrix = random_matrix(layer.weight.shape, packed_format, generator)
        parts = pack(matrix, packed_format)
        del tensors[f"{name}.weight"]
        tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
        if layer.bias is None and packed_format.packing == "gptq":  # AutoGPTQ adds a bias of zeros
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
    shape: tuple[int, ...], packed_format: PackedFormat, generator: torch.Generator
) -> QuantizedMatrix:
    """Draw integers and scales, so that weights have a realistic size."""
    outputs, inputs = shape
    size = packed_format.group_size if packed_format.group_size > 0 else inputs
    groups, levels = -(-inputs // size), 1 << packed_format.bits

    def draw(low: int, high: int, *of: int) -> Tensor:
        return torch.randint(low, high, of, generator=generator)

    scale_GO = (0.5 + torch.rand(groups, outputs, generator=generator)) / levels / inputs**0.5
    middle = torch.full((groups, outputs), levels // 2)
    zero_GO = middle if packed_format.is_symmetric else draw(1, levels, groups, outputs)
    group_I = torch.arange(inputs) // size
    if not packed_format.has_contiguous_groups:
        group_I = group_I[torch.randperm(inputs, generator=generator)]
    return QuantizedMatrix(
        ints_OI=draw(0, levels, outputs, inputs).to(torch.uint8),
        scale_GO=scale_GO.bfloat16().half(),  # exact in both
        zero_GO=zero_GO.to(torch.int16),
        group_I=group_I,
    )


def read_quantization_config(path: Path) -> dict[str, Any]:
    """Read quantization_config from a folder's config.json."""
    return json.loads((path / "config.json").read_text(encoding="utf-8"))["quantization_config"]
