"""In-memory embedding cache: LRU eviction, pins, statistics, and the disk cache below it."""

from __future__ import annotations

from collections import Counter, OrderedDict
from pathlib import Path

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from torch import Tensor

from qwen2vl.engine.encoder_cache.disk_cache import DiskEmbeddingCache, EmbeddingKey
from qwen2vl.engine.encoder_cache.memory_cache import EmbeddingCache


def key(name: str, weights: str = "w") -> EmbeddingKey:
    return EmbeddingKey(name.encode().ljust(32), weights.encode().ljust(32))


def embeddings(num: int = 1, value: float = 0.0) -> Tensor:
    """Return `num` embeddings of 32 bytes."""
    return torch.full((num, 8), float(value))


def disk_cache(folder: Path) -> DiskEmbeddingCache:
    return DiskEmbeddingCache(folder, max_bytes=10**8)


def test_stored_embeddings_are_returned() -> None:
    cache = EmbeddingCache()
    assert cache.get(key("a")) is None
    cache.put(key("a"), embeddings(3, 7.0))
    found = cache.get(key("a"))
    assert found is not None
    assert torch.equal(found, embeddings(3, 7.0))
    stats = cache.stats
    assert (stats.num_memory_hits, stats.num_disk_hits, stats.num_misses) == (1, 0, 1)
    assert stats.num_bytes == 96


def test_other_weights_are_another_key() -> None:
    cache = EmbeddingCache()
    cache.put(key("a", "before training"), embeddings())
    assert cache.get(key("a", "after")) is None


def test_eviction_is_lru() -> None:
    cache = EmbeddingCache(max_bytes=96)
    for name in "abc":
        cache.put(key(name), embeddings())
    cache.get(key("a"))
    cache.put(key("d"), embeddings())
    assert [name for name in "abcd" if cache.get(key(name)) is not None] == ["a", "c", "d"]
    assert cache.stats.num_evictions == 1
    assert cache.stats.num_bytes == 96


def test_pins_are_counted_and_may_precede_the_embeddings() -> None:
    cache = EmbeddingCache(max_bytes=32)
    cache.pin(key("a"))
    cache.pin(key("a"))
    cache.put(key("a"), embeddings(4))
    cache.put(key("b"), embeddings())
    assert cache.get(key("b")) is None
    assert cache.pinned_bytes == cache.stats.num_bytes == 128
    cache.unpin(key("a"))
    assert cache.get(key("a")) is not None
    cache.unpin(key("a"))
    assert cache.get(key("a")) is None
    assert cache.pinned_bytes == cache.stats.num_bytes == 0
    with pytest.raises(AssertionError, match="more often"):
        cache.unpin(key("a"))


def test_an_entry_above_the_limit_evicts_no_others() -> None:
    cache = EmbeddingCache(max_bytes=64)
    cache.put(key("a"), embeddings())
    cache.put(key("large"), embeddings(3))
    assert cache.get(key("large")) is None
    assert cache.get(key("a")) is not None
    cache.pin(key("large"))
    cache.put(key("large"), embeddings(3))
    cache.put(key("a"), embeddings())
    cache.unpin(key("large"))
    assert cache.get(key("large")) is None


def test_embeddings_of_a_batch_do_not_keep_the_batch_alive() -> None:
    cache = EmbeddingCache()
    batch = embeddings(100)
    cache.put(key("a"), batch[10:12])
    found = cache.get(key("a"))
    assert found is not None
    assert found.untyped_storage().nbytes() == 64
    cache.put(key("b"), batch)
    assert cache.get(key("b")) is batch


def test_replaced_embeddings_are_counted_once() -> None:
    cache = EmbeddingCache()
    cache.put(key("a"), embeddings(5))
    cache.put(key("a"), embeddings(2))
    assert cache.stats.num_bytes == 64


def test_embeddings_on_disk_survive_a_restart(tmp_path: Path) -> None:
    with torch.inference_mode():
        EmbeddingCache(disk_cache=disk_cache(tmp_path)).put(key("a"), embeddings(3, 0.1).bfloat16())
    cache = EmbeddingCache(disk_cache=disk_cache(tmp_path))
    for _ in range(2):
        found = cache.get(key("a"))
        assert found is not None
        assert torch.equal(found, embeddings(3, 0.1).bfloat16())
    assert (cache.stats.num_disk_hits, cache.stats.num_memory_hits, cache.stats.num_misses) == (
        1,
        1,
        0,
    )


def test_entries_evicted_from_memory_are_read_from_disk(tmp_path: Path) -> None:
    cache = EmbeddingCache(max_bytes=32, disk_cache=disk_cache(tmp_path))
    for i, name in enumerate("abc"):
        cache.put(key(name), embeddings(1, i))
    for i, name in enumerate("abc"):
        found = cache.get(key(name))
        assert found is not None
        assert (found == i).all()
    assert cache.stats.num_bytes == 32


class EmbeddingCacheMachine(RuleBasedStateMachine):
    """Any order of calls, compared with an ordered dict of last uses."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = EmbeddingCache(max_bytes=5 * 32)
        self.expected: OrderedDict[str, int] = OrderedDict()
        self.pins: Counter[str] = Counter()

    names = st.sampled_from("abcdef")

    @rule(name=names, num=st.integers(1, 4))
    def put(self, name: str, num: int) -> None:
        self.cache.put(key(name), embeddings(num, ord(name)))
        self.expected.pop(name, None)
        self.expected[name] = num
        self._evict()

    @rule(name=names)
    def get(self, name: str) -> None:
        found = self.cache.get(key(name))
        assert (None if found is None else len(found)) == self.expected.get(name)
        if found is not None:
            assert (found == ord(name)).all()
            self.expected.move_to_end(name)

    @rule(name=names)
    def pin(self, name: str) -> None:
        self.cache.pin(key(name))
        self.pins[name] += 1

    @precondition(lambda self: +self.pins)
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(+self.pins)))
        self.cache.unpin(key(name))
        self.pins[name] -= 1
        if not self.pins[name]:
            self._evict()

    def _evict(self) -> None:
        for name in list(self.expected):
            if sum(self.expected.values()) > 5 and not self.pins[name]:
                del self.expected[name]

    @invariant()
    def counts_agree(self) -> None:
        assert self.cache.stats.num_bytes == 32 * sum(self.expected.values())
        pinned = sum(num for name, num in self.expected.items() if self.pins[name])
        assert self.cache.pinned_bytes == 32 * pinned
        assert self.cache.stats.num_bytes <= max(5 * 32, self.cache.pinned_bytes)


TestEmbeddingCacheMachine = EmbeddingCacheMachine.TestCase


def test_removed_embeddings_are_gone_from_memory_and_disk(tmp_path: Path) -> None:
    cache = EmbeddingCache(disk_cache=disk_cache(tmp_path))
    for name in ("a", "b"):
        cache.put(key(name), embeddings(2))
    cache.remove(key("a"))
    cache.remove(key("never stored"))
    assert cache.get(key("a")) is None and cache.get(key("b")) is not None
    assert cache.stats.num_bytes == 64
    other = EmbeddingCache(disk_cache=disk_cache(tmp_path))
    assert other.get(key("a")) is None and other.get(key("b")) is not None
