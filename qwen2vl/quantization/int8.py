"""Int8 linear layers (W8A8 with dynamic per-token activation scales, and W8A16) for the CPU.

`Int8Linear` (W8A8) quantizes each row of the input to int8 as well, with a scale of its own, and
oneDNN accumulates the integer products exactly. Up to MAX_HIGH_PRECISION_ROWS rows (decode) cost
only the reading of the weights, so there each row is split into two int8 rows, a high and a low
byte: 15 bits, nearly exact. A row's result never depends on the other rows, except on whether their
number is above MAX_HIGH_PRECISION_ROWS.

`Int8WeightOnlyLinear` (W8A16) is for processors without int8 dot products: inputs are not
quantized. Neither has parameters or can be trained. Letters: T rows, O outputs, I inputs. (Dettmers
et al. 2022, LLM.int8, for scales by row and output.)
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qwen2vl.linear.custom_ops import custom_op
from qwen2vl.quantization.rtn import PerChannelWeight

__all__ = ["Int8Linear", "Int8WeightOnlyLinear", "build_int8_linear", "has_int8_dot_product"]

# Rows whose second product is free: half the rows of an AMX tile, as each row is there twice.
MAX_HIGH_PRECISION_ROWS = 8

# 126, not 127: dividing in bfloat16 can raise the largest number of a row by half a step.
ACTIVATION_QMAX = 126
LOW_BYTE_STEPS = 256  # fractions of a step in 15-bit inputs: one more byte

MIN_SCALE = 1e-30  # for rows of zeros

# Flags in /proc/cpuinfo of processors with int8 dot products; those of AMX multiply signed bytes.
_INT8_FLAGS = {"avx512_vnni", "avx_vnni", "amx_int8"}
_SIGNED_FLAG = "amx_int8"

ZERO_POINT = 128  # of unsigned bytes
_SIGN_BIT = 128


def has_int8_dot_product() -> bool:
    """Return whether this processor has int8 dot products (VNNI, AMX); False if not on Linux."""
    return not _INT8_FLAGS.isdisjoint(_cpu_flags())


@lru_cache(maxsize=1)
def _cpu_flags() -> frozenset[str]:
    cpuinfo = Path("/proc/cpuinfo")
    return frozenset(cpuinfo.read_text().split() if cpuinfo.is_file() else ())


def build_int8_linear(
    weight: PerChannelWeight, bias_O: Tensor | None
) -> Int8Linear | Int8WeightOnlyLinear:
    """Build the int8 layer that this processor computes fastest."""
    layer_class = Int8Linear if has_int8_dot_product() else Int8WeightOnlyLinear
    return layer_class(weight, bias_O)


def _fake_int8_matmul(
    ints_TI: Tensor, packed: Tensor, scale_O: Tensor, zero_point_O: Tensor, dtype: torch.dtype
) -> Tensor:
    return ints_TI.new_empty((ints_TI.shape[0], scale_O.shape[0]), dtype=dtype)


@custom_op(_fake_int8_matmul)
def _int8_matmul(
    ints_TI: Tensor, packed: Tensor, scale_O: Tensor, zero_point_O: Tensor, dtype: torch.dtype
) -> Tensor:
    """Accumulate integer products, and scale each output.

    Without AMX, processors multiply unsigned by signed bytes only; for signed ones oneDNN 3.12 has
    no kernel there, and its reference implementation takes a thousand times as long.
    """
    zero_point = 0
    if _SIGNED_FLAG not in _cpu_flags():
        # A flipped sign bit adds 128; oneDNN subtracts the products with the zero point again.
        ints_TI, zero_point = ints_TI.view(torch.uint8) ^ _SIGN_BIT, ZERO_POINT
    # No bias, output scale 1, output zero point 0, no fused post-operation.
    rest = (None, 1.0, 0, dtype, "none", [], "")
    return torch.ops.onednn.qlinear_pointwise.default(
        ints_TI, 1.0, zero_point, packed, scale_O, zero_point_O, *rest
    )


class _Int8Base(nn.Module):
    """Sizes, scales and the bias of both int8 layers; scales and bias are float32."""

    scale_O: Tensor
    bias_O: Tensor | None

    def __init__(self, weight: PerChannelWeight, bias_O: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.ints_OI.shape
        self.register_buffer("scale_O", weight.scale_O.float())
        float_bias_O = None if bias_O is None else bias_O.detach().to(torch.float32, copy=True)
        self.register_buffer("bias_O", float_bias_O)

    def quantized_weight(self) -> Tensor:
        """Return the quantized weights, (O, I) int8."""
        raise NotImplementedError

    def dequantize(self) -> Tensor:
        """Compute the dequantized weights (O, I) in float32: the reference of the tests."""
        return PerChannelWeight(ints_OI=self.quantized_weight(), scale_O=self.scale_O).dequantize()

    def describe_quantization(self) -> str:
        """Return the name of the arithmetic, for cache keys."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        """Return the sizes, as nn.Linear does."""
        return f"{self.in_features}, {self.out_features}, bias={self.bias_O is not None}"


class Int8Linear(_Int8Base):
    """y = x W^T + b by int8 dot products (W8A8); the only copy of W is in oneDNN's layout."""

    packed: Tensor
    zero_point_O: Tensor  # all 0: weights are symmetric

    def __init__(self, weight: PerChannelWeight, bias_O: Tensor | None) -> None:
        super().__init__(weight, bias_O)
        self.register_buffer("packed", torch.ops.onednn.qlinear_prepack(weight.ints_OI, None))
        self.register_buffer("zero_point_O", torch.zeros(self.out_features, dtype=torch.int64))

    def quantized_weight(self) -> Tensor:
        """Return the quantized weights, (O, I) int8."""
        return self.packed.to_dense().T

    def describe_quantization(self) -> str:
        """Return the name of the arithmetic, for cache keys."""
        return "int8"

    def forward(self, x_TI: Tensor) -> Tensor:
        """Multiply rows (T, I) into (T, O), in the dtype of `x_TI`."""
        if x_TI.shape[0] > MAX_HIGH_PRECISION_ROWS:
            scale_T1 = _row_scales(x_TI)
            ints_TI = (x_TI / scale_T1).round_().to(torch.int8)
            return self._scale_rows(self._matmul(ints_TI, x_TI.dtype), scale_T1)
        # A row of zeros divides by zero here; its products are multiplied by zero below.
        max_T1 = x_TI.abs().amax(1, keepdim=True).float()
        parts_TI = torch.mul(x_TI, ACTIVATION_QMAX * LOW_BYTE_STEPS / max_T1).round_()
        # v = 256 high + low with both bytes signed: adding 128 carries into the high byte. Computed
        # in floats, which a compiler fuses into one pass, and which take no longer than integers.
        high_TI = torch.add(parts_TI, LOW_BYTE_STEPS // 2).mul_(1 / LOW_BYTE_STEPS).floor_()
        low_TI = torch.sub(parts_TI, high_TI, alpha=LOW_BYTE_STEPS)
        both = self._matmul(torch.cat((high_TI, low_TI)).to(torch.int8), torch.float32)
        high_TO, low_TO = both.chunk(2)
        products_TO = torch.add(high_TO, low_TO, alpha=1 / LOW_BYTE_STEPS)
        return self._scale_rows(products_TO, max_T1.mul_(1 / ACTIVATION_QMAX)).to(x_TI.dtype)

    def _matmul(self, ints_TI: Tensor, dtype: torch.dtype) -> Tensor:
        return _int8_matmul(ints_TI, self.packed, self.scale_O, self.zero_point_O, dtype)

    def _scale_rows(self, products_TO: Tensor, scale_T1: Tensor) -> Tensor:
        """Scale each row and add the bias, rounding once."""
        if self.bias_O is None:
            return products_TO.mul_(scale_T1)
        return torch.addcmul(self.bias_O.to(products_TO.dtype), products_TO, scale_T1)


class Int8WeightOnlyLinear(_Int8Base):
    """y = x W^T + b with int8 weights, converted to the input's dtype in the product (W8A16)."""

    weight_OI: Tensor

    # Beyond these rows converting the matrix once is cheaper than the operator, which converts it
    # again for each row.
    MAX_FUSED_ROWS = 16

    CHUNK_NUMEL = 2**22  # weights that are converted at once

    # torch's operator for few rows crashed on a width of 61; it is called for multiples of this.
    ALIGNMENT = 32

    def __init__(self, weight: PerChannelWeight, bias_O: Tensor | None) -> None:
        super().__init__(weight, bias_O)
        self.register_buffer("weight_OI", weight.ints_OI)

    def quantized_weight(self) -> Tensor:
        """Return the quantized weights, (O, I) int8."""
        return self.weight_OI

    def describe_quantization(self) -> str:
        """Return the name of the arithmetic, for cache keys."""
        return "int8/wide"

    def forward(self, x_TI: Tensor) -> Tensor:
        """Multiply rows (T, I) into (T, O), in the dtype of `x_TI`."""
        scale_O = self.scale_O.to(x_TI.dtype)
        if x_TI.shape[0] <= self.MAX_FUSED_ROWS and self.in_features % self.ALIGNMENT == 0:
            out_TO = torch.ops.aten._weight_int8pack_mm.default(
                x_TI.contiguous(), self.weight_OI, scale_O
            )
        else:
            chunks = self.weight_OI.split(max(1, self.CHUNK_NUMEL // self.in_features))
            out_TO = torch.cat([F.linear(x_TI, chunk.to(x_TI.dtype)) for chunk in chunks], 1)
            out_TO *= scale_O
        return out_TO if self.bias_O is None else out_TO + self.bias_O.to(x_TI.dtype)


def _row_scales(x_TI: Tensor) -> Tensor:
    """Compute each row's dynamic scale; a NaN stays in its row.

    Without the sign bit floats have the order of their bit patterns, NaN last, and integers are
    compared twice as fast: 0.6 instead of 1.2 ms for 308 rows of 8,960 (torch 2.13, one core).
    Compiled, a tensor viewed as integers is read one element at a time: 1.5 times the time of a
        whole
    layer.
    """
    if torch.compiler.is_compiling():
        max_T1 = x_TI.abs().amax(1, keepdim=True)
    else:
        int_dtype = torch.int16 if x_TI.itemsize == 2 else torch.int32
        magnitude_TI = x_TI.view(int_dtype) & torch.iinfo(int_dtype).max
        max_T1 = magnitude_TI.amax(1, keepdim=True).view(x_TI.dtype)
    return max_T1.div_(ACTIVATION_QMAX).clamp_(min=MIN_SCALE)
