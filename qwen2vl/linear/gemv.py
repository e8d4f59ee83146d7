"""GEMV: matrix-vector products for decode with a single token on a CPU.

nn.Linear calls the matrix-matrix kernel (GEMM) even for a single row, and in bfloat16 that kernel
reads the weights at half the memory bandwidth. `torch.mv` reads them at nearly full bandwidth. Only
a single row takes this path; prefill, images and training keep GEMM. Small matrices do not: they
stay in the cache, where GEMM is faster. It is for layers that are not prepacked (prepacked.py). A
tied head, which is a bare matrix in the model, becomes a layer over the same parameter. A model
changed by `use_gemv` is for inference only, not for saving.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qwen2vl.linear.custom_ops import custom_op
from qwen2vl.model import Qwen2VL

__all__ = ["GemvLinear", "use_gemv"]


MIN_GEMV_WEIGHTS = 2**20


def _fake_gemv(x_1I: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    return x_1I.new_empty(1, weight_OI.shape[0])


@custom_op(_fake_gemv)
def _gemv(x_1I: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    if bias_O is None:
        return torch.mv(weight_OI, x_1I[0])[None]
    return torch.addmv(bias_O, weight_OI, x_1I[0])[None]


class GemvLinear(nn.Linear):
    """An nn.Linear with a GEMV kernel for one row; rounding may differ in the last bit."""

    def forward(self, input: Tensor) -> Tensor:
        """Multiply rows (T, in) into (T, out)."""
        if input.shape[0] != 1 or self.weight.numel() < MIN_GEMV_WEIGHTS:
            return super().forward(input)
        return _gemv(input, self.weight, self.bias)


def use_gemv(model: Qwen2VL) -> None:
    """Turn every nn.Linear of the decoder, and the head, into a GemvLinear, in place."""
    if model.lm_head is None:
        embedding = model.model.embed_tokens.weight
        with torch.device("meta"):
            model.lm_head = nn.Linear(embedding.shape[1], embedding.shape[0], bias=False)
        model.lm_head.weight = embedding
    for module in (*model.model.modules(), model.lm_head):
        if type(module) is nn.Linear:
            module.__class__ = GemvLinear
