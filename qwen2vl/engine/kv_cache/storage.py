"""KV cache storage, and the non-blocking host-to-device copies of the indices into it.

`SeparateStorage` allocates contiguous tensors for each request, which is what CPU kernels need, in
the model's dtype or in int8; `KVArena` (arena.py) is the storage of a GPU. The model runner uses
either through `KVStorage`.

Copies from unpinned memory synchronize with the GPU, each one separately. So the index tensors of a
step are flattened into one, pinned, copied in one non-blocking transfer, and split again on the
GPU. On other devices each tensor is moved as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from qwen2vl.config import TextConfig
from qwen2vl.geometry import AttnMeta
from qwen2vl.model.kv_cache import BatchKVCache, KVCache, SequenceKVCaches

__all__ = [
    "KVStorage",
    "SeparateStorage",
    "copy_to_device",
    "flatten_tensors",
    "unflatten_tensors",
]


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
    kv_cache: type[KVCache] = KVCache

    def reserve(self, old: KVCache | None, num_tokens: int, in_use: Iterable[KVCache]) -> KVCache:
        """Allocate a cache, and copy the tokens of `old` into it."""
        cache = self.kv_cache.allocate(self.config, num_tokens, self.dtype, self.device)
        if old is not None:
            cache.copy_from(old, old.length)
        return cache

    def batch(self, caches: Sequence[KVCache], meta: AttnMeta) -> BatchKVCache:
        """Return the KV caches of one forward."""
        return SequenceKVCaches(caches, meta)


def copy_to_device(device: torch.device, *tensors: Tensor) -> list[Tensor]:
    """Copy tensors of one dtype to `device`; to a GPU in one non-blocking transfer."""
    if device.type != "cuda":
        return [tensor.to(device) for tensor in tensors]
    flat = flatten_tensors(tensors).pin_memory().to(device, non_blocking=True)
    return unflatten_tensors(flat, tensors)


def flatten_tensors(tensors: Sequence[Tensor]) -> Tensor:
    """Flatten all tensors and concatenate them."""
    return torch.cat([tensor.flatten() for tensor in tensors])


def unflatten_tensors(flat: Tensor, templates: Sequence[Tensor]) -> list[Tensor]:
    """Split what `flatten_tensors` returned into tensors of the shapes of `templates`."""
    parts = flat.split([tensor.numel() for tensor in templates])
    return [part.view(tensor.shape) for part, tensor in zip(parts, templates, strict=True)]
