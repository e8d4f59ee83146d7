"""KV cache storage: allocates the KV caches of requests, as separate tensors or in one arena.

`SeparateStorage` allocates contiguous tensors for each request, which is what CPU kernels need;
`KVArena` (arena.py) is the storage of a GPU. The model runner uses either through `KVStorage`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from qwen2vl.config import TextConfig
from qwen2vl.geometry import AttnMeta
from qwen2vl.model.kv_cache import BatchKVCache, KVCache, SequenceKVCaches

__all__ = ["KVStorage", "SeparateStorage"]


class KVStorage(Protocol):
    """Allocates the KV caches of requests, and passes them to the model."""

    def reserve(self, old: KVCache | None, num_tokens: int, in_use: Iterable[KVCache]) -> KVCache:
        """Allocate a cache of `num_tokens` slots, or grow `old` to it, keeping its content.

        `in_use` are all allocated caches, including `old`; they may be moved.
        """
        ...

    def batch(self, caches: Sequence[KVCache], meta: AttnMeta) -> BatchKVCache:
        """Return the KV caches of one forward, one for each segment of `meta`."""
        ...


@dataclass(frozen=True, slots=True)
class SeparateStorage:
    """Contiguous tensors of its own for each request."""

    config: TextConfig
    dtype: torch.dtype
    device: torch.device

    def reserve(self, old: KVCache | None, num_tokens: int, in_use: Iterable[KVCache]) -> KVCache:
        """Allocate a cache, and copy the tokens of `old` into it."""
        cache = KVCache.allocate(self.config, num_tokens, self.dtype, self.device)
        if old is not None:
            cache.copy_from(old, old.length)
        return cache

    def batch(self, caches: Sequence[KVCache], meta: AttnMeta) -> BatchKVCache:
        """Return the KV caches of one forward."""
        return SequenceKVCaches(caches, meta)
