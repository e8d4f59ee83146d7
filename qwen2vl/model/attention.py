"""Variable-length attention over packed sequences (SDPA, GQA), causal or bidirectional.

Sequences are concatenated, without batch axis or padding; `AttnMeta` holds the segment bounds
(cu_seqlens). Consecutive segments of equal length share one SDPA call; on a GPU, one varlen kernel
computes segments of different lengths (kernels.py). `attention_by_segment` is the reference
implementation of both. (HF: ALL_ATTENTION_FUNCTIONS["sdpa"].) Axis letters of tensor names:

    T  tokens, packed     N  patches, packed     M  vision tokens     S  sequences
    D  text width         E  vision width        P  numbers a patch   V  vocabulary
    H  query heads        K  key/value heads     C  channels a head   Z  KV slots of a sequence
    L  layers             3  (time, height, width)
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
from qwen2vl.geometry import AttnMeta, SegmentRun
from qwen2vl.model import kernels

__all__ = [
    "BatchKVCache",
    "KVCache",
    "LayerCaches",
    "attention",
    "attention_by_segment",
    "decode_attention",
]


@dataclass(slots=True)
class LayerCache:
    """One layer of a KVCache: views of its keys and values, and the number of tokens stored."""

    k_KZC: Tensor
    v_KZC: Tensor
    length: int

    def append(self, k_TKC: Tensor, v_TKC: Tensor) -> tuple[Tensor, Tensor]:
        """Append new keys and values; return all stored ones of this layer as (K, T, C) views."""
        end = self.length + k_TKC.shape[0]
        assert end <= self.k_KZC.shape[1], f"cache holds {self.k_KZC.shape[1]} tokens, got {end}"
        self.k_KZC[:, self.length : end] = k_TKC.transpose(0, 1)
        self.v_KZC[:, self.length : end] = v_TKC.transpose(0, 1)
        return self.k_KZC[:, :end], self.v_KZC[:, :end]


@dataclass(slots=True)
class KVCache:
    """KV cache of one sequence, contiguous in memory, which is what CPU kernels need.

    `length` counts the tokens stored. `Qwen2VL.forward` advances it after all layers have written,
    so a forward that fails in between leaves the cache unchanged. Setting it to a smaller value
    truncates the cache.
    """

    k_LKZC: Tensor
    v_LKZC: Tensor
    length: int = 0

    @classmethod
    def allocate(
        cls, config: TextConfig, capacity: int, dtype: torch.dtype, device: torch.device | str
    ) -> KVCache:
        """Allocate slots for `capacity` tokens: 2 * L * K * C numbers a token."""
        shape = (config.num_hidden_layers, config.num_key_value_heads, capacity, config.head_dim)
        k_LKZC = torch.empty(shape, dtype=dtype, device=device)
        return cls(k_LKZC, torch.empty_like(k_LKZC))

    @property
    def capacity(self) -> int:
        """Maximum number of tokens."""
        return self.k_LKZC.shape[2]

    def copy_from(self, other: KVCache, num_tokens: int) -> None:
        """Copy the first `num_tokens` of another cache and set `length` to that number."""
        assert num_tokens <= min(other.length, self.capacity), "a copy longer than its source"
        self.k_LKZC[:, :, :num_tokens] = other.k_LKZC[:, :, :num_tokens]
        self.v_LKZC[:, :, :num_tokens] = other.v_LKZC[:, :, :num_tokens]
        self.length = num_tokens

    def layer(self, index: int) -> LayerCache:
        """Return the views of one layer."""
        return LayerCache(self.k_LKZC[index], self.v_LKZC[index], self.length)


# One LayerCache per segment, or a function (q_THC, k_TKC, v_TKC) -> out_THC that stores the new
# keys and values of all segments and attends.
LayerCaches = Sequence[LayerCache] | Callable[[Tensor, Tensor, Tensor], Tensor]


class BatchKVCache(Protocol):
    """KV cache of all sequences of a batch in one tensor, for GPU kernels.

    Implemented in engine/kv_cache/arena.py.
    """

    def layer(self, index: int) -> LayerCaches:
        """Return the function that stores and attends in one layer."""
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
    """Compute scaled dot-product attention within each segment.

    With `layer_caches`, one per segment, the new keys and values are appended first; the queries,
    which are the last tokens of their sequence, then attend to all stored keys. Causal masks are
    aligned bottom right: the last query attends to every key. Scores are scaled by C ** -0.5.

    Returns:
        out_THC, in the order of the queries.
    """
    if callable(layer_caches):
        return layer_caches(q_THC, k_TKC, v_TKC)
    if layer_caches is not None:
        return _cached_attention(q_THC, k_TKC, v_TKC, meta, layer_caches, causal)
    if len(meta.segment_runs) > 1 and kernels.supports_varlen(q_THC, k_TKC):
        cu_seqlens = (meta.cu_seqlens_q, meta.cu_seqlens_k)
        max_seqlens = (meta.max_seqlen_q, meta.max_seqlen_k)
        return kernels.varlen_attention(q_THC, k_TKC, v_TKC, cu_seqlens, max_seqlens, causal=causal)
    return _attention_by_run(q_THC, k_TKC, v_TKC, meta, meta.segment_runs, causal)


def attention_by_segment(
    q_THC: Tensor, k_TKC: Tensor, v_TKC: Tensor, meta: AttnMeta, *, causal: bool
) -> Tensor:
    """Compute `attention` one segment at a time: the slow reference implementation for tests."""
    segment_runs: list[SegmentRun] = []
    start_q = start_k = 0
    for length_q, length_k in zip(meta.lengths_q, meta.lengths_k, strict=True):
        segment_runs.append(SegmentRun(start_q, start_k, 1, length_q, length_k))
        start_q += length_q
        start_k += length_k
    return _attention_by_run(q_THC, k_TKC, v_TKC, meta, segment_runs, causal)


def _cached_attention(
    q_THC: Tensor,
    k_TKC: Tensor,
    v_TKC: Tensor,
    meta: AttnMeta,
    layer_caches: Sequence[LayerCache],
    causal: bool,
) -> Tensor:
    """Append and attend, sequence by sequence, since each has its own KV cache tensors."""
    sizes = list(meta.lengths_q)
    outs: list[Tensor] = []
    parts = zip(q_THC.split(sizes), k_TKC.split(sizes), v_TKC.split(sizes), strict=True)
    for (q, k, v), cache in zip(parts, layer_caches, strict=True):
        keys, values = cache.append(k, v)
        if len(q) == 1:
            outs.append(decode_attention(q, keys, values))
        else:
            outs.append(_chunked_prefill_attention(q, keys, values, meta, causal))
    return outs[0] if len(outs) == 1 else torch.cat(outs)


def decode_attention(q_1HC: Tensor, k_KTC: Tensor, v_KTC: Tensor) -> Tensor:
    """Attend from one new token to all cached keys (decode).

    The query heads of a GQA group share their keys, so they are passed as the queries of one SDPA
    call: bitwise the same result, in 29 instead of 51 us (12 heads, 2 groups, 1,000 keys, 2 cores).
    """
    queries = q_1HC.unflatten(1, (k_KTC.shape[0], -1))
    return F.scaled_dot_product_attention(queries, k_KTC[None], v_KTC[None]).flatten(1, 2)


def _chunked_prefill_attention(
    q_THC: Tensor, k_KTC: Tensor, v_KTC: Tensor, meta: AttnMeta, causal: bool
) -> Tensor:
    """Attend from the last tokens of a sequence to all its cached keys (chunked prefill)."""
    is_whole = len(q_THC) == k_KTC.shape[1]
    mask = (
        _causal_mask(meta, len(q_THC), k_KTC.shape[1], q_THC.dtype)
        if causal and not is_whole
        else None
    )
    out = F.scaled_dot_product_attention(
        q_THC.transpose(0, 1)[None],
        k_KTC[None],
        v_KTC[None],
        attn_mask=mask,
        is_causal=causal and mask is None,
        enable_gqa=q_THC.shape[1] != k_KTC.shape[0],
    )
    return out[0].transpose(0, 1)


def _causal_mask(meta: AttnMeta, length_q: int, length_k: int, dtype: torch.dtype) -> Tensor:
    """Build the additive causal mask (q, k) of the last `length_q` of `length_k` tokens.

    Additive (0 and -inf) rather than boolean, since the CPU kernel converts a boolean mask in every
    layer. Cached in `meta.masks`, so that all layers share it.
    """
    key = (length_q, length_k, dtype)
    if key not in meta.masks:
        device = meta.cu_seqlens_q.device
        mask = torch.full((length_q, length_k), -math.inf, dtype=dtype, device=device)
        meta.masks[key] = mask.triu_(length_k - length_q + 1)
    return meta.masks[key]


def _attention_by_run(
    q_THC: Tensor,
    k_TKC: Tensor,
    v_TKC: Tensor,
    meta: AttnMeta,
    segment_runs: Sequence[SegmentRun],
    causal: bool,
) -> Tensor:
    """Run SDPA once per run of equal segments and concatenate the outputs."""
    # Split rather than narrow: the backward of a split is one concatenation, that of each narrow
    # fills and adds a tensor of the size of all runs together.
    sizes_q = [run.num_segments * run.length_q for run in segment_runs]
    sizes_k = [run.num_segments * run.length_k for run in segment_runs]
    parts = zip(q_THC.split(sizes_q), k_TKC.split(sizes_k), v_TKC.split(sizes_k), strict=True)
    outs = [
        _sdpa_segment_run(*part, meta, run, causal)
        for part, run in zip(parts, segment_runs, strict=True)
    ]
    return outs[0] if len(outs) == 1 else torch.cat(outs)


def _sdpa_segment_run(
    q: Tensor, k: Tensor, v: Tensor, meta: AttnMeta, run: SegmentRun, causal: bool
) -> Tensor:
    """Stack the segments of one run along a batch axis and call SDPA once."""
    is_square = run.length_q == run.length_k
    dtype = _sdpa_dtype(q)
    needs_mask = causal and not is_square and run.length_q > 1
    mask = _causal_mask(meta, run.length_q, run.length_k, dtype) if needs_mask else None
    with torch.autocast(q.device.type, enabled=False):
        out = F.scaled_dot_product_attention(
            q.to(dtype).unflatten(0, (run.num_segments, run.length_q)).transpose(1, 2),
            k.to(dtype).unflatten(0, (run.num_segments, run.length_k)).transpose(1, 2),
            v.to(dtype).unflatten(0, (run.num_segments, run.length_k)).transpose(1, 2),
            attn_mask=mask,
            is_causal=causal and is_square and run.length_q > 1,
            enable_gqa=q.shape[1] != k.shape[1],
        )
    return out.transpose(1, 2).flatten(0, 1).to(v.dtype)


def _sdpa_dtype(q_THC: Tensor) -> torch.dtype:
    """Return the dtype that SDPA computes in: that of the inputs, but float32 to train on a CPU.

    On a CPU the backward of the bfloat16 kernel is eight times slower than that of the float32 one
    (114 against 14 ms at 128 segments of 72 tokens, 6 heads of 32; torch 2.13, 2 cores).
    """
    is_slow = q_THC.device.type == "cpu" and q_THC.dtype == torch.bfloat16 and q_THC.requires_grad
    return torch.float32 if is_slow else q_THC.dtype
