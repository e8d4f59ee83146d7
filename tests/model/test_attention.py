"""Attention equals its reference implementation, and naive softmax attention."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from qwen2vl.config import TextConfig
from qwen2vl.geometry import AttnMeta
from qwen2vl.model import KVCache, SequenceKVCaches
from qwen2vl.model import attention as attention_module
from qwen2vl.model.attention import (
    attention,
    attention_by_segment,
    chunked_prefill_attention,
)

# 12/2 and 28/4 are those of the official models; 3/1, 5/5 and 7/7 are no powers of two.
HEADS = [(12, 2), (28, 4), (3, 1), (5, 5), (7, 7), (1, 1)]


def random_heads(tokens: int, heads: int, channels: int = 8, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, heads, channels, generator=generator)


def qkv(tokens_q: int, tokens_k: int, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    return (
        random_heads(tokens_q, heads),
        random_heads(tokens_k, kv_heads, seed=1),
        random_heads(tokens_k, kv_heads, seed=2),
    )


def naive_attention(q_THC: Tensor, k_TKC: Tensor, v_TKC: Tensor, *, causal: bool) -> Tensor:
    """Softmax attention of one segment, one query and head at a time; aligned bottom right."""
    out_THC = torch.empty_like(q_THC)
    group = q_THC.shape[1] // k_TKC.shape[1]
    num_cached = len(k_TKC) - len(q_THC)
    for token in range(len(q_THC)):
        num_visible = token + num_cached + 1 if causal else len(k_TKC)
        for head in range(q_THC.shape[1]):
            keys, values = k_TKC[:num_visible, head // group], v_TKC[:num_visible, head // group]
            scores = keys @ q_THC[token, head] * q_THC.shape[2] ** -0.5
            out_THC[token, head] = scores.softmax(0) @ values
    return out_THC


def assert_close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("length_q", "length_k"), [(6, 6), (2, 7), (1, 5), (1, 1)])
def test_one_segment_is_softmax_attention(
    length_q: int, length_k: int, causal: bool, heads: int, kv_heads: int
) -> None:
    q_THC, k_TKC, v_TKC = qkv(length_q, length_k, heads, kv_heads)
    meta = AttnMeta.build([length_q], [length_k])
    expected = naive_attention(q_THC, k_TKC, v_TKC, causal=causal)
    assert_close(attention(q_THC, k_TKC, v_TKC, meta, causal=causal), expected)
    assert_close(attention_by_segment(q_THC, k_TKC, v_TKC, meta, causal=causal), expected)


@settings(max_examples=40)
@given(
    segments=st.lists(st.tuples(st.integers(1, 4), st.integers(0, 4)), min_size=1, max_size=8),
    heads=st.sampled_from(HEADS),
    causal=st.booleans(),
)
def test_segment_runs_equal_one_segment_at_a_time(
    segments: list[tuple[int, int]], heads: tuple[int, int], causal: bool
) -> None:
    lengths_q = [q for q, _ in segments]
    lengths_k = [q + cached for q, cached in segments]
    meta = AttnMeta.build(lengths_q, lengths_k)
    q_THC, k_TKC, v_TKC = qkv(sum(lengths_q), sum(lengths_k), *heads)
    got = attention(q_THC, k_TKC, v_TKC, meta, causal=causal)
    assert_close(got, attention_by_segment(q_THC, k_TKC, v_TKC, meta, causal=causal))


def test_segments_do_not_attend_to_each_other() -> None:
    q_THC, k_TKC, v_TKC = qkv(9, 9, 4, 2)
    meta = AttnMeta.build([4, 2, 3])
    before = attention(q_THC, k_TKC, v_TKC, meta, causal=False)
    v_TKC[4:6] += 100.0
    after = attention(q_THC, k_TKC, v_TKC, meta, causal=False)
    changed = (before != after).any(dim=2).any(dim=1)
    assert changed.tolist() == [False] * 4 + [True] * 2 + [False] * 3


def make_cache(capacity: int) -> KVCache:
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


def append(cache: KVCache, layer: int, k_TKC: Tensor, v_TKC: Tensor) -> tuple[Tensor, Tensor]:
    """Write new keys and values of one layer; return all of it up to them, (K, Z, C)."""
    keys, values = list(cache.layers(len(k_TKC)))[layer].append(k_TKC, v_TKC)
    return keys[0], values[0]


@settings(max_examples=25)
@given(chunks=st.lists(st.integers(1, 5), min_size=1, max_size=6))
def test_chunked_prefill_equals_prefill_at_once(chunks: list[int]) -> None:
    total = sum(chunks)
    q_THC, k_TKC, v_TKC = qkv(total, total, 6, 2)
    expected = attention(q_THC, k_TKC, v_TKC, AttnMeta.build([total]), causal=True)
    cache = make_cache(total)
    parts: list[Tensor] = []
    for chunk in chunks:
        chunk_slice = slice(cache.length, cache.length + chunk)
        meta = AttnMeta.build([chunk], [chunk_slice.stop])
        chunk_qkv = q_THC[chunk_slice], k_TKC[chunk_slice], v_TKC[chunk_slice]
        parts.append(SequenceKVCaches([cache], meta).layer(1).attend(*chunk_qkv))
        cache.length = chunk_slice.stop
    assert_close(torch.cat(parts), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("length", "num_keys", "heads", "group", "channels"),
    [(2, 3, 1, 1, 16), (5, 9, 2, 6, 128), (33, 200, 2, 2, 80), (64, 65, 1, 3, 32)],
)
def test_two_parts_equal_the_masked_attention(
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    length: int,
    num_keys: int,
    heads: int,
    group: int,
    channels: int,
) -> None:
    torch.manual_seed(0)
    q_TKGC = torch.randn(length, heads, group, channels, dtype=dtype)
    k_1KZC, v_1KZC = torch.randn(2, 1, heads, num_keys, channels, dtype=dtype).unbind()
    meta = AttnMeta.build([length], [num_keys])
    with torch.inference_mode():
        want_TKGC = chunked_prefill_attention(q_TKGC, k_1KZC, v_1KZC, meta)
        assert meta.masks
        meta.masks.clear()
        monkeypatch.setattr(attention_module, "MAX_MASK_NUMEL", 0)
        got_TKGC = chunked_prefill_attention(q_TKGC, k_1KZC, v_1KZC, meta)
    assert not meta.masks
    tolerance = 2e-6 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(got_TKGC, want_TKGC, rtol=tolerance, atol=tolerance)


def test_the_additive_mask_is_built_once_and_equals_a_boolean_mask() -> None:
    q_THC, k_TKC, v_TKC = qkv(7, 7, 6, 2)
    meta = AttnMeta.build([3], [7]).to("cpu")
    cache = make_cache(7)
    masks: list[Tensor] = []
    for layer in (0, 1):
        cache.length = 0
        append(cache, layer, k_TKC[:4], v_TKC[:4])
        cache.length = 4
        parts = q_THC[4:], k_TKC[4:], v_TKC[4:]
        got = SequenceKVCaches([cache], meta).layer(layer).attend(*parts)
        masks += meta.masks.values()
        is_visible = torch.ones(3, 7, dtype=torch.bool).tril(4)
        expected = F.scaled_dot_product_attention(
            *(x.transpose(0, 1)[None] for x in (q_THC[4:], k_TKC, v_TKC)),
            attn_mask=is_visible,
            enable_gqa=True,
        )
        assert torch.equal(got, expected[0].transpose(0, 1))
    assert len(masks) == 2 and masks[0] is masks[1]
    assert not AttnMeta.build([3], [7]).masks and not meta.to("cpu").masks


@given(
    num_cached=st.lists(st.integers(0, 6), min_size=1, max_size=4),
    data=st.data(),
)
def test_batched_sequences_with_caches_equal_single_sequences(
    num_cached: list[int], data: st.DataObject
) -> None:
    """New tokens of several sequences with cached tokens, prefill and decode mixed."""
    num_new = [data.draw(st.integers(1, 4)) for _ in num_cached]
    caches = [make_cache(cached + new) for cached, new in zip(num_cached, num_new, strict=True)]
    sequences = [
        qkv(cached + new, cached + new, 6, 2)
        for cached, new in zip(num_cached, num_new, strict=True)
    ]
    for cached, cache, (_, k_TKC, v_TKC) in zip(num_cached, caches, sequences, strict=True):
        append(cache, 1, k_TKC[:cached], v_TKC[:cached])
        cache.length = cached
    new_qkv = [
        torch.cat(
            [
                sequence[part][cached:]
                for cached, sequence in zip(num_cached, sequences, strict=True)
            ]
        )
        for part in range(3)
    ]
    meta = AttnMeta.build(
        num_new,
        [cached + new for cached, new in zip(num_cached, num_new, strict=True)],
    )
    got_THC = SequenceKVCaches(caches, meta).layer(1).attend(*new_qkv)
    expected_parts = [
        attention(*sequence, AttnMeta.build([len(sequence[0])]), causal=True)[cached:]
        for cached, sequence in zip(num_cached, sequences, strict=True)
    ]
    assert_close(got_THC, torch.cat(expected_parts))


def test_a_copied_cache_is_independent() -> None:
    source, copy = make_cache(4), make_cache(3)
    k_TKC = torch.arange(64.0).view(4, 2, 8)
    append(source, 0, k_TKC, -k_TKC)
    source.length = 4
    copy.copy_from(source, 2)
    assert (copy.length, copy.capacity) == (2, 3)
    keys, values = append(copy, 0, k_TKC[:1] + 100, k_TKC[:1])
    assert torch.equal(keys.transpose(0, 1), torch.cat([k_TKC[:2], k_TKC[:1] + 100]))
    assert torch.equal(values.transpose(0, 1), torch.cat([-k_TKC[:2], k_TKC[:1]]))
    assert torch.equal(source.k_LKZC[0, :, 2].flatten(), k_TKC[2].flatten())


def test_layers_of_a_cache_do_not_share_slots() -> None:
    cache = make_cache(3)
    for layer in range(2):
        k_TKC = torch.full((2, 2, 8), float(layer + 1))
        keys, values = append(cache, layer, k_TKC, -k_TKC)
        assert torch.equal(keys, k_TKC.transpose(0, 1))
        assert torch.equal(values, -k_TKC.transpose(0, 1))
    assert cache.length == 0  # the forward advances it, once for all layers
    assert cache.k_LKZC[0, :, :2].unique().tolist() == [1.0]
    assert cache.k_LKZC[1, :, :2].unique().tolist() == [2.0]


def test_appending_to_a_full_cache_is_an_error() -> None:
    cache = make_cache(3)
    cache.length = 2
    new_kv = torch.zeros(2, 2, 8)
    with pytest.raises(AssertionError, match="cache holds 3 tokens, got 4"):
        append(cache, 0, new_kv, new_kv)


def test_gradients_equal_one_segment_at_a_time() -> None:
    meta = AttnMeta.build([3, 3, 2])
    q_THC, k_TKC, v_TKC = inputs = qkv(8, 8, 6, 2)
    for x in inputs:
        x.requires_grad_()
    out = attention(q_THC, k_TKC, v_TKC, meta, causal=True)
    gradients = torch.autograd.grad(out.square().sum(), inputs)
    out = attention_by_segment(q_THC, k_TKC, v_TKC, meta, causal=True)
    reference_gradients = torch.autograd.grad(out.square().sum(), inputs)
    for got, expected in zip(gradients, reference_gradients, strict=True):
        assert_close(got, expected)
