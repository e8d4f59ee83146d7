"""KV caches: the interface that the decoder calls, and contiguous caches of single sequences.

    caches.layer(i).attend(q, k, v)   in each layer: append keys and values, attend to all stored
    caches.advance(lengths)           after the last layer: the appended tokens count as stored

A forward that fails in between leaves the caches unchanged. `KVCache` holds the keys and values of
one sequence, `SequenceKVCaches` is the interface over one of them per segment, which is what CPU
kernels need; engine/kv_cache/arena.py implements it for GPU kernels. (HF: DynamicCache.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

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


# Slots of new keys and of new values, (T, K, C); all keys and all values, (1, K, Z, C).
LayerSlots: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor]


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

    def layers(self, num_new: int) -> Iterator[LayerSlots]:
        """Return, layer by layer, the slots of `num_new` new tokens and all slots up to them.

        `length` stays as it is until the new tokens of all layers are written.
        """
        end = self.length + num_new
        assert end <= self.capacity, f"cache holds {self.capacity} tokens, got {end}"
        return zip(
            self.k_LKZC[:, :, self.length : end].transpose(1, 2).unbind(),
            self.v_LKZC[:, :, self.length : end].transpose(1, 2).unbind(),
            self.k_LKZC[:, None, :, :end].unbind(),
            self.v_LKZC[:, None, :, :end].unbind(),
            strict=True,
        )


def advance_caches(caches: Sequence[KVCache], lengths: Sequence[int]) -> None:
    """Add the number of new tokens of each sequence to the length of its cache."""
    for cache, length in zip(caches, lengths, strict=True):
        cache.length += length


class SequenceKVCaches:
    """A `KVCache` for each segment of `meta`, attended to one by one."""

    def __init__(self, caches: Sequence[KVCache], meta: AttnMeta) -> None:
        self._caches = caches
        self._meta = meta
        # Once for all layers: views in each layer took a fifth of the time of 16 sequences of nano.
        parts = [cache.layers(n) for cache, n in zip(caches, meta.lengths_q, strict=True)]
        self._layers = [SequenceLayer(slots, meta) for slots in zip(*parts, strict=True)]

    def layer(self, index: int) -> SequenceLayer:
        """Return the caches of one layer."""
        return self._layers[index]

    def advance(self, lengths: Sequence[int]) -> None:
        """Add the number of new tokens of each sequence to the length of its cache."""
        advance_caches(self._caches, lengths)


@dataclass(frozen=True, slots=True)
class SequenceLayer:
    """One layer of the caches of `SequenceKVCaches`."""

    slots: Sequence[LayerSlots]  # of each sequence
    meta: AttnMeta

    def attend(self, q_THC: Tensor, k_TKC: Tensor, v_TKC: Tensor) -> Tensor:
        """Write and attend, sequence by sequence, since each has tensors of its own."""
        sizes = list(self.meta.lengths_q)
        # Heads of a GQA group together, as `decode_attention` needs them: once for all sequences.
        q_TKGC = q_THC.unflatten(1, (k_TKC.shape[1], -1))
        parts = zip(q_TKGC.split(sizes), k_TKC.split(sizes), v_TKC.split(sizes), strict=True)
        outs: list[Tensor] = []
        for (q, k, v), (new_k, new_v, keys, values) in zip(parts, self.slots, strict=True):
            new_k.copy_(k)
            new_v.copy_(v)
            if len(q) == 1:
                outs.append(decode_attention(q, keys, values))
            else:
                outs.append(chunked_prefill_attention(q, keys, values, self.meta))
        return (outs[0] if len(outs) == 1 else torch.cat(outs)).flatten(1, 2)
