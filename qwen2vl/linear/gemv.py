"""One row at a time: on a CPU, decode as matrix-vector products.

A linear layer hands even a single row to the matrix-matrix kernel, which in bfloat16 reads the
weights at half the speed of memory. `torch.mv` reads them nearly as fast as they come. Only a
single row goes that way; prefill, pictures and training keep the matrix kernel. This is for layers
that nobody has packed (packed.py). The tied head, a bare matrix in the model, becomes a layer over
the same parameter. A model so changed answers; it is not meant to be saved.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qwen2vl.linear.custom_ops import opaque
from qwen2vl.model import Qwen2VL

__all__ = ["RowLinear", "multiply_single_rows"]


def _shape(x_1I: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    return x_1I.new_empty(1, weight_OI.shape[0])


@opaque(_shape)
def _multiply_row(x_1I: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    if bias_O is None:
        return torch.mv(weight_OI, x_1I[0])[None]
    return torch.addmv(bias_O, weight_OI, x_1I[0])[None]


class RowLinear(nn.Linear):
    """An nn.Linear with another kernel for one row; rounding may differ in the last bit."""

    def forward(self, input: Tensor) -> Tensor:
        """Multiply rows (T, in) into (T, out)."""
        if input.shape[0] != 1:
            return super().forward(input)
        return _multiply_row(input, self.weight, self.bias)


def multiply_single_rows(model: Qwen2VL) -> None:
    """Give every linear layer of the decoder, and the head, the kernel for single rows."""
    if model.lm_head is None:
        embedding = model.model.embed_tokens.weight
        with torch.device("meta"):
            model.lm_head = nn.Linear(embedding.shape[1], embedding.shape[0], bias=False)
        model.lm_head.weight = embedding
    for module in (*model.model.modules(), model.lm_head):
        if type(module) is nn.Linear:
            module.__class__ = RowLinear
