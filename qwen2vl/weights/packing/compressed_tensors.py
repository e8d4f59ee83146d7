"""compressed-tensors: tensors of a quantized layer, row-major, as the CPU kernels read them.

    int-quantized      weight             (O, I)              int8
                       weight_scale       (O, 1)              float
    pack-quantized     weight_packed      (O, I / 8)          int32    8 inputs, the first lowest
                       weight_scale       (O, G)              float
                       weight_zero_point  (ceil(O / 8), G)    int32    8 outputs; not if symmetric
                       weight_shape       (2,)                int64    O, I

4-bit integers are stored with an offset of 8, so from 0 to 15. The weights that `unpack` returns
are views of the stored ones; only zero points are copied. (compressed-tensors:
IntQuantizationCompressor, PackedQuantizationCompressor.)
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from qwen2vl.linear.cpu.operators import pack_int4, unpack_int4
from qwen2vl.quantization.int4 import PackedInt4Weight
from qwen2vl.quantization.rtn import PerChannelWeight
from qwen2vl.weights.packing.packed_format import PackedFormat

__all__ = ["pack", "part_shapes", "unpack", "unpacked_shape"]

PER_INT32 = 8  # 4-bit integers
SYMMETRIC_ZERO = 8  # the zero point of symmetric 4-bit weights, stored with the offset


def pack(weight: PackedInt4Weight | PerChannelWeight) -> dict[str, Tensor]:
    """Return the tensors of a layer, by their suffixes; scales are float16."""
    if isinstance(weight, PerChannelWeight):
        scale_O1 = weight.scale_O[:, None].to(torch.float16)
        return {"weight": weight.ints_OI, "weight_scale": scale_O1}
    outputs, num_bytes = weight.packed.shape
    return {
        "weight_packed": _view_rows(weight.packed, torch.int32),
        "weight_scale": weight.scale_OG.to(torch.float16),
        "weight_zero_point": _pack_outputs(weight.zero_OG),
        "weight_shape": torch.tensor([outputs, 2 * num_bytes]),
    }


def unpack(
    parts: Mapping[str, Tensor], packed_format: PackedFormat
) -> PackedInt4Weight | PerChannelWeight:
    """Return the weight that a layer's tensors hold, without a copy of its integers."""
    if packed_format.packing == "int-quantized":
        return PerChannelWeight(ints_OI=parts["weight"], scale_O=parts["weight_scale"][:, 0])
    scale_OG = parts["weight_scale"].to(torch.float16)
    if packed_format.is_symmetric:
        zero_OG = torch.full(scale_OG.shape, SYMMETRIC_ZERO, dtype=torch.uint8)
    else:
        zero_OG = _unpack_outputs(parts["weight_zero_point"], len(scale_OG))
    return PackedInt4Weight(
        packed=parts["weight_packed"].view(torch.uint8), scale_OG=scale_OG, zero_OG=zero_OG
    )


def unpacked_shape(stored: tuple[int, ...], packed_format: PackedFormat) -> tuple[int, int]:
    """Return the shape (O, I) of the matrix whose `weight` or `weight_packed` has this shape."""
    outputs, columns = stored
    return outputs, columns if packed_format.packing == "int-quantized" else columns * PER_INT32


def part_shapes(shape: tuple[int, int], packed_format: PackedFormat) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the other tensors of a layer (O, I)."""
    outputs, inputs = shape
    groups = packed_format.num_groups(inputs)
    shapes: dict[str, tuple[int, ...]] = {"weight_scale": (outputs, groups)}
    if packed_format.packing == "pack-quantized":
        shapes["weight_shape"] = (2,)
        if not packed_format.is_symmetric:
            shapes["weight_zero_point"] = (-(-outputs // PER_INT32), groups)
    return shapes


def _pack_outputs(ints_OG: Tensor) -> Tensor:
    """Pack 4-bit integers, uint8, along the outputs, which zeros fill up to a multiple of 8."""
    ints_GO = F.pad(ints_OG.T, (0, -len(ints_OG) % PER_INT32))
    return _view_rows(pack_int4(ints_GO), torch.int32).T.contiguous()


def _unpack_outputs(packed: Tensor, outputs: int) -> Tensor:
    ints_GO = unpack_int4(_view_rows(packed.T, torch.uint8))
    return ints_GO[:, :outputs].T.contiguous()


def _view_rows(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """View rows as another dtype; flat, because an axis of size 1 may have any stride."""
    return matrix.reshape(-1).view(dtype).view(len(matrix), -1)
