"""Integers that a folder stores -> the same layers that `quantize` makes, if these can hold them.

    4 bits, groups of 32 k inputs in order    Int4Linear; any zeros, larger groups repeat a scale
    8 bits, one scale a row, zero at 128      Int8Linear
    8 bits in groups; act-order               neither: the caller widens them

It must not know files; load.py hands over what weights/ has unpacked. Next room: calibrate.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qwen2vl.errors import CheckpointError
from qwen2vl.quantization.int4 import GROUP_SIZES, Int4Linear
from qwen2vl.quantization.int8 import int8_linear
from qwen2vl.quantization.rtn import Channels, Groups
from qwen2vl.quantization.scheme import Kind, QuantizedLinear

__all__ = ["stored_kind", "stored_layer"]

MIDDLE = 128  # of the levels of 8 bits


def stored_kind(
    bits: int, group_size: int, num_inputs: int, *, is_symmetric: bool, is_ordered: bool
) -> Kind | None:
    """Say which layer can hold a stored matrix as it is; None: none can.

    Args:
        bits: of an integer, 4 or 8.
        group_size: inputs that share a scale; -1: all of them.
        num_inputs: of the matrix.
        is_symmetric: the zero lies in the middle of the levels.
        is_ordered: inputs that share a group are neighbors.
    """
    size = group_size if group_size > 0 else num_inputs
    if not is_ordered:
        return None
    if bits == 8:
        return Kind(8) if size >= num_inputs and is_symmetric else None
    fitting = (ours for ours in GROUP_SIZES if size % ours == 0 and num_inputs % ours == 0)
    ours = next(fitting, None)
    return None if ours is None else Kind(4, ours)


def stored_layer(
    ints_OI: Tensor,
    scale_GO: Tensor,
    zero_GO: Tensor,
    groups: Sequence[Tensor],
    bias_O: Tensor | None,
    kind: Kind,
) -> QuantizedLinear:
    """Build the layer that `stored_kind` found.

    Args:
        ints_OI: from 0 to 15 or 255; of siblings, their outputs one after the other.
        scale_GO: of each stored group.
        zero_GO: likewise.
        groups: of each layer in it, the stored group of each input.
        bias_O: of the layer, if it has one.
        kind: what was found.

    Raises:
        CheckpointError: zeros or groups are not what config.json says of them.
    """
    if kind.bits == 8:
        _demand(bool((zero_GO == MIDDLE).all()), "sym is true", f"zeros other than {MIDDLE}")
        centerd_OI = (ints_OI.to(torch.int16) - MIDDLE).to(torch.int8)
        return int8_linear(Channels(ints_OI=centerd_OI, scale_O=scale_GO[0]), bias_O)
    ours = groups[0].view(-1, kind.group_size)  # our groups may be parts of the stored ones
    is_ordered = bool((ours == ours[:, :1]).all())
    is_ordered &= all(torch.equal(group_I, groups[0]) for group_I in groups)
    _demand(is_ordered, "desc_act is false", "g_idx out of order")
    group_G = ours[:, 0]
    return Int4Linear(
        Groups(ints_OI=ints_OI, scale_GO=scale_GO[group_G], zero_GO=zero_GO[group_G]), bias_O
    )


def _demand(holds: bool, claim: str, found: str) -> None:
    if not holds:
        raise CheckpointError(
            f"quantization_config says that {claim}, but there are {found}; correct config.json"
        )
