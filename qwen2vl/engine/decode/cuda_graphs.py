"""CUDA graphs for decode steps: captured once per batch size and KV length, then replayed.

A decode step of a small model is thousands of tiny kernels whose launches cost more time than the
kernels. `StaticDecode` reads all inputs that change between steps (token ids, positions, cache
ranges) from one buffer at a fixed address, so `CudaGraphDecode` can capture the step and replay it
with new inputs. Captured on first use: batches padded to 1, 2, 4, 8, ... requests, KV lengths
padded to 512, 1024, 2048, ... tokens. `StaticDecode` is plain PyTorch and runs on any device; only
capture needs a GPU. Optional: EngineConfig(cuda_graphs=False). Letter: B, requests of the padded
batch.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from qwen2vl.engine.decode.backend import DecodeToken
from qwen2vl.engine.kv_cache.arena import KVArena
from qwen2vl.geometry import AttnMeta
from qwen2vl.model import Qwen2VL

__all__ = ["CudaGraphDecode", "StaticDecode"]

logger = logging.getLogger(__name__)

NUM_FIELDS = 4  # of each request: token id, position, first slot in the arena, tokens stored
MIN_KV_LENGTH = 512  # tokens; all shorter KV lengths share one graph


class StaticDecode:
    """Decodes up to `max_batch_size` requests, one token each, through static buffers."""

    def __init__(self, model: Qwen2VL, arena: KVArena, max_batch_size: int) -> None:
        """Allocate the static input and output buffers."""
        self.model = model
        self.arena = arena
        self.max_batch_size = max_batch_size
        batch_size = _padded(max_batch_size)
        device = model.device
        self._inputs = torch.zeros(NUM_FIELDS * batch_size, dtype=torch.int64, device=device)
        self._logits_BV = torch.empty(
            batch_size, model.config.text.vocab_size, dtype=model.dtype, device=device
        )
        self._metas: dict[tuple[int, int], AttnMeta] = {}

    def __call__(self, tokens: Sequence[DecodeToken]) -> Tensor:
        """Store the tokens' keys and values; return logits, one row for each token.

        The logits are valid until the next call. On a GPU the call does not synchronize.
        """
        batch_size = _padded(len(tokens))
        kv_length = self._padded_kv_length(max(token.cache.length for token in tokens) + 1)
        rows = [(t.id, t.position, self.arena.first_slot(t.cache), t.cache.length) for t in tokens]
        padding = (0, 0, self.arena.num_tokens, 0)
        rows += [padding] * (batch_size - len(tokens))
        inputs = torch.tensor(rows, dtype=torch.int64).T.flatten()
        if self._inputs.is_cuda:
            inputs = inputs.pin_memory()
        self._inputs[: len(inputs)].copy_(inputs, non_blocking=True)
        self.run(batch_size, kv_length)
        return self._logits_BV[: len(tokens)]

    def run(self, batch_size: int, kv_length: int) -> None:
        """Compute a padded batch from the input buffer."""
        self.forward(batch_size, kv_length)

    def on_weights_changed(self) -> None:
        """Do nothing: the weights are read from the model in each step."""

    @torch.inference_mode()
    def forward(self, batch_size: int, kv_length: int) -> None:
        """Compute a padded batch of KV lengths up to `kv_length`, from buffer to buffer."""
        inputs = self._inputs[: NUM_FIELDS * batch_size]
        ids_B, positions_B, starts_B, lengths_B = inputs.view(-1, batch_size)
        if (batch_size, kv_length) not in self._metas:
            meta = AttnMeta.build([1] * batch_size, [kv_length] * batch_size)
            self._metas[batch_size, kv_length] = meta.to(self.model.device)
        meta = self._metas[batch_size, kv_length]
        caches = self.arena.batch_of_slots(meta, starts_B, lengths_B + 1, starts_B + lengths_B)
        hidden_BD = self.model(ids_B, positions_B.expand(3, -1), meta, caches=caches)
        self._logits_BV[:batch_size] = self.model.logits(hidden_BD)

    def _padded_kv_length(self, num_tokens: int) -> int:
        return min(max(_padded(num_tokens), MIN_KV_LENGTH), self.arena.num_tokens)


class CudaGraphDecode(StaticDecode):
    """Captures each pair of batch size and KV length as a CUDA graph after its first run."""

    def __init__(self, model: Qwen2VL, arena: KVArena, max_batch_size: int) -> None:
        super().__init__(model, arena, max_batch_size)
        # None: there was not enough memory to capture it.
        self._graphs: dict[tuple[int, int], torch.cuda.CUDAGraph | None] = {}

    def run(self, batch_size: int, kv_length: int) -> None:
        """Compute a padded batch from the input buffer."""
        graph = self._graphs.get((batch_size, kv_length))
        if graph is not None:
            graph.replay()
            return
        self.forward(batch_size, kv_length)  # eagerly first: libraries initialize on first use
        if (batch_size, kv_length) not in self._graphs:
            self._graphs[batch_size, kv_length] = self._try_capture(batch_size, kv_length)

    def on_weights_changed(self) -> None:
        """Drop all graphs: they contain the addresses of the old weights."""
        self._graphs.clear()
        self.__dict__.pop("_pool_and_stream", None)  # an unused pool cannot be reused

    def _try_capture(self, batch_size: int, kv_length: int) -> torch.cuda.CUDAGraph | None:
        """Capture a graph; None when out of memory (the step itself is computed already)."""
        try:
            return self._capture(batch_size, kv_length)
        except torch.OutOfMemoryError:
            logger.warning(
                "decode of %d requests up to %d tokens is not captured as a CUDA graph, and so "
                "slower: the GPU's memory is full; lower EngineConfig.kv_cache_tokens",
                batch_size,
                kv_length,
            )
            return None

    def _capture(self, batch_size: int, kv_length: int) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        pool, stream = self._pool_and_stream
        # Other threads may copy from the GPU meanwhile (weights_digest.py does).
        with (
            torch.cuda.device(self.model.device),
            torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"),
        ):
            self.forward(batch_size, kv_length)
        return graph

    @cached_property
    def _pool_and_stream(self) -> tuple[Any, torch.cuda.Stream]:
        """The memory pool that all graphs share, and the stream they are captured on."""
        return torch.cuda.graph_pool_handle(), torch.cuda.Stream(self.model.device)


def _padded(count: int) -> int:
    """Round up to a power of two."""
    return 1 << (count - 1).bit_length()
