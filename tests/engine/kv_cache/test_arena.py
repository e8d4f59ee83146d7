"""Rows as ranges of one memory: nobody's numbers change, whoever comes, grows, moves or goes."""

from __future__ import annotations

from contextlib import nullcontext
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qwen2vl.engine.kv_cache.arena import Arena, PackedRows, Range
from qwen2vl.errors import CapacityError
from qwen2vl.geometry import AttnMeta
from qwen2vl.model.attention import KVCache, attention
from tests.tiny import tiny_config
from tests.varlen import with_varlen

CONFIG = tiny_config().text
TOKENS = 24


def arena_of(num_tokens: int = TOKENS) -> Arena:
    arena = Arena(CONFIG, num_tokens, torch.float32, torch.device("cpu"))
    arena.k_LKTC.fill_(torch.nan)
    arena.v_LKTC.fill_(torch.nan)
    return arena


def fill(row: KVCache, mark: float) -> None:
    """Make every token of a row full and recognizable."""
    steps_Z1 = torch.arange(row.capacity)[:, None] + 1000 * mark
    row.k_LKZC[:] = steps_Z1
    row.v_LKZC[:] = -steps_Z1
    row.length = row.capacity


def assert_holds(row: KVCache, mark: float, count: int) -> None:
    want_Z1 = torch.arange(count)[:, None] + 1000 * mark
    assert (row.k_LKZC[:, :, :count] == want_Z1).all()
    assert (row.v_LKZC[:, :, :count] == -want_Z1).all()


@settings(max_examples=120)
@given(data=st.data())
def test_rows_keep_what_they_hold(data: st.DataObject) -> None:
    arena, rows, marks = arena_of(), dict[int, Range](), 0
    held: dict[int, int] = {}
    for _ in range(data.draw(st.integers(1, 25))):
        free = TOKENS - sum(row.capacity for row in rows.values())
        kind = data.draw(st.sampled_from(["new", "grow", "free"]))
        if kind == "new" and free:
            marks += 1
            rows[marks] = arena.reserve(None, data.draw(st.integers(1, free)), rows.values())
            assert rows[marks].length == 0
            fill(rows[marks], marks)
            held[marks] = rows[marks].capacity
        elif rows:
            mark = data.draw(st.sampled_from(sorted(rows)))
            if kind == "free":
                del rows[mark], held[mark]
            else:
                old = rows[mark]
                wider = old.capacity + data.draw(st.integers(0, free))
                rows[mark] = arena.reserve(old, wider, rows.values())
                assert (rows[mark].capacity, rows[mark].length) == (wider, old.length)
        for mark, row in rows.items():
            assert_holds(row, mark, held[mark])
        used = [t for row in rows.values() for t in range(row.start, row.start + row.capacity)]
        assert len(set(used)) == len(used) and all(0 <= token < TOKENS for token in used)
    assert not arena.is_torn


def test_a_row_widens_where_it_is_if_nobody_stands_behind_it() -> None:
    arena = arena_of()
    row = arena.reserve(None, 4, [])
    fill(row, 1)
    wider = arena.reserve(row, 9, [row])
    assert wider.start == row.start == 0 and wider.k_LKZC.data_ptr() == row.k_LKZC.data_ptr()
    assert wider.length == 4


def test_a_freed_place_is_used_again() -> None:
    arena = arena_of()
    first = arena.reserve(None, 8, [])
    second = arena.reserve(None, 8, [first])
    third = arena.reserve(None, 8, [first, second])
    assert arena.reserve(None, 6, [first, third]).start == second.start


def test_an_interrupt_while_rows_move_is_known_afterwards() -> None:
    arena = arena_of(12)
    rows = [arena.reserve(None, 4, [])]
    rows.append(arena.reserve(None, 4, rows))
    del rows[0]
    with (
        patch.object(arena, "_move", side_effect=KeyboardInterrupt),
        pytest.raises(KeyboardInterrupt),
    ):
        arena.reserve(None, 8, rows)
    assert arena.is_torn


def test_more_than_the_device_has_is_refused_by_its_numbers() -> None:
    with (
        patch("torch.empty", side_effect=torch.OutOfMemoryError),
        pytest.raises(CapacityError, match=r"4,194,304 tokens take 1\.0 GiB.*lower cache_tokens"),
    ):
        Arena(CONFIG, 4 * 2**20, torch.bfloat16, torch.device("cpu"))


def numbers(tokens: int, heads: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, heads, CONFIG.head_dim, generator=generator)


@settings(max_examples=40)
@given(
    rows=st.lists(st.tuples(st.integers(0, 4), st.integers(1, 3)), min_size=1, max_size=4),
    packs=st.booleans(),
    room=st.integers(0, 1),
)
def test_attention_over_ranges_is_attention_row_by_row(
    rows: list[tuple[int, int]], packs: bool, room: int
) -> None:
    """Each row has a past and new tokens, one each for the plain way; the rest is no number."""
    rows = rows if packs else [(past, 1) for past, _ in rows]
    news, totals = [new for _, new in rows], [past + new for past, new in rows]
    heads, kv_heads = CONFIG.num_attention_heads, CONFIG.num_key_value_heads
    q_THC, k_TKC, v_TKC = (
        numbers(sum(news), count, seed) for seed, count in enumerate((heads, kv_heads, kv_heads))
    )
    meta = AttnMeta.build(news, totals)
    with with_varlen() if packs else nullcontext():
        arena = arena_of(32)
        ranges: list[Range] = []
        oracles = [KVCache.allocate(CONFIG, total, torch.float32, "cpu") for total in totals]
        for index, (past, _) in enumerate(rows):
            ranges.append(arena.reserve(None, totals[index] + room, ranges))
            before = numbers(past, kv_heads, 3 + index), numbers(past, kv_heads, 40 + index)
            for cache in (ranges[index], oracles[index]):
                cache.layer(1).append(*before)
                cache.length = past
        starts = torch.tensor([arena.start(row) for row in ranges])
        slots = [
            torch.arange(row.start + past, row.start + past + new)
            for row, (past, new) in zip(ranges, rows, strict=True)
        ]
        view = arena.rows(meta, starts, torch.tensor(totals), torch.cat(slots))
        assert isinstance(view, PackedRows) is packs
        got_THC = view.layer(1)(q_THC, k_TKC, v_TKC)
    layers = [oracle.layer(1) for oracle in oracles]
    want_THC = attention(q_THC, k_TKC, v_TKC, meta, causal=True, layer_caches=layers)
    torch.testing.assert_close(got_THC, want_THC, rtol=1e-5, atol=2e-6)
    for row, oracle, total in zip(ranges, oracles, totals, strict=True):
        assert torch.equal(row.k_LKZC[1, :, :total], oracle.k_LKZC[1])
        assert torch.equal(row.v_LKZC[1, :, :total], oracle.v_LKZC[1])
