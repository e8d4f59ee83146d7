"""How a matrix is quantized and packed, and the unpacked form of GPTQ and AWQ.

    gptq, awq         4 or 8 bits packed into int32; column-major: unpacked while loading
    pack-quantized    compressed-tensors: 4 bits packed into int32, row-major
    int-quantized     compressed-tensors: int8, row-major

Letters: O outputs and I inputs of a layer, G groups of inputs. (AutoGPTQ: QuantLinear; AutoAWQ:
WQLinear_GEMM; compressed-tensors: CompressionFormat.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

__all__ = ["PackedFormat", "Packing", "QuantizedMatrix"]

Packing = Literal["gptq", "awq", "pack-quantized", "int-quantized"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedFormat:
    """Bits, groups and packing of quantized matrices."""

    packing: Packing
    bits: int
    group_size: int  # inputs that share a scale; -1: all of them
    is_symmetric: bool = False  # the zero point is the middle of the range
    has_contiguous_groups: bool = True  # inputs of a group are neighbors (no act-order)
    stores_zero_minus_one: bool = False  # GPTQ v1 (checkpoint_format "gptq")

    @property
    def is_row_major(self) -> bool:
        """Whether the CPU kernels read the stored integers as they are."""
        return self.packing in ("pack-quantized", "int-quantized")

    def num_groups(self, num_inputs: int) -> int:
        """Return the number of groups of a matrix."""
        return -(-num_inputs // self.group_size) if self.group_size > 0 else 1

    def describe(self) -> str:
        """Return the format in words, for messages: GPTQ of 4 bits in groups of 128."""
        name = self.packing if self.is_row_major else self.packing.upper()
        size = self.group_size
        groups = f" in groups of {size}" if size > 0 else ", a scale for each output"
        order = "" if self.has_contiguous_groups else ", out of order"
        return f"{name} of {self.bits} bits{groups}{order}"


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedMatrix:
    """Unpacked: W[o, i] = (ints_OI[o, i] - zero_GO[g, o]) * scale_GO[g, o], g = group_I[i]."""

    ints_OI: Tensor  # uint8
    scale_GO: Tensor  # as stored, float16
    zero_GO: Tensor  # int16
    group_I: Tensor  # int64

    def dequantize(self) -> Tensor:
        """Compute the dequantized matrix (O, I), in float32."""
        zero_OI = self.zero_GO[self.group_I].T.float()
        return (self.ints_OI.float() - zero_OI) * self.scale_GO[self.group_I].T.float()
