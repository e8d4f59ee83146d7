"""Packing by the definitions of the formats, in other code than the library's."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from qwen2vl.weights.packing.awq_format import ORDER
from qwen2vl.weights.packing.packed_format import PackedFormat, QuantizedMatrix


def pack(matrix: QuantizedMatrix, packed_format: PackedFormat) -> dict[str, Tensor]:
    """Return the tensors of a layer, by their suffixes."""
    bits, scales = packed_format.bits, matrix.scale_GO.to(torch.float16)
    if packed_format.packing == "int-quantized":
        signed_OI = (matrix.ints_OI.to(torch.int16) - 128).to(torch.int8)
        return {"weight": signed_OI, "weight_scale": matrix.scale_GO.T.bfloat16().contiguous()}
    if packed_format.packing == "pack-quantized":
        return _pack_quantized(matrix, packed_format)
    if packed_format.packing == "awq":
        return {
            "qweight": _pack_int32(matrix.ints_OI.T, bits, ORDER),
            "qzeros": _pack_int32(matrix.zero_GO, bits, ORDER),
            "scales": scales,
        }
    zero_GO = matrix.zero_GO - 1 if packed_format.stores_zero_minus_one else matrix.zero_GO
    order = tuple(range(32 // bits))
    return {
        "qweight": _pack_int32(matrix.ints_OI, bits, order).T.contiguous(),
        "qzeros": _pack_int32(zero_GO, bits, order),
        "scales": scales,
        "g_idx": matrix.group_I.to(torch.int32),
    }


def _pack_quantized(matrix: QuantizedMatrix, packed_format: PackedFormat) -> dict[str, Tensor]:
    """Return tensors of compressed-tensors, with scales in bfloat16, as llm-compressor has them."""
    order = tuple(range(8))
    outputs, inputs = matrix.ints_OI.shape
    parts = {
        "weight_packed": _pack_int32(matrix.ints_OI, 4, order),
        "weight_scale": matrix.scale_GO.T.bfloat16().contiguous(),
        "weight_shape": torch.tensor([outputs, inputs]),
    }
    if not packed_format.is_symmetric:
        zero_GO = F.pad(matrix.zero_GO, (0, -outputs % 8))
        parts["weight_zero_point"] = _pack_int32(zero_GO, 4, order).T.contiguous()
    return parts


def _pack_int32(ints: Tensor, bits: int, order: tuple[int, ...]) -> Tensor:
    """Pack integers along the last axis; `order` has the one at each position, the lowest first."""
    groups = ints.unflatten(-1, (-1, len(order)))
    packed = torch.zeros(groups.shape[:-1], dtype=torch.int32)
    for position, index in enumerate(order):
        # The sign bit is a bit like the others.
        packed |= groups[..., index].to(torch.int32) << bits * position
    return packed
