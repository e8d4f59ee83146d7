"""Engine core: scheduler, model runner and caches of one engine, advanced step by step.

`step` is schedule, execute, update: a continuous batch of all unfinished requests. The state of the
three parts must agree, so a core is thrown away after an interrupt or an unexpected error, and its
owner (`LLM`) creates a new one with empty caches; the `EngineResources` (KV storage, compiled code,
disk cache) outlive it. Running out of memory and errors of single requests are handled inside
`step` and leave the core usable. (vLLM: v1.engine.core.EngineCore.)
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qwen2vl.engine.config import EngineConfig
from qwen2vl.engine.decode.backend import DecodeBackend
from qwen2vl.engine.decode.compiled import CompiledDecode
from qwen2vl.engine.decode.cuda_graphs import CudaGraphDecode
from qwen2vl.engine.encoder_cache.disk_cache import DiskEmbeddingCache
from qwen2vl.engine.encoder_cache.manager import EncoderCacheManager
from qwen2vl.engine.encoder_cache.memory_cache import EmbeddingCache
from qwen2vl.engine.encoder_cache.weights_digest import VisionWeightsDigest
from qwen2vl.engine.kv_cache.arena import KVArena
from qwen2vl.engine.kv_cache.block_pool import BLOCK_SIZE, BlockPool
from qwen2vl.engine.kv_cache.storage import KVStorage, SeparateStorage
from qwen2vl.engine.request import Request
from qwen2vl.engine.runner import ModelRunner, StepOutOfMemoryError
from qwen2vl.engine.scheduler.output import StepLimits
from qwen2vl.engine.scheduler.scheduler import RequestOutput, Scheduler
from qwen2vl.engine.speculative import NgramProposer
from qwen2vl.lora.multi import LoraManager
from qwen2vl.model import Qwen2VL

__all__ = ["EngineCore", "EngineResources"]


@dataclass(slots=True)
class EngineResources:
    """What outlives an engine core, because it is large or takes long to create."""

    kv_storage: KVStorage
    decode_backend: DecodeBackend | None
    disk_cache: DiskEmbeddingCache | None
    weights_digest: VisionWeightsDigest

    @classmethod
    def create(
        cls, model: Qwen2VL, config: EngineConfig, num_blocks: int, *, is_compiled: bool
    ) -> EngineResources:
        """Create the resources of a model; with a disk cache, start hashing its vision tower.

        On a GPU the KV storage is an arena and the decode backend CUDA graphs; on a CPU separate
        tensors, and compiled decoder blocks where the model is compiled.

        Raises:
            CapacityError: the arena does not fit into the device's memory.
            InputError: the folder of the disk cache cannot be created, or is not private.
        """
        folder, max_disk_bytes = config.encoder_cache_dir, config.encoder_cache_disk_bytes
        disk_cache = (
            None if folder is None else DiskEmbeddingCache(Path(folder), max_bytes=max_disk_bytes)
        )
        weights_digest = VisionWeightsDigest(model, persistent=disk_cache is not None)
        # Takes a second for the official towers, while the first prompt is processed.
        weights_digest.start_hashing()
        decode_backend: DecodeBackend | None = None
        if model.device.type == "cuda":
            num_slots = num_blocks * BLOCK_SIZE
            arena = KVArena(model.config.text, num_slots, model.dtype, model.device)
            if config.cuda_graphs:
                decode_backend = CudaGraphDecode(model, arena, config.max_num_seqs)
            return cls(arena, decode_backend, disk_cache, weights_digest)
        if is_compiled and model.device.type == "cpu":
            decode_backend = CompiledDecode.try_compile(model)
        storage = SeparateStorage(model.config.text, model.dtype, model.device)
        return cls(storage, decode_backend, disk_cache, weights_digest)


class EngineCore:
    """One engine over a model: requests in, text out, step by step."""

    def __init__(
        self,
        model: Qwen2VL,
        config: EngineConfig,
        num_blocks: int,
        lora_manager: LoraManager,
        resources: EngineResources,
    ) -> None:
        """Start without requests and with empty caches of `num_blocks` KV blocks."""
        embedding_cache = EmbeddingCache(
            max_bytes=config.encoder_cache_bytes,
            disk_cache=resources.disk_cache,
            device=model.device,
        )
        self.encoder_cache = EncoderCacheManager(
            model, embedding_cache, resources.weights_digest, lora_manager
        )
        self.runner = ModelRunner(
            model,
            self.encoder_cache,
            lora_manager,
            resources.kv_storage,
            resources.decode_backend,
        )
        self.scheduler = Scheduler(
            BlockPool(num_blocks),
            self.encoder_cache,
            StepLimits(
                max_num_batched_tokens=config.max_num_batched_tokens,
                max_num_encoder_patches=config.max_num_encoder_patches,
                max_num_seqs=config.max_num_seqs,
            ),
            NgramProposer(config.num_speculative_tokens) if config.num_speculative_tokens else None,
        )

    def add_request(self, request: Request) -> None:
        """Append a request to the waiting queue."""
        self.scheduler.add_request(request)

    def abort(self, request: Request) -> None:
        """Stop a request; what it computed stays in the prefix cache until it is evicted."""
        self.scheduler.abort(request)
        self._apply_free_operations()

    def step(self) -> list[RequestOutput]:
        """Run one engine step: schedule, execute, update; return new text of its requests.

        When memory runs out, cached blocks and vision embeddings are evicted and the next step
        tries again; without any, the request that needs most of the memory fails.
        """
        if not self.scheduler.has_unfinished_requests:
            return []
        scheduler_output = self.scheduler.schedule()
        try:
            results = self.runner.execute_model(scheduler_output)
        except StepOutOfMemoryError as out_of_memory:
            if self.evict_cached():
                return []
            outputs = [self.scheduler.fail(out_of_memory.request, out_of_memory.error)]
        else:
            outputs = self.scheduler.update_from_output(scheduler_output, results)
        self._apply_free_operations()
        return outputs

    def evict_cached(self) -> bool:
        """Evict cached KV blocks and vision embeddings that no request uses; False: none."""
        pool, cache = self.scheduler.pool, self.encoder_cache.cache
        if not pool.num_evictable_blocks and cache.pinned_bytes == cache.stats.num_bytes:
            return False
        self.scheduler.reset_prefix_cache()
        self._apply_free_operations()
        cache.clear()
        return True

    def _apply_free_operations(self) -> None:
        self.runner.apply_free_operations(self.scheduler.pool.cache_operations)
