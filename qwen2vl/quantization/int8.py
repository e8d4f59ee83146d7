"""Linear layers of 8-bit weights, on torch's own operators for the CPU.

`Int8Linear` multiplies integers by integers: each row of the input is rounded to 8 bits, too, with
a scale of its own, and oneDNN adds the products exactly. Up to FEW_ROWS rows (decode) cost only
the reading of the weights, so there the input gets a second row of 8 bits that holds what the
first has lost: with 15 bits it is as good as exact. A row's result never depends on its
neighbors, but on their number: FEW_ROWS or fewer.

`WideInt8Linear` is for processors without integer products: the input stays as it is.
Both hold no parameters and cannot be trained. Letters: T rows, O outputs, I inputs.
(Dettmers et al. 2022, LLM.int8, for scales by row and output.) Next room: int4.py.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qwen2vl.linear.custom_ops import opaque
from qwen2vl.quantization.rtn import Channels

__all__ = ["Int8Linear", "WideInt8Linear", "has_integer_products", "int8_linear"]

# Rows that a product is free for: half of what an AMX tile holds, as each is there twice.
FEW_ROWS = 8

# 126, not 127: dividing in bfloat16 can lift the largest number of a row by half a step.
STEPS = 126
FINE = 256  # parts of a step that few rows are rounded to: one more byte

SMALLEST_STEP = 1e-30  # for rows of zeros

# Words of /proc/cpuinfo for processors that multiply int8 by int8.
_INTEGER_PRODUCTS = {"avx512_vnni", "avx_vnni", "amx_int8"}


def has_integer_products() -> bool:
    """Tell whether this processor multiplies 8-bit integers itself; only Linux says so."""
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.is_file() and not _INTEGER_PRODUCTS.isdisjoint(cpuinfo.read_text().split())


def int8_linear(rounded: Channels, bias_O: Tensor | None) -> Int8Linear | WideInt8Linear:
    """Build the layer that suits this processor."""
    kind = Int8Linear if has_integer_products() else WideInt8Linear
    return kind(rounded, bias_O)


def _shape(
    ints_TI: Tensor, packed: Tensor, scale_O: Tensor, no_zeros: Tensor, dtype: torch.dtype
) -> Tensor:
    return ints_TI.new_empty((ints_TI.shape[0], scale_O.shape[0]), dtype=dtype)


@opaque(_shape)
def _multiply_integers(
    ints_TI: Tensor, packed: Tensor, scale_O: Tensor, no_zeros: Tensor, dtype: torch.dtype
) -> Tensor:
    """Add up integers, and scale each output."""
    # Without a bias, a scale of the result, or an operation after it.
    rest = (None, 1.0, 0, dtype, "none", [], "")
    return torch.ops.onednn.qlinear_pointwise.default(
        ints_TI, 1.0, 0, packed, scale_O, no_zeros, *rest
    )


class _Quantized(nn.Module):
    """What both layers know: widths, scales and the bias, in float32."""

    scale_O: Tensor
    bias_O: Tensor | None

    def __init__(self, rounded: Channels, bias_O: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = rounded.ints_OI.shape
        self.register_buffer("scale_O", rounded.scale_O.float())
        own = None if bias_O is None else bias_O.detach().to(torch.float32, copy=True)
        self.register_buffer("bias_O", own)

    def integers(self) -> Tensor:
        """Give the weights as they were rounded, (O, I) int8."""
        raise NotImplementedError

    def dequantized(self) -> Tensor:
        """Compute the matrix this layer stands for, in float32: the oracle of its tests."""
        return Channels(ints_OI=self.integers(), scale_O=self.scale_O).dequantized()

    def describe(self) -> str:
        """Name the arithmetic, for keys of caches."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        """Say the widths, as nn.Linear does."""
        return f"{self.in_features}, {self.out_features}, bias={self.bias_O is not None}"


class Int8Linear(_Quantized):
    """y = x W^T + b by integer products; oneDNN's own layout of the weights is the only copy."""

    packed: Tensor
    no_zeros: Tensor

    def __init__(self, rounded: Channels, bias_O: Tensor | None) -> None:
        super().__init__(rounded, bias_O)
        self.register_buffer("packed", torch.ops.onednn.qlinear_prepack(rounded.ints_OI, None))
        self.register_buffer("no_zeros", torch.zeros(self.out_features, dtype=torch.int64))

    def integers(self) -> Tensor:
        """Give the weights as they were rounded, (O, I) int8."""
        return self.packed.to_dense().T

    def describe(self) -> str:
        """Name the arithmetic, for keys of caches."""
        return "int8"

    def forward(self, x_TI: Tensor) -> Tensor:
        """Multiply rows (T, I) into (T, O), in the dtype of `x_TI`."""
        if x_TI.shape[0] > FEW_ROWS:
            step_T1 = _step(x_TI)
            ints_TI = (x_TI / step_T1).round_().to(torch.int8)
            return self._finish(self._products(ints_TI, x_TI.dtype), step_T1)
        # A row of zeros divides by zero here, and what that gives is multiplied by zero below.
        top_T1 = x_TI.abs().amax(1, keepdim=True).float()
        parts_TI = torch.mul(x_TI, STEPS * FINE / top_T1).round_()
        # v = 256 high + low with both bytes signed: 128 more carry into the high one. In floats,
        # which a compiler makes one pass of, and without one takes no longer than bytes.
        high_TI = torch.add(parts_TI, FINE // 2).mul_(1 / FINE).floor_()
        low_TI = torch.sub(parts_TI, high_TI, alpha=FINE)
        both = self._products(torch.cat((high_TI, low_TI)).to(torch.int8), torch.float32)
        high_TO, low_TO = both.chunk(2)
        products_TO = torch.add(high_TO, low_TO, alpha=1 / FINE)
        return self._finish(products_TO, top_T1.mul_(1 / STEPS)).to(x_TI.dtype)

    def _products(self, ints_TI: Tensor, dtype: torch.dtype) -> Tensor:
        return _multiply_integers(ints_TI, self.packed, self.scale_O, self.no_zeros, dtype)

    def _finish(self, products_TO: Tensor, step_T1: Tensor) -> Tensor:
        """Scale each row and add the bias, rounding once."""
        if self.bias_O is None:
            return products_TO.mul_(step_T1)
        return torch.addcmul(self.bias_O.to(products_TO.dtype), products_TO, step_T1)


class WideInt8Linear(_Quantized):
    """y = x W^T + b, the weights widened on their way through the processor."""

    plain_OI: Tensor

    # Beyond these rows widening the matrix once is cheaper than widening it row by row.
    FEW_ROWS = 16

    STRIP = 2**22  # numbers that are widened at once

    # torch's operator for few rows crashed on a width of 61; it is given multiples of this.
    ALIGNED = 32

    def __init__(self, rounded: Channels, bias_O: Tensor | None) -> None:
        super().__init__(rounded, bias_O)
        self.register_buffer("plain_OI", rounded.ints_OI)

    def integers(self) -> Tensor:
        """Give the weights as they were rounded, (O, I) int8."""
        return self.plain_OI

    def describe(self) -> str:
        """Name the arithmetic, for keys of caches."""
        return "int8/wide"

    def forward(self, x_TI: Tensor) -> Tensor:
        """Multiply rows (T, I) into (T, O), in the dtype of `x_TI`."""
        scale_O = self.scale_O.to(x_TI.dtype)
        if x_TI.shape[0] <= self.FEW_ROWS and self.in_features % self.ALIGNED == 0:
            out_TO = torch.ops.aten._weight_int8pack_mm.default(
                x_TI.contiguous(), self.plain_OI, scale_O
            )
        else:
            pieces = self.plain_OI.split(max(1, self.STRIP // self.in_features))
            out_TO = torch.cat([F.linear(x_TI, piece.to(x_TI.dtype)) for piece in pieces], 1)
            out_TO *= scale_O
        return out_TO if self.bias_O is None else out_TO + self.bias_O.to(x_TI.dtype)


def _step(x_TI: Tensor) -> Tensor:
    """Choose each row's scale; a row with a NaN keeps it, and spoils no other.

    Without their sign floats are in the order of their bits, NaN last, and integers are compared
    twice as fast: 0.6 instead of 1.2 ms for 308 rows of 8,960 (torch 2.13, one core). Compiled, a
    tensor seen as integers is read number by number: half as slow again for a whole layer.
    """
    if torch.compiler.is_compiling():
        top_T1 = x_TI.abs().amax(1, keepdim=True)
    else:
        whole = torch.int16 if x_TI.itemsize == 2 else torch.int32
        sizes_TI = x_TI.view(whole) & torch.iinfo(whole).max
        top_T1 = sizes_TI.amax(1, keepdim=True).view(x_TI.dtype)
    return top_T1.div_(STEPS).clamp_(min=SMALLEST_STEP)
