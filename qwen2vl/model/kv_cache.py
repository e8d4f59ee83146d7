"""KV caches: the interface that the decoder calls, and contiguous caches of single sequences.

    caches.layer(i).attend(q, k, v)   in each layer: append keys and values, attend to all stored
    caches.advance(lengths)           after the last layer: the appended tokens count as stored

A forward that fails in between leaves the caches unchanged. `KVCache` holds the keys and values of
one sequence, `SequenceKVCaches` is the interface over one of them per segment, which is what CPU
kernels need; engine/kv_cache/arena.py implements it for GPU kernels. (HF: DynamicCache.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from qwen2vl.config import TextConfig
from qwen2vl.geometry import AttnMeta
from qwen2vl.model.attention import chunked_prefill_attention, decode_attention

__all__ = ["BatchKVCache", "KVCache", "LayerKVCache", "SequenceKVCaches", "advance_caches"]


class LayerKVCache(Protocol):
    """One layer of the KV caches of all sequences of a forward."""

    def attend(self, q_THC: Tensor, k_TKC: Tensor, v_TKC: Tensor) -> Tensor:
        """Append the new keys and values; return out_THC, causal attention to all stored keys.

        The queries are the last tokens of their sequences: the last one attends to every key.
        """
        ...


class BatchKVCache(Protocol):
    """KV caches of all sequences of a forward."""

    def layer(self, index: int) -> LayerKVCache:
        """Return the caches of one layer."""
        ...

    def advance(self, lengths: Sequence[int]) -> None:
        """Add the number of new tokens of each sequence to the length of its cache."""
        ...


@dataclass(slots=True)
class KVCache:
    """KV cache of one sequence, contiguous in memory, which is what CPU kernels need.

    `length` counts the tokens stored. Setting it to a smaller value truncates the cache.
    """

    k_LKZC: Tensor
    v_LKZC: Tensor
    length: int = 0

    @classmethod
    def allocate(
        cls, config: TextConfig, capacity: int, dtype: torch.dtype, device: torch.device | str
    ) -> KVCache:
        """Allocate slots for `capacity` tokens: 2 * L * K * C numbers a token."""
        shape = (config.num_hidden_layers, config.num_key_value_heads, capacity, config.head_dim)
        k_LKZC = torch.empty(shape, dtype=dtype, device=device)
        return cls(k_LKZC, torch.empty_like(k_LKZC))

    @property
    def capacity(self) -> int:
        """Maximum number of tokens."""
        return self.k_LKZC.shape[2]

    def copy_from(self, other: KVCache, num_tokens: int) -> None:
        """Copy the first `num_tokens` of another cache and set `length` to that number."""
        assert num_tokens <= min(other.length, self.capacity), "a copy longer than its source"
        self.k_LKZC[:, :, :num_tokens] = other.k_LKZC[:, :, :num_tokens]
        self.v_LKZC[:, :, :num_tokens] = other.v_LKZC[:, :, :num_tokens]
        self.length = num_tokens

    def append(self, layer: int, k_TKC: Tensor, v_TKC: Tensor) -> tuple[Tensor, Tensor]:
        """Write keys and values behind the stored ones; return all of a layer as (K, T, C) views.

        `length` stays as it is until all layers are written.
        """
        end = self.length + k_TKC.shape[0]
        assert end <= self.capacity, f"cache holds {self.capacity} tokens, got {end}"
        k_KZC, v_KZC = self.k_LKZC[layer], self.v_LKZC[layer]
        k_KZC[:, self.length : end] = k_TKC.transpose(0, 1)
        v_KZC[:, self.length : end] = v_TKC.transpose(0, 1)
        return k_KZC[:, :end], v_KZC[:, :end]


def advance_caches(caches: Sequence[KVCache], lengths: Sequence[int]) -> None:
    """Add the number of new tokens of each sequence to the length of its cache."""
    for cache, length in zip(caches, lengths, strict=True):
        cache.length += length


@dataclass(frozen=True, slots=True)
class SequenceKVCaches:
    """A `KVCache` for each segment of `meta`, attended to one by one."""

    caches: Sequence[KVCache]
    meta: AttnMeta

    def layer(self, index: int) -> LayerKVCache:
        """Return the caches of one layer."""
        return _SequenceLayer(self.caches, self.meta, index)

    def advance(self, lengths: Sequence[int]) -> None:
        """Add the number of new tokens of each sequence to the length of its cache."""
        advance_caches(self.caches, lengths)


@dataclass(frozen=True, slots=True)
class _SequenceLayer:
    caches: Sequence[KVCache]
    meta: AttnMeta
    index: int

    def attend(self, q_THC: Tensor, k_TKC: Tensor, v_TKC: Tensor) -> Tensor:
        """Append and attend, sequence by sequence, since each has tensors of its own."""
        sizes = list(self.meta.lengths_q)
        outs: list[Tensor] = []
        parts = zip(q_THC.split(sizes), k_TKC.split(sizes), v_TKC.split(sizes), strict=True)
        for (q, k, v), cache in zip(parts, self.caches, strict=True):
            keys, values = cache.append(self.index, k, v)
            if len(q) == 1:
                outs.append(decode_attention(q, keys, values))
            else:
                outs.append(chunked_prefill_attention(q, keys, values, self.meta))
        return outs[0] if len(outs) == 1 else torch.cat(outs)
