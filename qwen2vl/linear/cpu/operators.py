"""The CPU kernels as functions of tensors, registered as custom operators for torch.compile.

Weights are row-major: bf16 and int8 (O, I), int4 two inputs a byte, the even one in the low bits.
Up to MAX_PRECISE_ROWS rows of x are rounded to 15 bits, more to 8, with a scale for each row.
int4 weights are multiplied exactly with one row; with more they are first rounded to int8, with a
scale for each output. Without kernels (library.py) torch multiplies by the dequantized weights.

Letters: T rows, I inputs, O outputs, G groups of inputs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from qwen2vl.linear.cpu.library import Kernels, load_kernels
from qwen2vl.linear.custom_ops import custom_op

__all__ = [
    "GROUP_SIZES",
    "MAX_PRECISE_ROWS",
    "dequantize_int4",
    "linear_bf16",
    "linear_int4",
    "linear_int8",
    "pack_int4",
    "unpack_int4",
]

GROUP_SIZES = (128, 64, 32)  # of int4; preferred first
MAX_PRECISE_ROWS = 8  # kMaxPreciseRows of kernels/common.h

CHUNK_NUMEL = 2**22  # weights that are dequantized at once where there are no kernels

_DTYPES = {torch.float32: 0, torch.bfloat16: 1}  # as `enum DType` of kernels/common.h


def pack_int4(ints_OI: Tensor) -> Tensor:
    """Pack 4-bit integers (O, I), uint8, into bytes (O, I / 2)."""
    return ints_OI[:, ::2] | ints_OI[:, 1::2] << 4


def unpack_int4(packed: Tensor) -> Tensor:
    """Unpack bytes (O, I / 2) into 4-bit integers (O, I), uint8."""
    return torch.stack((packed & 15, packed >> 4), -1).flatten(1)


def dequantize_int4(packed: Tensor, scale_OG: Tensor, zero_OG: Tensor) -> Tensor:
    """Compute (int - zero) * scale, (O, I) float32."""
    groups = unpack_int4(packed).float().unflatten(1, (scale_OG.shape[1], -1))
    return ((groups - zero_OG.float()[..., None]) * scale_OG.float()[..., None]).flatten(1)


def _fake_linear_bf16(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    return x_TI.new_empty(x_TI.shape[0], weight_OI.shape[0])


@custom_op(_fake_linear_bf16)
def linear_bf16(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """Multiply bfloat16 rows (T, I) by bfloat16 weights into (T, O), summed in float32.

    Args:
        x_TI: the rows.
        weight_OI: the weights.
        bias_O: float32, or None.

    Raises:
        ValueError: dtypes, shapes or layouts are others.
    """
    kernels = load_kernels()
    if kernels is None:
        return F.linear(x_TI, weight_OI, None if bias_O is None else bias_O.to(x_TI.dtype))
    outputs, inputs = weight_OI.shape
    _check(x_TI, inputs, (torch.bfloat16,))
    _check_weight("weight_OI", weight_OI, (outputs, inputs), torch.bfloat16)
    _check_bias(bias_O, outputs)
    return _call(kernels, kernels.linear_bf16, x_TI, outputs, (weight_OI, bias_O), has_dtype=False)


def _fake_linear_int8(
    x_TI: Tensor, weight_OI: Tensor, scale_O: Tensor, bias_O: Tensor | None
) -> Tensor:
    return x_TI.new_empty(x_TI.shape[0], weight_OI.shape[0])


@custom_op(_fake_linear_int8)
def linear_int8(x_TI: Tensor, weight_OI: Tensor, scale_O: Tensor, bias_O: Tensor | None) -> Tensor:
    """Multiply rows (T, I) by int8 weights with a scale for each output into (T, O).

    Args:
        x_TI: float32 or bfloat16, as is the result.
        weight_OI: int8.
        scale_O: float32.
        bias_O: float32, or None.

    Raises:
        ValueError: dtypes, shapes or layouts are others.
    """
    outputs, inputs = weight_OI.shape
    _check(x_TI, inputs, tuple(_DTYPES))
    _check_weight("weight_OI", weight_OI, (outputs, inputs), torch.int8)
    _check_weight("scale_O", scale_O, (outputs,), torch.float32)
    _check_bias(bias_O, outputs)
    kernels = load_kernels()
    if kernels is None:
        return _by_torch(
            x_TI, outputs, bias_O, lambda rows: weight_OI[rows].float() * scale_O[rows, None]
        )
    return _call(kernels, kernels.linear_int8, x_TI, outputs, (weight_OI, scale_O, bias_O))


def _fake_linear_int4(
    x_TI: Tensor, packed: Tensor, scale_OG: Tensor, zero_OG: Tensor, bias_O: Tensor | None
) -> Tensor:
    return x_TI.new_empty(x_TI.shape[0], packed.shape[0])


@custom_op(_fake_linear_int4)
def linear_int4(
    x_TI: Tensor, packed: Tensor, scale_OG: Tensor, zero_OG: Tensor, bias_O: Tensor | None
) -> Tensor:
    """Multiply rows (T, I) by 4-bit weights, (int - zero) * scale, into (T, O).

    Args:
        x_TI: float32 or bfloat16, as is the result.
        packed: (O, I / 2) uint8, as `pack_int4` returns.
        scale_OG: float16.
        zero_OG: uint8, 0 to 15.
        bias_O: float32, or None.

    Raises:
        ValueError: dtypes, shapes or layouts are others; a group has not 32, 64 or 128 inputs.
    """
    outputs, inputs = packed.shape[0], 2 * packed.shape[1]
    groups = scale_OG.shape[1]
    _check(x_TI, inputs, tuple(_DTYPES))
    _check_weight("packed", packed, (outputs, inputs // 2), torch.uint8)
    _check_weight("scale_OG", scale_OG, (outputs, groups), torch.float16)
    _check_weight("zero_OG", zero_OG, (outputs, groups), torch.uint8)
    _check_bias(bias_O, outputs)
    group_size = inputs // groups
    if group_size not in GROUP_SIZES or group_size * groups != inputs:
        raise ValueError(f"{inputs} inputs in {groups} groups; a group must have 32, 64 or 128")
    kernels = load_kernels()
    if kernels is None:
        return _by_torch(
            x_TI,
            outputs,
            bias_O,
            lambda rows: dequantize_int4(packed[rows], scale_OG[rows], zero_OG[rows]),
        )
    tensors = (packed, scale_OG, zero_OG, bias_O)
    return _call(kernels, kernels.linear_int4, x_TI, outputs, tensors, group_size)


def _call(
    kernels: Kernels,
    function: Callable[..., int],
    x_TI: Tensor,
    outputs: int,
    tensors: tuple[Tensor | None, ...],
    *sizes: int,
    has_dtype: bool = True,
) -> Tensor:
    """Call a kernel: instruction set, threads, dtype of x, pointers, sizes."""
    x_TI = x_TI.contiguous()
    rows, inputs = x_TI.shape
    out_TO = x_TI.new_empty(rows, outputs)
    if rows == 0:
        return out_TO
    pointers = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
    dtype = (_DTYPES[x_TI.dtype],) if has_dtype else ()
    failed = function(
        kernels.level,
        torch.get_num_threads(),
        *dtype,
        x_TI.data_ptr(),
        *pointers,
        out_TO.data_ptr(),
        *(rows, inputs, outputs),
        *sizes,
    )
    if failed:
        raise MemoryError(f"no memory for {rows} rows of {inputs} numbers, rounded")
    return out_TO


def _by_torch(
    x_TI: Tensor, outputs: int, bias_O: Tensor | None, dequantize: Callable[[slice], Tensor]
) -> Tensor:
    """Multiply by dequantized weights, some outputs at a time."""
    out_TO = x_TI.new_empty(x_TI.shape[0], outputs)
    step = max(1, CHUNK_NUMEL // x_TI.shape[1])
    for start in range(0, outputs, step):
        rows = slice(start, start + step)
        out_TO[:, rows] = F.linear(x_TI, dequantize(rows).to(x_TI.dtype))
    return out_TO if bias_O is None else out_TO + bias_O.to(x_TI.dtype)


def _check(x_TI: Tensor, inputs: int, dtypes: tuple[torch.dtype, ...]) -> None:
    if x_TI.ndim != 2 or x_TI.shape[1] != inputs or x_TI.dtype not in dtypes:
        raise ValueError(
            f"x_TI: got {tuple(x_TI.shape)} {x_TI.dtype}, must be (T, {inputs}) of "
            f"{' or '.join(map(str, dtypes))}"
        )


def _check_weight(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    is_on_cpu = tensor.device.type == "cpu"
    if (
        tensor.shape != shape
        or tensor.dtype != dtype
        or not tensor.is_contiguous()
        or not is_on_cpu
    ):
        raise ValueError(
            f"{name}: got {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}, strides "
            f"{tensor.stride()}; must be {shape} {dtype}, contiguous, on the CPU"
        )


def _check_bias(bias_O: Tensor | None, outputs: int) -> None:
    if bias_O is not None:
        _check_weight("bias_O", bias_O, (outputs,), torch.float32)
