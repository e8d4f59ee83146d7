"""Reference of `torch.nn.attention.varlen.varlen_attn` in plain PyTorch, for any device.

The kernel itself runs on GPUs only. With this in its place, the code around it can be tested on the
CPU: which path is taken, and all arguments of the kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from qwen2vl.model import kernels

__all__ = ["force_varlen", "varlen_attn"]


def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: Tensor | None = None,
) -> Tensor:
    """Compute attention segment by segment; causal masks are aligned bottom right."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert cu_seq_q.shape == cu_seq_k.shape
    assert query.dtype == key.dtype == value.dtype
    assert enable_gqa or query.shape[1] == key.shape[1]
    starts_k = cu_seq_k[:-1]
    num_keys = cu_seq_k.diff() if seqused_k is None else seqused_k
    assert num_keys.dtype == torch.int32 and num_keys.shape == starts_k.shape
    outs: list[Tensor] = []
    for start_q, stop_q, start_k, count in zip(
        cu_seq_q[:-1].tolist(),
        cu_seq_q[1:].tolist(),
        starts_k.tolist(),
        num_keys.tolist(),
        strict=True,
    ):
        length = stop_q - start_q
        assert 0 < length <= max_q and length <= count <= max_k
        mask = torch.ones(length, count, dtype=torch.bool)
        if window_size == (-1, 0):
            mask = mask.tril(count - length)
        parts = query[start_q:stop_q], key[start_k:][:count], value[start_k:][:count]
        out = F.scaled_dot_product_attention(
            *(part.transpose(0, 1)[None] for part in parts), attn_mask=mask, enable_gqa=enable_gqa
        )
        outs.append(out[0].transpose(0, 1))
    return torch.cat(outs)


@contextmanager
def force_varlen() -> Iterator[None]:
    """Use varlen attention wherever possible, computed by the function above."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "supports_varlen", lambda *_, **__: True)
        patch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
        yield
