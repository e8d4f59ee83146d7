"""The packed attention kernel of GPUs: segments of any lengths in one call, where torch has it.

torch.nn.attention.varlen wants half precision on a GPU of compute capability 8.0 and more. What
else it takes has grown: torch 2.11 knows no shared key heads and no keys with gaps behind them,
2.12 and later do. Nothing here runs on a CPU, and nothing waits for the GPU. Callers ask `packs`
and have another way; attention.py has the oracle. (Dao 2023, FlashAttention-2.)
"""

from __future__ import annotations

from functools import cache
from inspect import signature
from typing import Any, cast

import torch
from torch import Tensor

__all__ = ["attend_packed", "packs"]


def packs(q_THC: Tensor, k_TKC: Tensor, *, has_gaps: bool = False) -> bool:
    """Tell whether `attend_packed` takes such queries and keys; `has_gaps`: also `used_S`."""
    if not q_THC.is_cuda or q_THC.dtype not in (torch.float16, torch.bfloat16):
        return False
    is_shared = q_THC.shape[1] != k_TKC.shape[1]
    needed = {"window_size", *["enable_gqa"] * is_shared, *["seqused_k"] * has_gaps}
    return needed <= _arguments(q_THC.device) and q_THC.shape[2] % 8 == 0


def attend_packed(
    q_THC: Tensor,
    k_TKC: Tensor,
    v_TKC: Tensor,
    starts: tuple[Tensor, Tensor],
    longest: tuple[int, int],
    *,
    causal: bool,
    used_S: Tensor | None = None,
) -> Tensor:
    """Attend within segments that begin at `starts`, of queries and of keys, each (S+1,) int32.

    `longest` bounds a segment's queries and keys. With `used_S` segment s has that many keys from
    its start on, wherever the next one starts. Causal is aligned to the end.
    """
    from torch.nn.attention.varlen import varlen_attn  # takes a second

    # A single query sees all keys. Told so, the kernel divides long keys among processors.
    options: dict[str, Any] = {"window_size": (-1, 0) if causal and longest[0] > 1 else (-1, -1)}
    if q_THC.shape[1] != k_TKC.shape[1]:
        options["enable_gqa"] = True
    if used_S is not None:
        options["seqused_k"] = used_S
    k_TKC, dtype = k_TKC.to(q_THC.dtype), v_TKC.dtype  # autocast may have left them different
    out = varlen_attn(q_THC, k_TKC, v_TKC.to(q_THC.dtype), *starts, *longest, **options)
    return cast("Tensor", out).to(dtype)


@cache
def _arguments(device: torch.device) -> frozenset[str]:
    """Name what torch's kernel takes on this GPU; nothing where it does not run."""
    is_built = torch.version.hip is None and torch.backends.cuda.is_flash_attention_available()
    if not is_built or torch.cuda.get_device_capability(device) < (8, 0):
        return frozenset()
    from torch.nn.attention.varlen import varlen_attn

    return frozenset(signature(varlen_attn).parameters)
