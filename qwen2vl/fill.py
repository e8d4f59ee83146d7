"""Weights of a folder -> parameters and layers of a model, one tensor or layer at a time.

A layer is loaded as stored, or built from the integers of a GPTQ or AWQ folder, or uses those of a
compressed-tensors folder where they are mapped (both prequantized), or is loaded and then quantized
by quantization/scheme.py (online quantization). Pages of the file that were copied are released at
once. So there is never a second copy of the model in memory, and of a quantized model not even one
unquantized copy. loading.py calls `fill_model`; convert.py holds one part of a model at a time
(`loaded_parameters`).
"""

from __future__ import annotations

import ctypes
import logging
import sys
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod

import torch
from torch import Tensor, nn

from qwen2vl.errors import CheckpointError, InputError
from qwen2vl.linear.fused import fusion_groups
from qwen2vl.lora.layers import LoraFactors, merge_lora
from qwen2vl.model import Qwen2VL
from qwen2vl.quantization.prequantized import (
    build_prequantized_layer,
    build_row_major_layer,
    prequantized_scheme,
)
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
from qwen2vl.weights import PackedFormat, QuantizedMatrix, TensorFolder, expected_shapes
from qwen2vl.weights.state_dict import EMBED_TOKENS_WEIGHT

__all__ = [
    "fill_layer",
    "fill_model",
    "fill_parameters",
    "load_prequantized_layers",
    "loaded_parameters",
    "map_prequantized_layer",
    "online_schemes",
    "prequantized_schemes",
    "read_parameter",
    "release_layers",
]

logger = logging.getLogger(__name__)


