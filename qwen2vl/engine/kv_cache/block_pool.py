"""KV cache block pool with prefix caching: allocation and eviction of blocks, without tensors.

A block is BLOCK_SIZE tokens of keys and values. A request owns one allocation of contiguous blocks,
since the CPU attention kernel needs contiguous keys. When the request finishes, its allocation
stays cached until it is evicted (LRU), and is found by its chained block hashes:

    hash 0 = H(ids of block 0, items)    hash 1 = H(hash 0, ids of block 1, items)    ...

Images of one size have the same placeholder ids, so a hash also covers the digests of the frame
pairs in the block; a longer video shares the blocks of its beginning. Hash 0 covers the adapter's
digest and the cache salt. A request that extends a whole cached allocation reuses it in place; one
that shares a prefix copies it. The model runner executes the queue of cache operations.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import count

from qwen2vl.processor.inputs import ModelInput

__all__ = [
    "BLOCK_SIZE",
    "BlockHashes",
    "BlockPool",
    "CacheAllocation",
    "CacheOperation",
    "CopySlots",
    "FreeSlots",
    "ReserveSlots",
    "salted_digest",
]

BLOCK_SIZE = 32  # tokens


def salted_digest(data: bytes, cache_salt: bytes) -> bytes:
    """Return a digest of `data` that differs for each salt; b"" without data and salt."""
    if not cache_salt:
        return blake2b(data, digest_size=32).digest() if data else b""
    key = blake2b(cache_salt, digest_size=32).digest()  # a salt may be longer than a key
    return blake2b(data, digest_size=32, key=key).digest()


class BlockHashes:
    """Chained hashes of the full blocks of one request, extended as its tokens arrive."""

    def __init__(self, prompt: ModelInput, adapter_digest: bytes = b"") -> None:
        """Start without hashes; different adapters and cache salts never share a block."""
        self.hashes: list[bytes] = []
        self._root = salted_digest(adapter_digest, prompt.cache_salt)
        self._prompt = prompt

    def extend(self, ids: Sequence[int]) -> list[bytes]:
        """Hash all blocks that `ids`, the whole sequence, fill; return the hashes of all blocks.

        They end at the first block with a frame pair that is not decoded yet.
        """
        while (len(self.hashes) + 1) * BLOCK_SIZE <= len(ids):
            start = len(self.hashes) * BLOCK_SIZE
            block_hash = self._hash_block(start, ids[start : start + BLOCK_SIZE])
            if block_hash is None:
                break
            self.hashes.append(block_hash)
        return self.hashes

    def _hash_block(self, start: int, ids: Sequence[int]) -> bytes | None:
        hasher = blake2b(self.hashes[-1] if self.hashes else self._root, digest_size=32)
        hasher.update(array("q", ids).tobytes())
        for first, item, index in self._prompt.pairs_between(start, start + BLOCK_SIZE):
            digest = item.pair_digest(index)
            if digest is None:
                return None
            hasher.update(digest + (start - first).to_bytes(8, "little", signed=True))
        return hasher.digest()


@dataclass(slots=True, eq=False)
class CacheAllocation:
    """Contiguous blocks that hold the keys and values of a prefix of one request."""

    id: int
    num_blocks: int  # capacity
    block_hashes: list[bytes] = field(default_factory=list)  # of the full blocks


@dataclass(frozen=True, slots=True)
class ReserveSlots:
    """Allocate slots for `num_tokens`, or grow an existing allocation and keep its content."""

    allocation_id: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class CopySlots:
    """Copy the first `num_tokens` of one allocation, from `start` on, into another; given by id."""

    source: int
    target: int
    num_tokens: int
    start: int = 0  # the target holds the same tokens before


@dataclass(frozen=True, slots=True)
class FreeSlots:
    """Free the slots of an allocation."""

    allocation_id: int


CacheOperation = ReserveSlots | CopySlots | FreeSlots


class BlockPool:
    """A fixed number of blocks; cached allocations are evicted for new ones, LRU first."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        # To be executed in this order by the model runner, which removes those it has executed.
        self.cache_operations: deque[CacheOperation] = deque()
        self.num_free_blocks = num_blocks  # neither used nor cached
        self.num_used_blocks = 0  # of running requests
        # Thousands of allocations are cached after some hours: no method iterates over all of them.
        self._ids = count()
        self._in_use: dict[int, CacheAllocation] = {}
        self._evictable: dict[int, CacheAllocation] = {}  # least recently used first
        # Hash of the last full block -> the newest evictable allocation that ends with it.
        self._evictable_by_last_hash: dict[bytes, CacheAllocation] = {}
        # Block hash -> allocations that hold the block, by id, oldest first.
        self._allocations_by_hash: dict[bytes, dict[int, CacheAllocation]] = {}

    @property
    def num_evictable_blocks(self) -> int:
        """Blocks of cached allocations that no running request uses."""
        return self.num_blocks - self.num_free_blocks - self.num_used_blocks

    def match_prefix(self, block_hashes: Sequence[bytes]) -> int:
        """Return the number of leading blocks that are cached (prefix cache hit)."""
        num_cached = 0
        while (
            num_cached < len(block_hashes) and block_hashes[num_cached] in self._allocations_by_hash
        ):
            num_cached += 1
        return num_cached

    def allocate(
        self, block_hashes: Sequence[bytes], num_blocks: int
    ) -> tuple[CacheAllocation, int] | None:
        """Allocate `num_blocks`, with as many of the blocks `block_hashes` filled as are cached.

        Returns:
            The allocation and its number of cached blocks; None if too few blocks can be freed.
        """
        num_cached = self.match_prefix(block_hashes)
        if num_cached and block_hashes[num_cached - 1] in self._evictable_by_last_hash:
            return self._reuse(
                self._evictable_by_last_hash[block_hashes[num_cached - 1]],
                num_cached,
                num_blocks,
            )
        # The oldest holder: a younger one may itself be waiting for its copy operation.
        source = (
            next(iter(self._allocations_by_hash[block_hashes[num_cached - 1]].values()))
            if num_cached
            else None
        )
        if self._evict_for(num_blocks, keep=source):
            return self._allocate_new(block_hashes[:num_cached], source, num_blocks), num_cached
        if source is not None and source.id in self._evictable:
            return self._reuse(source, num_cached, num_blocks)  # truncates it
        return None

    def copy_cached_blocks(
        self, allocation: CacheAllocation, block_hashes: Sequence[bytes], num_filled: int
    ) -> int:
        """Fill the blocks after the first `num_filled` of an allocation in use, as far as cached.

        For a request whose block hashes have become known after its admission.

        Returns:
            The number of filled blocks.
        """
        num_cached = min(self.match_prefix(block_hashes), allocation.num_blocks)
        if num_cached <= num_filled:
            return num_filled
        holders = self._allocations_by_hash[block_hashes[num_cached - 1]]
        source = next(iter(holders.values()))
        start, stop = num_filled * BLOCK_SIZE, num_cached * BLOCK_SIZE
        self.cache_operations.append(CopySlots(source.id, allocation.id, stop, start))
        self.cache_full_blocks(allocation, block_hashes[:num_cached])
        return num_cached

    def grow(self, allocation: CacheAllocation, num_blocks: int) -> bool:
        """Grow an allocation in use to `num_blocks`; False, without changes, if impossible."""
        assert allocation.id in self._in_use, "only an allocation in use can grow"
        num_new = num_blocks - allocation.num_blocks
        if num_new <= 0:
            return True
        if not self._evict_for(num_new):
            return False
        allocation.num_blocks = num_blocks
        self._mark_used(num_new)
        self.cache_operations.append(ReserveSlots(allocation.id, num_blocks * BLOCK_SIZE))
        return True

    def cache_full_blocks(self, allocation: CacheAllocation, block_hashes: Sequence[bytes]) -> None:
        """Record the hashes of an allocation's full blocks, so that other requests find them.

        `block_hashes` are those of all its full blocks, from the first.
        """
        assert len(block_hashes) <= allocation.num_blocks, "more hashes than blocks"
        for block_hash in block_hashes[len(allocation.block_hashes) :]:
            allocation.block_hashes.append(block_hash)
            self._allocations_by_hash.setdefault(block_hash, {})[allocation.id] = allocation

    def release(self, allocation: CacheAllocation) -> None:
        """Return an allocation to the pool: it stays cached and becomes evictable."""
        del self._in_use[allocation.id]
        self.num_used_blocks -= allocation.num_blocks
        if allocation.block_hashes:
            self._evictable[allocation.id] = allocation
            self._evictable_by_last_hash[allocation.block_hashes[-1]] = allocation
        else:
            self._free(allocation)

    def discard(self, allocation: CacheAllocation) -> None:
        """Free an allocation in use without caching its content."""
        del self._in_use[allocation.id]
        self.num_used_blocks -= allocation.num_blocks
        self._free(allocation)

    def evict_holders(self, block_hashes: Sequence[bytes]) -> None:
        """Evict the cached allocations, not in use, that hold any of these blocks."""
        for block_hash in block_hashes:
            for allocation in list(self._allocations_by_hash.get(block_hash, {}).values()):
                if allocation.id in self._evictable:
                    self._evict(allocation)

    def reset_prefix_cache(self) -> None:
        """Evict every cached allocation that is not in use."""
        for allocation in list(self._evictable.values()):
            self._evict(allocation)

    def _reuse(
        self, allocation: CacheAllocation, num_cached: int, num_blocks: int
    ) -> tuple[CacheAllocation, int] | None:
        """Put a cached allocation in use again, truncated to its first `num_cached` blocks."""
        self._remove_from_evictable(allocation)
        self._in_use[allocation.id] = allocation
        self.num_used_blocks += allocation.num_blocks
        if not self.grow(allocation, num_blocks):
            self.release(allocation)
            return None
        self._uncache_blocks(allocation, num_cached)
        return allocation, num_cached

    def _allocate_new(
        self, block_hashes: Sequence[bytes], source: CacheAllocation | None, num_blocks: int
    ) -> CacheAllocation:
        """Create an allocation; its first blocks are copied from `source`, if given."""
        allocation = CacheAllocation(next(self._ids), num_blocks)
        self._in_use[allocation.id] = allocation
        self._mark_used(num_blocks)
        self.cache_operations.append(ReserveSlots(allocation.id, num_blocks * BLOCK_SIZE))
        if source is not None:
            self.cache_operations.append(
                CopySlots(source.id, allocation.id, len(block_hashes) * BLOCK_SIZE)
            )
            self.cache_full_blocks(allocation, block_hashes)
        return allocation

    def _evict_for(self, num_blocks: int, keep: CacheAllocation | None = None) -> bool:
        """Evict cached allocations but `keep`, LRU first, until `num_blocks` are free.

        Returns False, and evicts nothing, if that is impossible.
        """
        num_available = self.num_blocks - self.num_used_blocks
        if keep is not None and keep.id in self._evictable:
            num_available -= keep.num_blocks
        if num_available < num_blocks:
            return False
        while self.num_free_blocks < num_blocks:
            self._evict(next(cached for cached in self._evictable.values() if cached is not keep))
        return True

    def _mark_used(self, num_blocks: int) -> None:
        """Move blocks from the free to the used count."""
        self.num_free_blocks -= num_blocks
        self.num_used_blocks += num_blocks

    def _remove_from_evictable(self, allocation: CacheAllocation) -> None:
        """Remove an allocation from the evictable ones."""
        del self._evictable[allocation.id]
        if self._evictable_by_last_hash.get(allocation.block_hashes[-1]) is allocation:
            del self._evictable_by_last_hash[allocation.block_hashes[-1]]

    def _evict(self, allocation: CacheAllocation) -> None:
        self._remove_from_evictable(allocation)
        self._free(allocation)

    def _free(self, allocation: CacheAllocation) -> None:
        self._uncache_blocks(allocation, 0)
        self.num_free_blocks += allocation.num_blocks
        self.cache_operations.append(FreeSlots(allocation.id))

    def _uncache_blocks(self, allocation: CacheAllocation, num_cached: int) -> None:
        """Remove the hashes of all blocks but the first `num_cached` from the prefix cache."""
        for block_hash in allocation.block_hashes[num_cached:]:
            holders = self._allocations_by_hash[block_hash]
            del holders[allocation.id]
            if not holders:
                del self._allocations_by_hash[block_hash]
        del allocation.block_hashes[num_cached:]
