"""Varlen attention kernel of PyTorch (FlashAttention): segments of any lengths in one GPU call.

`torch.nn.attention.varlen.varlen_attn` requires float16 or bfloat16 and a GPU of compute capability
8.0 or higher. Its parameters depend on the release: torch 2.11 has neither GQA (`enable_gqa`) nor
keys with unused slots behind them (`seqused_k`); 2.12 and later have both. Nothing here runs on a
CPU, and no call synchronizes with the GPU. Callers check `supports_varlen` and fall back to SDPA;
`attention_by_segment` in attention.py is the reference. (Dao 2023, FlashAttention-2.)
"""

from __future__ import annotations

from functools import cache
from inspect import signature
from typing import Any, cast

import torch
from torch import Tensor

__all__ = ["supports_varlen", "varlen_attention"]


def supports_varlen(q_THC: Tensor, k_TKC: Tensor, *, has_key_gaps: bool = False) -> bool:
    """Return whether `varlen_attention` supports these queries and keys.

    With `has_key_gaps`, whether it also supports `seqused_k_S`.
    """
    if not q_THC.is_cuda or q_THC.dtype not in (torch.float16, torch.bfloat16):
        return False
    is_gqa = q_THC.shape[1] != k_TKC.shape[1]
    needed = {"window_size", *["enable_gqa"] * is_gqa, *["seqused_k"] * has_key_gaps}
    return needed <= _varlen_attn_parameters(q_THC.device) and q_THC.shape[2] % 8 == 0


def varlen_attention(
    q_THC: Tensor,
    k_TKC: Tensor,
    v_TKC: Tensor,
    cu_seqlens: tuple[Tensor, Tensor],
    max_seqlens: tuple[int, int],
    *,
    causal: bool,
    seqused_k_S: Tensor | None = None,
) -> Tensor:
    """Compute attention within each segment.

    Args:
        q_THC: queries of all segments.
        k_TKC: keys.
        v_TKC: values.
        cu_seqlens: start offsets of the segments' queries and of their keys, each (S+1,) int32.
        max_seqlens: upper bounds of a segment's queries and of its keys.
        causal: mask later keys; the mask is aligned bottom right.
        seqused_k_S: number of keys of each segment, counted from its start offset, wherever the
            next segment starts; int32.
    """
    from torch.nn.attention.varlen import varlen_attn  # importing it takes a second

    # A single query attends to all keys; without a window the kernel may split them (split-KV).
    options: dict[str, Any] = {
        "window_size": (-1, 0) if causal and max_seqlens[0] > 1 else (-1, -1)
    }
    if q_THC.shape[1] != k_TKC.shape[1]:
        options["enable_gqa"] = True
    if seqused_k_S is not None:
        options["seqused_k"] = seqused_k_S
    k_TKC, dtype = k_TKC.to(q_THC.dtype), v_TKC.dtype  # autocast may have left them different
    out = varlen_attn(q_THC, k_TKC, v_TKC.to(q_THC.dtype), *cu_seqlens, *max_seqlens, **options)
    return cast("Tensor", out).to(dtype)


@cache
def _varlen_attn_parameters(device: torch.device) -> frozenset[str]:
    """Return the parameter names of torch's kernel; empty where it does not run on `device`."""
    is_built = torch.version.hip is None and torch.backends.cuda.is_flash_attention_available()
    if not is_built or torch.cuda.get_device_capability(device) < (8, 0):
        return frozenset()
    from torch.nn.attention.varlen import varlen_attn

    return frozenset(signature(varlen_attn).parameters)
