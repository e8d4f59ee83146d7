"""In-memory LRU cache of vision embeddings, with an optional disk cache below it.

An entry is the vision_MD of one frame pair. With a folder, embeddings are also written to disk, so
that a repeated image needs no encoding even after a restart. A key identifies the pixels and the
weights, so embeddings are never reused after the vision tower was retrained or quantized. Not
thread-safe.
(vLLM: EncoderCacheManager.)
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from dataclasses import dataclass

import torch
from torch import Tensor

from qwen2vl.engine.encoder_cache.disk_cache import DiskEmbeddingCache, EmbeddingKey

__all__ = ["EmbeddingCache", "EmbeddingCacheStats"]

GIB = 1024**3


@dataclass(slots=True, kw_only=True)
class EmbeddingCacheStats:
    """Counters since creation, and the current size."""

    num_memory_hits: int = 0
    num_disk_hits: int = 0
    num_misses: int = 0
    num_evictions: int = 0  # from memory
    num_bytes: int = 0  # in memory now


class EmbeddingCache:
    """Vision embeddings by key: in memory, LRU, and on disk."""

    def __init__(
        self,
        *,
        max_bytes: int = GIB // 2,
        disk_cache: DiskEmbeddingCache | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """Start with empty memory, above `disk_cache`, whose embeddings are reused.

        Args:
            max_bytes: limit in memory; pinned entries may exceed it, 0 keeps only those.
            disk_cache: for embeddings that are not in memory.
            device: device of the embeddings that `get` returns.
        """
        self.stats = EmbeddingCacheStats()
        self.max_bytes = max_bytes
        self.disk_cache = disk_cache
        self._device = torch.device(device)
        self._embeddings: OrderedDict[EmbeddingKey, Tensor] = OrderedDict()
        self._pins: Counter[EmbeddingKey] = Counter()

    def get(self, key: EmbeddingKey) -> Tensor | None:
        """Return the embeddings of `key`, read-only, from memory or else from disk, or None."""
        vision_MD = self._embeddings.get(key)
        if vision_MD is not None:
            self._embeddings.move_to_end(key)
            self.stats.num_memory_hits += 1
            return vision_MD
        vision_MD = None if self.disk_cache is None else self.disk_cache.read(key)
        if vision_MD is None:
            self.stats.num_misses += 1
            return None
        self.stats.num_disk_hits += 1
        vision_MD = vision_MD.to(self._device)
        self._insert(key, vision_MD)
        return vision_MD

    def put(self, key: EmbeddingKey, vision_MD: Tensor) -> None:
        """Store embeddings, in memory and on disk; the caller must not write to them afterwards."""
        vision_MD = vision_MD.to(self._device)
        if vision_MD.untyped_storage().nbytes() > vision_MD.nbytes:
            # A view would keep the embeddings of the whole batch alive.
            vision_MD = vision_MD.clone()
        self._insert(key, vision_MD)
        if self.disk_cache is not None:
            self.disk_cache.write(key, vision_MD)

    def remove(self, key: EmbeddingKey) -> None:
        """Remove the embeddings of `key` from memory and from disk, if they are there."""
        if key in self._embeddings:
            self.stats.num_bytes -= self._embeddings.pop(key).nbytes
        if self.disk_cache is not None:
            self.disk_cache.remove(key)

    def clear(self) -> None:
        """Remove all entries in memory that are not pinned."""
        for key in [key for key in self._embeddings if key not in self._pins]:
            self.stats.num_bytes -= self._embeddings.pop(key).nbytes

    def pin(self, key: EmbeddingKey) -> None:
        """Exempt `key`, stored now or later, from eviction until as many calls of `unpin`."""
        self._pins[key] += 1

    def unpin(self, key: EmbeddingKey) -> None:
        """Remove one pin; without pins the entry becomes evictable."""
        assert self._pins[key] > 0, "unpinned more often than pinned"
        self._pins[key] -= 1
        if not self._pins[key]:
            del self._pins[key]
            self._evict()

    @property
    def pinned_bytes(self) -> int:
        """Bytes in memory that cannot be evicted now."""
        return sum(self._embeddings[key].nbytes for key in self._pins if key in self._embeddings)

    def _insert(self, key: EmbeddingKey, vision_MD: Tensor) -> None:
        old = self._embeddings.pop(key, None)
        self._embeddings[key] = vision_MD
        self.stats.num_bytes += vision_MD.nbytes - (0 if old is None else old.nbytes)
        self._evict()

    def _evict(self) -> None:
        """Remove unpinned entries, least recently used first, until the limit is met."""
        if self.stats.num_bytes <= self.max_bytes:
            return
        evictable = [key for key in self._embeddings if key not in self._pins]
        # Entries above the limit are removed first; otherwise they would evict all others as well.
        evictable.sort(key=lambda key: self._embeddings[key].nbytes <= self.max_bytes)
        for key in evictable:
            self.stats.num_bytes -= self._embeddings.pop(key).nbytes
            self.stats.num_evictions += 1
            if self.stats.num_bytes <= self.max_bytes:
                return
