"""What is minimized: cross-entropy of the supervised tokens, summed and divided once.

Only rows that carry loss meet the vocabulary: pictures and questions, most of a batch, never do.
They meet it in chunks that leave nothing of their logits behind: with 151,936 words the logits
would be the largest tensor of a step by far. The divisor is the weight of the whole optimizer
step, so that a token counts the same in whatever batch or rank it lands. Text alone is
supervised. (Qwen2-VL sec. 2.2.) Next room: optim.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from qwen2vl.train.loader.batch import Batch

__all__ = ["CHUNK_NUMBERS", "Outcome", "token_loss"]

# Logits that exist at a time: 441 rows of the official vocabulary, 268 MB in float32. Larger ones
# gain little: what a chunk costs besides its products is adding to the head's gradient once.
CHUNK_NUMBERS = 1 << 26


class Outcome(NamedTuple):
    """The loss to differentiate, and what metrics need, without a gradient."""

    loss: Tensor  # scalar, already divided
    losses_R: Tensor  # unweighted cross-entropy of each target
    right_R: Tensor  # bool: the greedy choice was the target


def token_loss(
    hidden_TD: Tensor, head_weight: Tensor, batch: Batch, divisor: float | Tensor
) -> Outcome:
    """Compute sum(weight * cross-entropy) / divisor over the target rows of `batch`.

    Gradients are computed here, chunk by chunk, and handed out by `backward`, which may be called
    once. Without targets the loss is 0, and so is every gradient.
    """
    rows_RD = hidden_TD.index_select(0, batch.target_index_R)
    scale_R = batch.weights_R.to(_wide(rows_RD.dtype)) / divisor
    return Outcome(
        *_CrossEntropy.apply(
            rows_RD, head_weight, batch.targets_R, scale_R, torch.is_grad_enabled()
        )
    )


class _CrossEntropy(torch.autograd.Function):
    """Head and cross-entropy as one: what is kept for the backward are finished gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        rows_RD: Tensor,
        head_VD: Tensor,
        targets_R: Tensor,
        scale_R: Tensor,
        differentiate: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype, wide = _product_dtype(rows_RD), scale_R.dtype
        wants_rows, wants_head = (differentiate and needed for needed in ctx.needs_input_grad[:2])
        # Sums over chunks are wide, whatever the products are computed in.
        d_rows_RD = torch.zeros_like(rows_RD, dtype=wide) if wants_rows else None
        d_head_VD = torch.zeros_like(head_VD, dtype=wide) if wants_head else None
        losses_R, right_R = torch.empty_like(scale_R), torch.empty_like(targets_R, dtype=torch.bool)
        head = head_VD.to(dtype)
        with torch.autocast(rows_RD.device.type, enabled=False):
            for part in _chunks(len(rows_RD), len(head_VD)):
                losses_R[part], right_R[part] = _one_chunk(
                    rows_RD[part],
                    head,
                    targets_R[part],
                    scale_R[part, None],
                    None if d_rows_RD is None else d_rows_RD[part],
                    d_head_VD,
                )
        ctx.gradients = (d_rows_RD, d_head_VD)
        ctx.dtypes = (rows_RD.dtype, head_VD.dtype)
        ctx.mark_non_differentiable(losses_R, right_R)
        return (losses_R * scale_R).sum(), losses_R, right_R

    @staticmethod
    @once_differentiable
    def backward(  # type: ignore - the wrapper hides that ctx is the first argument
        ctx: Any, d_loss: Tensor, *_: Tensor
    ) -> tuple[Tensor | None, ...]:
        assert ctx.gradients is not None, "the loss was differentiated a second time"
        # In place: a copy of the head's gradient would stand at the peak of a step's memory.
        found = [
            None if gradient is None else gradient.mul_(d_loss).to(dtype)
            for gradient, dtype in zip(ctx.gradients, ctx.dtypes, strict=True)
        ]
        ctx.gradients = None
        return (*found, None, None, None)


def _one_chunk(
    rows_RD: Tensor,
    head_VD: Tensor,
    targets_R: Tensor,
    scale_R1: Tensor,
    d_rows_RD: Tensor | None,
    d_head_VD: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Give losses_R and right_R, and add to the gradients; here logits live and die."""
    logits_RV = F.linear(rows_RD.to(head_VD.dtype), head_VD).to(scale_R1.dtype)
    losses_R, right_R = _judge_and_normalize(logits_RV, targets_R)
    if d_rows_RD is not None or d_head_VD is not None:
        # Subtracted before it is rounded: close to a sure and right word, p - 1 is small.
        logits_RV.scatter_add_(1, targets_R[:, None], -torch.ones_like(scale_R1))
        slope_RV = logits_RV.to(head_VD.dtype)
        if d_rows_RD is not None:
            torch.mul(slope_RV @ head_VD, scale_R1, out=d_rows_RD)
        if d_head_VD is not None:
            _add_product(d_head_VD, slope_RV.t(), (rows_RD * scale_R1).to(head_VD.dtype))
    return losses_R, right_R


def _judge_and_normalize(logits_RV: Tensor, targets_R: Tensor) -> tuple[Tensor, Tensor]:
    """Give losses_R and right_R; the logits become probabilities, in place."""
    top_R1, best_R1 = logits_RV.max(1, keepdim=True)
    own_R1 = logits_RV.sub_(top_R1).gather(1, targets_R[:, None])
    total_R1 = logits_RV.exp_().sum(1, keepdim=True)
    logits_RV.div_(total_R1)
    return (total_R1.log() - own_R1)[:, 0], best_R1[:, 0] == targets_R


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right, rounded at most once."""
    if total.dtype == left.dtype:
        torch.addmm(total, left, right, out=total)
    else:
        total += left @ right


def _chunks(rows: int, words: int) -> list[slice]:
    """Cut rows into pieces of about the same size, none with more than CHUNK_NUMBERS logits."""
    most = max(1, CHUNK_NUMBERS // words)
    size = -(-rows // max(1, -(-rows // most)))
    return [slice(start, start + size) for start in range(0, rows, max(1, size))]


def _product_dtype(tensor: Tensor) -> torch.dtype:
    """Choose what products are computed in: as autocast says where it is on."""
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensor.dtype


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
