"""AWQ's layout (GEMM): words run along the outputs, eight of them shuffled, zeros as they are.

    qweight  (I, O / 8)  int32   word c of an input packs outputs c*8 .. c*8 + 7
    qzeros   (G, O / 8)  int32   the same of a group
    scales   (G, O)      float16

    bits of a word, lowest first:   0..3  4..7  8..11  ...
    output c*8 +                     0     2     4      6  1  3  5  7

(AutoAWQ: WQLinear_GEMM.) Next room: tensors.py.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from qwen2vl.weights.quantization_config import PackedMatrix, Packing

__all__ = ["pack", "shape_of", "unpack", "wanted_shapes"]

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which output lies in which place of a word
PLACE = (0, 4, 1, 5, 2, 6, 3, 7)  # in which place an output lies
SHIFTS = range(0, 32, 4)


def unpack(parts: Mapping[str, Tensor], packing: Packing) -> PackedMatrix:
    """Turn the tensors of one layer, by their endings, into what they mean."""
    ints_IO = _numbers(parts["qweight"])
    num_inputs = ints_IO.shape[0]
    size = packing.group_size if packing.group_size > 0 else num_inputs
    return PackedMatrix(
        ints_OI=ints_IO.T.contiguous(),
        scale_GO=parts["scales"],
        zero_GO=_numbers(parts["qzeros"]).to(torch.int16),
        group_I=torch.arange(num_inputs) // size,
    )


def pack(matrix: PackedMatrix, packing: Packing) -> dict[str, Tensor]:
    """Do the reverse of `unpack`."""
    return {
        "qweight": _words(matrix.ints_OI.T),
        "qzeros": _words(matrix.zero_GO),
        "scales": matrix.scale_GO.to(torch.float16),
    }


def shape_of(qweight: tuple[int, ...], packing: Packing) -> tuple[int, int]:
    """Say (O, I) of the matrix that a packed tensor of this shape holds."""
    return qweight[1] * len(ORDER), qweight[0]


def wanted_shapes(shape: tuple[int, int], packing: Packing) -> dict[str, tuple[int, ...]]:
    """Say how large the other tensors of a layer (O, I) have to be."""
    outputs, inputs = shape
    groups = -(-inputs // packing.group_size) if packing.group_size > 0 else 1
    return {"qzeros": (groups, outputs // len(ORDER)), "scales": (groups, outputs)}


def _numbers(words: Tensor) -> Tensor:
    """Take words (rows, n) apart into numbers (rows, n * 8), uint8, in the order of outputs."""
    numbers = (words[..., None] >> torch.tensor(SHIFTS, dtype=torch.int32)) & 15
    return numbers[..., PLACE].flatten(-2).to(torch.uint8)


def _words(numbers: Tensor) -> Tensor:
    """Put numbers together again, int32."""
    places = numbers.long().unflatten(-1, (-1, len(ORDER)))[..., ORDER]
    total = (places << torch.tensor(SHIFTS)).sum(-1)
    # Beyond the largest int32 a word is negative.
    return torch.where(total >= 2**31, total - 2**32, total).to(torch.int32)
