"""Int8 KV cache: what is read is within half a scale of what was written."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qwen2vl.config import PRESETS
from qwen2vl.geometry import AttnMeta
from qwen2vl.model import Int8KVCache, KVCache, SequenceKVCaches
from qwen2vl.model.int8_kv_cache import dequantize_heads, quantize_heads
from tests.tiny import tiny_config

CONFIG = tiny_config().text
SHAPE = (CONFIG.num_key_value_heads, CONFIG.head_dim)
DTYPES = [torch.float32, torch.bfloat16]


def random_kv(tokens: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Draw keys and values whose heads differ in size by orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    sizes = 10 ** torch.empty(2, tokens, SHAPE[0], 1).uniform_(-3, 3, generator=generator)
    return tuple((torch.randn(2, tokens, *SHAPE, generator=generator) * sizes).to(dtype))


def allocate(capacity: int, dtype: torch.dtype = torch.float32) -> Int8KVCache:
    cache = Int8KVCache.allocate(CONFIG, capacity, dtype, "cpu")
    for slots in (cache.k_scale_LKZ, cache.v_scale_LKZ):
        slots.fill_(torch.nan)  # what was not written is not read
    return cache


def write(cache: KVCache, k_TKC: Tensor, v_TKC: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Append to all layers; return all that is stored in each, (K, Z, C)."""
    read = [slots.append(k_TKC, v_TKC) for slots in cache.layers(len(k_TKC))]
    cache.length += len(k_TKC)
    return [(keys[0], values[0]) for keys, values in read]


@given(
    size=st.sampled_from([1e-32, 1e-20, 1e-6, 1.0, 3e4, 1e30]),
    seed=st.integers(0, 2**20),
    dtype=st.sampled_from(DTYPES),
)
def test_numbers_are_within_half_a_scale(size: float, seed: int, dtype: torch.dtype) -> None:
    x_TKC = (random_kv(5, seed)[0].double() * size).clamp(-3e38, 3e38).to(dtype)
    ints_TKC, scale_TK = quantize_heads(x_TKC)
    assert ints_TKC.dtype == torch.int8
    assert ints_TKC.int().abs().max() <= 127  # symmetric: -128 is not used
    assert scale_TK.dtype == torch.float32
    read_TKC = dequantize_heads(ints_TKC, scale_TK, torch.float32).double()
    bound_TK = scale_TK.double() * (0.5 + 1e-4)
    assert ((read_TKC - x_TKC.double()).abs() <= bound_TK[..., None]).all()


def test_the_largest_magnitude_is_127() -> None:
    x_TKC = random_kv(9)[0]
    ints_TKC, scale_TK = quantize_heads(x_TKC)
    assert (ints_TKC.int().abs().amax(-1) == 127).all()
    torch.testing.assert_close(scale_TK * 127, x_TKC.abs().amax(-1))


def test_zeros_are_read_as_zeros_and_nan_as_nan() -> None:
    x_TKC = torch.zeros(2, *SHAPE)
    x_TKC[1, 0, 3] = torch.nan
    read_TKC = dequantize_heads(*quantize_heads(x_TKC), torch.float32)
    assert not read_TKC[0].any()
    assert not read_TKC[1, 1].any()
    assert read_TKC[1, 0].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_forward_reads_all_tokens_in_its_own_dtype(dtype: torch.dtype) -> None:
    cache = allocate(9, dtype)
    kv = random_kv(7, dtype=dtype)
    write(cache, *(x[:4] for x in kv))
    for keys_KZC, values_KZC in write(cache, *(x[4:] for x in kv)):
        for got_KZC, x_TKC in ((keys_KZC, kv[0]), (values_KZC, kv[1])):
            want_TKC = dequantize_heads(*quantize_heads(x_TKC), dtype)
            assert got_KZC.dtype == dtype
            assert torch.equal(got_KZC.transpose(0, 1), want_TKC)


@pytest.mark.parametrize("bounds", [(0, 12), (0, 5, 12), (0, 1, 2, 11, 12), tuple(range(13))])
def test_outputs_do_not_depend_on_chunks(bounds: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(1)
    q_THC = torch.randn(12, CONFIG.num_attention_heads, CONFIG.head_dim, generator=generator)
    k_TKC, v_TKC = random_kv(12)
    cache = allocate(12)
    parts: list[Tensor] = []
    for start, stop in pairwise(bounds):
        meta = AttnMeta.build([stop - start], [stop])
        layer = SequenceKVCaches([cache], meta).layer(1)
        parts.append(layer.attend(q_THC[start:stop], k_TKC[start:stop], v_TKC[start:stop]))
        cache.length = stop
    # The reference: a plain cache of the numbers that are read back.
    plain = KVCache.allocate(CONFIG, 12, torch.float32, "cpu")
    read = [dequantize_heads(*quantize_heads(x), torch.float32) for x in (k_TKC, v_TKC)]
    want = SequenceKVCaches([plain], AttnMeta.build([12])).layer(1).attend(q_THC, *read)
    torch.testing.assert_close(torch.cat(parts), want, rtol=1e-5, atol=1e-4)


def test_a_copy_has_the_scales_and_is_independent() -> None:
    source, copy = allocate(6), allocate(4)
    kv = random_kv(5)
    write(source, *kv)
    copy.copy_from(source, 3)
    assert (copy.length, copy.capacity) == (3, 4)
    new = random_kv(1, seed=1)
    (keys_KZC, values_KZC), _ = write(copy, *new)
    for got_KZC, old_TKC, new_TKC in ((keys_KZC, kv[0], new[0]), (values_KZC, kv[1], new[1])):
        want_TKC = torch.cat([old_TKC[:3], new_TKC])
        want_TKC = dequantize_heads(*quantize_heads(want_TKC), torch.float32)
        assert torch.equal(got_KZC.transpose(0, 1), want_TKC)
    assert torch.equal(source.k_scale_LKZ[0, :, 3], quantize_heads(kv[0])[1][3])


def test_appending_to_a_full_cache_is_an_error() -> None:
    cache = allocate(3)
    cache.length = 2
    with pytest.raises(AssertionError, match="cache holds 3 tokens, got 4"):
        write(cache, *random_kv(2))


@pytest.mark.parametrize("kv_cache", [KVCache, Int8KVCache])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_per_token_are_those_allocated(kv_cache: type[KVCache], dtype: torch.dtype) -> None:
    cache = kv_cache.allocate(CONFIG, 10, dtype, "cpu")
    allocated = sum(slots.nbytes for slots in cache.slots)
    assert allocated == 10 * kv_cache.bytes_per_token(CONFIG, dtype)


def test_bytes_of_the_2b() -> None:
    text = PRESETS["2B"].text
    assert KVCache.bytes_per_token(text, torch.bfloat16) == 28_672
    assert Int8KVCache.bytes_per_token(text, torch.bfloat16) == 2 * 28 * 2 * (128 + 4) == 14_784
