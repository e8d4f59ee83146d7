"""Engine core: scheduler, model runner and caches of one engine, advanced step by step.

`step` is schedule, execute, update: a continuous batch of all unfinished requests. The state of the
three parts must agree, so a core is thrown away after an interrupt or an unexpected error, and a
new one with empty caches takes its place; the `EngineResources` (KV storage, compiled code, disk
cache) outlive it. Running out of memory and errors of single requests are handled inside `step` and
leave the core usable. `ExclusiveEngine` creates and discards cores, and gives them to one owner at
a time, by an `EngineSession`. (vLLM: v1.engine.core.EngineCore.)
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from qwen2vl.engine.config import EngineConfig
from qwen2vl.engine.decode.backend import DecodeBackend
from qwen2vl.engine.decode.cuda_graphs import CudaGraphDecode
from qwen2vl.engine.decode.kernel_decode import KernelDecode
from qwen2vl.engine.encoder_cache.disk_cache import DiskEmbeddingCache
from qwen2vl.engine.encoder_cache.manager import EncoderCacheManager
from qwen2vl.engine.encoder_cache.memory_cache import EmbeddingCache
from qwen2vl.engine.encoder_cache.weights_digest import VisionWeightsDigest
from qwen2vl.engine.kv_cache.arena import KVArena
from qwen2vl.engine.kv_cache.block_pool import BLOCK_SIZE, BlockPool
from qwen2vl.engine.kv_cache.storage import KVStorage, SeparateStorage
from qwen2vl.engine.request import Request
from qwen2vl.engine.runner import ModelRunner, StepOutOfMemoryError
from qwen2vl.engine.scheduler.output import RequestOutput, StepLimits
from qwen2vl.engine.scheduler.scheduler import Scheduler
from qwen2vl.engine.scheduler.speculative import NgramProposer
from qwen2vl.engine.stats import EngineCounters
from qwen2vl.errors import EngineError, Qwen2VLError
from qwen2vl.lora.multi import LoraManager
from qwen2vl.model import KVCache, Qwen2VL

T = TypeVar("T")

# Seconds that a step waits for the decoding of a video where there is nothing else to do.
MAX_DECODING_WAIT = 0.02

__all__ = ["EngineCore", "EngineResources", "EngineSession", "ExclusiveEngine"]


@dataclass(slots=True)
class EngineResources:
    """What outlives an engine core, because it is large or takes long to create."""

    kv_storage: KVStorage
    decode_backend: DecodeBackend | None
    disk_cache: DiskEmbeddingCache | None
    weights_digest: VisionWeightsDigest
    counters: EngineCounters = field(default_factory=EngineCounters)

    @classmethod
    def create(
        cls, model: Qwen2VL, config: EngineConfig, num_blocks: int, kv_cache: type[KVCache]
    ) -> EngineResources:
        """Create the resources of a model; with a disk cache, start hashing its vision tower.

        On a GPU the KV storage is an arena and the decode backend CUDA graphs; on a CPU separate
        tensors, and the decode kernel.

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
            assert kv_cache is KVCache, "the arena stores the model's dtype"
            num_slots = num_blocks * BLOCK_SIZE
            arena = KVArena(model.config.text, num_slots, model.dtype, model.device)
            if config.cuda_graphs:
                decode_backend = CudaGraphDecode(model, arena, config.max_num_seqs)
            return cls(arena, decode_backend, disk_cache, weights_digest)
        if model.device.type == "cpu":
            decode_backend = KernelDecode(model, config.max_num_seqs)
        storage = SeparateStorage(model.config.text, model.dtype, model.device, kv_cache)
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
            model, embedding_cache, resources.weights_digest, lora_manager, resources.counters
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
            resources.counters,
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
        if scheduler_output.is_empty:
            for source, index in scheduler_output.awaited_pairs[:1]:
                source.wait(index, MAX_DECODING_WAIT)
            return list(scheduler_output.failed)
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


