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

from qwen2vl.weights.packing.packed_format import PackedFormat, QuantizedMatrix

__all__ = ["part_shapes", "unpack", "unpacked_shape"]


def unpack(parts: Mapping[str, Tensor], packed_format: PackedFormat) -> QuantizedMatrix:
    """Unpack the tensors of one layer, given by their suffixes."""
    ints_OI = _unpack_int32(parts["qweight"].T, packed_format.bits)
    zero_GO = _unpack_int32(parts["qzeros"], packed_format.bits).to(torch.int16)
    num_inputs = ints_OI.shape[1]
    size = packed_format.group_size if packed_format.group_size > 0 else num_inputs
    group_I = parts.get("g_idx", torch.arange(num_inputs) // size)
    return QuantizedMatrix(
        ints_OI=ints_OI,
        scale_GO=parts["scales"],
        zero_GO=zero_GO + 1 if packed_format.stores_zero_minus_one else zero_GO,
        group_I=group_I.long(),
    )


def unpacked_shape(qweight: tuple[int, ...], packed_format: PackedFormat) -> tuple[int, int]:
    """Return the shape (O, I) of the matrix that a qweight of this shape holds."""
    return qweight[1], qweight[0] * 32 // packed_format.bits


def part_shapes(shape: tuple[int, int], packed_format: PackedFormat) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the other tensors of a layer (O, I)."""
    outputs, inputs = shape
    groups = packed_format.num_groups(inputs)
    per_int32 = 32 // packed_format.bits
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
