"""Activation functions of both towers: quick GELU of the vision MLP, SwiGLU of the text MLP.

Written as one expression, each allocates two or three tensors of the MLP's intermediate size. On a
CPU the page faults of their first use take longer than the arithmetic, so inference overwrites the
input instead, a few rows at a time, which stay in the cache. The values are the same bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["quick_gelu", "swiglu"]

ROWS = 512  # overwritten at a time: 1.5 MB of float32 in nano's vision MLP


def quick_gelu(x_TI: Tensor) -> Tensor:
    """Return x * sigmoid(1.702 * x), the approximation of GELU used in CLIP.

    The input must not be used afterwards: inference on a CPU overwrites it.
    """
    if not _overwrites(x_TI):
        return x_TI * torch.sigmoid(1.702 * x_TI)
    for rows in x_TI.split(ROWS):
        rows.mul_((1.702 * rows).sigmoid_())
    return x_TI


def swiglu(gate_TI: Tensor, up_TI: Tensor) -> Tensor:
    """Return silu(gate) * up. The gate must not be used afterwards: inference overwrites it."""
    if not _overwrites(gate_TI):
        return F.silu(gate_TI, inplace=not torch.is_grad_enabled()) * up_TI
    for gate, up in zip(gate_TI.split(ROWS), up_TI.split(ROWS), strict=True):
        F.silu(gate, inplace=True).mul_(up)
    return gate_TI


def _overwrites(x_TI: Tensor) -> bool:
    """Whether rows are overwritten: not in training, under torch.compile, or on a GPU."""
    return (
        x_TI.device.type == "cpu"
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
    )
