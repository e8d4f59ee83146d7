"""torch's varlen kernel equals attention computed one segment at a time."""

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


def random_heads(tokens: int, heads: int, channels: int, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator(GPU).manual_seed(seed)
    shape = (tokens, heads, channels)
    return torch.randn(shape, generator=generator, device=GPU).to(dtype)


def skip_without_kernel(q_THC: Tensor, k_TKC: Tensor, *, has_key_gaps: bool = False) -> None:
    if not kernels.supports_varlen(q_THC, k_TKC, has_key_gaps=has_key_gaps):
        pytest.skip("this torch, or this GPU, has no varlen kernel for such tensors")


@pytest.mark.parametrize(("heads", "kv_heads", "channels"), HEADS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [True, False])
def test_varlen_attention_equals_one_segment_at_a_time(
    heads: int, kv_heads: int, channels: int, dtype: torch.dtype, causal: bool
) -> None:
    lengths = [1024, 3, 1, 700, 64, 64, 129]
    meta = AttnMeta.build(lengths).to(GPU)
    q_THC = random_heads(sum(lengths), heads, channels, dtype, 0)
    k_TKC, v_TKC = (random_heads(sum(lengths), kv_heads, channels, dtype, seed) for seed in (1, 2))
    skip_without_kernel(q_THC, k_TKC)
    got_THC = attention(q_THC, k_TKC, v_TKC, meta, causal=causal)
    float32_inputs = (x.float() for x in (q_THC, k_TKC, v_TKC))
    expected_THC = attention_by_segment(*float32_inputs, meta, causal=causal)
    torch.testing.assert_close(got_THC.float(), expected_THC, rtol=2e-2, atol=2e-2)


def test_varlen_gradients_equal_one_segment_at_a_time() -> None:
    lengths = [200, 3, 64]
    meta = AttnMeta.build(lengths).to(GPU)
    inputs = [
        random_heads(sum(lengths), heads, 128, torch.bfloat16, seed).requires_grad_()
        for seed, heads in enumerate((12, 2, 2))
    ]
    skip_without_kernel(inputs[0], inputs[1])
    out_THC = attention(*inputs, meta, causal=True)
    varlen_gradients = torch.autograd.grad(out_THC.float().square().sum(), inputs)
    float32_inputs = [x.detach().float().requires_grad_() for x in inputs]
    out_THC = attention_by_segment(*float32_inputs, meta, causal=True)
    reference_gradients = torch.autograd.grad(out_THC.square().sum(), float32_inputs)
    for got, expected in zip(varlen_gradients, reference_gradients, strict=True):
        error = (got.float() - expected).norm() / expected.norm()
        assert error < 2e-2


@pytest.mark.parametrize(("heads", "kv_heads", "channels"), HEADS[1:])
@pytest.mark.parametrize("num_new", [[1, 1, 1, 1], [1, 5, 1, 130]])
def test_keys_at_arbitrary_offsets_with_gaps(
    heads: int, kv_heads: int, channels: int, num_new: list[int]
) -> None:
    """Unordered start offsets and NaN behind the ends, as in decode and chunked prefill."""
    seq_lens, starts = [900, 5, 1, 131], [1200, 40, 7, 100]
    q_THC = random_heads(sum(num_new), heads, channels, torch.bfloat16, 0)
    k_TKC, v_TKC = (
        torch.full((2500, kv_heads, channels), torch.nan, device=GPU, dtype=torch.bfloat16)
        for _ in range(2)
    )
    skip_without_kernel(q_THC, k_TKC, has_key_gaps=True)
    parts: list[Tensor] = []
    for seed, (q, start, seq_len) in enumerate(
        zip(q_THC.split(num_new), starts, seq_lens, strict=True), start=10
    ):
        keys = slice(start, start + seq_len)
        k_TKC[keys] = random_heads(seq_len, kv_heads, channels, torch.bfloat16, seed)
        v_TKC[keys] = random_heads(seq_len, kv_heads, channels, torch.bfloat16, 50 + seed)
        meta = AttnMeta.build([len(q)], [seq_len]).to(GPU)
        float32_inputs = (x.float() for x in (q, k_TKC[keys], v_TKC[keys]))
        parts.append(attention_by_segment(*float32_inputs, meta, causal=True))
    meta = AttnMeta.build(num_new, seq_lens).to(GPU)
    got_THC = kernels.varlen_attention(
        q_THC,
        k_TKC,
        v_TKC,
        (meta.cu_seqlens_q, torch.tensor([*starts, 0], dtype=torch.int32, device=GPU)),
        (max(num_new), 1024),
        causal=True,
        seqused_k_S=torch.tensor(seq_lens, dtype=torch.int32, device=GPU),
    )
    torch.testing.assert_close(got_THC.float(), torch.cat(parts), rtol=2e-2, atol=2e-2)
