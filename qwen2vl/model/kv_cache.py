"""KV caches: the interface that the decoder calls, and contiguous caches of single sequences.

    caches.layer(i).attend(q, k, v)   in each layer: append keys and values, attend to all stored
    caches.advance(lengths)           after the last layer: the appended tokens count as stored

A forward that fails in between leaves the caches unchanged. `KVCache` holds the keys and values of
one sequence (`Int8KVCache` of int8_kv_cache.py in half the bytes), `SequenceKVCaches` is the
interface over one of them per segment, which is what CPU kernels need; engine/kv_cache/arena.py
implements it for GPU kernels. (HF: DynamicCache.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import starmap
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from qwen2vl.config import TextConfig
from qwen2vl.geometry import AttnMeta
from qwen2vl.model.attention import chunked_prefill_attention, decode_attention

__all__ = [
    "BatchKVCache",
    "KVCache",
    "LayerKVCache",
    "LayerSlots",
    "SequenceKVCaches",
    "advance_caches",
]


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


class LayerSlots(Protocol):
    """One layer of one sequence's cache, in a forward with new tokens."""

    def append(self, k_TKC: Tensor, v_TKC: Tensor) -> tuple[Tensor, Tensor]:
        """Write the new keys and values; return all keys and all values, (1, K, Z, C)."""
        ...


class _PlainSlots(NamedTuple):
    """Slots of a `KVCache`."""

    new_k_TKC: Tensor
    new_v_TKC: Tensor
    k_1KZC: Tensor
    v_1KZC: Tensor

    def append(self, k_TKC: Tensor, v_TKC: Tensor) -> tuple[Tensor, Tensor]:
        """Write the new keys and values; return views of all."""
        self.new_k_TKC.copy_(k_TKC)
        self.new_v_TKC.copy_(v_TKC)
        return self.k_1KZC, self.v_1KZC


@dataclass(slots=True)
class KVCache:
    """KV cache of one sequence, contiguous in memory, which is what CPU kernels need.

    `length` counts the tokens stored. Setting it to a smaller value truncates the cache.
    """

    k_LKZC: Tensor
    v_LKZC: Tensor
    length: int = 0
    # Makes the slots of a layer from those of new tokens and those of all, in the order of `slots`.
    layer_slots: ClassVar[Callable[..., LayerSlots]] = _PlainSlots

    @classmethod
    def allocate(
        cls, config: TextConfig, capacity: int, dtype: torch.dtype, device: torch.device | str
    ) -> KVCache:
        """Allocate slots for `capacity` tokens; `dtype` is that of the model."""
        shape = (config.num_hidden_layers, config.num_key_value_heads, capacity, config.head_dim)
        k_LKZC = torch.empty(shape, dtype=dtype, device=device)
        return cls(k_LKZC, torch.empty_like(k_LKZC))

    @classmethod
    def bytes_per_token(cls, config: TextConfig, dtype: torch.dtype) -> int:
        """Return the bytes of a token's slots: 2 * L * K * C numbers."""
        heads = 2 * config.num_hidden_layers * config.num_key_value_heads
        return heads * config.head_dim * dtype.itemsize

    @property
    def capacity(self) -> int:
        """Maximum number of tokens."""
        return self.k_LKZC.shape[2]

    @property
    def slots(self) -> tuple[Tensor, ...]:
        """All tensors of the cache; their third axis is that of the slots."""
        return self.k_LKZC, self.v_LKZC

    def copy_from(self, other: KVCache, num_tokens: int, start: int = 0) -> None:
        """Copy tokens `start` to `num_tokens` of another cache, and set `length` to the latter."""
        assert num_tokens <= min(other.length, self.capacity), "a copy longer than its source"
        for ours, theirs in zip(self.slots, other.slots, strict=True):
            ours[:, :, start:num_tokens] = theirs[:, :, start:num_tokens]
        self.length = num_tokens

    def layers(self, num_new: int) -> Iterator[LayerSlots]:
        """Return, layer by layer, the slots of `num_new` new tokens and all slots up to them.

        `length` stays as it is until the new tokens of all layers are written.
        """
        end = self.length + num_new
        assert end <= self.capacity, f"cache holds {self.capacity} tokens, got {end}"
        new = (x[:, :, self.length : end].transpose(1, 2).unbind() for x in self.slots)
        stored = (x[:, None, :, :end].unbind() for x in self.slots)
        return starmap(self.layer_slots, zip(*new, *stored, strict=True))


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
        for (q, k, v), slots in zip(parts, self.slots, strict=True):
            keys, values = slots.append(k, v)
            if len(q) == 1:
                outs.append(decode_attention(q, keys, values))
            else:
                outs.append(chunked_prefill_attention(q, keys, values, self.meta))
        return (outs[0] if len(outs) == 1 else torch.cat(outs)).flatten(1, 2)
