"""FlashAttention on a CPU, for training in bfloat16: torch's forward kernel and a faster backward.

torch's CPU backward is a float32 algorithm: in float32 it runs at a tenth of the speed of bfloat16
matmuls (AMX), and in bfloat16 it is slower still for short segments. This backward recomputes the
probabilities from the logsumexp, block by block, with batched bfloat16 matmuls; a block of scores
stays in the cache. It is bidirectional: causal segments are short, torch's kernel skips half of
their scores, and nothing is gained. What happens to scores between the matmuls must be one pass
over memory, so it needs torch.compile. (Dao 2023, FlashAttention-2, algorithm 2; measured by
`python benchmarks/attention_backward.py`.)

    B  pairs of segment and head     T  queries of a pair     Z  its keys     C  channels of a head
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = [
    "MAX_BLOCK_SCORES",
    "attend_with_logsumexp",
    "enable_flash_attention_cpu",
    "flash_attention_cpu",
    "supports_flash_attention_cpu",
    "supports_logsumexp",
]

# What SDPA calls; SDPA itself does not return the logsumexp.
FORWARD_KERNEL = "_scaled_dot_product_flash_attention_for_cpu"

# Of one block: four megabytes in bfloat16. Half and twice as many were slower, on one thread and
# on two, at 152 to 4,096 tokens.
MAX_BLOCK_SCORES = 1 << 21

_score_gradients: Callable[..., tuple[Tensor, Tensor]] | None = None


def enable_flash_attention_cpu() -> None:
    """Let attention use this from now on in this process; compiles at the first backward.

    It stays disabled where torch does not have the forward kernel, which is private.
    """
    global _score_gradients
    if hasattr(torch.ops.aten, FORWARD_KERNEL):
        _score_gradients = torch.compile(_compute_score_gradients, dynamic=True)


def supports_flash_attention_cpu(q: Tensor, k: Tensor, *, causal: bool) -> bool:
    """Return whether `flash_attention_cpu` computes these segments, and is enabled."""
    is_enabled = _score_gradients is not None and q.device.type == "cpu"
    return (
        is_enabled
        and not causal
        and q.shape == k.shape
        and q.dtype == torch.bfloat16
        and q.requires_grad
    )


def supports_logsumexp(q: Tensor) -> bool:
    """Return whether `attend_with_logsumexp` computes such queries, which is for inference."""
    return (
        q.device.type == "cpu"
        and not torch.is_grad_enabled()
        and hasattr(torch.ops.aten, FORWARD_KERNEL)
    )


def attend_with_logsumexp(
    q_SHTC: Tensor, k_SHZC: Tensor, v_SHZC: Tensor, *, causal: bool
) -> tuple[Tensor, Tensor]:
    """Attend as SDPA does; return out_SHTC, and the logsumexp of the scores (S, H, T), float32.

    With `causal`, T equals Z.
    """
    return getattr(torch.ops.aten, FORWARD_KERNEL)(q_SHTC, k_SHZC, v_SHZC, 0.0, causal)


def flash_attention_cpu(q_SHTC: Tensor, k_SHTC: Tensor, v_SHTC: Tensor) -> Tensor:
    """Attend within S segments of T tokens each, bidirectionally; scores are scaled by C ** -0.5.

    Differentiable once.

    Returns:
        out_SHTC, bfloat16.
    """
    return _FlashAttention.apply(q_SHTC, k_SHTC, v_SHTC)


class _FlashAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *qkv: Tensor) -> Tensor:
        q_SHTC, k_SHTC, v_SHTC = (tensor.contiguous() for tensor in qkv)
        kernel = getattr(torch.ops.aten, FORWARD_KERNEL)
        out_SHTC, logsumexp_SHT = kernel(q_SHTC, k_SHTC, v_SHTC)
        ctx.save_for_backward(q_SHTC, k_SHTC, v_SHTC, out_SHTC, logsumexp_SHT)
        return out_SHTC

    @staticmethod
    @once_differentiable
    def backward(  # type: ignore - the decorator hides that ctx is the first argument
        ctx: Any, d_out_SHTC: Tensor
    ) -> tuple[Tensor, ...]:
        q_SHTC, k_SHTC, v_SHTC, out_SHTC, logsumexp_SHT = ctx.saved_tensors
        gradients = _gradients(
            d_out_SHTC.contiguous().flatten(0, 1),
            q_SHTC.flatten(0, 1),
            k_SHTC.flatten(0, 1),
            v_SHTC.flatten(0, 1),
            out_SHTC.flatten(0, 1),
            logsumexp_SHT.flatten(0, 1).unsqueeze(2),
        )
        return tuple(gradient.view(d_out_SHTC.shape) for gradient in gradients)


def _gradients(
    d_out_BTC: Tensor,
    q_BTC: Tensor,
    k_BTC: Tensor,
    v_BTC: Tensor,
    out_BTC: Tensor,
    logsumexp_BT1: Tensor,
) -> list[Tensor]:
    """Compute d_q, d_k and d_v by blocks: of several pairs, or of some queries of one pair."""
    num_pairs, length, _ = q_BTC.shape
    # The part of a score's gradient that all keys of a query share.
    delta_BT1 = (d_out_BTC.float() * out_BTC.float()).sum(2, keepdim=True)
    parts = (d_out_BTC, q_BTC, k_BTC, v_BTC, logsumexp_BT1, delta_BT1)
    pairs_per_block = MAX_BLOCK_SCORES // length**2
    if pairs_per_block >= num_pairs:
        return _gradients_of_rows(*parts)
    compute = _gradients_of_rows if pairs_per_block else _gradients_of_pair
    gradients = [torch.empty_like(q_BTC) for _ in range(3)]
    for start in range(0, num_pairs, max(1, pairs_per_block)):
        pairs = slice(start, start + max(1, pairs_per_block))
        block_gradients = compute(*(part[pairs] for part in parts))
        for gradient, block_gradient in zip(gradients, block_gradients, strict=True):
            gradient[pairs] = block_gradient
    return gradients


def _gradients_of_pair(
    d_out_1TC: Tensor,
    q_1TC: Tensor,
    k_1ZC: Tensor,
    v_1ZC: Tensor,
    logsumexp_1T1: Tensor,
    delta_1T1: Tensor,
) -> list[Tensor]:
    """Compute the gradients of one pair by blocks of queries; sums over blocks are float32."""
    rows_per_block = max(1, MAX_BLOCK_SCORES // k_1ZC.shape[1])
    d_q_parts: list[Tensor] = []
    d_k_1ZC, d_v_1ZC = (torch.zeros_like(k_1ZC, dtype=torch.float32) for _ in range(2))
    for d_out, q, logsumexp, delta in zip(
        *(x.split(rows_per_block, 1) for x in (d_out_1TC, q_1TC, logsumexp_1T1, delta_1T1)),
        strict=True,
    ):
        d_q, d_k, d_v = _gradients_of_rows(d_out, q, k_1ZC, v_1ZC, logsumexp, delta)
        d_q_parts.append(d_q)
        d_k_1ZC += d_k
        d_v_1ZC += d_v
    return [torch.cat(d_q_parts, 1), d_k_1ZC, d_v_1ZC]


def _gradients_of_rows(
    d_out_BTC: Tensor,
    q_BTC: Tensor,
    k_BZC: Tensor,
    v_BZC: Tensor,
    logsumexp_BT1: Tensor,
    delta_BT1: Tensor,
) -> list[Tensor]:
    """Compute what some queries contribute: to their own gradients, and to those of all keys."""
    assert _score_gradients is not None, "supports_flash_attention_cpu was not asked"
    scale = q_BTC.shape[2] ** -0.5
    probabilities_BTZ, d_scores_BTZ = _score_gradients(
        torch.bmm(q_BTC, k_BZC.mT),
        logsumexp_BT1.contiguous(),
        torch.bmm(d_out_BTC, v_BZC.mT),
        delta_BT1.contiguous(),
        # As a tensor: a float that varies is compiled to double precision.
        torch.full((1, 1, 1), scale),
    )
    d_q_BTC = torch.bmm(d_scores_BTZ, k_BZC)
    # Products with the transpose of the narrow factor: bmm copies what is transposed.
    d_k_BCZ = torch.bmm(q_BTC.mT, d_scores_BTZ)
    d_v_BCZ = torch.bmm(d_out_BTC.mT, probabilities_BTZ)
    return [d_q_BTC.mul_(scale), d_k_BCZ.mul_(scale).mT, d_v_BCZ.mT]


def _compute_score_gradients(
    scores_BTZ: Tensor,
    logsumexp_BT1: Tensor,
    d_probabilities_BTZ: Tensor,
    delta_BT1: Tensor,
    scale_111: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return the probabilities and the gradients of the scaled scores, in bfloat16."""
    probabilities_BTZ = torch.exp(scores_BTZ * scale_111 - logsumexp_BT1)
    d_scores_BTZ = probabilities_BTZ * (d_probabilities_BTZ - delta_BT1)
    return probabilities_BTZ.bfloat16(), d_scores_BTZ.bfloat16()
