"""Block pool: blocks are conserved, block hashes cover images, and cached prefixes are correct."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from qwen2vl.engine.kv_cache.block_pool import (
    BLOCK_SIZE,
    BlockHashes,
    BlockPool,
    CacheAllocation,
    CopySlots,
    FreeSlots,
    ReserveSlots,
)
from qwen2vl.geometry import Grid
from qwen2vl.processor.inputs import Item, ModelInput

PLACEHOLDER = 5


def prompt(*hashes: int | tuple[Grid, bytes]) -> ModelInput:
    """Build a ModelInput of token ids, and images given as (grid, digest)."""
    ids: list[int] = []
    items: list[Item] = []
    placeholders: list[int] = []
    for part in hashes:
        if isinstance(part, int):
            ids.append(part)
            continue
        grid, digest = part
        item = Item(
            kind="image",
            patches_NP=torch.empty(0, 1176, dtype=torch.uint8),
            grid=grid,
            pair_digests=(digest, *(digest + bytes([i]) for i in range(1, grid.t))),
            name="x",
            original_size=(1, 1),
            resized_size=(1, 1),
        )
        items.append(item)
        placeholders += range(len(ids), len(ids) + item.num_tokens)
        ids += [PLACEHOLDER] * item.num_tokens
    return ModelInput(
        input_ids=ids,
        items=tuple(items),
        position_ids_3T=torch.arange(len(ids)).expand(3, -1),
        rope_delta=0,
        placeholder_index_M=torch.tensor(placeholders, dtype=torch.int64),
    )


def hashes_of(*hashes: int | tuple[Grid, bytes]) -> list[bytes]:
    model_input = prompt(*hashes)
    return BlockHashes(model_input).extend(model_input.input_ids)


def test_only_full_blocks_are_hashed_and_a_hash_covers_all_preceding_blocks() -> None:
    short, long = hashes_of(*range(2 * BLOCK_SIZE - 1)), hashes_of(*range(3 * BLOCK_SIZE))
    assert (len(short), len(long)) == (1, 3)
    assert short[0] == long[0]
    others = hashes_of(7, *range(1, 3 * BLOCK_SIZE))
    assert not set(others) & set(long)


def test_hashes_are_extended_incrementally() -> None:
    model_input = prompt(*range(BLOCK_SIZE))
    block_hashes = BlockHashes(model_input)
    block_hashes.extend(model_input.input_ids)
    ids = [*model_input.input_ids, *range(100, 100 + BLOCK_SIZE)]
    assert block_hashes.extend(ids) == hashes_of(*ids)


def test_hashes_distinguish_images_of_one_size_by_digest() -> None:
    grid = Grid(1, 4 * 4, 2 * 4)  # 32 tokens
    one, others = (
        hashes_of(1, (grid, b"a" * 32), *range(BLOCK_SIZE)),
        hashes_of(1, (grid, b"b" * 32), *range(BLOCK_SIZE)),
    )
    assert not set(one) & set(others)
    before = hashes_of(*range(BLOCK_SIZE), (grid, b"a" * 32))
    # The first block ends before the image.
    assert before[0] == hashes_of(*range(BLOCK_SIZE), (grid, b"b" * 32))[0]


def test_hashes_cover_the_offset_of_a_block_within_an_image() -> None:
    """Two images with different borders, while every block holds placeholders only."""
    small, large = (Grid(1, 8, 8), b"a" * 32), (Grid(1, 16, 8), b"b" * 32)  # 16 and 32 tokens
    one = hashes_of(*([1] * 16), small, large, *([2] * 16))
    two = hashes_of(
        *([1] * 16), (Grid(1, 8, 8), b"b" * 32), (Grid(1, 16, 8), b"a" * 32), *([2] * 16)
    )
    assert not set(one) & set(two)


def test_a_longer_video_shares_the_blocks_of_its_beginning() -> None:
    pair = Grid(1, 8, 12)  # 24 tokens
    short, long = (hashes_of(1, 2, (pair._replace(t=t), b"v" * 32)) for t in (5, 9))
    assert short == long[: len(short)]
    assert len(short) == (2 + 5 * 24) // BLOCK_SIZE
    other = hashes_of(1, 2, (pair._replace(t=9), b"w" * 32))
    assert not set(other) & set(long)


def allocate_and_fill(pool: BlockPool, hashes: list[bytes]) -> CacheAllocation:
    result = pool.allocate(hashes, len(hashes))
    assert result is not None
    allocation, _ = result
    pool.cache_full_blocks(allocation, hashes)
    return allocation


def test_a_cached_allocation_is_reused_by_a_request_that_extends_it() -> None:
    pool, hashes = BlockPool(10), hashes_of(*range(4 * BLOCK_SIZE))
    allocation = allocate_and_fill(pool, hashes[:3])
    pool.release(allocation)
    pool.cache_operations.clear()
    result = pool.allocate(hashes, 5)
    assert result == (allocation, 3)
    # Nothing is copied.
    assert list(pool.cache_operations) == [ReserveSlots(allocation.id, 5 * BLOCK_SIZE)]


def test_a_shared_prefix_is_copied() -> None:
    pool, hashes = BlockPool(10), hashes_of(*range(4 * BLOCK_SIZE))
    allocation = allocate_and_fill(pool, hashes)
    pool.release(allocation)
    pool.cache_operations.clear()
    result = pool.allocate(hashes[:2], 3)
    assert result is not None
    copy, num_cached = result
    assert num_cached == 2 and copy is not allocation
    assert list(pool.cache_operations) == [
        ReserveSlots(copy.id, 3 * BLOCK_SIZE),
        CopySlots(allocation.id, copy.id, 2 * BLOCK_SIZE),
    ]
    assert pool.match_prefix(hashes) == 4  # the first one is still there


def test_without_free_blocks_the_source_itself_is_truncated() -> None:
    pool, hashes = BlockPool(4), hashes_of(*range(4 * BLOCK_SIZE))
    allocation = allocate_and_fill(pool, hashes)
    pool.release(allocation)
    assert pool.allocate(hashes[:2], 4) == (allocation, 2)
    assert pool.match_prefix(hashes) == 2


def test_a_prefix_in_use_is_copied() -> None:
    pool, hashes = BlockPool(10), hashes_of(*range(3 * BLOCK_SIZE))
    allocation = allocate_and_fill(pool, hashes)
    result = pool.allocate(hashes, 4)
    assert result is not None and result[1] == 3 and result[0] is not allocation


def test_a_prefix_is_copied_from_the_oldest_allocation() -> None:
    """A younger one may itself be waiting for its copy operation."""
    pool, hashes = BlockPool(12), hashes_of(*range(4 * BLOCK_SIZE))
    oldest = allocate_and_fill(pool, hashes)
    for _ in range(2):
        pool.cache_operations.clear()
        result = pool.allocate(hashes[:2], 3)
        assert result is not None and result[1] == 2
        assert pool.cache_operations[1] == CopySlots(oldest.id, result[0].id, 2 * BLOCK_SIZE)


def test_of_equal_cached_allocations_the_newest_is_reused_and_the_older_copied() -> None:
    pool, hashes = BlockPool(10), hashes_of(*range(2 * BLOCK_SIZE))
    older, newer = allocate_and_fill(pool, hashes), allocate_and_fill(pool, hashes)
    pool.release(older)
    pool.release(newer)
    assert pool.allocate(hashes, 3) == (newer, 2)
    pool.cache_operations.clear()
    result = pool.allocate(hashes, 3)
    assert result is not None and result[1] == 2
    assert pool.cache_operations[1] == CopySlots(older.id, result[0].id, 2 * BLOCK_SIZE)


def test_eviction_is_lru() -> None:
    pool = BlockPool(4)
    old, new = (
        allocate_and_fill(pool, hashes_of(i, *range(1, 2 * BLOCK_SIZE))) for i in (100, 200)
    )
    old_hashes, new_hashes = list(old.block_hashes), list(new.block_hashes)
    pool.release(old)
    pool.release(new)
    pool.cache_operations.clear()
    assert pool.allocate([], 2) is not None
    assert pool.cache_operations[0] == FreeSlots(old.id)
    assert pool.match_prefix(old_hashes) == 0
    assert pool.match_prefix(new_hashes) == 2


def test_a_failed_allocation_changes_nothing() -> None:
    pool = BlockPool(4)
    allocation = allocate_and_fill(pool, hashes_of(*range(3 * BLOCK_SIZE)))
    pool.cache_operations.clear()
    assert pool.allocate([], 2) is None
    assert not pool.grow(allocation, 5)
    assert (pool.num_free_blocks, pool.num_used_blocks, list(pool.cache_operations)) == (1, 3, [])


class BlockPoolMachine(RuleBasedStateMachine):
    """Allocate, fill, grow, release in any order, executing the operations on a dict."""

    CAPACITY = 12

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(self.CAPACITY)
        self.memory: dict[int, list[bytes]] = {}  # allocation id -> actual content of its blocks
        self.capacity: dict[int, int] = {}
        self.in_use: dict[int, tuple[CacheAllocation, list[bytes]]] = {}

    def execute_operations(self) -> None:
        for operation in self.pool.cache_operations:
            match operation:
                case ReserveSlots(allocation_id, tokens):
                    assert self.capacity.get(allocation_id, 0) < tokens // BLOCK_SIZE
                    self.memory.setdefault(allocation_id, [])
                    self.capacity[allocation_id] = tokens // BLOCK_SIZE
                case CopySlots(source, target, tokens):
                    assert len(self.memory[source]) >= tokens // BLOCK_SIZE
                    self.memory[target] = self.memory[source][: tokens // BLOCK_SIZE]
                case FreeSlots(allocation_id):
                    del self.memory[allocation_id], self.capacity[allocation_id]
        self.pool.cache_operations.clear()

    @rule(ids=st.lists(st.integers(0, 1), min_size=1, max_size=5), more=st.integers(0, 3))
    def allocate(self, ids: list[int], more: int) -> None:
        block_hashes = hashes_of(*(i for i in ids for _ in range(BLOCK_SIZE)))
        result = self.pool.allocate(block_hashes, len(block_hashes) + more)
        self.execute_operations()
        if result is None:
            return
        allocation, num_cached = result
        assert self.memory[allocation.id][:num_cached] == block_hashes[:num_cached]
        self.memory[allocation.id] = list(block_hashes)  # the rest is computed
        self.pool.cache_full_blocks(allocation, block_hashes)
        self.in_use[allocation.id] = (allocation, block_hashes)

    @precondition(lambda self: self.in_use)
    @rule(data=st.data(), more=st.integers(1, 3))
    def grow(self, data: st.DataObject, more: int) -> None:
        allocation, _ = data.draw(st.sampled_from(list(self.in_use.values())))
        before = allocation.num_blocks
        grown = self.pool.grow(allocation, before + more)
        self.execute_operations()
        assert allocation.num_blocks == before + (more if grown else 0)

    @precondition(lambda self: self.in_use)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        allocation, _ = self.in_use.pop(data.draw(st.sampled_from(list(self.in_use))))
        self.pool.release(allocation)
        self.execute_operations()

    @invariant()
    def blocks_are_conserved(self) -> None:
        assert sum(self.capacity.values()) + self.pool.num_free_blocks == self.CAPACITY
        assert self.pool.num_free_blocks >= 0
        assert self.pool.num_used_blocks == sum(
            allocation.num_blocks for allocation, _ in self.in_use.values()
        )

    @invariant()
    def allocations_in_use_keep_their_content(self) -> None:
        for allocation_id, (allocation, block_hashes) in self.in_use.items():
            assert self.memory[allocation_id] == block_hashes == allocation.block_hashes


BlockPoolMachine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None
)
TestBlockPoolMachine = BlockPoolMachine.TestCase


def test_reset_prefix_cache_frees_all_evictable_blocks() -> None:
    pool = BlockPool(6)
    allocation = allocate_and_fill(pool, hashes_of(*range(3 * BLOCK_SIZE)))
    pool.release(allocation)
    pool.reset_prefix_cache()
    assert pool.num_free_blocks == 6
    assert pool.cache_operations[-1] == FreeSlots(allocation.id)


def test_an_allocation_without_full_blocks_is_not_cached() -> None:
    pool = BlockPool(6)
    result = pool.allocate([], 2)
    assert result is not None
    pool.release(result[0])
    assert pool.num_free_blocks == 6


def test_only_allocations_in_use_can_grow() -> None:
    pool = BlockPool(6)
    allocation = allocate_and_fill(pool, hashes_of(*range(BLOCK_SIZE)))
    pool.release(allocation)
    with pytest.raises(AssertionError, match="in use"):
        pool.grow(allocation, 2)


def test_holders_of_a_block_are_evicted_unless_in_use() -> None:
    pool = BlockPool(16)
    hashes = [bytes([number]) * 32 for number in range(4)]
    for block_hashes in (hashes[:2], [hashes[0], hashes[3]], [hashes[2]], hashes[:1]):
        allocated = pool.allocate([], 2)
        assert allocated is not None
        pool.cache_full_blocks(allocated[0], block_hashes)
        if block_hashes != hashes[:1]:  # the last one stays in use
            pool.release(allocated[0])
    pool.evict_holders(hashes[:2])
    assert [pool.match_prefix([one]) for one in hashes] == [1, 0, 1, 0]
    assert (pool.num_used_blocks, pool.num_evictable_blocks) == (2, 2)
