"""KV cache arena: ranges keep their content while others are allocated, grown, moved and freed."""

from __future__ import annotations

from contextlib import nullcontext
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qwen2vl.engine.kv_cache.arena import KVArena, SlotRange, VarlenBatchKVCache
from qwen2vl.errors import CapacityError
from qwen2vl.geometry import AttnMeta
from qwen2vl.model import KVCache, SequenceKVCaches
from tests.tiny import tiny_config
from tests.varlen import force_varlen

CONFIG = tiny_config().text
TOKENS = 24


def make_arena(num_tokens: int = TOKENS) -> KVArena:
    arena = KVArena(CONFIG, num_tokens, torch.float32, torch.device("cpu"))
    arena.k_LKTC.fill_(torch.nan)
    arena.v_LKTC.fill_(torch.nan)
    return arena


def fill(slot_range: KVCache, mark: float) -> None:
    """Fill all slots of a range with recognizable values."""
    values_Z1 = torch.arange(slot_range.capacity)[:, None] + 1000 * mark
    slot_range.k_LKZC[:] = values_Z1
    slot_range.v_LKZC[:] = -values_Z1
    slot_range.length = slot_range.capacity


def assert_content(slot_range: KVCache, mark: float, count: int) -> None:
    expected_Z1 = torch.arange(count)[:, None] + 1000 * mark
    assert (slot_range.k_LKZC[:, :, :count] == expected_Z1).all()
    assert (slot_range.v_LKZC[:, :, :count] == -expected_Z1).all()


@settings(max_examples=120)
@given(data=st.data())
def test_ranges_keep_their_content(data: st.DataObject) -> None:
    arena, allocated, last_mark = make_arena(), dict[int, SlotRange](), 0
    lengths: dict[int, int] = {}
    for _ in range(data.draw(st.integers(1, 25))):
        free = TOKENS - sum(slot_range.capacity for slot_range in allocated.values())
        kind = data.draw(st.sampled_from(["new", "grow", "free"]))
        if kind == "new" and free:
            last_mark += 1
            allocated[last_mark] = arena.reserve(
                None, data.draw(st.integers(1, free)), allocated.values()
            )
            assert allocated[last_mark].length == 0
            fill(allocated[last_mark], last_mark)
            lengths[last_mark] = allocated[last_mark].capacity
        elif allocated:
            mark = data.draw(st.sampled_from(sorted(allocated)))
            if kind == "free":
                del allocated[mark], lengths[mark]
            else:
                old = allocated[mark]
                grown = old.capacity + data.draw(st.integers(0, free))
                allocated[mark] = arena.reserve(old, grown, allocated.values())
                assert (allocated[mark].capacity, allocated[mark].length) == (grown, old.length)
        for mark, slot_range in allocated.items():
            assert_content(slot_range, mark, lengths[mark])
        used = [
            t
            for slot_range in allocated.values()
            for t in range(slot_range.start, slot_range.start + slot_range.capacity)
        ]
        assert len(set(used)) == len(used) and all(0 <= token < TOKENS for token in used)


def test_a_range_grows_in_place_if_the_slots_behind_it_are_free() -> None:
    arena = make_arena()
    slot_range = arena.reserve(None, 4, [])
    fill(slot_range, 1)
    grown = arena.reserve(slot_range, 9, [slot_range])
    assert (
        grown.start == slot_range.start == 0
        and grown.k_LKZC.data_ptr() == slot_range.k_LKZC.data_ptr()
    )
    assert grown.length == 4


def test_freed_slots_are_reused() -> None:
    arena = make_arena()
    first = arena.reserve(None, 8, [])
    second = arena.reserve(None, 8, [first])
    third = arena.reserve(None, 8, [first, second])
    assert arena.reserve(None, 6, [first, third]).start == second.start


def test_out_of_device_memory_is_a_capacity_error_with_the_size() -> None:
    with (
        patch("torch.empty", side_effect=torch.OutOfMemoryError),
        pytest.raises(
            CapacityError, match=r"4,194,304 tokens take 1\.0 GiB.*lower kv_cache_tokens"
        ),
    ):
        KVArena(CONFIG, 4 * 2**20, torch.bfloat16, torch.device("cpu"))


def random_heads(tokens: int, heads: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, heads, CONFIG.head_dim, generator=generator)


@settings(max_examples=40)
@given(
    allocated=st.lists(st.tuples(st.integers(0, 4), st.integers(1, 3)), min_size=1, max_size=4),
    supports_varlen=st.booleans(),
    num_spare=st.integers(0, 1),
)
def test_batch_cache_equals_per_sequence_caches(
    allocated: list[tuple[int, int]], supports_varlen: bool, num_spare: int
) -> None:
    """Cached and new tokens per sequence, one new token each without varlen; free slots are NaN."""
    allocated = allocated if supports_varlen else [(num_cached, 1) for num_cached, _ in allocated]
    num_new, seq_lens = (
        [num_new_tokens for _, num_new_tokens in allocated],
        [num_cached + num_new_tokens for num_cached, num_new_tokens in allocated],
    )
    heads, kv_heads = CONFIG.num_attention_heads, CONFIG.num_key_value_heads
    q_THC, k_TKC, v_TKC = (
        random_heads(sum(num_new), count, seed)
        for seed, count in enumerate((heads, kv_heads, kv_heads))
    )
    meta = AttnMeta.build(num_new, seq_lens)
    with force_varlen() if supports_varlen else nullcontext():
        arena = make_arena(32)
        ranges: list[SlotRange] = []
        references = [
            KVCache.allocate(CONFIG, seq_len, torch.float32, "cpu") for seq_len in seq_lens
        ]
        for index, (num_cached, _) in enumerate(allocated):
            ranges.append(arena.reserve(None, seq_lens[index] + num_spare, ranges))
            cached_kv = (
                random_heads(num_cached, kv_heads, 3 + index),
                random_heads(num_cached, kv_heads, 40 + index),
            )
            for cache in (ranges[index], references[index]):
                list(cache.layers(num_cached))[1].append(*cached_kv)
                cache.length = num_cached
        starts = torch.tensor([arena.first_slot(slot_range) for slot_range in ranges])
        slots = [
            torch.arange(
                slot_range.start + num_cached, slot_range.start + num_cached + num_new_tokens
            )
            for slot_range, (num_cached, num_new_tokens) in zip(ranges, allocated, strict=True)
        ]
        caches = arena.batch_of_slots(
            meta, starts, torch.tensor(seq_lens), torch.cat(slots), ranges
        )
        assert isinstance(caches, VarlenBatchKVCache) is supports_varlen
        got_THC = caches.layer(1).attend(q_THC, k_TKC, v_TKC)
        caches.advance(num_new)
    expected_THC = SequenceKVCaches(references, meta).layer(1).attend(q_THC, k_TKC, v_TKC)
    assert [slot_range.length for slot_range in ranges] == seq_lens
    torch.testing.assert_close(got_THC, expected_THC, rtol=1e-5, atol=2e-6)
    for slot_range, reference, seq_len in zip(ranges, references, seq_lens, strict=True):
        assert torch.equal(slot_range.k_LKZC[1, :, :seq_len], reference.k_LKZC[1])
        assert torch.equal(slot_range.v_LKZC[1, :, :seq_len], reference.v_LKZC[1])
