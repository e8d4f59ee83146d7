"""GPTQ's packing format: weights packed along the inputs, zero points along the outputs, minus 1.

    qweight  (I / p, O)  int32   value r of an output packs inputs r*p .. r*p + p - 1, p = 32 / bits
    qzeros   (G, O / p)  int32   value c of a group packs outputs c*p .. c*p + p - 1
    scales   (G, O)      float16
    g_idx    (I,)        int32   the group of each input: i // group_size, but for act-order

The first integer is in the lowest bits. A zero point z is stored as z - 1 (except in the format
"gptq_v2"). (AutoGPTQ: QuantLinear.)
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from qwen2vl.weights.quantization_config import QuantizationConfig, QuantizedMatrix

__all__ = ["pack", "part_shapes", "unpack", "unpacked_shape"]


def unpack(parts: Mapping[str, Tensor], config: QuantizationConfig) -> QuantizedMatrix:
    """Unpack the tensors of one layer, given by their suffixes."""
    ints_OI = _unpack_int32(parts["qweight"].T, config.bits)
    zero_GO = _unpack_int32(parts["qzeros"], config.bits).to(torch.int16)
    num_inputs = ints_OI.shape[1]
    size = config.group_size if config.group_size > 0 else num_inputs
    group_I = parts.get("g_idx", torch.arange(num_inputs) // size)
    return QuantizedMatrix(
        ints_OI=ints_OI,
        scale_GO=parts["scales"],
        zero_GO=zero_GO + 1 if config.stores_zero_minus_one else zero_GO,
        group_I=group_I.long(),
    )


def pack(matrix: QuantizedMatrix, config: QuantizationConfig) -> dict[str, Tensor]:
    """Pack a matrix: the inverse of `unpack`."""
    zero_GO = matrix.zero_GO - 1 if config.stores_zero_minus_one else matrix.zero_GO
    return {
        "qweight": _pack_int32(matrix.ints_OI, config.bits).T.contiguous(),
        "qzeros": _pack_int32(zero_GO, config.bits),
        "scales": matrix.scale_GO.to(torch.float16),
        "g_idx": matrix.group_I.to(torch.int32),
    }


def unpacked_shape(qweight: tuple[int, ...], config: QuantizationConfig) -> tuple[int, int]:
    """Return the shape (O, I) of the matrix that a qweight of this shape holds."""
    return qweight[1], qweight[0] * 32 // config.bits


def part_shapes(shape: tuple[int, int], config: QuantizationConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the other tensors of a layer (O, I)."""
    outputs, inputs = shape
    groups = -(-inputs // config.group_size) if config.group_size > 0 else 1
    per_int32 = 32 // config.bits
    return {
        "qzeros": (groups, outputs // per_int32),
        "scales": (groups, outputs),
        "g_idx": (inputs,),
    }


def _unpack_int32(packed: Tensor, bits: int) -> Tensor:
    """Unpack int32 (rows, n) into integers (rows, n * 32 / bits), uint8."""
    per_int32 = 32 // bits
    ints = torch.empty(*packed.shape, per_int32, dtype=torch.uint8, device=packed.device)
    for i in range(per_int32):
        # A right shift of a negative value fills in ones from the left; the mask removes them.
        ints[..., i] = (packed >> bits * i) & (1 << bits) - 1
    return ints.flatten(-2)


def _pack_int32(ints: Tensor, bits: int) -> Tensor:
    """Pack integers into int32."""
    per_int32 = 32 // bits
    groups = ints.unflatten(-1, (-1, per_int32))
    packed = torch.zeros(groups.shape[:-1], dtype=torch.int32, device=ints.device)
    for i in range(per_int32):
        # The sign bit is a bit like the others.
        packed |= groups[..., i].to(torch.int32) << bits * i
    return packed
