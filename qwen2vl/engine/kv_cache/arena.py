"""KV cache arena for GPUs: one preallocated tensor that holds the KV caches of all requests.

Each request has a contiguous range of slots. One kernel writes the new keys and values of all
requests and one attends for all of them, given the first slot and the length of each range as
tensors. The arena's addresses never change, so a captured CUDA graph (decode/cuda_graphs.py) stays
valid while ranges grow, move or are freed. A range is also a `KVCache`, so code that handles one
request at a time works on both devices. On a CPU the arena is not used.

    arena    request 7 ....   request 2 ..........      request 9 ...         padding slot
             |             |                      free               free ... |

Axis letters as in model/attention.py; T counts slots of the arena.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from qwen2vl.config import TextConfig
from qwen2vl.engine.kv_cache.storage import copy_to_device
from qwen2vl.errors import CapacityError
from qwen2vl.geometry import AttnMeta
from qwen2vl.model import KVCache, kernels
from qwen2vl.model.kv_cache import BatchKVCache, SequenceKVCaches, advance_caches

__all__ = ["GatheredBatchKVCache", "KVArena", "SlotRange", "VarlenBatchKVCache"]


@dataclass(slots=True)
class SlotRange(KVCache):
    """Slots start..start + capacity of an arena, the KV cache of one request."""

    start: int = 0


class KVArena:
    """A KV cache of `num_tokens` slots, from which ranges are allocated by first fit."""

    def __init__(
        self, config: TextConfig, num_tokens: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Allocate all memory at once.

        Raises:
            CapacityError: out of device memory.
        """
        # One extra slot: the tokens that pad a decode batch are stored there and never read.
        shape = (config.num_hidden_layers, config.num_key_value_heads, num_tokens + 1)
        try:
            self.k_LKTC = torch.empty((*shape, config.head_dim), dtype=dtype, device=device)
            self.v_LKTC = torch.empty_like(self.k_LKTC)
        except torch.OutOfMemoryError:
            size = 2 * math.prod(shape) * config.head_dim * dtype.itemsize
            raise CapacityError(
                f"keys and values of {num_tokens:,} tokens take {size / 2**30:.1f} GiB, more "
                "than the device has free; lower kv_cache_tokens"
            ) from None
        self.num_tokens = num_tokens
        heads = self.k_LKTC.new_empty(0, config.num_attention_heads, config.head_dim)
        self.supports_varlen = kernels.supports_varlen(
            heads, self.k_LKTC[0].transpose(0, 1), has_key_gaps=True
        )

    def reserve(self, old: KVCache | None, num_tokens: int, in_use: Iterable[KVCache]) -> SlotRange:
        """Allocate a range of `num_tokens` slots, or grow `old` to it, keeping its content.

        Other ranges are moved (compaction) only if no free range is large enough. `in_use` are all
        allocated ranges, including `old`; the free slots must suffice in total.
        """
        assert old is None or isinstance(old, SlotRange)
        ranges = sorted((r for r in in_use if isinstance(r, SlotRange)), key=lambda r: r.start)
        if old is not None:
            next_start = next((r.start for r in ranges if r.start > old.start), self.num_tokens)
            if old.start + num_tokens <= next_start:
                return self._slot_range(old.start, num_tokens, old.length)
        start = self._first_fit(ranges, num_tokens)
        if start is None:
            return self._compact([r for r in ranges if r is not old], old, num_tokens)
        new = self._slot_range(start, num_tokens)
        if old is not None:
            new.copy_from(old, old.length)
        return new

    def first_slot(self, cache: KVCache) -> int:
        """Return the first slot of a range."""
        assert isinstance(cache, SlotRange)
        return cache.start

    def batch(self, caches: Sequence[KVCache], meta: AttnMeta) -> BatchKVCache:
        """Return the KV caches of one forward, with one range for each segment of `meta`."""
        if not self.supports_varlen:
            return SequenceKVCaches(caches, meta)
        starts = [self.first_slot(cache) for cache in caches]
        firsts = [start + cache.length for start, cache in zip(starts, caches, strict=True)]
        slots = [torch.arange(f, f + n) for f, n in zip(firsts, meta.lengths_q, strict=True)]
        starts_S, seq_lens_S, slot_mapping_T = copy_to_device(
            self.k_LKTC.device,
            torch.tensor(starts),
            torch.tensor(meta.lengths_k),
            torch.cat(slots),
        )
        return self.batch_of_slots(meta, starts_S, seq_lens_S, slot_mapping_T, caches)

    def batch_of_slots(
        self,
        meta: AttnMeta,
        starts_S: Tensor,
        seq_lens_S: Tensor,
        slot_mapping_T: Tensor,
        caches: Sequence[KVCache] | None = None,
    ) -> VarlenBatchKVCache | GatheredBatchKVCache:
        """Return the KV caches of one forward, given by slots.

        Args:
            meta: number of queries of each segment; max_seqlen_k bounds `seq_lens_S`.
            starts_S: first slot of each segment's keys; int64 on the arena's device, as the others.
            seq_lens_S: number of keys of each segment, new ones included.
            slot_mapping_T: slot in which the keys and values of each new token are stored.
            caches: the ranges that `advance` is to advance; None: the caller does it.
        """
        if self.supports_varlen:
            # The kernel reads only the starts of the segments, but requires S + 1 numbers.
            starts = torch.cat((starts_S, starts_S[-1:])).int()
            return VarlenBatchKVCache(self, caches, meta, slot_mapping_T, starts, seq_lens_S.int())
        assert meta.max_seqlen_q == 1, "one token each, where torch has no varlen kernel"
        return GatheredBatchKVCache.from_slots(
            self, meta, slot_mapping_T, starts_S, seq_lens_S, caches
        )

    def store(self, layer: int, slot_mapping_T: Tensor, k_TKC: Tensor, v_TKC: Tensor) -> None:
        """Write the keys and values of new tokens to their slots."""
        self.k_LKTC[layer].index_copy_(1, slot_mapping_T, k_TKC.transpose(0, 1))
        self.v_LKTC[layer].index_copy_(1, slot_mapping_T, v_TKC.transpose(0, 1))

    def _slot_range(self, start: int, num_tokens: int, length: int = 0) -> SlotRange:
        stop = start + num_tokens
        k_LKZC, v_LKZC = self.k_LKTC[:, :, start:stop], self.v_LKTC[:, :, start:stop]
        return SlotRange(k_LKZC, v_LKZC, length, start)

    def _first_fit(self, ranges: Sequence[SlotRange], num_tokens: int) -> int | None:
        """Return the start of the first free range of at least `num_tokens` slots, or None."""
        start = 0
        for used in ranges:
            if used.start - start >= num_tokens:
                return start
            start = used.start + used.capacity
        return start if self.num_tokens - start >= num_tokens else None

    def _compact(
        self, others: Sequence[SlotRange], old: SlotRange | None, num_tokens: int
    ) -> SlotRange:
        """Move all other ranges to the front, so that the free slots behind them are contiguous."""
        used = sum(other.capacity for other in others)
        assert used + num_tokens <= self.num_tokens, "more slots allocated than exist"
        target = old or self._slot_range(0, 0)
        length = target.length
        saved = [x[:, :, :length].clone() for x in (target.k_LKZC, target.v_LKZC)]
        # Nothing below allocates memory, so only an interrupt can leave ranges half moved.
        start = 0
        for other in others:
            self._move_down(other, start)
            start += other.capacity
        new = self._slot_range(start, num_tokens)
        target.k_LKZC, target.v_LKZC, target.start = new.k_LKZC, new.v_LKZC, start
        target.k_LKZC[:, :, :length], target.v_LKZC[:, :, :length] = saved
        return target

    def _move_down(self, moved: SlotRange, start: int) -> None:
        """Move a range to a lower start, in pieces that do not overlap their destinations."""
        distance = moved.start - start
        if distance == 0:
            return
        target = self._slot_range(start, moved.capacity, moved.length)
        for first in range(0, moved.length, distance):
            stop = min(first + distance, moved.length)
            target.k_LKZC[:, :, first:stop] = moved.k_LKZC[:, :, first:stop]
            target.v_LKZC[:, :, first:stop] = moved.v_LKZC[:, :, first:stop]
        moved.k_LKZC, moved.v_LKZC, moved.start = target.k_LKZC, target.v_LKZC, start