def prequantized_schemes(tensors: TensorFolder, device: torch.device) -> dict[str, LayerScheme]:
    """Return the schemes of prequantized layers that have a kernel; others are dequantized."""
    schemes: dict[str, LayerScheme] = {}
    dequantized: Counter[PackedFormat] = Counter()
    for name, layer in tensors.packed_layers.items():
        scheme = prequantized_scheme(
            layer.format.bits,
            layer.format.group_size,
            layer.shape[1],
            is_symmetric=layer.format.is_symmetric,
            has_contiguous_groups=layer.format.has_contiguous_groups,
        )
        if scheme is None or device.type != "cpu":
            dequantized[layer.format] += 1
        else:
            schemes[name] = scheme
    for packed_format, count in dequantized.items():
        logger.warning(
            "%d layers are stored as %s, for which there is no kernel on %s: they are dequantized, "
            "and take more memory",
            count,
            packed_format.describe(),
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
        online = {name: s for name, s in schemes.items() if name not in prequantized}
        if num_stored := len(schemes) - len(online):
            logger.warning(
                "quantize %r: %d layers are stored quantized and stay so; it applies to the other "
                "%d layers",
                quantize,
                num_stored,
                len(online),
            )
        return online
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

    Plain parameters first; then those to be quantized online, then the layers of a folder's own
    integers, one fused group at a time and the largest first: what a group needs besides its result
    (for the head of the 2B half a gigabyte) is needed while little else is loaded. Last, layers
    whose integers stay in the file: fusing them would copy them.

    Raises:
        CheckpointError: zero points or groups contradict config.json.
    """
    fill_parameters(model, tensors, device, dtype, skip_layers={**prequantized, **online})
    merge_lora(model, {name: f for name, f in factors.items() if name not in online})
    for names, scheme in _largest_first(model, online):
        for name in names:
            fill_layer(model, tensors, name)
        merge_lora(model, {name: factors[name] for name in names if name in factors})
        quantize_layers(model, names, scheme)
        release_layers(tensors, names)
    mapped = [name for name in prequantized if tensors.packed_layers[name].format.is_row_major]
    unpacked = {name: s for name, s in prequantized.items() if name not in set(mapped)}
    for names, scheme in _largest_first(model, unpacked):
        load_prequantized_layers(model, tensors, names, scheme)
        release_layers(tensors, names)
    for name in mapped:
        map_prequantized_layer(model, tensors, name)


def _largest_first(
    model: Qwen2VL, schemes: Mapping[str, LayerScheme]
) -> list[tuple[tuple[str, ...], LayerScheme]]:
    shapes = expected_shapes(model.config)
    shapes[f"{LM_HEAD}.weight"] = shapes[EMBED_TOKENS_WEIGHT]

    def numel(group: tuple[tuple[str, ...], LayerScheme]) -> int:
        return sum(prod(shapes[f"{name}.weight"]) for name in group[0])

    return sorted(fusion_groups(schemes), key=numel, reverse=True)


def release_layers(tensors: TensorFolder, names: Sequence[str]) -> None:
    """Return memory of layers that were copied: their resident pages, and what copying took.

    A tied head's pages are those of the embedding.
    """
    weights = [f"{name}.weight" for name in names]
    if LM_HEAD in names and f"{LM_HEAD}.weight" not in tensors:
        weights.append(EMBED_TOKENS_WEIGHT)
    tensors.release(weights)
    _trim_heap()


def _trim_heap() -> None:
    """Return free memory of the heap to the system, where the C library is glibc.

    Freed tensors of up to 32 MB leave holes between those that stay: 0.6 GB while a 2B is loaded.
    """
    if sys.platform == "linux" and (malloc_trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        malloc_trim(0)


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
        name: read_parameter(tensors, name, parameter.shape, device, dtype)
        for name, parameter in model.named_parameters()
        if name.rpartition(".")[0] not in skip_layers
    }
    model.load_state_dict(state, strict=not skip_layers, assign=True)


def read_parameter(
    tensors: TensorFolder,
    name: str,
    shape: tuple[int, ...],
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """Read one tensor as a parameter: a copy, or memory-mapped if device and dtype are as stored.

    A patch embedding stored as a matrix takes the Conv3d shape here.
    """
    stored = tensors[name].view(shape)
    parameter = stored.to(device).to(dtype)
    if parameter is not stored or name.removesuffix(".weight") in tensors.packed_layers:
        tensors.release([name])
    return parameter


@contextmanager
def loaded_parameters(
    model: Qwen2VL, tensors: TensorFolder, dtype: torch.dtype, prefixes: Sequence[str]
) -> Iterator[None]:
    """Load a part of a model that is on meta, the parameters of these prefixes, for a while."""
    meta = {n: p for n, p in model.state_dict().items() if n.startswith(tuple(prefixes))}
    cpu = torch.device("cpu")
    state = {n: read_parameter(tensors, n, p.shape, cpu, dtype) for n, p in meta.items()}
    model.load_state_dict(state, strict=False, assign=True)
    del state
    try:
        yield
    finally:
        model.load_state_dict(meta, strict=False, assign=True)
        tensors.release(meta)


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
    """Replace a linear layer, or a group to fuse, by a layer of its unpacked GPTQ or AWQ weights.

    Raises:
        CheckpointError: zero points or groups contradict config.json.
    """
    weights = [tensors.quantized_weight(name) for name in names]
    matrices = [weight for weight in weights if isinstance(weight, QuantizedMatrix)]
    biases = [tensors[f"{name}.bias"] for name in names if _has_bias(model, name)]
    try:
        layer = build_prequantized_layer(
            torch.cat([matrix.ints_OI for matrix in matrices]),
            torch.cat([matrix.scale_GO for matrix in matrices], 1),
            torch.cat([matrix.zero_GO for matrix in matrices], 1),
            [matrix.group_I for matrix in matrices],
            torch.cat(biases) if biases else None,
            scheme,
        )
    except CheckpointError as error:
        raise CheckpointError(f"{tensors.folder}, {names[0]}: {error}") from None
    replace_layers(model, names, layer)


def map_prequantized_layer(model: Qwen2VL, tensors: TensorFolder, name: str) -> None:
    """Replace a linear layer by one whose weights stay in the mapped file, as in other processes.

    Bias, zero points and int8 scales are copied.
    """
    weight = tensors.quantized_weight(name)
    assert not isinstance(weight, QuantizedMatrix), f"{name} is not row-major"
    bias_O = tensors[f"{name}.bias"] if _has_bias(model, name) else None
    replace_layers(model, [name], build_row_major_layer(weight, bias_O))


def _has_bias(model: Qwen2VL, name: str) -> bool:
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    return layer.bias is not None
