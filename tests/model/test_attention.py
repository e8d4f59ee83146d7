"""The fast attention against its slow oracle, and against softmax written out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from qwen2vl.config import TextConfig
from qwen2vl.geometry import AttnMeta
from qwen2vl.model.attention import KVCache, attention, attention_by_segment

# 12/2 and 28/4 are the official heads; 3/1, 5/5 and 7/7 are no power of two.
HEADS = [(12, 2), (28, 4), (3, 1), (5, 5), (7, 7), (1, 1)]


def draw(tokens: int, heads: int, channels: int = 8, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, heads, channels, generator=generator)


def qkv(tokens_q: int, tokens_k: int, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    return draw(tokens_q, heads), draw(tokens_k, kv_heads, seed=1), draw(tokens_k, kv_heads, seed=2)


def written_out(q_THC: Tensor, k_TKC: Tensor, v_TKC: Tensor, *, causal: bool) -> Tensor:
    """Softmax attention of one segment, one query and head at a time; the end is aligned."""
    out_THC = torch.empty_like(q_THC)
    group = q_THC.shape[1] // k_TKC.shape[1]
    ahead = len(k_TKC) - len(q_THC)
    for token in range(len(q_THC)):
        seen = token + ahead + 1 if causal else len(k_TKC)
        for head in range(q_THC.shape[1]):
            keys, values = k_TKC[:seen, head // group], v_TKC[:seen, head // group]
            scores = keys @ q_THC[token, head] * q_THC.shape[2] ** -0.5
            out_THC[token, head] = scores.softmax(0) @ values
    return out_THC


def assert_close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("length_q", "length_k"), [(6, 6), (2, 7), (1, 5), (1, 1)])
def test_one_segment_is_softmax_attention(
    length_q: int, length_k: int, causal: bool, heads: int, kv_heads: int
) -> None:
    q_THC, k_TKC, v_TKC = qkv(length_q, length_k, heads, kv_heads)
    meta = AttnMeta.build([length_q], [length_k])
    want = written_out(q_THC, k_TKC, v_TKC, causal=causal)
    assert_close(attention(q_THC, k_TKC, v_TKC, meta, causal=causal), want)
    assert_close(attention_by_segment(q_THC, k_TKC, v_TKC, meta, causal=causal), want)


@settings(max_examples=40)
@given(
    segments=st.lists(st.tuples(st.integers(1, 4), st.integers(0, 4)), min_size=1, max_size=8),
    heads=st.sampled_from(HEADS),
    causal=st.booleans(),
)
def test_runs_equal_one_segment_at_a_time(
    segments: list[tuple[int, int]], heads: tuple[int, int], causal: bool
) -> None:
    lengths_q = [q for q, _ in segments]
    lengths_k = [q + cached for q, cached in segments]
    meta = AttnMeta.build(lengths_q, lengths_k)
    q_THC, k_TKC, v_TKC = qkv(sum(lengths_q), sum(lengths_k), *heads)
    got = attention(q_THC, k_TKC, v_TKC, meta, causal=causal)
    assert_close(got, attention_by_segment(q_THC, k_TKC, v_TKC, meta, causal=causal))


def test_a_segment_sees_nothing_of_its_neighbors() -> None:
    q_THC, k_TKC, v_TKC = qkv(9, 9, 4, 2)
    meta = AttnMeta.build([4, 2, 3])
    before = attention(q_THC, k_TKC, v_TKC, meta, causal=False)
    v_TKC[4:6] += 100.0
    after = attention(q_THC, k_TKC, v_TKC, meta, causal=False)
    changed = (before != after).any(dim=2).any(dim=1)
    assert changed.tolist() == [False] * 4 + [True] * 2 + [False] * 3


def cache_of(capacity: int) -> KVCache:
    config = TextConfig(
        hidden_size=48,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        vocab_size=8,
        mrope_section=(1, 1, 2),
    )
    return KVCache.allocate(config, capacity, torch.float32, "cpu")


@settings(max_examples=25)
@given(chunks=st.lists(st.integers(1, 5), min_size=1, max_size=6))
def test_a_chunked_prefill_equals_the_whole(chunks: list[int]) -> None:
    total = sum(chunks)
    q_THC, k_TKC, v_TKC = qkv(total, total, 6, 2)
    want = attention(q_THC, k_TKC, v_TKC, AttnMeta.build([total]), causal=True)
    cache = cache_of(total)
    parts: list[Tensor] = []
    for chunk in chunks:
        here = slice(cache.length, cache.length + chunk)
        meta = AttnMeta.build([chunk], [here.stop])
        qkv_here = q_THC[here], k_TKC[here], v_TKC[here]
        parts.append(attention(*qkv_here, meta, causal=True, layer_caches=[cache.layer(1)]))
        cache.length = here.stop
    assert_close(torch.cat(parts), want)


def test_a_mask_is_drawn_once_for_all_layers_and_is_what_truth_values_are() -> None:
    q_THC, k_TKC, v_TKC = qkv(7, 7, 6, 2)
    meta = AttnMeta.build([3], [7]).to("cpu")
    cache = cache_of(7)
    drawn: list[Tensor] = []
    for layer in (0, 1):
        layer_cache = cache.layer(layer)
        layer_cache.append(k_TKC[:4], v_TKC[:4])
        layer_cache.length = 4
        parts = q_THC[4:], k_TKC[4:], v_TKC[4:]
        got = attention(*parts, meta, causal=True, layer_caches=[layer_cache])
        drawn += meta.masks.values()
        seen = torch.ones(3, 7, dtype=torch.bool).tril(4)
        want = F.scaled_dot_product_attention(
            *(x.transpose(0, 1)[None] for x in (q_THC[4:], k_TKC, v_TKC)),
            attn_mask=seen,
            enable_gqa=True,
        )
        assert torch.equal(got, want[0].transpose(0, 1))
    assert len(drawn) == 2 and drawn[0] is drawn[1]
    assert not AttnMeta.build([3], [7]).masks and not meta.to("cpu").masks


@given(
    before=st.lists(st.integers(0, 6), min_size=1, max_size=4),
    data=st.data(),
)
def test_sequences_with_caches_in_one_call_equal_each_alone(
    before: list[int], data: st.DataObject
) -> None:
    """New tokens of several sequences, each with a past of its own, prefill and decode mixed."""
    new = [data.draw(st.integers(1, 4)) for _ in before]
    caches = [cache_of(p + n) for p, n in zip(before, new, strict=True)]
    wholes = [qkv(p + n, p + n, 6, 2) for p, n in zip(before, new, strict=True)]
    for past, cache, (_, k_TKC, v_TKC) in zip(before, caches, wholes, strict=True):
        cache.layer(1).append(k_TKC[:past], v_TKC[:past])
        cache.length = past
    packed = [
        torch.cat([whole[part][past:] for past, whole in zip(before, wholes, strict=True)])
        for part in range(3)
    ]
    meta = AttnMeta.build(new, [p + n for p, n in zip(before, new, strict=True)])
    layer_caches = [cache.layer(1) for cache in caches]
    got_THC = attention(*packed, meta, causal=True, layer_caches=layer_caches)
    alone = [
        attention(*whole, AttnMeta.build([len(whole[0])]), causal=True)[past:]
        for past, whole in zip(before, wholes, strict=True)
    ]
    assert_close(got_THC, torch.cat(alone))


def test_a_copied_cache_goes_its_own_way() -> None:
    source, copy = cache_of(4), cache_of(3)
    k_TKC = torch.arange(64.0).view(4, 2, 8)
    source.layer(0).append(k_TKC, -k_TKC)
    source.length = 4
    copy.copy_from(source, 2)
    assert (copy.length, copy.capacity) == (2, 3)
    keys, values = copy.layer(0).append(k_TKC[:1] + 100, k_TKC[:1])
    assert torch.equal(keys.transpose(0, 1), torch.cat([k_TKC[:2], k_TKC[:1] + 100]))
    assert torch.equal(values.transpose(0, 1), torch.cat([-k_TKC[:2], k_TKC[:1]]))
    assert torch.equal(source.k_LKZC[0, :, 2].flatten(), k_TKC[2].flatten())


def test_layers_of_a_cache_do_not_share_rows() -> None:
    cache = cache_of(3)
    for layer in range(2):
        k_TKC = torch.full((2, 2, 8), float(layer + 1))
        seen_k, seen_v = cache.layer(layer).append(k_TKC, -k_TKC)
        assert torch.equal(seen_k, k_TKC.transpose(0, 1))
        assert torch.equal(seen_v, -k_TKC.transpose(0, 1))
    assert cache.length == 0  # the forward advances it, once for all layers
    assert cache.k_LKZC[0, :, :2].unique().tolist() == [1.0]
    assert cache.k_LKZC[1, :, :2].unique().tolist() == [2.0]


def test_a_full_cache_refuses_more() -> None:
    cache = cache_of(3)
    cache.length = 2
    rows = torch.zeros(2, 2, 8)
    with pytest.raises(AssertionError, match="cache holds 3 tokens, got 4"):
        cache.layer(0).append(rows, rows)


def test_gradients_flow_as_one_segment_at_a_time() -> None:
    meta = AttnMeta.build([3, 3, 2])
    q_THC, k_TKC, v_TKC = inputs = qkv(8, 8, 6, 2)
    for x in inputs:
        x.requires_grad_()
    out = attention(q_THC, k_TKC, v_TKC, meta, causal=True)
    fast = torch.autograd.grad(out.square().sum(), inputs)
    out = attention_by_segment(q_THC, k_TKC, v_TKC, meta, causal=True)
    slow = torch.autograd.grad(out.square().sum(), inputs)
    for got, want in zip(fast, slow, strict=True):
        assert_close(got, want)
