"""One attention for everything: packed or cached, causal or not, no batch axis and no padding.

Tokens lie end to end; `AttnMeta` says where each segment begins. Letters (docs/conventions.md):

    T  tokens, packed     N  patches, packed     M  vision tokens     S  sequences
    D  text width         E  vision width        P  numbers a patch   V  vocabulary
    H  query heads        K  key/value heads     C  channels a head   Z  tokens a cache block
    L  layers             3  (time, height, width)

`attention` is what the model calls. Neighboring segments of the same length share one call of
the kernel, on a GPU all segments (kernels.py); `attention_by_segment` does one at a time and is the
oracle of both. (HF: ALL_ATTENTION_FUNCTIONS["sdpa"].) Next room: rope.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from qwen2vl.config import TextConfig
from qwen2vl.geometry import AttnMeta, Run
from qwen2vl.model import kernels

__all__ = [
    "KVCache",
    "LayerCaches",
    "SharedCache",
    "attend_token",
    "attention",
    "attention_by_segment",
]


@dataclass(slots=True)
class LayerCache:
    """Keys and values of one layer, a view into the KVCache that knows how far it is filled."""

    k_KZC: Tensor
    v_KZC: Tensor
    length: int

    def append(self, k_TKC: Tensor, v_TKC: Tensor) -> tuple[Tensor, Tensor]:
        """Store new keys and values; return all of this layer's, as (K, T, C) views."""
        end = self.length + k_TKC.shape[0]
        assert end <= self.k_KZC.shape[1], f"cache holds {self.k_KZC.shape[1]} tokens, got {end}"
        self.k_KZC[:, self.length : end] = k_TKC.transpose(0, 1)
        self.v_KZC[:, self.length : end] = v_TKC.transpose(0, 1)
        return self.k_KZC[:, :end], self.v_KZC[:, :end]


@dataclass(slots=True)
class KVCache:
    """Keys and values of one sequence: one contiguous block, as CPU kernels like it.

    `length` counts the tokens stored; `Qwen2VL.forward` advances it once all layers have written,
    so that a forward that fails in between leaves the cache as it was. Setting it back forgets
    the tokens behind.
    """

    k_LKZC: Tensor
    v_LKZC: Tensor
    length: int = 0

    @classmethod
    def allocate(
        cls, config: TextConfig, capacity: int, dtype: torch.dtype, device: torch.device | str
    ) -> KVCache:
        """Reserve room for `capacity` tokens: 2 * L * K * C numbers a token."""
        shape = (config.num_hidden_layers, config.num_key_value_heads, capacity, config.head_dim)
        k_LKZC = torch.empty(shape, dtype=dtype, device=device)
        return cls(k_LKZC, torch.empty_like(k_LKZC))

    @property
    def capacity(self) -> int:
        """Tokens there is room for."""
        return self.k_LKZC.shape[2]

    def copy_from(self, other: KVCache, num_tokens: int) -> None:
        """Take over the first `num_tokens` of another sequence; that is now the length."""
        assert num_tokens <= min(other.length, self.capacity), "a copy longer than its source"
        self.k_LKZC[:, :, :num_tokens] = other.k_LKZC[:, :, :num_tokens]
        self.v_LKZC[:, :, :num_tokens] = other.v_LKZC[:, :, :num_tokens]
        self.length = num_tokens

    def layer(self, index: int) -> LayerCache:
        """Give one layer's share."""
        return LayerCache(self.k_LKZC[index], self.v_LKZC[index], self.length)


# Of one layer, for each segment; or what stores and attends for all of them: q, k, v -> out_THC.
LayerCaches = Sequence[LayerCache] | Callable[[Tensor, Tensor, Tensor], Tensor]


class SharedCache(Protocol):
    """Keys and values of all segments in one place, as GPUs like it; engine/kv_cache/arena.py has it."""

    def layer(self, index: int) -> LayerCaches:
        """Give one layer's share."""
        ...


def attention(
    q_THC: Tensor,
    k_TKC: Tensor,
    v_TKC: Tensor,
    meta: AttnMeta,
    *,
    causal: bool,
    layer_caches: LayerCaches | None = None,
) -> Tensor:
    """Let each token attend within its own segment.

    With `layer_caches`, one for each segment, the new keys and values are stored first and the
    queries, the last tokens of their sequence, see all of them. Causal masks are aligned to the
    end: the last query sees every key. Scores are scaled by C ** -0.5.

    Returns:
        out_THC, in the order of the queries.
    """
    if callable(layer_caches):
        return layer_caches(q_THC, k_TKC, v_TKC)
    if layer_caches is not None:
        return _attend_cached(q_THC, k_TKC, v_TKC, meta, layer_caches, causal)
    if len(meta.runs) > 1 and kernels.packs(q_THC, k_TKC):
        starts = (meta.cu_seqlens_q, meta.cu_seqlens_k)
        longest = (meta.max_seqlen_q, meta.max_seqlen_k)
        return kernels.attend_packed(q_THC, k_TKC, v_TKC, starts, longest, causal=causal)
    return _attend(q_THC, k_TKC, v_TKC, meta, meta.runs, causal)


