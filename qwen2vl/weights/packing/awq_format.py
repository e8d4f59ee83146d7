"""AWQ's packing format (GEMM): eight 4-bit integers per int32 along the outputs, interleaved.

    qweight  (I, O / 8)  int32   value c of an input packs outputs c*8 .. c*8 + 7
    qzeros   (G, O / 8)  int32   the same of a group; zero points are stored as they are
    scales   (G, O)      float16

    bits of an int32, lowest first:   0..3  4..7  8..11  ...
    output c*8 +                      0     2     4      6  1  3  5  7

(AutoAWQ: WQLinear_GEMM.)
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from qwen2vl.weights.packing.packed_format import PackedFormat, QuantizedMatrix

__all__ = ["part_shapes", "unpack", "unpacked_shape"]

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the output at each position of an int32


def unpack(parts: Mapping[str, Tensor], packed_format: PackedFormat) -> QuantizedMatrix:
    """Unpack the tensors of one layer, given by their suffixes."""
    ints_IO = _unpack_int32(parts["qweight"])
    num_inputs = ints_IO.shape[0]
    size = packed_format.group_size if packed_format.group_size > 0 else num_inputs
    return QuantizedMatrix(
        ints_OI=ints_IO.T.contiguous(),
        scale_GO=parts["scales"],
        zero_GO=_unpack_int32(parts["qzeros"]).to(torch.int16),
        group_I=torch.arange(num_inputs) // size,
    )


def unpacked_shape(qweight: tuple[int, ...], packed_format: PackedFormat) -> tuple[int, int]:
    """Return the shape (O, I) of the matrix that a qweight of this shape holds."""
    return qweight[1] * len(ORDER), qweight[0]


def part_shapes(shape: tuple[int, int], packed_format: PackedFormat) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the other tensors of a layer (O, I)."""
    outputs, inputs = shape
    groups = packed_format.num_groups(inputs)
    return {"qzeros": (groups, outputs // len(ORDER)), "scales": (groups, outputs)}


def _unpack_int32(packed: Tensor) -> Tensor:
    """Unpack int32 (rows, n) into 4-bit integers (rows, n * 8), uint8, in the order of outputs."""
    ints = torch.empty(*packed.shape, len(ORDER), dtype=torch.uint8, device=packed.device)
    for position, output in enumerate(ORDER):
        ints[..., output] = (packed >> 4 * position) & 15
    return ints.flatten(-2)
