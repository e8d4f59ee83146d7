"""Prequantized weights: layers built from the integers of a checkpoint.

    4 bits, contiguous groups of 32 k    Int4Linear; any zero points, larger groups repeat a scale
    8 bits, a scale an output, symmetric Int8Linear
    8 bits in groups; act-order          no kernel: the caller dequantizes them

The layers are those that `scheme.quantize` makes. The input is what weights/ has read (fill.py):
the unpacked integers of GPTQ and AWQ, or row-major ones of compressed-tensors, which are not
copied.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qwen2vl.errors import CheckpointError
from qwen2vl.linear.cpu.operators import GROUP_SIZES
from qwen2vl.quantization.int4 import Int4Linear, PackedInt4Weight
from qwen2vl.quantization.int8 import Int8Linear
from qwen2vl.quantization.rtn import GroupwiseWeight, PerChannelWeight
from qwen2vl.quantization.scheme import LayerScheme, QuantizedLinear

__all__ = ["build_prequantized_layer", "build_row_major_layer", "prequantized_scheme"]

ZERO_POINT = 128  # of symmetric 8-bit weights, stored unsigned


def prequantized_scheme(
    bits: int, group_size: int, num_inputs: int, *, is_symmetric: bool, has_contiguous_groups: bool
) -> LayerScheme | None:
    """Return the scheme of the layer that holds a prequantized matrix exactly; None if none does.

    Args:
        bits: of an integer, 4 or 8.
        group_size: inputs that share a scale; -1: all of them.
        num_inputs: of the matrix.
        is_symmetric: the zero point is the middle of the range.
        has_contiguous_groups: inputs of a group are neighbors (no act-order).
    """
    size = group_size if group_size > 0 else num_inputs
    if not has_contiguous_groups:
        return None
    if bits == 8:
        return LayerScheme(8) if size >= num_inputs and is_symmetric else None
    divisors = (n for n in GROUP_SIZES if size % n == 0 and num_inputs % n == 0)
    layer_group_size = next(divisors, None)
    return None if layer_group_size is None else LayerScheme(4, layer_group_size)


def build_prequantized_layer(
    ints_OI: Tensor,
    scale_GO: Tensor,
    zero_GO: Tensor,
    groups: Sequence[Tensor],
    bias_O: Tensor | None,
    scheme: LayerScheme,
) -> QuantizedLinear:
    """Build the layer that `prequantized_scheme` returned the scheme of.

    Args:
        ints_OI: from 0 to 15 or 255; of fused layers, their outputs concatenated.
        scale_GO: of each stored group.
        zero_GO: zero point of each stored group.
        groups: of each fused layer, the stored group of each input.
        bias_O: of the layer, if it has one.
        scheme: of the layer.

    Raises:
        CheckpointError: zero points or groups contradict config.json.
    """
    if scheme.bits == 8:
        _require(
            bool((zero_GO == ZERO_POINT).all()), "sym is true", f"zeros other than {ZERO_POINT}"
        )
        signed_OI = (ints_OI.to(torch.int16) - ZERO_POINT).to(torch.int8)
        return Int8Linear(PerChannelWeight(ints_OI=signed_OI, scale_O=scale_GO[0]), bias_O)
    layer_groups = groups[0].view(-1, scheme.group_size)  # these may be parts of the stored groups
    has_contiguous_groups = bool((layer_groups == layer_groups[:, :1]).all())
    has_contiguous_groups &= all(torch.equal(group_I, groups[0]) for group_I in groups)
    _require(has_contiguous_groups, "desc_act is false", "g_idx out of order")
    group_G = layer_groups[:, 0]
    weight = GroupwiseWeight(ints_OI=ints_OI, scale_GO=scale_GO[group_G], zero_GO=zero_GO[group_G])
    return Int4Linear(PackedInt4Weight.from_groupwise(weight), bias_O)


def build_row_major_layer(
    weight: PackedInt4Weight | PerChannelWeight, bias_O: Tensor | None
) -> QuantizedLinear:
    """Build the layer of a weight in the kernels' own layout; its integers are not copied."""
    if isinstance(weight, PerChannelWeight):
        return Int8Linear(weight, bias_O)
    return Int4Linear(weight, bias_O)


def _require(holds: bool, claim: str, found: str) -> None:
    if not holds:
        raise CheckpointError(
            f"quantization_config says that {claim}, but there are {found}; correct config.json"
        )
