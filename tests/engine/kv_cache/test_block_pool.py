"""Blocks are conserved, keys tell pictures apart, and a beginning found again is the same one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from qwen2vl.engine.kv_cache.block_pool import BLOCK, BlockPool, Copy, Free, KeyChain, Reserve, Row
from qwen2vl.geometry import Grid
from qwen2vl.processor.inputs import Item, ModelInput

PAD = 5


def prompt(*parts: int | tuple[Grid, bytes]) -> ModelInput:
    """Tokens, and pictures as (grid, digest)."""
    ids: list[int] = []
    items: list[Item] = []
    pads: list[int] = []
    for part in parts:
        if isinstance(part, int):
            ids.append(part)
            continue
        grid, digest = part
        item = Item(
            kind="image",
            patches_NP=torch.empty(0, 1176, dtype=torch.uint8),
            grid=grid,
            digest=digest,
            name="x",
            size_given=(1, 1),
            size_seen=(1, 1),
        )
        items.append(item)
        pads += range(len(ids), len(ids) + item.num_tokens)
        ids += [PAD] * item.num_tokens
    return ModelInput(
        input_ids=ids,
        items=tuple(items),
        position_ids_3T=torch.arange(len(ids)).expand(3, -1),
        rope_delta=0,
        pad_index_M=torch.tensor(pads, dtype=torch.int64),
    )


def keys(*parts: int | tuple[Grid, bytes]) -> list[bytes]:
    given = prompt(*parts)
    return KeyChain(given).extend(given.input_ids)


def test_only_full_blocks_have_keys_and_each_holds_all_before_it() -> None:
    short, long = keys(*range(2 * BLOCK - 1)), keys(*range(3 * BLOCK))
    assert (len(short), len(long)) == (1, 3)
    assert short[0] == long[0]
    other = keys(7, *range(1, 3 * BLOCK))
    assert not set(other) & set(long)


def test_keys_come_as_tokens_come() -> None:
    given = prompt(*range(BLOCK))
    chain = KeyChain(given)
    chain.extend(given.input_ids)
    ids = [*given.input_ids, *range(100, 100 + BLOCK)]
    assert chain.extend(ids) == keys(*ids)


def test_pictures_of_one_size_are_told_apart_by_their_pixels() -> None:
    grid = Grid(1, 4 * 4, 2 * 4)  # 32 tokens
    one, other = (
        keys(1, (grid, b"a" * 32), *range(BLOCK)),
        keys(1, (grid, b"b" * 32), *range(BLOCK)),
    )
    assert not set(one) & set(other)
    before = keys(*range(BLOCK), (grid, b"a" * 32))
    assert before[0] == keys(*range(BLOCK), (grid, b"b" * 32))[0]  # it ends before the picture


def test_a_block_inside_a_picture_says_where_in_it() -> None:
    """Two pictures whose borders fall differently, while every block holds pads alone."""
    small, large = (Grid(1, 8, 8), b"a" * 32), (Grid(1, 16, 8), b"b" * 32)  # 16 and 32 tokens
    one = keys(*([1] * 16), small, large, *([2] * 16))
    two = keys(*([1] * 16), (Grid(1, 8, 8), b"b" * 32), (Grid(1, 16, 8), b"a" * 32), *([2] * 16))
    assert not set(one) & set(two)


def filled(pool: BlockPool, parts: list[bytes]) -> Row:
    claimed = pool.claim(parts, len(parts))
    assert claimed is not None
    row, _ = claimed
    pool.record(row, parts)
    return row


def test_a_row_at_rest_is_taken_over_by_what_continues_it() -> None:
    pool, parts = BlockPool(10), keys(*range(4 * BLOCK))
    row = filled(pool, parts[:3])
    pool.release(row)
    pool.orders.clear()
    claimed = pool.claim(parts, 5)
    assert claimed == (row, 3)
    assert list(pool.orders) == [Reserve(row.number, 5 * BLOCK)]  # nothing is copied


def test_what_only_begins_alike_copies_the_beginning() -> None:
    pool, parts = BlockPool(10), keys(*range(4 * BLOCK))
    row = filled(pool, parts)
    pool.release(row)
    pool.orders.clear()
    claimed = pool.claim(parts[:2], 3)
    assert claimed is not None
    branch, held = claimed
    assert held == 2 and branch is not row
    assert list(pool.orders) == [
        Reserve(branch.number, 3 * BLOCK),
        Copy(row.number, branch.number, 2 * BLOCK),
    ]
    assert pool.match(parts) == 4  # the first one is still there


def test_without_room_the_source_itself_is_cut() -> None:
    pool, parts = BlockPool(4), keys(*range(4 * BLOCK))
    row = filled(pool, parts)
    pool.release(row)
    assert pool.claim(parts[:2], 4) == (row, 2)
    assert pool.match(parts) == 2


def test_a_beginning_in_use_is_copied_too() -> None:
    pool, parts = BlockPool(10), keys(*range(3 * BLOCK))
    row = filled(pool, parts)
    claimed = pool.claim(parts, 4)
    assert claimed is not None and claimed[1] == 3 and claimed[0] is not row


def test_a_copy_is_made_from_the_oldest_row_that_holds_it() -> None:
    """A younger one may hold no more than a copy that memory has yet to be found for."""
    pool, parts = BlockPool(12), keys(*range(4 * BLOCK))
    oldest = filled(pool, parts)
    for _ in range(2):
        pool.orders.clear()
        claimed = pool.claim(parts[:2], 3)
        assert claimed is not None and claimed[1] == 2
        assert pool.orders[1] == Copy(oldest.number, claimed[0].number, 2 * BLOCK)


def test_of_rows_at_rest_that_end_alike_the_newest_is_taken_and_the_other_copied() -> None:
    pool, parts = BlockPool(10), keys(*range(2 * BLOCK))
    older, newer = filled(pool, parts), filled(pool, parts)
    pool.release(older)
    pool.release(newer)
    assert pool.claim(parts, 3) == (newer, 2)
    pool.orders.clear()
    claimed = pool.claim(parts, 3)
    assert claimed is not None and claimed[1] == 2
    assert pool.orders[1] == Copy(older.number, claimed[0].number, 2 * BLOCK)


def test_the_longest_at_rest_goes_first() -> None:
    pool = BlockPool(4)
    old, new = (filled(pool, keys(i, *range(1, 2 * BLOCK))) for i in (100, 200))
    old_keys, new_keys = list(old.keys), list(new.keys)
    pool.release(old)
    pool.release(new)
    pool.orders.clear()
    assert pool.claim([], 2) is not None
    assert pool.orders[0] == Free(old.number)
    assert pool.match(old_keys) == 0
    assert pool.match(new_keys) == 2


def test_no_room_is_none_and_changes_nothing() -> None:
    pool = BlockPool(4)
    row = filled(pool, keys(*range(3 * BLOCK)))
    pool.orders.clear()
    assert pool.claim([], 2) is None
    assert not pool.grow(row, 5)
    assert (pool.num_free, pool.num_busy, list(pool.orders)) == (1, 3, [])


class Pool(RuleBasedStateMachine):
    """Claim, fill, grow, release in any order, beside a memory that carries the orders out."""

    CAPACITY = 12

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(self.CAPACITY)
        self.memory: dict[int, list[bytes]] = {}  # row -> what its blocks really hold
        self.room: dict[int, int] = {}
        self.busy: dict[int, tuple[Row, list[bytes]]] = {}

    def carry_out(self) -> None:
        for order in self.pool.orders:
            match order:
                case Reserve(number, tokens):
                    assert self.room.get(number, 0) < tokens // BLOCK
                    self.memory.setdefault(number, [])
                    self.room[number] = tokens // BLOCK
                case Copy(source, target, tokens):
                    assert len(self.memory[source]) >= tokens // BLOCK
                    self.memory[target] = self.memory[source][: tokens // BLOCK]
                case Free(number):
                    del self.memory[number], self.room[number]
        self.pool.orders.clear()

    @rule(ids=st.lists(st.integers(0, 1), min_size=1, max_size=5), more=st.integers(0, 3))
    def claim(self, ids: list[int], more: int) -> None:
        chain = keys(*(i for i in ids for _ in range(BLOCK)))
        claimed = self.pool.claim(chain, len(chain) + more)
        self.carry_out()
        if claimed is None:
            return
        row, held = claimed
        assert self.memory[row.number][:held] == chain[:held]
        self.memory[row.number] = list(chain)  # the rest is computed
        self.pool.record(row, chain)
        self.busy[row.number] = (row, chain)

    @precondition(lambda self: self.busy)
    @rule(data=st.data(), more=st.integers(1, 3))
    def grow(self, data: st.DataObject, more: int) -> None:
        row, _ = data.draw(st.sampled_from(list(self.busy.values())))
        before = row.num_blocks
        grown = self.pool.grow(row, before + more)
        self.carry_out()
        assert row.num_blocks == before + (more if grown else 0)

    @precondition(lambda self: self.busy)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        row, _ = self.busy.pop(data.draw(st.sampled_from(list(self.busy))))
        self.pool.release(row)
        self.carry_out()

    @invariant()
    def blocks_are_conserved(self) -> None:
        assert sum(self.room.values()) + self.pool.num_free == self.CAPACITY
        assert self.pool.num_free >= 0
        assert self.pool.num_busy == sum(row.num_blocks for row, _ in self.busy.values())

    @invariant()
    def rows_in_use_hold_what_they_computed(self) -> None:
        for number, (row, chain) in self.busy.items():
            assert self.memory[number] == chain == row.keys


Pool.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestPool = Pool.TestCase


def test_giving_up_what_rests_frees_everything() -> None:
    pool = BlockPool(6)
    row = filled(pool, keys(*range(3 * BLOCK)))
    pool.release(row)
    pool.clear()
    assert pool.num_free == 6
    assert pool.orders[-1] == Free(row.number)


def test_an_empty_row_does_not_rest() -> None:
    pool = BlockPool(6)
    claimed = pool.claim([], 2)
    assert claimed is not None
    pool.release(claimed[0])
    assert pool.num_free == 6


def test_only_rows_in_use_grow() -> None:
    pool = BlockPool(6)
    row = filled(pool, keys(*range(BLOCK)))
    pool.release(row)
    with pytest.raises(AssertionError, match="in use"):
        pool.grow(row, 2)