def attention_by_segment(
    q_THC: Tensor, k_TKC: Tensor, v_TKC: Tensor, meta: AttnMeta, *, causal: bool
) -> Tensor:
    """Do what `attention` does, one segment at a time: slow, obvious, the oracle of the tests."""
    runs: list[Run] = []
    start_q = start_k = 0
    for length_q, length_k in zip(meta.lengths_q, meta.lengths_k, strict=True):
        runs.append(Run(start_q, start_k, 1, length_q, length_k))
        start_q += length_q
        start_k += length_k
    return _attend(q_THC, k_TKC, v_TKC, meta, runs, causal)


def _attend_cached(
    q_THC: Tensor,
    k_TKC: Tensor,
    v_TKC: Tensor,
    meta: AttnMeta,
    layer_caches: Sequence[LayerCache],
    causal: bool,
) -> Tensor:
    """Store and attend, sequence by sequence: their keys lie in different places."""
    sizes = list(meta.lengths_q)
    outs: list[Tensor] = []
    parts = zip(q_THC.split(sizes), k_TKC.split(sizes), v_TKC.split(sizes), strict=True)
    for (q, k, v), cache in zip(parts, layer_caches, strict=True):
        keys, values = cache.append(k, v)
        if len(q) == 1:
            outs.append(attend_token(q, keys, values))
        else:
            outs.append(_attend_chunk(q, keys, values, meta, causal))
    return outs[0] if len(outs) == 1 else torch.cat(outs)


def attend_token(q_1HC: Tensor, k_KTC: Tensor, v_KTC: Tensor) -> Tensor:
    """Let one token see all keys.

    The heads of a group share their keys, so they stand as the queries: the same bits, in 29
    instead of 51 us (12 heads, 2 groups, 1,000 keys, 2 cores).
    """
    queries = q_1HC.unflatten(1, (k_KTC.shape[0], -1))
    return F.scaled_dot_product_attention(queries, k_KTC[None], v_KTC[None]).flatten(1, 2)


def _attend_chunk(
    q_THC: Tensor, k_KTC: Tensor, v_KTC: Tensor, meta: AttnMeta, causal: bool
) -> Tensor:
    """Let the last tokens of a sequence see all of it."""
    is_whole = len(q_THC) == k_KTC.shape[1]
    mask = _mask(meta, len(q_THC), k_KTC.shape[1], q_THC.dtype) if causal and not is_whole else None
    out = F.scaled_dot_product_attention(
        q_THC.transpose(0, 1)[None],
        k_KTC[None],
        v_KTC[None],
        attn_mask=mask,
        is_causal=causal and mask is None,
        enable_gqa=q_THC.shape[1] != k_KTC.shape[0],
    )
    return out[0].transpose(0, 1)


def _mask(meta: AttnMeta, length_q: int, length_k: int, dtype: torch.dtype) -> Tensor:
    """Hide from the last `length_q` of `length_k` tokens what comes after each: (q, k).

    Numbers to be added to the scores, since the CPU kernel makes truth values into such numbers in
    every layer.
    """
    key = (length_q, length_k, dtype)
    if key not in meta.masks:
        device = meta.cu_seqlens_q.device
        hidden = torch.full((length_q, length_k), -math.inf, dtype=dtype, device=device)
        meta.masks[key] = hidden.triu_(length_k - length_q + 1)
    return meta.masks[key]


def _attend(
    q_THC: Tensor,
    k_TKC: Tensor,
    v_TKC: Tensor,
    meta: AttnMeta,
    runs: Sequence[Run],
    causal: bool,
) -> Tensor:
    # Split, not narrow: the backward of a split is one concatenation, that of every narrow fills
    # and adds a tensor as large as all runs together.
    sizes_q = [run.num * run.length_q for run in runs]
    sizes_k = [run.num * run.length_k for run in runs]
    parts = zip(q_THC.split(sizes_q), k_TKC.split(sizes_k), v_TKC.split(sizes_k), strict=True)
    outs = [_attend_run(*part, meta, run, causal) for part, run in zip(parts, runs, strict=True)]
    return outs[0] if len(outs) == 1 else torch.cat(outs)


def _attend_run(q: Tensor, k: Tensor, v: Tensor, meta: AttnMeta, run: Run, causal: bool) -> Tensor:
    """Stack the segments of one run along a batch axis and call the kernel once."""
    square = run.length_q == run.length_k
    dtype = _kernel_dtype(q)
    is_cut = causal and not square and run.length_q > 1
    mask = _mask(meta, run.length_q, run.length_k, dtype) if is_cut else None
    with torch.autocast(q.device.type, enabled=False):
        out = F.scaled_dot_product_attention(
            q.to(dtype).unflatten(0, (run.num, run.length_q)).transpose(1, 2),
            k.to(dtype).unflatten(0, (run.num, run.length_k)).transpose(1, 2),
            v.to(dtype).unflatten(0, (run.num, run.length_k)).transpose(1, 2),
            attn_mask=mask,
            is_causal=causal and square and run.length_q > 1,
            enable_gqa=q.shape[1] != k.shape[1],
        )
    return out.transpose(1, 2).flatten(0, 1).to(v.dtype)


def _kernel_dtype(q_THC: Tensor) -> torch.dtype:
    """Choose what the kernel computes in: the inputs' dtype, but for training on a CPU.

    There the backward of the bfloat16 kernel is eight times slower than the float32 one (114
    against 14 ms at 128 segments of 72 tokens, 6 heads of 32; torch 2.13, 2 cores).
    """
    slow = q_THC.device.type == "cpu" and q_THC.dtype == torch.bfloat16 and q_THC.requires_grad
    return torch.float32 if slow else q_THC.dtype
