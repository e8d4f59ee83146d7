"""Finds the packed layers of a folder, and unpacks one.

A packed layer has several tensors in place of `....weight`. Which of the folder's formats it has
follows from their names and shapes, so targets and ignored layers of a config need not be matched.
All shapes and dtypes are checked against that format before any tensor is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType

from torch import Tensor

from qwen2vl.quantization.int4 import PackedInt4Weight
from qwen2vl.quantization.rtn import PerChannelWeight
from qwen2vl.weights.header import TensorInfo
from qwen2vl.weights.packing import awq_format, compressed_tensors, gptq_format
from qwen2vl.weights.packing.packed_format import PackedFormat, Packing, QuantizedMatrix
from qwen2vl.weights.packing.quantization_config import QuantizationConfig

__all__ = ["PackedLayer", "QuantizedWeight", "find_packed_layers", "unpack_layer"]

QuantizedWeight = QuantizedMatrix | PackedInt4Weight | PerChannelWeight

_MODULES: dict[Packing, ModuleType] = {
    "gptq": gptq_format,
    "awq": awq_format,
    "pack-quantized": compressed_tensors,
    "int-quantized": compressed_tensors,
}

# The tensor that holds the integers.
_INTEGERS: dict[Packing, str] = {
    "gptq": "qweight",
    "awq": "qweight",
    "pack-quantized": "weight_packed",
    "int-quantized": "weight",
}

_OPTIONAL = ("g_idx",)

_SCALES = ("F16", "BF16", "F32")
_DTYPES = {
    **dict.fromkeys(("qweight", "qzeros", "weight_packed", "weight_zero_point"), ("I32",)),
    **dict.fromkeys(("g_idx", "weight_shape"), ("I32", "I64")),
    **dict.fromkeys(("scales", "weight_scale"), _SCALES),
    "weight": ("I8",),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedLayer:
    """One layer that is stored quantized."""

    shape: tuple[int, int]  # O, I
    format: PackedFormat
    parts: tuple[str, ...]  # its tensors, by their last names


def find_packed_layers(
    infos: Mapping[str, TensorInfo], config: QuantizationConfig
) -> tuple[dict[str, PackedLayer], list[str]]:
    """Find the packed layers among tensors, by their official names.

    Returns:
        The layers, and a text for each tensor that contradicts the formats of `config`.
    """
    tensors_of: dict[str, dict[str, TensorInfo]] = {}
    for name, info in infos.items():
        layer, _, part = name.rpartition(".")
        tensors_of.setdefault(layer, {})[part] = info
    found: dict[str, PackedLayer] = {}
    wrong: list[str] = []
    for layer, tensors in tensors_of.items():
        packings = _packings(tensors)
        if not packings:
            continue
        formats = [f for f in config.formats if f.packing in packings] or list(config.formats)
        problems = [_problems(layer, tensors, packed_format) for packed_format in formats]
        if all(problems):
            wrong += min(problems, key=len)
            continue
        packed_format = formats[problems.index([])]
        found[layer] = PackedLayer(
            shape=_shape(tensors, packed_format),
            format=packed_format,
            parts=tuple(part for part in tensors if part != "bias"),
        )
    return found, wrong


def unpack_layer(layer: PackedLayer, parts: Mapping[str, Tensor]) -> QuantizedWeight:
    """Return the weight of a layer, whose integers are views of the parts if it is row-major."""
    return _MODULES[layer.format.packing].unpack(parts, layer.format)


def _packings(tensors: Mapping[str, TensorInfo]) -> tuple[Packing, ...]:
    """Return what the tensors of one layer may be packed as; nothing if they are not packed."""
    if "qweight" in tensors:
        return "gptq", "awq"
    if "weight_packed" in tensors:
        return ("pack-quantized",)
    return ("int-quantized",) if {"weight", "weight_scale"} <= tensors.keys() else ()


def _shape(tensors: Mapping[str, TensorInfo], packed_format: PackedFormat) -> tuple[int, int]:
    integers = tensors[_INTEGERS[packed_format.packing]].shape
    return _MODULES[packed_format.packing].unpacked_shape(integers, packed_format)


def _problems(
    layer: str, tensors: Mapping[str, TensorInfo], packed_format: PackedFormat
) -> list[str]:
    """Return what speaks against a layer having this format, a text for each tensor."""
    integers = _INTEGERS[packed_format.packing]
    if integers not in tensors:
        return [f"{layer}.{integers} is missing"]
    if len(tensors[integers].shape) != 2:
        return [f"{layer}.{integers} is {list(tensors[integers].shape)}, expected a matrix"]
    shape = _shape(tensors, packed_format)
    expected = _MODULES[packed_format.packing].part_shapes(shape, packed_format)
    problems: list[str] = []
    if packed_format.is_row_major and shape[1] % max(packed_format.group_size, 1):
        problems.append(f"{layer} has {shape[1]} inputs, not whole groups")
    for part, want in expected.items():
        info = tensors.get(part)
        if info is None and part in _OPTIONAL:
            continue
        if info is None or info.shape != want:
            shown = "missing" if info is None else str(list(info.shape))
            problems.append(f"{layer}.{part} is {shown}, expected {list(want)}")
    for part, info in tensors.items():
        if part not in {*expected, integers, "bias"}:
            problems.append(f"{layer}.{part} is not of this format")
        elif info.dtype not in _DTYPES.get(part, (info.dtype,)):
            problems.append(
                f"{layer}.{part} is {info.dtype}, expected {' or '.join(_DTYPES[part])}"
            )
    return problems
