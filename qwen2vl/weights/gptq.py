"""GPTQ's layout: words run down the inputs, zeros along the outputs, and zeros are less one.

    qweight  (I / p, O)  int32   word r of an output packs inputs r*p .. r*p + p - 1, p = 32 / bits
    qzeros   (G, O / p)  int32   word c of a group packs outputs c*p .. c*p + p - 1
    scales   (G, O)      float16
    g_idx    (I,)        int32   the group of each input: i // group_size, but for act-order

The first number of a word lies in its lowest bits. A zero of z is stored as z - 1 (except in the
format "gptq_v2"). (AutoGPTQ: QuantLinear.) Next room: awq.py.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from qwen2vl.weights.quantization_config import PackedMatrix, Packing

__all__ = ["pack", "shape_of", "unpack", "wanted_shapes"]


def unpack(parts: Mapping[str, Tensor], packing: Packing) -> PackedMatrix:
    """Turn the tensors of one layer, by their endings, into what they mean."""
    ints_OI = _numbers(parts["qweight"].T, packing.bits)
    zero_GO = _numbers(parts["qzeros"], packing.bits).to(torch.int16)
    num_inputs = ints_OI.shape[1]
    size = packing.group_size if packing.group_size > 0 else num_inputs
    group_I = parts.get("g_idx", torch.arange(num_inputs) // size)
    return PackedMatrix(
        ints_OI=ints_OI,
        scale_GO=parts["scales"],
        zero_GO=zero_GO + 1 if packing.stores_zero_less_one else zero_GO,
        group_I=group_I.long(),
    )


def pack(matrix: PackedMatrix, packing: Packing) -> dict[str, Tensor]:
    """Do the reverse of `unpack`."""
    zero_GO = matrix.zero_GO - 1 if packing.stores_zero_less_one else matrix.zero_GO
    return {
        "qweight": _words(matrix.ints_OI, packing.bits).T.contiguous(),
        "qzeros": _words(zero_GO, packing.bits),
        "scales": matrix.scale_GO.to(torch.float16),
        "g_idx": matrix.group_I.to(torch.int32),
    }


def shape_of(qweight: tuple[int, ...], packing: Packing) -> tuple[int, int]:
    """Say (O, I) of the matrix that a packed tensor of this shape holds."""
    return qweight[1], qweight[0] * 32 // packing.bits


def wanted_shapes(shape: tuple[int, int], packing: Packing) -> dict[str, tuple[int, ...]]:
    """Say how large the other tensors of a layer (O, I) have to be."""
    outputs, inputs = shape
    groups = -(-inputs // packing.group_size) if packing.group_size > 0 else 1
    per_word = 32 // packing.bits
    return {
        "qzeros": (groups, outputs // per_word),
        "scales": (groups, outputs),
        "g_idx": (inputs,),
    }


def _numbers(words: Tensor, bits: int) -> Tensor:
    """Take words (rows, n) apart into numbers (rows, n * 32 / bits), uint8."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    # Shifting a negative word right brings in ones from the left; the mask removes them.
    numbers = (words[..., None] >> shifts) & (1 << bits) - 1
    return numbers.flatten(-2).to(torch.uint8)


def _words(numbers: Tensor, bits: int) -> Tensor:
    """Put numbers together again, int32."""
    shifts = torch.arange(0, 32, bits)
    spread = numbers.long().unflatten(-1, (-1, len(shifts))) << shifts
    total = spread.sum(-1)
    # Beyond the largest int32 a word is negative.
    return torch.where(total >= 2**31, total - 2**32, total).to(torch.int32)
