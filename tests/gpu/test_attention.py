"""The packed kernel itself against one segment at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qwen2vl.geometry import AttnMeta
from qwen2vl.model import kernels
from qwen2vl.model.attention import attention, attention_by_segment
from tests.gpu.device import GPU, needs_gpu

pytestmark = needs_gpu

# Heads, key heads and channels of the official vision tower, of the 2B and of the 7B.
HEADS = [(16, 16, 80), (12, 2, 128), (28, 4, 128)]
DTYPES = [torch.bfloat16, torch.float16]


def draw(tokens: int, heads: int, channels: int, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator(GPU).manual_seed(seed)
    shape = (tokens, heads, channels)
    return torch.randn(shape, generator=generator, device=GPU).to(dtype)


def skip_without_kernel(q_THC: Tensor, k_TKC: Tensor, *, has_gaps: bool = False) -> None:
    if not kernels.packs(q_THC, k_TKC, has_gaps=has_gaps):
        pytest.skip("this torch, or this GPU, has no packed kernel for such tensors")


@pytest.mark.parametrize(("heads", "kv_heads", "channels"), HEADS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [True, False])
def test_packed_is_one_segment_at_a_time(
    heads: int, kv_heads: int, channels: int, dtype: torch.dtype, causal: bool
) -> None:
    lengths = [1024, 3, 1, 700, 64, 64, 129]
    meta = AttnMeta.build(lengths).to(GPU)
    q_THC = draw(sum(lengths), heads, channels, dtype, 0)
    k_TKC, v_TKC = (draw(sum(lengths), kv_heads, channels, dtype, seed) for seed in (1, 2))
    skip_without_kernel(q_THC, k_TKC)
    got_THC = attention(q_THC, k_TKC, v_TKC, meta, causal=causal)
    wide = (x.float() for x in (q_THC, k_TKC, v_TKC))
    want_THC = attention_by_segment(*wide, meta, causal=causal)
    torch.testing.assert_close(got_THC.float(), want_THC, rtol=2e-2, atol=2e-2)


def test_gradients_are_those_of_one_segment_at_a_time() -> None:
    lengths = [200, 3, 64]
    meta = AttnMeta.build(lengths).to(GPU)
    inputs = [
        draw(sum(lengths), heads, 128, torch.bfloat16, seed).requires_grad_()
        for seed, heads in enumerate((12, 2, 2))
    ]
    skip_without_kernel(inputs[0], inputs[1])
    out_THC = attention(*inputs, meta, causal=True)
    fast = torch.autograd.grad(out_THC.float().square().sum(), inputs)
    wide = [x.detach().float().requires_grad_() for x in inputs]
    out_THC = attention_by_segment(*wide, meta, causal=True)
    slow = torch.autograd.grad(out_THC.square().sum(), wide)
    for got, want in zip(fast, slow, strict=True):
        error = (got.float() - want).norm() / want.norm()
        assert error < 2e-2


@pytest.mark.parametrize(("heads", "kv_heads", "channels"), HEADS[1:])
@pytest.mark.parametrize("news", [[1, 1, 1, 1], [1, 5, 1, 130]])
def test_keys_may_lie_anywhere_with_gaps_between(
    heads: int, kv_heads: int, channels: int, news: list[int]
) -> None:
    """Starts in no order, and no number behind the ends: what decode and chunks are given."""
    totals, starts = [900, 5, 1, 131], [1200, 40, 7, 100]
    q_THC = draw(sum(news), heads, channels, torch.bfloat16, 0)
    k_TKC, v_TKC = (
        torch.full((2500, kv_heads, channels), torch.nan, device=GPU, dtype=torch.bfloat16)
        for _ in range(2)
    )
    skip_without_kernel(q_THC, k_TKC, has_gaps=True)
    parts: list[Tensor] = []
    for seed, (q, start, total) in enumerate(
        zip(q_THC.split(news), starts, totals, strict=True), start=10
    ):
        here = slice(start, start + total)
        k_TKC[here] = draw(total, kv_heads, channels, torch.bfloat16, seed)
        v_TKC[here] = draw(total, kv_heads, channels, torch.bfloat16, 50 + seed)
        meta = AttnMeta.build([len(q)], [total]).to(GPU)
        wide = (x.float() for x in (q, k_TKC[here], v_TKC[here]))
        parts.append(attention_by_segment(*wide, meta, causal=True))
    meta = AttnMeta.build(news, totals).to(GPU)
    got_THC = kernels.attend_packed(
        q_THC,
        k_TKC,
        v_TKC,
        (meta.cu_seqlens_q, torch.tensor([*starts, 0], dtype=torch.int32, device=GPU)),
        (max(news), 1024),
        causal=True,
        used_S=torch.tensor(totals, dtype=torch.int32, device=GPU),
    )
    torch.testing.assert_close(got_THC.float(), torch.cat(parts), rtol=2e-2, atol=2e-2)