@dataclass(frozen=True, slots=True)
class _ArenaLayer:
    """One layer of the KV caches of a forward, in the arena."""

    caches: _ArenaBatchKVCache
    index: int

    def attend(self, q_THC: Tensor, k_TKC: Tensor, v_TKC: Tensor) -> Tensor:
        """Store the new keys and values, and attend to all stored keys."""
        return self.caches.attend(self.index, q_THC, k_TKC, v_TKC)


@dataclass(frozen=True, slots=True)
class _ArenaBatchKVCache(ABC):
    """KV caches of one forward, in the arena."""

    arena: KVArena
    caches: Sequence[KVCache] | None  # to be advanced; None: by the caller

    def layer(self, index: int) -> _ArenaLayer:
        """Return the caches of one layer."""
        return _ArenaLayer(self, index)

    def advance(self, lengths: Sequence[int]) -> None:
        """Add the number of new tokens of each request to the length of its range."""
        if self.caches is not None:
            advance_caches(self.caches, lengths)

    @abstractmethod
    def attend(self, index: int, q_THC: Tensor, k_TKC: Tensor, v_TKC: Tensor, /) -> Tensor:
        """Store and attend in one layer."""


@dataclass(frozen=True, slots=True)
class VarlenBatchKVCache(_ArenaBatchKVCache):
    """KV caches read in place by torch's varlen kernel: prefill and decode mixed."""

    meta: AttnMeta
    slot_mapping_T: Tensor
    seq_starts_k: Tensor  # (S+1,) int32
    seq_lens_S: Tensor  # int32

    def attend(self, index: int, q_THC: Tensor, k_TKC: Tensor, v_TKC: Tensor, /) -> Tensor:
        """Store and attend in one layer."""
        self.arena.store(index, self.slot_mapping_T, k_TKC, v_TKC)
        return kernels.varlen_attention(
            q_THC,
            self.arena.k_LKTC[index].transpose(0, 1),
            self.arena.v_LKTC[index].transpose(0, 1),
            (self.meta.cu_seqlens_q, self.seq_starts_k),
            (self.meta.max_seqlen_q, self.meta.max_seqlen_k),
            causal=True,
            seqused_k_S=self.seq_lens_S,
        )


