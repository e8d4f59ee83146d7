"""Slow references of the CPU kernels, in float64 and exact integers."""

from __future__ import annotations

import torch
from torch import Tensor

from qwen2vl.linear.cpu.operators import MAX_PRECISE_ROWS, dequantize_int4, unpack_int4

MIN_ABS = 1e-30


def quantize_rows(x_TI: Tensor) -> tuple[Tensor, Tensor]:
    """Round rows to 15 bits, or to 8 if there are many; return integers and scales (T, 1)."""
    steps = 127.0 * 256 if len(x_TI) <= MAX_PRECISE_ROWS else 127.0
    largest_T1 = x_TI.float().abs().amax(1, keepdim=True).clamp(min=MIN_ABS)
    # A number divided by a tensor is multiplied by its reciprocal in torch.
    steps_T1 = torch.full_like(largest_T1, steps)
    return (x_TI.float() * (steps_T1 / largest_T1)).round(), largest_T1 / steps_T1


def linear_bf16(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """Multiply in float64."""
    out_TO = x_TI.double() @ weight_OI.double().T
    return out_TO if bias_O is None else out_TO + bias_O


def linear_int8(x_TI: Tensor, weight_OI: Tensor, scale_O: Tensor, bias_O: Tensor | None) -> Tensor:
    """Multiply integers exactly; scale and add the bias in float32, as the kernel does."""
    ints_TI, scale_T1 = quantize_rows(x_TI)
    total_TO = (ints_TI.double() @ weight_OI.double().T).float()
    out_TO = total_TO * (scale_T1 * scale_O)
    return (out_TO if bias_O is None else out_TO + bias_O).to(x_TI.dtype)


def round_int4_to_int8(packed: Tensor, scale_OG: Tensor, zero_OG: Tensor) -> tuple[Tensor, Tensor]:
    """Round 4-bit weights to int8 with a scale for each output (O,)."""
    zero = zero_OG.float()
    extreme_OG = scale_OG.float().abs() * torch.maximum(zero, 15 - zero)
    scale_O1 = extreme_OG.amax(1, keepdim=True).clamp(min=MIN_ABS) / 127
    groups = unpack_int4(packed).float().unflatten(1, (scale_OG.shape[1], -1))
    ratio_OG = scale_OG.float() / scale_O1
    rounded = ((groups - zero[..., None]) * ratio_OG[..., None]).round()
    return rounded.flatten(1).to(torch.int8), scale_O1[:, 0]


def linear_int4(
    x_TI: Tensor, packed: Tensor, scale_OG: Tensor, zero_OG: Tensor, bias_O: Tensor | None
) -> Tensor:
    """Multiply one row by exact weights in float64; several by weights rounded to int8."""
    if len(x_TI) > 1:
        return linear_int8(x_TI, *round_int4_to_int8(packed, scale_OG, zero_OG), bias_O)
    ints_TI, scale_T1 = quantize_rows(x_TI)
    weight_OI = dequantize_int4(packed, scale_OG, zero_OG)
    out_TO = (ints_TI.double() @ weight_OI.double().T) * scale_T1
    return out_TO if bias_O is None else out_TO + bias_O
