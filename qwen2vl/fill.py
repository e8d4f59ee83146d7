"""Weights of a folder -> parameters and layers of a model, one tensor or layer at a time.

A layer is loaded as stored, or built from the integers of a GPTQ or AWQ folder (prequantized), or
loaded and then quantized by quantization/scheme.py (online quantization). So there is never a
second copy of the model in memory, and of a quantized model not even one unquantized copy.
loading.py calls `fill_model`.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from qwen2vl.errors import InputError
from qwen2vl.linear.fused import fusion_groups
from qwen2vl.lora.layers import LoraFactors, merge_lora
from qwen2vl.model import Qwen2VL
from qwen2vl.quantization.prequantized import build_prequantized_layer, prequantized_scheme
from qwen2vl.quantization.scheme import (
    CPU_MODES,
    LM_HEAD,
    LayerScheme,
    QuantizationMode,
    gpu_layer_schemes,
    layer_schemes,
    quantize_layers,
    replace_layers,
)
from qwen2vl.quantization.torchao import check_gpu_support
from qwen2vl.weights import TensorFolder, open_tensors

__all__ = [
    "fill_layer",
    "fill_model",
    "fill_parameters",
    "load_prequantized_layers",
    "online_schemes",
    "prequantized_schemes",
    "remap_parameters",
]

logger = logging.getLogger(__name__)


def prequantized_schemes(tensors: TensorFolder, device: torch.device) -> dict[str, LayerScheme]:
    """Return the schemes of prequantized layers that have a kernel; others are dequantized."""
    quantization_config = tensors.quantization_config
    if quantization_config is None:
        return {}
    schemes: dict[str, LayerScheme] = {}
    for name, (_, num_inputs) in tensors.packed_layers.items():
        scheme = prequantized_scheme(
            quantization_config.bits,
            quantization_config.group_size,
            num_inputs,
            is_symmetric=quantization_config.is_symmetric,
            has_contiguous_groups=quantization_config.has_contiguous_groups,
        )
        if scheme is not None and device.type == "cpu":
            schemes[name] = scheme
    if num_dequantized := len(tensors.packed_layers) - len(schemes):
        logger.warning(
            "%d layers are stored as %s of %d bits in groups of %d%s, for which there is no kernel "
            "on %s: they are dequantized, and take more memory",
            num_dequantized,
            quantization_config.method.upper(),
            quantization_config.bits,
            quantization_config.group_size,
            "" if quantization_config.has_contiguous_groups else ", out of order",
            device.type,
        )
    return schemes


def online_schemes(
    model: Qwen2VL,
    quantize: QuantizationMode | None,
    tensors: TensorFolder,
    prequantized: Collection[str],
    device: torch.device,
) -> dict[str, LayerScheme]:
    """Return the schemes of layers to quantize while loading (online quantization).

    Requested by `quantize`, or by `head_and_vision` of the folder's quantization_config.

    Raises:
        InputError: the mode is unknown, or not supported on this device.
    """
    if quantize is not None:
        if device.type == "cuda":
            schemes = gpu_layer_schemes(model, quantize)
            check_gpu_support(quantize, device)
            return schemes
        if quantize == "fp8":
            raise InputError(
                "quantize 'fp8' computes on NVIDIA GPUs only; use "
                f"{' or '.join(CPU_MODES)} on {device}"
            )
        schemes = layer_schemes(model, quantize)
        if device.type != "cpu":
            raise InputError(
                f"quantize {quantize!r} computes on the CPU and on NVIDIA GPUs only; leave it out "
                f"on {device}, or use device cpu"
            )
        return {name: s for name, s in schemes.items() if name not in prequantized}
    quantization_config = tensors.quantization_config
    if (
        quantization_config is None
        or quantization_config.head_and_vision is None
        or device.type != "cpu"
    ):
        return {}
    return {
        n: s
        for n, s in layer_schemes(model, quantization_config.head_and_vision).items()
        if n not in tensors.packed_layers
    }


def fill_model(
    model: Qwen2VL,
    tensors: TensorFolder,
    device: torch.device,
    dtype: torch.dtype,
    *,
    prequantized: Mapping[str, LayerScheme],
    online: Mapping[str, LayerScheme],
    factors: Mapping[str, LoraFactors],
) -> None:
    """Load all weights, merge the LoRA `factors`, and build the quantized layers.

    Plain parameters first; then the layers of a folder's own integers, then those to be quantized
    online, one fused group at a time.

    Raises:
        CheckpointError: zero points or groups contradict config.json.
    """
    fill_parameters(model, tensors, device, dtype, skip_layers={**prequantized, **online})
    merge_lora(model, {name: f for name, f in factors.items() if name not in online})
    for names, scheme in fusion_groups(prequantized):
        load_prequantized_layers(model, tensors, names, scheme)
    for names, scheme in fusion_groups(online):
        for name in names:
            fill_layer(model, tensors, name)
        merge_lora(model, {name: factors[name] for name in names if name in factors})
        quantize_layers(model, names, scheme)


def fill_parameters(
    model: Qwen2VL,
    tensors: TensorFolder,
    device: torch.device,
    dtype: torch.dtype,
    *,
    skip_layers: Collection[str],
) -> None:
    """Load, move and cast parameters one by one; layers in `skip_layers` stay on meta."""
    state = {
        # A patch embedding stored as a matrix takes the Conv3d shape here.
        name: tensors[name].view(parameter.shape).to(device).to(dtype)
        for name, parameter in model.named_parameters()
        if name.rpartition(".")[0] not in skip_layers
    }
    model.load_state_dict(state, strict=not skip_layers, assign=True)


def remap_parameters(model: Qwen2VL, folder: Path, merged: Collection[str]) -> None:
    """Memory-map the remaining plain weights anew, so that the first mapping is closed.

    Weights that were prepacked or quantized have been read, and their pages stay resident while any
    tensor uses the same mapping; of the new mapping only pages in use are read.
    """
    tensors = open_tensors(folder)
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[0] in merged:
            continue  # differs from the stored weight
        stored = tensors[name]
        if stored.dtype == parameter.dtype:  # else it is a copy already
            parameter.data = stored.view(parameter.shape)


def fill_layer(model: Qwen2VL, tensors: TensorFolder, name: str) -> None:
    """Load one layer's weights as stored; a tied head has none of its own."""
    if name == LM_HEAD and model.lm_head is None:
        return
    layer = model.get_submodule(name)
    state = {leaf: tensors[f"{name}.{leaf}"] for leaf, _ in layer.named_parameters()}
    layer.load_state_dict(state, strict=True, assign=True)


def load_prequantized_layers(
    model: Qwen2VL, tensors: TensorFolder, names: Sequence[str], scheme: LayerScheme
) -> None:
    """Replace a linear layer, or a group to fuse, by a layer of its prequantized weights.

    Raises:
        CheckpointError: zero points or groups contradict config.json.
    """
    matrices = [tensors.quantized_matrix(name) for name in names]
    biases = [tensors[f"{name}.bias"] for name in names if _has_bias(model, name)]
    layer = build_prequantized_layer(
        torch.cat([matrix.ints_OI for matrix in matrices]),
        torch.cat([matrix.scale_GO for matrix in matrices], 1),
        torch.cat([matrix.zero_GO for matrix in matrices], 1),
        [matrix.group_I for matrix in matrices],
        torch.cat(biases) if biases else None,
        scheme,
    )
    replace_layers(model, names, layer)


def _has_bias(model: Qwen2VL, name: str) -> bool:
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    return layer.bias is not None