@dataclass(frozen=True, slots=True)
class GatheredBatchKVCache(_ArenaBatchKVCache):
    """KV caches for decode in plain PyTorch: keys are gathered to one padded length."""

    slot_mapping_S: Tensor
    gather_index: Tensor  # (S * Z,): slots of the keys of each request, Z of them
    mask_S11Z: Tensor

    @classmethod
    def from_slots(
        cls,
        arena: KVArena,
        meta: AttnMeta,
        slot_mapping_S: Tensor,
        starts_S: Tensor,
        seq_lens_S: Tensor,
        caches: Sequence[KVCache] | None = None,
    ) -> GatheredBatchKVCache:
        """Build the gather index and the mask, once for all layers."""
        offsets_Z = torch.arange(meta.max_seqlen_k, device=starts_S.device)
        # Padding repeats the last key and is masked: slots behind the end may hold NaN.
        clamped_SZ = torch.minimum(offsets_Z, seq_lens_S[:, None] - 1)
        is_padding_SZ = offsets_Z >= seq_lens_S[:, None]
        mask_SZ = torch.zeros_like(is_padding_SZ, dtype=arena.k_LKTC.dtype)
        mask_SZ.masked_fill_(is_padding_SZ, -math.inf)
        gather_index = (starts_S[:, None] + clamped_SZ).flatten()
        return cls(arena, caches, slot_mapping_S, gather_index, mask_SZ[:, None, None])

    def attend(self, index: int, q_SHC: Tensor, k_SKC: Tensor, v_SKC: Tensor, /) -> Tensor:
        """Store and attend in one layer."""
        self.arena.store(index, self.slot_mapping_S, k_SKC, v_SKC)
        k_SKZC, v_SKZC = (
            x[index]
            .index_select(1, self.gather_index)
            .unflatten(1, (len(q_SHC), -1))
            .transpose(0, 1)
            for x in (self.arena.k_LKTC, self.arena.v_LKTC)
        )
        # As in model/attention.py, the query heads of a GQA group are passed as queries.
        queries = q_SHC.unflatten(1, (k_SKC.shape[1], -1))
        out = F.scaled_dot_product_attention(queries, k_SKZC, v_SKZC, attn_mask=self.mask_S11Z)
        return out.flatten(1, 2)