class ExclusiveEngine:
    """The engine core of one LLM; it is used by one owner at a time.

    An owner is a synchronous call, an open stream or an AsyncLLM. Any other is refused at once
    instead of waiting: requests of two owners in one core would receive each other's outputs.
    """

    def __init__(self, create_core: Callable[[], EngineCore]) -> None:
        self._create_core: Callable[[], EngineCore] | None = create_core  # None: closed
        self._core: EngineCore | None = None
        # The session of the owner, under one key: `setdefault` is atomic, and unlike a lock it
        # cannot be left locked by an interrupt. A weak reference, because an interrupt may prevent
        # the release: then the ownership ends with the last reference to the session.
        self._owner: dict[str, weakref.ref[EngineSession]] = {}

    @property
    def is_closed(self) -> bool:
        """Whether the LLM was closed."""
        return self._create_core is None

    @property
    def current_core(self) -> EngineCore | None:
        """The core if there is one: none before the first use, after an error, and when closed."""
        return self._core

    @property
    def core(self) -> EngineCore:
        """The core; a new one at the first use, and after an interrupt or an error.

        Raises:
            EngineError: the LLM was closed.
        """
        if self._core is None:
            self.check_open("LLM.engine_core")
            assert self._create_core is not None
            self._core = self._create_core()
        return self._core

    def discard_core(self) -> None:
        """Drop the core with its requests and caches; the next use creates a new one."""
        self._core = None

    def close(self) -> None:
        """Drop the core, and refuse all later uses."""
        self._core = self._create_core = None

    def check_open(self, method: str) -> None:
        """Raise an EngineError if the LLM was closed."""
        if self.is_closed:
            raise EngineError(f"{method}: this LLM was closed; create a new one")

    def acquire(self, owner: str, *, is_async: bool = False) -> EngineSession:
        """Give the engine to an owner, named as in "LLM.chat", until its session is released.

        Raises:
            EngineError: the engine has another owner, or the LLM was closed.
        """
        self.check_open(owner)
        session = EngineSession(self, owner, is_async=is_async)
        reference = weakref.ref(session, self._on_session_lost)
        while (registered := self._owner.setdefault("session", reference)) is not reference:
            if (other := registered()) is not None:
                raise EngineError(f"{owner}: {other.describe_conflict(is_async=is_async)}")
        return session

    @contextmanager
    def session(self, owner: str) -> Iterator[EngineSession]:
        """Give the engine to a synchronous call of the name `owner`; errors as for `acquire`."""
        session = self.acquire(owner)
        try:
            yield session
        finally:
            session.release()

    @contextmanager
    def using_core(self) -> Iterator[EngineCore]:
        """Yield the core; discard it on an interrupt or an unexpected error.

        Either may have come in the middle of a change of its state. Errors of this library are
        raised before or after one.
        """
        core = self.core
        try:
            yield core
        except Qwen2VLError:
            raise
        except BaseException:
            self.discard_core()
            raise

    def is_owned_by(self, session: EngineSession) -> bool:
        """Whether this session has the engine."""
        registered = self._owner.get("session")
        return registered is not None and registered() is session

    def unregister(self, session: EngineSession) -> None:
        """End the ownership of a session; does nothing if it has ended."""
        if self.is_owned_by(session):
            del self._owner["session"]

    def end_open_stream(self) -> None:
        """Release the session of a stream that this thread has left open."""
        registered = self._owner.get("session")
        session = None if registered is None else registered()
        if session is not None and session.is_stream_of_this_thread:
            session.release()

    def _on_session_lost(self, reference: weakref.ref[EngineSession]) -> None:
        """End the ownership of a session that was interrupted before or in its release."""
        if self._owner.get("session") is reference:
            self.discard_core()  # it may hold requests of that session
            del self._owner["session"]


class EngineSession:
    """The right of one owner to run an engine, and the requests that it runs."""

    def __init__(self, engine: ExclusiveEngine, owner: str, *, is_async: bool = False) -> None:
        self._engine = engine
        self._owner = owner
        self._is_async = is_async
        self._thread = threading.current_thread()
        self._unfinished: set[Request] = set()

    @property
    def is_stream_of_this_thread(self) -> bool:
        """Whether the owner is an `LLM.stream` that the calling thread has opened."""
        return self._owner == "LLM.stream" and self._thread is threading.current_thread()

    @property
    def has_unfinished_requests(self) -> bool:
        """Whether any request of the engine is waiting or running."""
        core = self._engine.current_core
        return core is not None and core.scheduler.has_unfinished_requests

    def run(self, requests: Sequence[Request]) -> Iterator[list[RequestOutput]]:
        """Run the engine until all of `requests` are finished; yield their outputs of each step."""
        for request in requests:
            self.add_request(request)
        unfinished = set(requests)
        while unfinished:
            outputs = [output for output in self.step() if output.request in unfinished]
            unfinished -= {o.request for o in outputs if o.request.finish_reason is not None}
            yield outputs

    def add_request(self, request: Request) -> None:
        """Queue a request for the next steps; `release` aborts it if it has not finished."""
        self._check_owner()
        request.timer.mark_submitted()
        self._unfinished.add(request)
        with self._engine.using_core() as core:
            core.add_request(request)

    def step(self) -> list[RequestOutput]:
        """Run one engine step; return new text of its requests.

        After an unexpected exception all requests are gone.
        """
        self._check_owner()
        with self._engine.using_core() as core:
            outputs = core.step()
        for output in outputs:
            if output.request.finish_reason is not None:
                self._unfinished.discard(output.request)
        return outputs

    def run_operation(self, operation: Callable[[EngineCore], T]) -> T:
        """Call a function with the core, between two steps, and return its result.

        After an unexpected exception all requests are gone, as after one of a step.
        """
        self._check_owner()
        with self._engine.using_core() as core:
            return operation(core)

    def abort(self, request: Request) -> None:
        """Stop a request; does nothing if it has finished."""
        self._check_owner()
        if self._engine.current_core is not None:
            with self._engine.using_core() as core:
                core.abort(request)
        self._unfinished.discard(request)

    def release(self) -> None:
        """Abort what has not finished and end the ownership; does nothing the second time."""
        if not self._engine.is_owned_by(self):
            return
        try:
            for request in tuple(self._unfinished):
                self.abort(request)
        except BaseException:
            self._engine.discard_core()  # it holds the others
            raise
        finally:
            self._engine.unregister(self)

    def describe_conflict(self, *, is_async: bool) -> str:
        """Say that this session has the engine, and what another owner can do."""
        if self._is_async:
            remedy = "share that one" if is_async else "use its chat and stream"
            return f"this LLM is owned by an AsyncLLM; {remedy}, or close it first"
        if self.is_stream_of_this_thread:
            return "an LLM.stream of this thread is open; exhaust or close it first"
        if self._thread is threading.current_thread():
            return (
                f"called inside {self._owner}, by on_delta or on_step; call it after that has "
                "returned"
            )
        return (
            f"this LLM is running {self._owner} in thread {self._thread.name}; wait for it, or "
            "serve concurrent callers by an AsyncLLM"
        )

    def _check_owner(self) -> None:
        if not self._engine.is_owned_by(self):
            self._engine.check_open(self._owner)
            raise EngineError(f"{self._owner}: it no longer owns the engine; call it again")
