"""Encoder cache manager: vision embeddings of the running requests, reference-counted.

An item's embeddings come whole from the `EmbeddingCache`, or are encoded in chunks of frame pairs
over several steps (chunked encoding). The vision tower attends within one frame pair, so a video
encoded in chunks has the same embeddings as one encoded at once. Items that several requests share
are encoded once. (vLLM v1: EncoderCacheManager.)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from qwen2vl.engine.encoder_cache.disk_cache import EmbeddingKey
from qwen2vl.engine.encoder_cache.memory_cache import EmbeddingCache
from qwen2vl.engine.encoder_cache.weights_digest import VisionWeightsDigest
from qwen2vl.engine.scheduler.output import EncoderChunk
from qwen2vl.engine.stats import EngineCounters
from qwen2vl.geometry import Grid, VisionMeta
from qwen2vl.lora.multi import LoraManager
from qwen2vl.model import Qwen2VL
from qwen2vl.processor.inputs import Item
from qwen2vl.threads import batch_threads

__all__ = ["EncoderCacheManager"]


class EncoderCacheManager:
    """Keeps the embeddings of each item as long as a running request needs them."""

    def __init__(
        self,
        model: Qwen2VL,
        cache: EmbeddingCache,
        weights: VisionWeightsDigest,
        lora_manager: LoraManager,
        counters: EngineCounters | None = None,
    ) -> None:
        self.model = model
        self.cache = cache
        self._weights = weights
        self._lora_manager = lora_manager
        self._counters = counters or EngineCounters()
        self._num_references: Counter[bytes] = Counter()
        self._keys: dict[bytes, EmbeddingKey] = {}  # of the weights at the first acquisition
        # By item digest; embeddings of frame pairs that are not yet encoded are uninitialized.
        self._embeddings: dict[bytes, Tensor] = {}
        self._num_encoded: dict[bytes, int] = {}  # frame pairs, by item digest

    def acquire(self, item: Item) -> None:
        """Add a reference to an item; its embeddings are kept until as many calls of `release`."""
        self._num_references[item.digest] += 1
        self._counters.encoder_cache_queries += 1
        if self._num_references[item.digest] > 1:
            self._counters.encoder_cache_hits += 1
            return
        key = EmbeddingKey(item.digest, self._weights.digest())
        self._keys[item.digest] = key
        self.cache.pin(key)
        vision_MD = self.cache.get(key)
        if vision_MD is not None:
            self._counters.encoder_cache_hits += 1
            self._embeddings[item.digest], self._num_encoded[item.digest] = vision_MD, item.grid.t

    def release(self, item: Item) -> None:
        """Remove a reference; complete embeddings stay in the `EmbeddingCache`."""
        assert self._num_references[item.digest] > 0, "released more often than acquired"
        self._num_references[item.digest] -= 1
        if not self._num_references[item.digest]:
            del self._num_references[item.digest]
            self.cache.unpin(self._keys.pop(item.digest))
            self._embeddings.pop(item.digest, None)
            self._num_encoded.pop(item.digest, None)

    def discard(self, item: Item) -> None:
        """Remove an item's embeddings from memory and disk; those in use stay until released."""
        self.cache.remove(EmbeddingKey(item.digest, self._weights.digest()))

    def num_encoded_frame_pairs(self, item: Item) -> int:
        """Return the number of frame pairs whose embeddings are available."""
        return self._num_encoded.get(item.digest, 0)

    def embeddings(self, item: Item) -> Tensor:
        """Return the embeddings of an item, (num_tokens, D)."""
        return self._embeddings[item.digest]

    def encode(self, chunks: Sequence[EncoderChunk]) -> None:
        """Encode chunks of any items in one forward of the vision tower; store the embeddings."""
        device = self.model.device
        grids = [Grid(c.stop - c.start, c.item.grid.h, c.item.grid.w) for c in chunks]
        patches_NP = torch.cat([_patches(c) for c in chunks]).to(device)
        meta = VisionMeta.build(grids).to(device)
        segments = [(chunk.adapter, chunk.num_patches) for chunk in chunks]
        with self._lora_manager.activate("visual", segments), batch_threads(len(patches_NP)):
            vision_MD = self.model.encode(patches_NP, meta)
        sizes = [c.item.num_tokens // c.item.grid.t * (c.stop - c.start) for c in chunks]
        for chunk, chunk_MD in zip(chunks, vision_MD.split(sizes), strict=True):
            self._store(chunk, chunk_MD)

    def _store(self, chunk: EncoderChunk, chunk_MD: Tensor) -> None:
        item = chunk.item
        if item.digest not in self._num_references:
            return  # released after the step was scheduled
        assert self.num_encoded_frame_pairs(item) == chunk.start, "chunks must come in order"
        if chunk.stop - chunk.start == item.grid.t:
            self._embeddings[item.digest] = chunk_MD
        else:
            if item.digest not in self._embeddings:
                self._embeddings[item.digest] = chunk_MD.new_empty(
                    item.num_tokens, chunk_MD.shape[1]
                )
            size = item.num_tokens // item.grid.t  # tokens of one frame pair
            self._embeddings[item.digest][size * chunk.start : size * chunk.stop] = chunk_MD
        self._num_encoded[item.digest] = chunk.stop
        key = self._keys[item.digest]
        # If the weights changed in the meantime, the embeddings are of neither digest.
        if chunk.stop == item.grid.t and key.weights_digest == self._weights.digest():
            self.cache.put(key, self._embeddings[item.digest])


def _patches(chunk: EncoderChunk) -> Tensor:
    area = chunk.item.grid.h * chunk.item.grid.w
    return chunk.item.patches_NP[area * chunk.start : area * chunk.stop]
