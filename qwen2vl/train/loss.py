"""The loss: chunked cross-entropy of the supervised tokens, fused with the LM head.

Logits are computed for target positions only, not for images and prompts, which are most of a
batch, and chunk by chunk, with the gradients computed at once: with 151,936 vocabulary entries the
full logits would be the largest tensor of a step by far. The sum is divided by the target weight of
the whole optimizer step, so that a token counts the same in any batch and on any rank. Only text
is supervised. (Qwen2-VL sec. 2.2; compare Liger Kernel's fused linear cross-entropy.)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from qwen2vl.train.loader.batch import Batch

__all__ = ["MAX_CHUNK_LOGITS", "LossOutput", "token_loss"]

# Of one chunk: 441 rows of the official vocabulary, 268 MB in float32. Larger chunks gain little:
# besides its matmuls a chunk costs one addition to the head's gradient.
MAX_CHUNK_LOGITS = 1 << 26


class LossOutput(NamedTuple):
    """The loss to differentiate, and detached tensors for metrics."""

    loss: Tensor  # scalar, already divided
    losses_R: Tensor  # unweighted cross-entropy of each target
    is_correct_R: Tensor  # bool: the argmax of the logits is the target


def token_loss(
    hidden_TD: Tensor, lm_head_weight: Tensor, batch: Batch, divisor: float | Tensor
) -> LossOutput:
    """Compute sum(weight * cross-entropy) / divisor over the targets of `batch`.

    Gradients are computed in the forward, chunk by chunk, and returned by `backward`, which may be
    called once. Without targets the loss and every gradient are 0.
    """
    hidden_RD = hidden_TD.index_select(0, batch.target_index_R)
    scale_R = batch.weights_R.to(_accumulation_dtype(hidden_RD.dtype)) / divisor
    return LossOutput(
        *_CrossEntropy.apply(
            hidden_RD, lm_head_weight, batch.targets_R, scale_R, torch.is_grad_enabled()
        )
    )


class _CrossEntropy(torch.autograd.Function):
    """LM head and cross-entropy as one function; the forward saves the finished gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_RD: Tensor,
        head_VD: Tensor,
        targets_R: Tensor,
        scale_R: Tensor,
        differentiate: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype, accumulation_dtype = _matmul_dtype(hidden_RD), scale_R.dtype
        needs_hidden, needs_head = (differentiate and needed for needed in ctx.needs_input_grad[:2])
        # Sums over chunks are accumulated in float32 or wider, whatever the dtype of the matmuls.
        d_hidden_RD = (
            torch.zeros_like(hidden_RD, dtype=accumulation_dtype) if needs_hidden else None
        )
        d_head_VD = torch.zeros_like(head_VD, dtype=accumulation_dtype) if needs_head else None
        losses_R, is_correct_R = (
            torch.empty_like(scale_R),
            torch.empty_like(targets_R, dtype=torch.bool),
        )
        head = head_VD.to(dtype)
        with torch.autocast(hidden_RD.device.type, enabled=False):
            for chunk in _chunk_slices(len(hidden_RD), len(head_VD)):
                losses_R[chunk], is_correct_R[chunk] = _chunk_losses(
                    hidden_RD[chunk],
                    head,
                    targets_R[chunk],
                    scale_R[chunk, None],
                    None if d_hidden_RD is None else d_hidden_RD[chunk],
                    d_head_VD,
                )
        ctx.gradients = (d_hidden_RD, d_head_VD)
        ctx.dtypes = (hidden_RD.dtype, head_VD.dtype)
        ctx.mark_non_differentiable(losses_R, is_correct_R)
        return (losses_R * scale_R).sum(), losses_R, is_correct_R

    @staticmethod
    @once_differentiable
    def backward(  # type: ignore - the decorator hides that ctx is the first argument
        ctx: Any, d_loss: Tensor, *_: Tensor
    ) -> tuple[Tensor | None, ...]:
        assert ctx.gradients is not None, "the loss was differentiated a second time"
        # In place: a copy of the head's gradient would add to the peak memory of a step.
        gradients = [
            None if gradient is None else gradient.mul_(d_loss).to(dtype)
            for gradient, dtype in zip(ctx.gradients, ctx.dtypes, strict=True)
        ]
        ctx.gradients = None
        return (*gradients, None, None, None)


def _chunk_losses(
    hidden_RD: Tensor,
    head_VD: Tensor,
    targets_R: Tensor,
    scale_R1: Tensor,
    d_hidden_RD: Tensor | None,
    d_head_VD: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return losses_R and is_correct_R of a chunk, and add to the gradients; logits are freed."""
    logits_RV = F.linear(hidden_RD.to(head_VD.dtype), head_VD).to(scale_R1.dtype)
    losses_R, is_correct_R = _losses_and_probabilities(logits_RV, targets_R)
    if d_hidden_RD is not None or d_head_VD is not None:
        # Subtracted before rounding: for a confident, correct prediction p - 1 is small.
        logits_RV.scatter_add_(1, targets_R[:, None], -torch.ones_like(scale_R1))
        d_logits_RV = logits_RV.to(head_VD.dtype)
        if d_hidden_RD is not None:
            torch.mul(d_logits_RV @ head_VD, scale_R1, out=d_hidden_RD)
        if d_head_VD is not None:
            _add_product(d_head_VD, d_logits_RV.t(), (hidden_RD * scale_R1).to(head_VD.dtype))
    return losses_R, is_correct_R


def _losses_and_probabilities(logits_RV: Tensor, targets_R: Tensor) -> tuple[Tensor, Tensor]:
    """Return losses_R and is_correct_R; the logits become probabilities, in place."""
    max_R1, argmax_R1 = logits_RV.max(1, keepdim=True)
    target_logit_R1 = logits_RV.sub_(max_R1).gather(1, targets_R[:, None])
    sum_R1 = logits_RV.exp_().sum(1, keepdim=True)
    logits_RV.div_(sum_R1)
    return (sum_R1.log() - target_logit_R1)[:, 0], argmax_R1[:, 0] == targets_R


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right to `total`, rounding at most once."""
    if total.dtype == left.dtype:
        torch.addmm(total, left, right, out=total)
    else:
        total += left @ right


def _chunk_slices(num_rows: int, vocab_size: int) -> list[slice]:
    """Cut rows into slices of about equal size, of at most MAX_CHUNK_LOGITS logits each."""
    max_rows = max(1, MAX_CHUNK_LOGITS // vocab_size)
    chunk_size = -(-num_rows // max(1, -(-num_rows // max_rows)))
    return [slice(start, start + chunk_size) for start in range(0, num_rows, max(1, chunk_size))]


def _matmul_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype of matmuls: that of autocast where it is enabled."""
    device_type = tensor.device.type
    return (
        torch.get_autocast_dtype(device_type)
        if torch.is_autocast_enabled(device_type)
        else tensor.dtype
    )


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
