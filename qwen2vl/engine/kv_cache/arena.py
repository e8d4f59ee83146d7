"""Keys and values of all rows in one piece of memory: addresses that never move, for GPUs.

On a GPU a step must not ask each row for its tensors: one kernel writes the new keys of all rows
and another attends for all of them, told by numbers where each row begins and how long it is. So
rows are ranges of an arena, and a recorded decode step (graphs.py) stays right when rows grow or
come and go. A range is a KVCache as well, so whatever handles one row at a time handles it, too.

    arena    row 7 ....   row 2 ..........      row 9 ...          nobody's token
             |         |                  free           free ... |

Letters as in model/attention.py, T counting tokens of the arena. On a CPU a row is a tensor of its
own, and none of this is used. Next room: graphs.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from qwen2vl.config import TextConfig
from qwen2vl.errors import CapacityError
from qwen2vl.geometry import AttnMeta
from qwen2vl.model import KVCache, kernels
from qwen2vl.model.attention import SharedCache

__all__ = ["Arena", "GatheredRows", "PackedRows", "Range"]


@dataclass(slots=True)
class Range(KVCache):
    """Tokens start..start + capacity of an arena, which belong to one row."""

    start: int = 0


class Arena:
    """The memory of as many tokens as the block pool shares out, and who may use which."""

    def __init__(
        self, config: TextConfig, num_tokens: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Reserve all of it at once.

        Raises:
            CapacityError: the device has not as much.
        """
        # One more than is shared out: what pads a batch is stored there, and means nothing.
        shape = (config.num_hidden_layers, config.num_key_value_heads, num_tokens + 1)
        try:
            self.k_LKTC = torch.empty((*shape, config.head_dim), dtype=dtype, device=device)
            self.v_LKTC = torch.empty_like(self.k_LKTC)
        except torch.OutOfMemoryError:
            size = 2 * math.prod(shape) * config.head_dim * dtype.itemsize
            raise CapacityError(
                f"keys and values of {num_tokens:,} tokens take {size / 2**30:.1f} GiB, which are "
                "not there; lower cache_tokens"
            ) from None
        self.num_tokens = num_tokens
        self.is_torn = False  # an interrupt came while ranges were moved
        heads = self.k_LKTC.new_empty(0, config.num_attention_heads, config.head_dim)
        self.packs = kernels.packs(heads, self.k_LKTC[0].transpose(0, 1), has_gaps=True)

    def reserve(self, old: KVCache | None, num_tokens: int, taken: Iterable[KVCache]) -> Range:
        """Find room for a row, or more of it for `old`, which keeps what it holds.

        Rows in the way are moved if there is no other way. `taken` are all ranges in use, `old`
        among them; together they must leave as much free as is asked for.
        """
        assert old is None or isinstance(old, Range)
        ranges = sorted((r for r in taken if isinstance(r, Range)), key=lambda r: r.start)
        if old is not None:
            after = next((r.start for r in ranges if r.start > old.start), self.num_tokens)
            if old.start + num_tokens <= after:
                return self._range(old.start, num_tokens, old.length)
        start = self._hole(ranges, num_tokens)
        if start is None:
            return self._close_up([r for r in ranges if r is not old], old, num_tokens)
        found = self._range(start, num_tokens)
        if old is not None:
            found.copy_from(old, old.length)
        return found

    def start(self, cache: KVCache) -> int:
        """Say where a row begins."""
        assert isinstance(cache, Range)
        return cache.start

    def rows(
        self, meta: AttnMeta, starts_S: Tensor, totals_S: Tensor, slots_T: Tensor
    ) -> PackedRows | GatheredRows:
        """Give the rows of one forward to the model; int64 tensors on the device of the arena.

        Segment s, whose queries `meta` counts, has its keys at starts_S[s] and `totals_S[s]` of
        them, new ones included, at most meta.max_seqlen_k; token t is stored at slots_T[t].
        """
        if self.packs:
            # The kernel reads only where segments begin, but wants one number more.
            starts = torch.cat((starts_S, starts_S[-1:])).int()
            return PackedRows(self, meta, slots_T, starts, totals_S.int())
        assert meta.max_seqlen_q == 1, "one token each, where torch has no packed kernel"
        return GatheredRows.of(self, meta, slots_T, starts_S, totals_S)

    def store(self, layer: int, slots_T: Tensor, k_TKC: Tensor, v_TKC: Tensor) -> None:
        """Write the keys and values of new tokens."""
        self.k_LKTC[layer].index_copy_(1, slots_T, k_TKC.transpose(0, 1))
        self.v_LKTC[layer].index_copy_(1, slots_T, v_TKC.transpose(0, 1))

    def _range(self, start: int, num_tokens: int, length: int = 0) -> Range:
        stop = start + num_tokens
        k_LKZC, v_LKZC = self.k_LKTC[:, :, start:stop], self.v_LKTC[:, :, start:stop]
        return Range(k_LKZC, v_LKZC, length, start)

    def _hole(self, ranges: Sequence[Range], num_tokens: int) -> int | None:
        """Find the first free tokens that are enough."""
        start = 0
        for taken in ranges:
            if taken.start - start >= num_tokens:
                return start
            start = taken.start + taken.capacity
        return start if self.num_tokens - start >= num_tokens else None

    def _close_up(self, others: Sequence[Range], old: Range | None, num_tokens: int) -> Range:
        """Move all rows together, so that what is free lies in one piece behind them."""
        used = sum(row.capacity for row in others)
        assert used + num_tokens <= self.num_tokens, "more was shared out than there is"
        row = old or self._range(0, 0)
        held = row.length
        saved = [x[:, :, :held].clone() for x in (row.k_LKZC, row.v_LKZC)]
        # From here on nothing asks for memory, so that an interrupt alone can come between.
        self.is_torn = True
        start = 0
        for other in others:
            self._move(other, start)
            start += other.capacity
        found = self._range(start, num_tokens)
        row.k_LKZC, row.v_LKZC, row.start = found.k_LKZC, found.v_LKZC, start
        row.k_LKZC[:, :, :held], row.v_LKZC[:, :, :held] = saved
        self.is_torn = False
        return row

    def _move(self, row: Range, start: int) -> None:
        """Move a row toward the beginning, in pieces that do not overlap their new places."""
        distance = row.start - start
        if distance == 0:
            return
        target = self._range(start, row.capacity, row.length)
        for first in range(0, row.length, distance):
            stop = min(first + distance, row.length)
            target.k_LKZC[:, :, first:stop] = row.k_LKZC[:, :, first:stop]
            target.v_LKZC[:, :, first:stop] = row.v_LKZC[:, :, first:stop]
        row.k_LKZC, row.v_LKZC, row.start = target.k_LKZC, target.v_LKZC, start


