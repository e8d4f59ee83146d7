"""Rows come back as they were put, the unused longest leave first, and pinned ones stay."""

from __future__ import annotations

from collections import Counter, OrderedDict
from pathlib import Path

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from torch import Tensor

from qwen2vl.engine.encoder_cache.disk_cache import VisionKey
from qwen2vl.engine.encoder_cache.memory_cache import VisionCache


def key(name: str, weights: str = "w") -> VisionKey:
    return VisionKey(name.encode().ljust(32), weights.encode().ljust(32))


def rows(num: int = 1, value: float = 0.0) -> Tensor:
    """`num` rows of 32 bytes."""
    return torch.full((num, 8), float(value))


def test_what_was_put_comes_back() -> None:
    cache = VisionCache()
    assert cache.get(key("a")) is None
    cache.put(key("a"), rows(3, 7.0))
    found = cache.get(key("a"))
    assert found is not None
    assert torch.equal(found, rows(3, 7.0))
    stats = cache.stats
    assert (stats.hits_memory, stats.hits_disk, stats.misses) == (1, 0, 1)
    assert stats.num_bytes == 96


def test_other_weights_are_another_key() -> None:
    cache = VisionCache()
    cache.put(key("a", "before training"), rows())
    assert cache.get(key("a", "after")) is None


def test_the_longest_unused_leaves_first() -> None:
    cache = VisionCache(max_bytes=96)
    for name in "abc":
        cache.put(key(name), rows())
    cache.get(key("a"))
    cache.put(key("d"), rows())
    assert [name for name in "abcd" if cache.get(key(name)) is not None] == ["a", "c", "d"]
    assert cache.stats.evictions == 1
    assert cache.stats.num_bytes == 96


def test_pins_are_counted_and_may_come_before_the_rows() -> None:
    cache = VisionCache(max_bytes=32)
    cache.pin(key("a"))
    cache.pin(key("a"))
    cache.put(key("a"), rows(4))
    cache.put(key("b"), rows())
    assert cache.get(key("b")) is None
    assert cache.pinned_bytes == cache.stats.num_bytes == 128
    cache.unpin(key("a"))
    assert cache.get(key("a")) is not None
    cache.unpin(key("a"))
    assert cache.get(key("a")) is None
    assert cache.pinned_bytes == cache.stats.num_bytes == 0
    with pytest.raises(AssertionError, match="more often"):
        cache.unpin(key("a"))


def test_what_could_never_stay_takes_nothing_along() -> None:
    cache = VisionCache(max_bytes=64)
    cache.put(key("a"), rows())
    cache.put(key("large"), rows(3))
    assert cache.get(key("large")) is None
    assert cache.get(key("a")) is not None
    cache.pin(key("large"))
    cache.put(key("large"), rows(3))
    cache.put(key("a"), rows())
    cache.unpin(key("large"))
    assert cache.get(key("large")) is None


def test_rows_of_a_batch_do_not_hold_the_batch() -> None:
    cache = VisionCache()
    batch = rows(100)
    cache.put(key("a"), batch[10:12])
    found = cache.get(key("a"))
    assert found is not None
    assert found.untyped_storage().nbytes() == 64
    cache.put(key("b"), batch)
    assert cache.get(key("b")) is batch


def test_rows_put_again_are_counted_once() -> None:
    cache = VisionCache()
    cache.put(key("a"), rows(5))
    cache.put(key("a"), rows(2))
    assert cache.stats.num_bytes == 64


def test_a_restart_finds_the_rows_on_disk(tmp_path: Path) -> None:
    with torch.inference_mode():
        VisionCache(folder=tmp_path).put(key("a"), rows(3, 0.1).bfloat16())
    cache = VisionCache(folder=tmp_path)
    for _ in range(2):
        found = cache.get(key("a"))
        assert found is not None
        assert torch.equal(found, rows(3, 0.1).bfloat16())
    assert (cache.stats.hits_disk, cache.stats.hits_memory, cache.stats.misses) == (1, 1, 0)


def test_what_memory_lost_is_on_disk(tmp_path: Path) -> None:
    cache = VisionCache(max_bytes=32, folder=tmp_path)
    for i, name in enumerate("abc"):
        cache.put(key(name), rows(1, i))
    for i, name in enumerate("abc"):
        found = cache.get(key(name))
        assert found is not None
        assert (found == i).all()
    assert cache.stats.num_bytes == 32


class Model(RuleBasedStateMachine):
    """Any order of calls against a plain list of what was used when."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = VisionCache(max_bytes=5 * 32)
        self.want: OrderedDict[str, int] = OrderedDict()
        self.pins: Counter[str] = Counter()

    names = st.sampled_from("abcdef")

    @rule(name=names, num=st.integers(1, 4))
    def put(self, name: str, num: int) -> None:
        self.cache.put(key(name), rows(num, ord(name)))
        self.want.pop(name, None)
        self.want[name] = num
        self._evict()

    @rule(name=names)
    def get(self, name: str) -> None:
        found = self.cache.get(key(name))
        assert (None if found is None else len(found)) == self.want.get(name)
        if found is not None:
            assert (found == ord(name)).all()
            self.want.move_to_end(name)

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
        for name in list(self.want):
            if sum(self.want.values()) > 5 and not self.pins[name]:
                del self.want[name]

    @invariant()
    def counts_agree(self) -> None:
        assert self.cache.stats.num_bytes == 32 * sum(self.want.values())
        pinned = sum(num for name, num in self.want.items() if self.pins[name])
        assert self.cache.pinned_bytes == 32 * pinned
        assert self.cache.stats.num_bytes <= max(5 * 32, self.cache.pinned_bytes)


TestModel = Model.TestCase
