"""Int4 linear layer for the CPU: W4A8, 4-bit weights in groups of inputs.

One row (decode) is rounded to 15 bits and multiplied with each group's own scale, nearly exactly.
For more rows weights are rounded once more, to 8 bits with a scale for each output, a few outputs
at a time; where the groups of an output are alike, by a seventeenth of a step of 4 bits at most.
The kernels are linear/cpu's; weights are row-major, as files of the format `pack-quantized` store
them, and used where they lie. The layer has no parameters and cannot be trained. (SGLang:
int4_scaled_mm for W4A8; compressed-tensors.)

    one byte:   | input 2 i + 1 | input 2 i |     4 bits each

Letters: T rows, O outputs, I inputs, G groups of inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qwen2vl.linear.cpu.operators import dequantize_int4, linear_int4, pack_int4, unpack_int4
from qwen2vl.linear.cpu.weights import KernelWeights
from qwen2vl.quantization.rtn import GroupwiseWeight

__all__ = ["Int4Linear", "PackedInt4Weight"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedInt4Weight:
    """Group-wise 4-bit weights as the kernels read them: W = (int - zero_OG) * scale_OG."""

    packed: Tensor  # (O, I / 2) uint8
    scale_OG: Tensor  # float16, as model folders store it
    zero_OG: Tensor  # uint8, 0 to 15

    @classmethod
    def from_groupwise(cls, weight: GroupwiseWeight) -> PackedInt4Weight:
        """Pack the integers, and round scales to float16."""
        return cls(
            packed=pack_int4(weight.ints_OI),
            scale_OG=weight.scale_GO.T.to(torch.float16).contiguous(),
            zero_OG=weight.zero_GO.T.to(torch.uint8).contiguous(),
        )

    def dequantize(self) -> Tensor:
        """Compute the dequantized matrix (O, I), in float32."""
        return dequantize_int4(self.packed, self.scale_OG, self.zero_OG)


class Int4Linear(nn.Module):
    """y = x W^T + b with 4-bit weights, asymmetric, a scale and a zero point for each group."""

    packed: Tensor
    scale_OG: Tensor
    zero_OG: Tensor
    bias_O: Tensor | None  # float32

    def __init__(self, weight: PackedInt4Weight, bias_O: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.packed.shape[0], 2 * weight.packed.shape[1]
        self.group_size = self.in_features // weight.scale_OG.shape[1]
        self.register_buffer("packed", weight.packed)
        self.register_buffer("scale_OG", weight.scale_OG)
        self.register_buffer("zero_OG", weight.zero_OG)
        float_bias_O = None if bias_O is None else bias_O.detach().to(torch.float32, copy=True)
        self.register_buffer("bias_O", float_bias_O)

    def quantized_weight(self) -> Tensor:
        """Return the quantized weights, (O, I) uint8."""
        return unpack_int4(self.packed)

    def dequantize(self) -> Tensor:
        """Compute the dequantized weights (O, I) in float32: the reference of the tests."""
        return dequantize_int4(self.packed, self.scale_OG, self.zero_OG)

    def describe_quantization(self) -> str:
        """Return the name of the arithmetic, for cache keys."""
        return f"int4/{self.group_size}"

    def kernel_weights(self) -> KernelWeights:
        """Return what the decode kernel needs (linear/cpu/weights.py)."""
        return KernelWeights(
            kind="int4",
            outputs=self.out_features,
            inputs=self.in_features,
            weight=self.packed,
            scale=self.scale_OG,
            zero=self.zero_OG,
            bias=self.bias_O,
            group_size=self.group_size,
        )

    def extra_repr(self) -> str:
        """Return the sizes, as nn.Linear does."""
        shape = f"{self.in_features}, {self.out_features}, bias={self.bias_O is not None}"
        return f"{shape}, group_size={self.group_size}"

    def forward(self, x_TI: Tensor) -> Tensor:
        """Multiply rows (T, I) into (T, O), in the dtype of `x_TI`."""
        return linear_int4(x_TI, self.packed, self.scale_OG, self.zero_OG, self.bias_O)
