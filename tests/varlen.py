"""What torch documents of `torch.nn.attention.varlen.varlen_attn`, written out for any device.

The kernel itself runs on GPUs alone. With this in its place everything around it runs on the CPU:
which path is taken, and every number that the kernel would be given.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from qwen2vl.model import kernels

__all__ = ["varlen_attn", "with_varlen"]


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
    """Attend segment by segment; causal masks are aligned to the end."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert cu_seq_q.shape == cu_seq_k.shape
    assert query.dtype == key.dtype == value.dtype
    assert enable_gqa or query.shape[1] == key.shape[1]
    starts_k = cu_seq_k[:-1]
    used = cu_seq_k.diff() if seqused_k is None else seqused_k
    assert used.dtype == torch.int32 and used.shape == starts_k.shape
    outs: list[Tensor] = []
    for start_q, stop_q, start_k, count in zip(
        cu_seq_q[:-1].tolist(), cu_seq_q[1:].tolist(), starts_k.tolist(), used.tolist(), strict=True
    ):
        length = stop_q - start_q
        assert 0 < length <= max_q and length <= count <= max_k
        seen = torch.ones(length, count, dtype=torch.bool)
        if window_size == (-1, 0):
            seen = seen.tril(count - length)
        parts = query[start_q:stop_q], key[start_k:][:count], value[start_k:][:count]
        out = F.scaled_dot_product_attention(
            *(part.transpose(0, 1)[None] for part in parts), attn_mask=seen, enable_gqa=enable_gqa
        )
        outs.append(out[0].transpose(0, 1))
    return torch.cat(outs)


@contextmanager
def with_varlen() -> Iterator[None]:
    """Let every attention that may be packed be packed, by the function above."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "packs", lambda *_, **__: True)
        patch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
        yield
