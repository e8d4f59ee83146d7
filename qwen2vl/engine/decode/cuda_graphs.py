"""Decode without the host: one token of each row, from numbers that lie at fixed addresses.

A decode step of a small model is thousands of tiny kernels, and launching them costs more time
than they take. Here the step reads all that changes (ids, positions, where rows begin, how long
they are) from one buffer, so that on a GPU it is recorded once, as a CUDA graph, and replayed with
new numbers. Recorded are a few sizes, when they are first needed: batches padded to 1, 2, 4, 8, ...
rows, keys up to 512, 1024, 2048, ... tokens. `StaticDecode` is plain torch and runs on any device;
recording is the one thing that needs a GPU. Without this room everything works
(EngineConfig(graphs=False)). Letter of this room: B, the rows of a padded batch. Back up:
decode.py, whose protocol this is.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from qwen2vl.engine.decode.decoder import Token
from qwen2vl.engine.kv_cache.arena import Arena
from qwen2vl.geometry import AttnMeta
from qwen2vl.model import Qwen2VL

__all__ = ["DecodeGraphs", "StaticDecode"]

logger = logging.getLogger(__name__)

NUMBERS = 4  # of each row: id, position, first token in the arena, tokens stored
LEAST_ROOM = 512  # tokens; shorter rows share the graphs of this length


class StaticDecode:
    """Computes logits of up to `most` tokens, each of another row, through fixed buffers."""

    def __init__(self, model: Qwen2VL, arena: Arena, most: int) -> None:
        """Reserve the buffers; nothing is computed yet."""
        self.model = model
        self.arena = arena
        self.most = most
        size = _padded(most)
        device = model.device
        self._numbers = torch.zeros(NUMBERS * size, dtype=torch.int64, device=device)
        self._logits_BV = torch.empty(
            size, model.config.text.vocab_size, dtype=model.dtype, device=device
        )
        self._metas: dict[tuple[int, int], AttnMeta] = {}

    def __call__(self, tokens: Sequence[Token]) -> Tensor:
        """Store and attend; returns logits, one row for each token, until the next call.

        On a GPU nothing here waits for it.
        """
        size = _padded(len(tokens))
        room = self._room(max(token.cache.length for token in tokens) + 1)
        rows = [(t.id, t.position, self.arena.start(t.cache), t.cache.length) for t in tokens]
        nobody = (0, 0, self.arena.num_tokens, 0)
        rows += [nobody] * (size - len(tokens))
        numbers = torch.tensor(rows, dtype=torch.int64).T.flatten()
        if self._numbers.is_cuda:
            numbers = numbers.pin_memory()
        self._numbers[: len(numbers)].copy_(numbers, non_blocking=True)
        self.run(size, room)
        return self._logits_BV[: len(tokens)]

    def run(self, size: int, room: int) -> None:
        """Compute a padded batch whose numbers lie ready."""
        self.forward(size, room)

    def forget(self) -> None:
        """Hear that weights are others now."""

    @torch.inference_mode()
    def forward(self, size: int, room: int) -> None:
        """Compute the logits of `size` rows of at most `room` tokens, from buffer to buffer."""
        numbers = self._numbers[: NUMBERS * size]
        ids_B, positions_B, starts_B, lengths_B = numbers.view(-1, size)
        if (size, room) not in self._metas:
            meta = AttnMeta.build([1] * size, [room] * size)
            self._metas[size, room] = meta.to(self.model.device)
        meta = self._metas[size, room]
        rows = self.arena.rows(meta, starts_B, lengths_B + 1, starts_B + lengths_B)
        hidden_BD = self.model(ids_B, positions_B.expand(3, -1), meta, caches=rows)
        self._logits_BV[:size] = self.model.logits(hidden_BD)

    def _room(self, num_tokens: int) -> int:
        return min(max(_padded(num_tokens), LEAST_ROOM), self.arena.num_tokens)


class DecodeGraphs(StaticDecode):
    """Records each size of batch and room as a CUDA graph after its first run."""

    def __init__(self, model: Qwen2VL, arena: Arena, most: int) -> None:
        super().__init__(model, arena, most)
        # None: there was no memory to record it.
        self._graphs: dict[tuple[int, int], torch.cuda.CUDAGraph | None] = {}

    def run(self, size: int, room: int) -> None:
        """Compute a padded batch whose numbers lie ready."""
        graph = self._graphs.get((size, room))
        if graph is not None:
            graph.replay()
            return
        self.forward(size, room)  # first as it is: libraries set themselves up
        if (size, room) not in self._graphs:
            self._graphs[size, room] = self._recorded_or_not(size, room)

    def forget(self) -> None:
        """Hear that weights are others now: graphs hold the addresses of the old ones."""
        self._graphs.clear()
        self.__dict__.pop("_places", None)  # scratch memory that nobody uses may not be used again

    def _recorded_or_not(self, size: int, room: int) -> torch.cuda.CUDAGraph | None:
        """Record, unless that takes more memory than there is: the step is computed already."""
        try:
            return self._recorded(size, room)
        except torch.OutOfMemoryError:
            logger.warning(
                "decode of %d rows up to %d tokens is not recorded, and so slower: the GPU's "
                "memory is full; lower EngineConfig.cache_tokens",
                size,
                room,
            )
            return None

    def _recorded(self, size: int, room: int) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        pool, stream = self._places
        # Other threads may copy from the GPU meanwhile (fingerprint.py does).
        with (
            torch.cuda.device(self.model.device),
            torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"),
        ):
            self.forward(size, room)
        return graph

    @cached_property
    def _places(self) -> tuple[Any, torch.cuda.Stream]:
        """Make the scratch memory that all graphs share, and the stream they are recorded on."""
        return torch.cuda.graph_pool_handle(), torch.cuda.Stream(self.model.device)


def _padded(count: int) -> int:
    """Round up to a power of two."""
    return 1 << (count - 1).bit_length()