@dataclass(frozen=True, slots=True)
class PackedRows(SharedCache):
    """Rows for torch's packed kernel, which takes segments of any lengths."""

    arena: Arena
    meta: AttnMeta
    slots_T: Tensor
    starts_k: Tensor  # (S+1,) int32
    totals_S: Tensor  # int32

    def layer(self, index: int) -> partial[Tensor]:
        """Give one layer's share."""
        return partial(self._attend, index)

    def _attend(self, index: int, q_THC: Tensor, k_TKC: Tensor, v_TKC: Tensor) -> Tensor:
        self.arena.store(index, self.slots_T, k_TKC, v_TKC)
        return kernels.attend_packed(
            q_THC,
            self.arena.k_LKTC[index].transpose(0, 1),
            self.arena.v_LKTC[index].transpose(0, 1),
            (self.meta.cu_seqlens_q, self.starts_k),
            (self.meta.max_seqlen_q, self.meta.max_seqlen_k),
            causal=True,
            used_S=self.totals_S,
        )


@dataclass(frozen=True, slots=True)
class GatheredRows(SharedCache):
    """Rows of one new token each, in plain torch: keys are gathered up to one length for all."""

    arena: Arena
    slots_S: Tensor
    places: Tensor  # (S * Z,): where the keys of each row lie, Z of them
    mask_S11Z: Tensor

    @classmethod
    def of(
        cls, arena: Arena, meta: AttnMeta, slots_S: Tensor, starts_S: Tensor, totals_S: Tensor
    ) -> GatheredRows:
        """Lay out the gathering, once for all layers."""
        steps_Z = torch.arange(meta.max_seqlen_k, device=starts_S.device)
        # Beyond its end a row sees its last key again, hidden: what lies there may be no number.
        inside_SZ = torch.minimum(steps_Z, totals_S[:, None] - 1)
        hidden_SZ = steps_Z >= totals_S[:, None]
        mask_SZ = torch.zeros_like(hidden_SZ, dtype=arena.k_LKTC.dtype)
        mask_SZ.masked_fill_(hidden_SZ, -math.inf)
        places = (starts_S[:, None] + inside_SZ).flatten()
        return cls(arena, slots_S, places, mask_SZ[:, None, None])

    def layer(self, index: int) -> partial[Tensor]:
        """Give one layer's share."""
        return partial(self._attend, index)

    def _attend(self, index: int, q_SHC: Tensor, k_SKC: Tensor, v_SKC: Tensor) -> Tensor:
        self.arena.store(index, self.slots_S, k_SKC, v_SKC)
        k_SKZC, v_SKZC = (
            x[index].index_select(1, self.places).unflatten(1, (len(q_SHC), -1)).transpose(0, 1)
            for x in (self.arena.k_LKTC, self.arena.v_LKTC)
        )
        # As in model/attention.py, the heads of a group stand as the queries.
        queries = q_SHC.unflatten(1, (k_SKC.shape[1], -1))
        out = F.scaled_dot_product_attention(queries, k_SKZC, v_SKZC, attn_mask=self.mask_S11Z)
        return out.flatten(1, 2)
