"""Int8 linear layer for the CPU: W8A8, dynamic per-token activation scales, a scale per output.

Each row of the input is rounded as well, with a scale of its own, and products are accumulated
exactly in integers. Up to MAX_PRECISE_ROWS rows (decode) cost only the reading of the weights, so
there rows keep 15 bits, which is nearly exact. A row's result never depends on the other rows,
except on whether their number is above that. The kernels are linear/cpu's; weights are row-major,
as files store them. The layer has no parameters and cannot be trained. (Dettmers et al. 2022,
LLM.int8, for scales by row and output; vLLM: dynamic per-token W8A8.)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qwen2vl.linear.cpu.operators import linear_int8
from qwen2vl.linear.cpu.weights import KernelWeights
from qwen2vl.quantization.rtn import PerChannelWeight

__all__ = ["Int8Linear"]


class Int8Linear(nn.Module):
    """y = x W^T + b with int8 weights (O, I); scales and bias are float32."""

    weight_OI: Tensor
    scale_O: Tensor
    bias_O: Tensor | None

    def __init__(self, weight: PerChannelWeight, bias_O: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.ints_OI.shape
        self.register_buffer("weight_OI", weight.ints_OI.contiguous())
        self.register_buffer("scale_O", weight.scale_O.float())
        float_bias_O = None if bias_O is None else bias_O.detach().to(torch.float32, copy=True)
        self.register_buffer("bias_O", float_bias_O)

    def quantized_weight(self) -> Tensor:
        """Return the quantized weights, (O, I) int8."""
        return self.weight_OI

    def dequantize(self) -> Tensor:
        """Compute the dequantized weights (O, I) in float32: the reference of the tests."""
        return PerChannelWeight(ints_OI=self.weight_OI, scale_O=self.scale_O).dequantize()

    def describe_quantization(self) -> str:
        """Return the name of the arithmetic, for cache keys."""
        return "int8"

    def kernel_weights(self) -> KernelWeights:
        """Return what the decode kernel needs (linear/cpu/weights.py)."""
        return KernelWeights(
            kind="int8",
            outputs=self.out_features,
            inputs=self.in_features,
            weight=self.weight_OI,
            scale=self.scale_O,
            bias=self.bias_O,
        )

    def extra_repr(self) -> str:
        """Return the sizes, as nn.Linear does."""
        return f"{self.in_features}, {self.out_features}, bias={self.bias_O is not None}"

    def forward(self, x_TI: Tensor) -> Tensor:
        """Multiply rows (T, I) into (T, O), in the dtype of `x_TI`."""
        return linear_int8(x_TI, self.weight_OI, self.scale_O, self.bias_O)
