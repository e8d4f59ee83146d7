"""What the decode kernel needs of a linear layer: pointers to its weights, and their format.

Quantized layers implement `KernelWeightsLayer`; a plain nn.Linear in float32 or bfloat16 and the
slices of a fused layer are handled here. The structs mirror those of kernels/decode.h.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from qwen2vl.linear.fused import FusedLinearSlice

__all__ = ["KINDS", "KernelWeights", "KernelWeightsLayer", "LinearStruct", "kernel_weights"]

KINDS = {"bf16": 0, "int8": 1, "int4": 2, "f32": 3}  # as `enum Kind` of kernels/products.h
_PLAIN = {torch.bfloat16: "bf16", torch.float32: "f32"}


class LinearStruct(ctypes.Structure):
    """`struct Linear` of kernels/decode.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("kind", "outputs", "inputs", "group_size")),
        *((name, ctypes.c_void_p) for name in ("weight", "scale", "zero", "bias")),
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelWeights:
    """Weights of one product; tensors are contiguous and on the CPU, biases float32."""

    kind: str  # of KINDS
    outputs: int
    inputs: int
    weight: Tensor
    bias: Tensor | None
    scale: Tensor | None = None
    zero: Tensor | None = None
    group_size: int = 0

    def struct(self) -> LinearStruct:
        """Return the struct; it is valid as long as the tensors live."""
        tensors = (self.weight, self.scale, self.zero, self.bias)
        pointers = (None if tensor is None else tensor.data_ptr() for tensor in tensors)
        return LinearStruct(KINDS[self.kind], self.outputs, self.inputs, self.group_size, *pointers)


@runtime_checkable
class KernelWeightsLayer(Protocol):
    """A layer that the decode kernel can compute."""

    def kernel_weights(self) -> KernelWeights:
        """Return the layer's weights."""
        ...


def kernel_weights(layers: Sequence[nn.Module]) -> list[KernelWeights] | None:
    """Return the weights of layers with the same input, in their order, or None.

    Slices of one fused layer, all of them, are one product. None: a layer is of another kind, such
    as a prepacked one.
    """
    found: list[KernelWeights] = []
    fused: nn.Module | None = None
    for layer in layers:
        if isinstance(layer, FusedLinearSlice):
            if layer.layer is fused:
                continue
            layer = fused = layer.layer
        weights = _weights_of(layer)
        if weights is None:
            return None
        found.append(weights)
    return found


def _weights_of(layer: nn.Module) -> KernelWeights | None:
    if isinstance(layer, KernelWeightsLayer):
        return layer.kernel_weights()
    if not isinstance(layer, nn.Linear) or layer.weight.dtype not in _PLAIN:
        return None
    weight, bias = layer.weight.detach(), layer.bias
    if not weight.is_contiguous() or weight.device.type != "cpu":
        return None
    return KernelWeights(
        kind=_PLAIN[weight.dtype],
        outputs=layer.out_features,
        inputs=layer.in_features,
        weight=weight,
        bias=None if bias is None else bias.detach().float(),
    )
