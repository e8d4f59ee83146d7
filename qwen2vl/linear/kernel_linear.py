"""Linear layers whose products are the CPU kernels of linear/cpu, on the weights as they are.

nn.Linear calls the matrix-matrix kernel (GEMM) of oneDNN even for a single row, where it reads the
weights at half the memory bandwidth, and reorders them for it in every forward. The kernels read
plain weights, also those of a mapped file, at full bandwidth: in bfloat16 for up to MAX_ROWS rows,
with AMX for any number. Without kernels a single row of a large matrix is multiplied by `torch.mv`
(GEMV). A tied head, which is a bare matrix in the model, becomes a layer over the same parameter. A
model changed by `use_kernels` is for inference only, not for saving.
"""

from __future__ import annotations

import sys
from typing import cast

import torch
from torch import Tensor, nn

from qwen2vl.linear.cpu.library import load_kernels
from qwen2vl.linear.cpu.operators import linear_bf16
from qwen2vl.linear.custom_ops import custom_op
from qwen2vl.model import Qwen2VL

__all__ = ["KernelLinear", "use_kernels"]

MIN_GEMV_WEIGHTS = 2**20  # smaller matrices stay in the cache, where GEMM is faster
MAX_ROWS = 8  # without AMX; for more rows oneDNN is faster


def _fake_gemv(x_1I: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    return x_1I.new_empty(1, weight_OI.shape[0])


@custom_op(_fake_gemv)
def _gemv(x_1I: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    if bias_O is None:
        return torch.mv(weight_OI, x_1I[0])[None]
    return torch.addmv(bias_O, weight_OI, x_1I[0])[None]


class KernelLinear(nn.Linear):
    """An nn.Linear with kernels for inference on a CPU; rounding may differ in the last bit."""

    max_kernel_rows = 0  # more rows are multiplied by torch; a constant for torch.compile

    def forward(self, input: Tensor) -> Tensor:
        """Multiply rows (T, in) into (T, out)."""
        if self.weight.dtype == torch.bfloat16 and len(input) <= self.max_kernel_rows:
            bias_O = None if self.bias is None else self.bias.float()
            return linear_bf16(input, self.weight, bias_O)
        if len(input) != 1 or self.weight.numel() < MIN_GEMV_WEIGHTS:
            return super().forward(input)
        return _gemv(input, self.weight, self.bias)


def use_kernels(model: Qwen2VL) -> None:
    """Turn every nn.Linear of the decoder, and the head, into a KernelLinear, in place.

    With AMX also those of the vision tower, which has many rows only.
    """
    if model.lm_head is None:
        embedding = model.model.embed_tokens.weight
        with torch.device("meta"):
            model.lm_head = nn.Linear(embedding.shape[1], embedding.shape[0], bias=False)
        model.lm_head.weight = embedding
    kernels = load_kernels()
    max_rows = 0 if kernels is None else sys.maxsize if kernels.has_tiles else MAX_ROWS
    towers = (model.model, model.visual) if max_rows == sys.maxsize else (model.model,)
    for module in (*(m for tower in towers for m in tower.modules()), model.lm_head):
        if type(module) is nn.Linear:
            module.__class__ = KernelLinear
            cast("KernelLinear", module).max_kernel_rows = max_rows
