"""The engine of one model: it owns weights, processor, caches and core, and advances requests.

`LLM` adds the calls of users to it, and `AsyncLLM` runs it in a thread. Requests are created from
prompts that `validate` has accepted, and advanced by `step` (schedule, execute, update). Methods
that use the core are refused while somebody else owns it (`ExclusiveEngine`). `DeltaStream` is the
output of one conversation, generated while it is read. (vLLM: LLMEngine.)
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from functools import partial
from inspect import GEN_CLOSED, getgeneratorstate
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from qwen2vl.compile.regions import compile_for_inference
from qwen2vl.config import Qwen2VLConfig
from qwen2vl.engine.config import EngineConfig
from qwen2vl.engine.embed import Embedder, Pooling
from qwen2vl.engine.engine_core import EngineCore, EngineResources, ExclusiveEngine
from qwen2vl.engine.kv_cache.block_pool import BLOCK_SIZE
from qwen2vl.engine.kv_cache.capacity import (
    check_text_fits,
    fitting_max_pixels,
    num_cache_blocks,
    out_of_memory_as_capacity_error,
)
from qwen2vl.engine.outputs import Completion, Delta
from qwen2vl.engine.request import Request, collect_completions
from qwen2vl.engine.sampling.params import SamplingParams
from qwen2vl.engine.scheduler.output import RequestOutput
from qwen2vl.engine.stats import EngineStats
from qwen2vl.engine.validation import RequestValidator, with_cache_identity
from qwen2vl.errors import EngineError
from qwen2vl.loading import load_adapters, resolve_max_model_len
from qwen2vl.lora.multi import LoraManager
from qwen2vl.memory import KVCacheDTypeName, kv_cache_class
from qwen2vl.model import Qwen2VL
from qwen2vl.processor.inputs import ModelInput
from qwen2vl.processor.processor import Processor
from qwen2vl.weights import GenerationDefaults

__all__ = ["DeltaStream", "LLMEngine"]


class DeltaStream:
    """The output of one conversation while it is generated: iterate over its deltas.

    It is an iterator, too: `next` returns one delta, and a loop after it continues. The engine is
    in use from the first delta to the last. Leaving a loop early, or `close`, aborts the request.
    """

    def __init__(
        self, engine: ExclusiveEngine, requests: Sequence[Request], process_seconds: float
    ) -> None:
        self._engine = engine
        self._requests = requests
        self._process_seconds = process_seconds
        self._aborted: set[Request] = set()
        self._deltas: Generator[Delta, None, None] | None = None  # of `next`

    def __iter__(self) -> Iterator[Delta]:
        """Yield the deltas of all samples as they are generated; nothing after the last.

        Raises:
            EngineError: the engine is in use, or the request was aborted before.
        """
        yield from self._current_deltas()

    def __next__(self) -> Delta:
        """Return the next delta; raises as iterating does."""
        self._deltas = self._current_deltas()
        return next(self._deltas)

    def close(self) -> None:
        """Abort the request if `next` has begun it; does nothing after its last delta."""
        if self._deltas is not None:
            self._deltas.close()

    def _current_deltas(self) -> Generator[Delta, None, None]:
        """Return what `next` has begun, or a new generator."""
        if self._deltas is None or getgeneratorstate(self._deltas) == GEN_CLOSED:
            return _generate_deltas(self._engine, self._requests, self._aborted)
        return self._deltas

    def completions(self) -> list[Completion]:
        """Generate what is left; return one Completion for each sample.

        Raises:
            Qwen2VLError: the only sample failed, or the request was aborted.
        """
        for _ in self:
            pass
        return collect_completions(self._requests, [self._process_seconds] * len(self._requests))


def _generate_deltas(
    engine: ExclusiveEngine, requests: Sequence[Request], aborted: set[Request]
) -> Generator[Delta, None, None]:
    """Run requests, and add to `aborted` those that are left unfinished.

    Without a reference to the stream: one that is dropped ends at once, not at the next collection.
    """
    if aborted:
        raise EngineError("LLM.stream: the request was aborted before it finished; repeat it")
    if all(request.finish_reason is not None for request in requests):
        return
    with engine.session("LLM.stream") as session:
        try:
            for outputs in session.run(requests):
                for output in outputs:
                    yield output.delta
        finally:
            aborted.update(r for r in requests if r.finish_reason is None)


class LLMEngine:
    """A model in memory, its processor, and the engine that runs its requests."""

    def __init__(
        self,
        model: Qwen2VL,
        processor: Processor,
        engine_config: EngineConfig,
        generation_defaults: GenerationDefaults,
        *,
        name: str,
        adapters: Mapping[str, str | Path],
        max_model_len: int | None,
        kv_cache_dtype: KVCacheDTypeName,
        compile: bool,
        defaults_source: str,
    ) -> None:
        """Set up without requests; arguments as of `LLM`.

        Args:
            model: the network, with its weights.
            processor: of the same model.
            engine_config: limits and cache sizes.
            generation_defaults: of parameters that a request leaves out.
            name: of the model, for display.
            adapters: unmerged LoRA adapters, name -> folder.
            max_model_len: limit of prompt and output tokens; None: the model's.
            kv_cache_dtype: of keys and values; auto: the model's dtype.
            compile: compile the model.
            defaults_source: where the generation defaults are set, for warnings.
        """
        kv_cache = kv_cache_class(kv_cache_dtype, model.device)
        self._name = name
        self._model: Qwen2VL | None = model  # None: closed
        self.engine_config = engine_config
        streaming = processor.with_streamed_videos(engine_config.streamed_video_bytes)
        self.processor = streaming.with_item_cache(engine_config.item_cache_bytes)
        self.generation_defaults = generation_defaults
        self.max_model_len = resolve_max_model_len(model.config, max_model_len)
        self._lora_manager = LoraManager(model)
        for folder in adapters.values():
            processor.tokenizer.check_adapter(folder)
        self._validator = RequestValidator(
            model,
            processor.tokenizer,
            generation_defaults,
            load_adapters(model, adapters),
            defaults_source=defaults_source,
        )
        self.kv_cache_dtype = kv_cache_dtype
        self._num_blocks = num_cache_blocks(
            model, engine_config.kv_cache_tokens, max_model_len, kv_cache
        )
        began = time.perf_counter()
        is_compiled = compile and compile_for_inference(model)
        self._resources = EngineResources.create(model, engine_config, self._num_blocks, kv_cache)
        self._counters = self._resources.counters
        # None: not compiled
        self.compile_seconds = time.perf_counter() - began if is_compiled else None
        self.engine = ExclusiveEngine(
            partial(
                EngineCore,
                model,
                engine_config,
                self._num_blocks,
                self._lora_manager,
                self._resources,
            )
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        if self.engine.is_closed:
            return f"LLM({self._name!r}, closed)"
        dtype = str(self.model.dtype).removeprefix("torch.")
        return (
            f"LLM({self._name!r}, device={self.device}, dtype={dtype}, "
            f"max_model_len={self.max_model_len})"
        )

    def close(self) -> None:
        """Free the caches and the references to the weights; later calls raise an EngineError.

        A stream that this thread has left open is aborted. Closing again does nothing.

        Raises:
            EngineError: another owner is using the engine.
        """
        if self.engine.is_closed:
            return
        self.engine.end_open_stream()
        with self.engine.session("LLM.close"):
            self.engine.close()
        self._model = None
        self.processor = self.processor.with_item_cache(0)
        del self._validator, self._lora_manager, self._resources

    @property
    def model(self) -> Qwen2VL:
        """The model.

        Raises:
            EngineError: the LLM was closed.
        """
        self.engine.check_open("LLM.model")
        assert self._model is not None
        return self._model

    @property
    def config(self) -> Qwen2VLConfig:
        """The model's configuration."""
        return self.model.config

    @property
    def device(self) -> torch.device:
        """The model's device."""
        return self.model.device

    @property
    def engine_core(self) -> EngineCore:
        """The engine's scheduler, runner and caches; a new one after an interrupt or an error."""
        return self.engine.core

    @property
    def kv_cache_tokens(self) -> int:
        """The capacity of the KV cache, in tokens."""
        return self._num_blocks * BLOCK_SIZE

    def check_text_fits(self, texts: Sequence[str]) -> None:
        """Refuse text that is certainly longer than the context, before all of it is tokenized.

        Raises:
            CapacityError: with the least number of its tokens.
        """
        check_text_fits(texts, self.processor.tokenizer, self.max_model_len)

    def fitting_max_pixels(self, prompt: ModelInput, num_tokens: int) -> int | None:
        """Return the largest max_pixels at which a prompt's images take at most `num_tokens`.

        None if not even images of the smallest size do.
        """
        return fitting_max_pixels(prompt, self.config, num_tokens)

    def stats(self) -> EngineStats:
        """Return the statistics of this moment, without waiting; thread-safe."""
        totals = dataclasses.asdict(self._counters)
        core = self.engine.current_core
        item_cache_bytes = self.processor.item_cache_bytes
        if core is None:
            return EngineStats(item_cache_bytes=item_cache_bytes, **totals)
        scheduler = core.scheduler
        return EngineStats(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            kv_cache_usage=scheduler.pool.num_used_blocks / scheduler.pool.num_blocks,
            encoder_cache_bytes=core.encoder_cache.cache.stats.num_bytes,
            item_cache_bytes=item_cache_bytes,
            **totals,
        )

    @property
    def has_unfinished_requests(self) -> bool:
        """Whether any request is waiting or running."""
        core = self.engine.current_core
        return core is not None and core.scheduler.has_unfinished_requests

    def add_request(self, request: Request) -> None:
        """Queue a request for the next steps."""
        with self.engine.session("LLM.add_request"), self.engine.using_core() as core:
            core.add_request(request)

    def step(self) -> list[RequestOutput]:
        """Run one engine step: schedule, execute, update; return new text of its requests.

        After an exception all requests are gone, and the next call starts with empty caches.
        """
        with self.engine.session("LLM.step"), self.engine.using_core() as core:
            return core.step()

    def abort(self, request: Request) -> None:
        """Stop a request; what it computed stays in the prefix cache until it is evicted."""
        with self.engine.session("LLM.abort"), self.engine.using_core() as core:
            core.abort(request)

    def reset_caches(self) -> None:
        """Evict all cached KV blocks and vision embeddings; call it after changing the weights."""
        with self.engine.session("LLM.reset_caches"), self.engine.using_core() as core:
            core.evict_cached()
            if self._resources.decode_backend is not None:
                self._resources.decode_backend.on_weights_changed()

    def validate(self, prompt: ModelInput, params: SamplingParams) -> None:
        """Validate a request before anything is computed.

        Raises:
            InputError: a stop token or adapter does not exist, or a grammar allows no output.
            CapacityError: the prompt does not fit into the context.
        """
        self.engine.check_open("LLM.validate")
        self._validator.validate(
            prompt,
            params,
            max_model_len=self.max_model_len,
            kv_cache_tokens=self._num_blocks * BLOCK_SIZE,
        )

    def create_requests(
        self, prompt: ModelInput, params: SamplingParams, *, index: int = 0
    ) -> list[Request]:
        """Create the `params.n` engine requests of a prompt that `validate` has accepted."""
        self.engine.check_open("LLM.create_requests")
        limit = min(self.max_model_len, self._num_blocks * BLOCK_SIZE)
        return self._validator.create_requests(prompt, params, max_total_tokens=limit, index=index)

    def embed_prompts(
        self,
        prompts: Sequence[ModelInput],
        core: EngineCore,
        *,
        pooling: Pooling = "last",
        adapter: str | None = None,
    ) -> Tensor:
        """Embed at least one prompt that `validate` has accepted: (S, D) float32, on the CPU.

        Raises:
            CapacityError: out of memory.
            EngineError: the hidden states are not finite.
        """
        lora_adapter = self._validator.get_adapter(adapter)
        embedder = Embedder(
            model=self.model,
            encoder_cache=core.encoder_cache,
            lora_manager=self._lora_manager,
            limits=core.scheduler.limits,
            adapter=lora_adapter,
        )
        with out_of_memory_as_capacity_error(max(prompts, key=lambda p: len(p.input_ids))):
            return embedder.embed(
                [with_cache_identity(prompt, lora_adapter) for prompt in prompts], pooling
            )
