"""Encoder cache manager: vision embeddings of the running requests, reference-counted.

The unit is the frame pair, of which an image has one: the vision tower attends within a pair, so a
pair has the same embeddings in any video, and a video that is encoded in parts has those of one
encoded at once. A pair's embeddings come from the `EmbeddingCache` or are encoded; pairs with the
same pixels, in one video or several, are encoded once. Requests hold only the pairs that they are
about to compute. (vLLM v1: EncoderCacheManager, which keeps whole videos.)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from qwen2vl.engine.encoder_cache.disk_cache import EmbeddingKey
from qwen2vl.engine.encoder_cache.memory_cache import EmbeddingCache
from qwen2vl.engine.encoder_cache.weights_digest import VisionWeightsDigest
from qwen2vl.engine.scheduler.output import EncoderInput
from qwen2vl.engine.stats import EngineCounters
from qwen2vl.geometry import Grid, VisionMeta
from qwen2vl.lora.multi import LoraManager
from qwen2vl.model import Qwen2VL
from qwen2vl.threads import batch_threads

__all__ = ["EncoderCacheManager"]


class EncoderCacheManager:
    """Keeps the embeddings of each frame pair as long as a running request needs them."""

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
        self._embeddings: dict[bytes, Tensor] = {}

    def acquire(self, digests: Sequence[bytes]) -> None:
        """Add a reference to each frame pair: embeddings are kept until as many `release` calls."""
        weights_digest = self._weights.digest()
        for digest in digests:
            self._num_references[digest] += 1
            self._counters.encoder_cache_queries += 1
            if self._num_references[digest] > 1:
                self._counters.encoder_cache_hits += 1
                continue
            key = self._keys[digest] = EmbeddingKey(digest, weights_digest)
            self.cache.pin(key)
            vision_MD = self.cache.get(key)
            if vision_MD is not None:
                self._counters.encoder_cache_hits += 1
                self._embeddings[digest] = vision_MD

    def release(self, digest: bytes) -> None:
        """Remove a reference; embeddings stay in the `EmbeddingCache`."""
        assert self._num_references[digest] > 0, "released more often than acquired"
        self._num_references[digest] -= 1
        if not self._num_references[digest]:
            del self._num_references[digest]
            self.cache.unpin(self._keys.pop(digest))
            self._embeddings.pop(digest, None)

    def discard(self, digests: Sequence[bytes]) -> None:
        """Remove embeddings from memory and disk; those in use stay until released."""
        weights_digest = self._weights.digest()
        for digest in digests:
            self.cache.remove(EmbeddingKey(digest, weights_digest))

    def has_embeddings(self, digest: bytes) -> bool:
        """Return whether a frame pair that was acquired has embeddings."""
        return digest in self._embeddings

    def embeddings(self, digest: bytes) -> Tensor:
        """Return the embeddings of a frame pair, (tokens, D)."""
        return self._embeddings[digest]

    def encode(self, inputs: Sequence[EncoderInput]) -> None:
        """Encode frame pairs of any items in one forward of the vision tower; keep the embeddings.

        Each digest occurs once.
        """
        device = self.model.device
        grids = [Grid(1, one.item.grid.h, one.item.grid.w) for one in inputs]
        patches_NP = torch.cat([one.patches_NP for one in inputs]).to(device)
        meta = VisionMeta.build(grids).to(device)
        segments = [(one.adapter, one.num_patches) for one in inputs]
        with self._lora_manager.activate("visual", segments), batch_threads(len(patches_NP)):
            vision_MD = self.model.encode(patches_NP, meta)
        weights_digest = self._weights.digest()
        parts = vision_MD.split([one.item.tokens_per_pair for one in inputs])
        for one, pair_MD in zip(inputs, parts, strict=True):
            self._store(one.digest, pair_MD, weights_digest)

    def _store(self, digest: bytes, pair_MD: Tensor, weights_digest: bytes) -> None:
        if digest not in self._num_references:
            return  # released after the step was scheduled
        if pair_MD.untyped_storage().nbytes() > pair_MD.nbytes:
            pair_MD = pair_MD.clone()  # a view would keep the embeddings of the whole step alive
        self._embeddings[digest] = pair_MD
        key = self._keys[digest]
        # If the weights changed in the meantime, the embeddings are of neither digest.
        if key.weights_digest == weights_digest:
            self.cache.put(key, pair_MD)
