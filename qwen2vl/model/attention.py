"""Variable-length attention over packed sequences (SDPA, GQA), causal or bidirectional.

Sequences are concatenated, without batch axis or padding; `AttnMeta` holds the segment bounds
(cu_seqlens). Consecutive segments of equal length share one SDPA call; on a GPU, one varlen kernel
computes segments of different lengths (kernels.py). `attention_by_segment` is the reference
implementation of both. (HF: ALL_ATTENTION_FUNCTIONS["sdpa"].) Axis letters of tensor names:

    T  tokens, packed     N  patches, packed     M  vision tokens     S  sequences
    D  text width         E  vision width        P  numbers a patch   V  vocabulary
    H  query heads        K  key/value heads     C  channels a head   Z  KV slots of a sequence
    L  layers             3  (time, height, width)
    G  query heads that share a key/value head (H / K)
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from qwen2vl.geometry import AttnMeta, SegmentRun
from qwen2vl.model import kernels
from qwen2vl.model.flash_attention_cpu import (
    attend_with_logsumexp,
    flash_attention_cpu,
    supports_flash_attention_cpu,
    supports_logsumexp,
)

__all__ = [
    "attention",
    "attention_by_segment",
    "chunked_prefill_attention",
    "decode_attention",
]

# Elements of a mask in chunked prefill; with more keys, a mask for each chunk would take memory and
# time in proportion to the whole context.
MAX_MASK_NUMEL = 2**20


def attention(
    q_THC: Tensor,
    k_TKC: Tensor,
    v_TKC: Tensor,
    meta: AttnMeta,
    *,
    causal: bool,
) -> Tensor:
    """Compute scaled dot-product attention within each segment.

    Causal masks are aligned bottom right: the last query attends to every key. Scores are scaled by
    C ** -0.5.

    Returns:
        out_THC, in the order of the queries.
    """
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


def decode_attention(q_1KGC: Tensor, k_1KZC: Tensor, v_1KZC: Tensor) -> Tensor:
    """Attend from one new token to all cached keys (decode): out_1KGC, G query heads a group.

    The query heads of a GQA group share their keys, so they are the queries of one SDPA call:
    bitwise the same result, in 29 instead of 51 us (12 heads, 2 groups, 1,000 keys, 2 cores).
    """
    return F.scaled_dot_product_attention(q_1KGC, k_1KZC, v_1KZC)


def chunked_prefill_attention(
    q_TKGC: Tensor, k_1KZC: Tensor, v_1KZC: Tensor, meta: AttnMeta
) -> Tensor:
    """Attend causally from the last tokens of a sequence to all cached keys (chunked prefill).

    Returns:
        out_TKGC.
    """
    length, num_keys = len(q_TKGC), k_1KZC.shape[2]
    if length < num_keys and length * num_keys >= MAX_MASK_NUMEL and supports_logsumexp(q_TKGC):
        return _attend_in_two_parts(q_TKGC, k_1KZC, v_1KZC)
    q_THC = q_TKGC.flatten(1, 2)
    is_whole = length == num_keys
    mask = None if is_whole else _causal_mask(meta, length, num_keys, q_THC.dtype)
    out = F.scaled_dot_product_attention(
        q_THC.transpose(0, 1)[None],
        k_1KZC,
        v_1KZC,
        attn_mask=mask,
        is_causal=is_whole,
        enable_gqa=q_THC.shape[1] != k_1KZC.shape[1],
    )
    return out[0].transpose(0, 1).unflatten(1, q_TKGC.shape[1:3])


def _attend_in_two_parts(q_TKGC: Tensor, k_1KZC: Tensor, v_1KZC: Tensor) -> Tensor:
    """Attend to the earlier keys, without a mask, and causally to those of the queries' own tokens.

    Each part's logsumexp is its weight in the sum. No tensor has T * Z elements, nor are keys
    repeated for the query heads of a group, of which all rows are queries of one head. (vLLM:
    merge_attn_states.)
    """
    length, num_heads, group, _ = q_TKGC.shape
    past = k_1KZC.shape[2] - length
    q_KTGC = q_TKGC.transpose(0, 1)
    before_1KNC, before_1KN = attend_with_logsumexp(
        q_KTGC.flatten(1, 2)[None], k_1KZC[:, :, :past], v_1KZC[:, :, :past], causal=False
    )
    own_1HTC, own_1HT = attend_with_logsumexp(
        q_KTGC.transpose(1, 2).flatten(0, 1)[None],
        k_1KZC[:, :, past:].repeat_interleave(group, 1),
        v_1KZC[:, :, past:].repeat_interleave(group, 1),
        causal=True,
    )
    before_KTGC = before_1KNC[0].unflatten(1, (length, group)).float()
    own_KTGC = own_1HTC[0].unflatten(0, (num_heads, group)).transpose(1, 2).float()
    logit_KTG = before_1KN[0].unflatten(1, (length, group)) - own_1HT[0].unflatten(
        0, (num_heads, group)
    ).transpose(1, 2)
    out_KTGC = torch.lerp(own_KTGC, before_KTGC, logit_KTG.sigmoid()[..., None])
    return out_KTGC.transpose(0, 1).to(q_TKGC.dtype)


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
    if supports_flash_attention_cpu(q, k, causal=causal):
        return _flash_segment_run(q, k, v, run)
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


def _flash_segment_run(q: Tensor, k: Tensor, v: Tensor, run: SegmentRun) -> Tensor:
    """Stack the segments of one run along a batch axis, for training on a CPU in bfloat16."""
    q_SHTC, k_SHTC, v_SHTC = (
        x.unflatten(0, (run.num_segments, run.length_q)).transpose(1, 2) for x in (q, k, v)
    )
    out_SHTC = flash_attention_cpu(q_SHTC, k_SHTC, v_SHTC)
    return out_SHTC.transpose(1, 2).flatten(0, 1)


def _sdpa_dtype(q_THC: Tensor) -> torch.dtype:
    """Return the dtype that SDPA computes in: that of the inputs, but float32 to train on a CPU.

    The backward of torch's bfloat16 kernel for the CPU is slow (flash_attention_cpu.py).
    """
    is_slow = q_THC.device.type == "cpu" and q_THC.dtype == torch.bfloat16 and q_THC.requires_grad
    return torch.float32 if is_slow else q_THC.dtype
