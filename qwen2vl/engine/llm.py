"""The LLM class: offline inference with continuous batching, chat, generate and embed.

Takes conversations (`chat`, `embed`) or prompts (`generate`) and returns completions or vectors in
order. All prompts of a call are validated before the first one runs. `step` runs one engine step:
schedule, execute, update. KV blocks and vision embeddings are reused between requests (prefix
caching, encoder cache). After an interrupt or an error the LLM stays usable. (vLLM: LLM; HF:
GenerationMixin.generate.)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwen2vl.compile.regions import compile_for_inference
from qwen2vl.config import Qwen2VLConfig
from qwen2vl.engine.config import EngineConfig
from qwen2vl.engine.decode.backend import DecodeBackend
from qwen2vl.engine.decode.compiled import CompiledDecode
from qwen2vl.engine.embed import Embedder, Pooling
from qwen2vl.engine.encoder_cache.manager import EncoderCacheManager
from qwen2vl.engine.kv_cache.arena import KVArena
from qwen2vl.engine.kv_cache.block_pool import BLOCK_SIZE, BlockPool
from qwen2vl.engine.kv_cache.capacity import num_cache_blocks
from qwen2vl.engine.outputs import Completion, Delta
from qwen2vl.engine.request import Request
from qwen2vl.engine.runner import ModelRunner, StepOutOfMemoryError
from qwen2vl.engine.sampling.params import SamplingParams
from qwen2vl.engine.scheduler.output import StepLimits
from qwen2vl.engine.scheduler.scheduler import RequestOutput, Scheduler
from qwen2vl.engine.speculative import NgramProposer
from qwen2vl.engine.validation import (
    Conversation,
    PreparedRequest,
    RequestValidator,
    as_batch,
    broadcast_params,
    ends_with_assistant,
    with_adapter_digest,
)
from qwen2vl.errors import InputError
from qwen2vl.loading import DTypeName, load, load_adapters
from qwen2vl.lora.multi import LoraManager
from qwen2vl.model import Qwen2VL
from qwen2vl.processor.inputs import ModelInput
from qwen2vl.processor.media.source import MediaLimits
from qwen2vl.processor.processor import Processor
from qwen2vl.processor.tools import STOP_WORDS
from qwen2vl.quantization.scheme import QuantizationMode
from qwen2vl.weights import GenerationDefaults, read_generation_defaults, resolve_model

__all__ = ["LLM", "OnDelta"]

OnDelta = Callable[[Delta], None]


class LLM:
    """A model with its processor and inference engine."""

    def __init__(
        self,
        model: str | Path = "nano",
        *,
        device: str = "auto",
        dtype: DTypeName = "auto",
        quantize: QuantizationMode | None = None,
        compile: bool = False,
        adapter: str | Path | None = None,
        adapters: Mapping[str, str | Path] | None = None,
        max_model_len: int | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        video_preset: str = "paper",
        limits: MediaLimits | None = None,
        engine: EngineConfig | None = None,
    ) -> None:
        """Load a model; arguments as for `load`, and device "auto" uses a GPU if available.

        `adapters` (name -> folder) are LoRA adapters that stay unmerged; each request selects one
        by SamplingParams(adapter=name). `compile` takes half a minute the first time and less
        later; without a C++ compiler it logs a warning and does nothing.

        Raises:
            CheckpointError, ConfigError, CapacityError, InputError: as `load` does.
        """
        if compile and adapters:
            raise InputError(
                "compile: layers of adapters that stay unmerged cannot be compiled; leave either "
                "out, or merge one by adapter="
            )
        folder = resolve_model(model)
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        network, processor = load(
            folder,
            device=device,
            dtype=dtype,
            quantize=quantize,
            adapter=adapter,
            max_model_len=max_model_len,
            min_pixels=min_pixels,
            max_pixels=max_pixels,
            video_preset=video_preset,
            limits=limits,
        )
        defaults = read_generation_defaults(folder)
        self._initialize(network, processor, defaults, engine, adapters, max_model_len, compile)

    @classmethod
    def from_model(
        cls,
        model: Qwen2VL,
        processor: Processor,
        *,
        generation_defaults: GenerationDefaults | None = None,
        engine: EngineConfig | None = None,
        adapters: Mapping[str, str | Path] | None = None,
    ) -> LLM:
        """Create an LLM from a model in memory; max_model_len is the model's context length."""
        llm = cls.__new__(cls)
        defaults = generation_defaults or GenerationDefaults()
        llm._initialize(model, processor, defaults, engine, adapters)
        return llm

    def _initialize(
        self,
        model: Qwen2VL,
        processor: Processor,
        generation_defaults: GenerationDefaults,
        engine: EngineConfig | None,
        adapters: Mapping[str, str | Path] | None,
        max_model_len: int | None = None,
        compile: bool = False,
    ) -> None:
        self.model = model
        self._engine_config = engine = engine or EngineConfig()
        self.processor = processor.with_item_cache(engine.item_cache_bytes)
        self.generation_defaults = generation_defaults
        self.max_model_len = max_model_len or model.config.text.max_position_embeddings
        self._lora_manager = LoraManager(model)
        self._validator = RequestValidator(
            model, processor.tokenizer, generation_defaults, load_adapters(model, adapters or {})
        )
        num_blocks = num_cache_blocks(model, engine.kv_cache_tokens, max_model_len)
        self._arena: KVArena | None = None
        self._decode_backend: DecodeBackend | None = None
        self.compile_seconds: float | None = None  # None: not compiled
        began = time.perf_counter()
        if compile and compile_for_inference(model):
            if model.device.type == "cpu":
                self._decode_backend = CompiledDecode.try_compile(model)
            self.compile_seconds = time.perf_counter() - began
        if model.device.type == "cuda":
            num_slots = num_blocks * BLOCK_SIZE
            self._arena = KVArena(model.config.text, num_slots, model.dtype, model.device)
            if engine.cuda_graphs:
                from qwen2vl.engine.decode.cuda_graphs import CudaGraphDecode

                self._decode_backend = CudaGraphDecode(model, self._arena, engine.max_num_seqs)
        self._reset_engine(num_blocks)

    def _reset_engine(self, num_blocks: int) -> None:
        """Create a new scheduler and runner with empty caches; the encoder cache on disk stays."""
        config = self._engine_config
        encoder_cache = EncoderCacheManager.from_config(self.model, config, self._lora_manager)
        self.runner = ModelRunner(
            self.model, encoder_cache, self._lora_manager, self._arena, self._decode_backend
        )
        self.scheduler = Scheduler(
            BlockPool(num_blocks),
            encoder_cache,
            StepLimits(
                max_num_batched_tokens=config.max_num_batched_tokens,
                max_num_encoder_patches=config.max_num_encoder_patches,
                max_num_seqs=config.max_num_seqs,
            ),
            NgramProposer(config.num_speculative_tokens) if config.num_speculative_tokens else None,
        )

    def _recover(self) -> None:
        """Reset the engine if an interrupt has left its state inconsistent."""
        if self.runner.is_inconsistent:
            self.scheduler.is_inconsistent = True  # until both are replaced
        if self.scheduler.is_inconsistent:
            self._reset_engine(self.scheduler.pool.num_blocks)

    @property
    def config(self) -> Qwen2VLConfig:
        """The model's configuration."""
        return self.model.config

    @property
    def device(self) -> torch.device:
        """The model's device."""
        return self.model.device

    def chat(
        self,
        conversations: Conversation | Sequence[Conversation],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        on_delta: OnDelta | None = None,
    ) -> list[Completion]:
        """Generate the next assistant message of one conversation, or of each in a list, in order.

        A conversation is a list of messages; a final assistant message is continued. `params` are
        for all, or one for each. `on_delta` receives each piece of text as it is generated. With
        `tools`, generation stops where a tool's result belongs; parse calls by `parse_tool_calls`.

        Raises:
            InputError: a message, image, video or parameter is invalid.
            CapacityError: a prompt does not fit into the context.
        """
        batch = as_batch(conversations)
        params_list = broadcast_params(params, len(batch))
        prepared = [
            self.prepare(conversation, request_params, tools)
            for conversation, request_params in zip(batch, params_list, strict=True)
        ]
        return self._generate(prepared, on_delta)

    def embed(
        self,
        conversations: Conversation | Sequence[Conversation],
        *,
        pooling: Pooling = "last",
        adapter: str | None = None,
    ) -> Tensor:
        """Return one L2-normalized embedding for each conversation: (S, D) float32, on the CPU.

        Pools the hidden states after the final norm, computed with `adapter` if given: that of the
        last prompt token (which opens the assistant's turn), or the mean over all tokens.

        Raises:
            InputError, CapacityError: as `chat` does.
        """
        request_params = SamplingParams(max_tokens=1, adapter=adapter)
        prompts = [self.prepare(chat, request_params).prompt for chat in as_batch(conversations)]
        if not prompts:
            return torch.empty(0, self.config.text.hidden_size)
        self._recover()
        lora_adapter = self._validator.get_adapter(adapter)
        embedder = Embedder(
            model=self.model,
            encoder_cache=self.runner.encoder_cache,
            lora_manager=self._lora_manager,
            limits=self.scheduler.limits,
            adapter=lora_adapter,
        )
        return embedder.embed(
            [with_adapter_digest(prompt, lora_adapter) for prompt in prompts], pooling
        )

    def prepare(
        self,
        conversation: Conversation,
        params: SamplingParams,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> PreparedRequest:
        """Preprocess a conversation into a prompt and validate it; thread-safe.

        Raises:
            InputError, CapacityError: as `chat` does.
        """
        began = time.perf_counter()
        prompt = self.processor(
            conversation, tools=tools, continue_final_message=ends_with_assistant(conversation)
        )
        if tools:  # stop before the model invents the tool's result
            params = replace(params, stop=(*params.stop, *STOP_WORDS))
        self.validate(prompt, params)
        return PreparedRequest(prompt, params, time.perf_counter() - began)

    def generate(
        self,
        prompts: str | ModelInput | Sequence[str | ModelInput],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        on_delta: OnDelta | None = None,
    ) -> list[Completion]:
        """Continue raw text (special tokens are parsed), or prompts built by the processor.

        Raises:
            InputError: a prompt or parameter is invalid.
            CapacityError: a prompt does not fit into the context.
        """
        batch = [prompts] if isinstance(prompts, (str, ModelInput)) else list(prompts)
        params_list = broadcast_params(params, len(batch))
        unexpected = [type(p).__name__ for p in batch if not isinstance(p, (str, ModelInput))]
        if unexpected:
            raise InputError(
                f"prompts: got {unexpected[0]}, must be text or a ModelInput of the processor; "
                "messages go to LLM.chat"
            )
        prepared: list[PreparedRequest] = []
        for prompt, request_params in zip(batch, params_list, strict=True):
            model_input = self.processor.from_text(prompt) if isinstance(prompt, str) else prompt
            self.validate(model_input, request_params)
            prepared.append(PreparedRequest(model_input, request_params, 0.0))
        return self._generate(prepared, on_delta)

    def _generate(
        self, prepared: Sequence[PreparedRequest], on_delta: OnDelta | None
    ) -> list[Completion]:
        self._recover()
        requests: list[Request] = []
        process_seconds: list[float] = []
        for prompt, params, seconds in prepared:
            requests += self.create_requests(prompt, params, index=len(requests))
            process_seconds += [seconds] * params.n
        try:
            self._run_engine(requests, on_delta or (lambda delta: None))
        except BaseException:
            if not self.scheduler.is_inconsistent:
                for request in requests:
                    self.abort(request)
            raise
        if len(requests) == 1 and requests[0].error is not None:
            raise requests[0].error
        pairs = zip(requests, process_seconds, strict=True)
        return [request.completion(process_seconds=seconds) for request, seconds in pairs]

    def _run_engine(self, requests: Sequence[Request], on_delta: OnDelta) -> None:
        """Run engine steps until all of `requests` are finished."""
        for request in requests:
            self.scheduler.add_request(request)
        unfinished = set(requests)
        while unfinished:
            for output in self.step():
                request, reason = output.request, output.request.finish_reason
                if request in unfinished:
                    on_delta(Delta(index=request.index, text=output.text, finish_reason=reason))
                if reason is not None:
                    unfinished.discard(request)

    def step(self) -> list[RequestOutput]:
        """Run one engine step: schedule, execute, update; return new text of its requests."""
        if not self.scheduler.has_unfinished_requests:
            return []
        scheduler_output = self.scheduler.schedule()
        try:
            results = self.runner.execute_model(scheduler_output)
        except StepOutOfMemoryError as out_of_memory:
            if self._evict_cached():
                return []  # the next step tries again
            outputs = [self.scheduler.fail(out_of_memory.request, out_of_memory.error)]
        else:
            outputs = self.scheduler.update_from_output(scheduler_output, results)
        self.runner.apply_free_operations(self.scheduler.pool.cache_operations)
        return outputs

    def _evict_cached(self) -> bool:
        """Evict cached KV blocks and vision embeddings that no request uses; False: none."""
        pool, cache = self.scheduler.pool, self.runner.encoder_cache.cache
        if not pool.num_evictable_blocks and cache.pinned_bytes == cache.stats.num_bytes:
            return False
        self.scheduler.reset_prefix_cache()
        self.runner.apply_free_operations(pool.cache_operations)
        cache.clear()
        return True

    def reset_caches(self) -> None:
        """Evict all cached KV blocks and vision embeddings; call it after changing the weights."""
        self._evict_cached()
        if self._decode_backend is not None:
            self._decode_backend.on_weights_changed()

    def abort(self, request: Request) -> None:
        """Stop a request; what it computed stays in the prefix cache until it is evicted."""
        self.scheduler.abort(request)
        self.runner.apply_free_operations(self.scheduler.pool.cache_operations)

    def validate(self, prompt: ModelInput, params: SamplingParams) -> None:
        """Validate a request before anything is computed.

        Raises:
            InputError: a stop token or adapter does not exist, or a grammar allows no output.
            CapacityError: the prompt does not fit into the context.
        """
        self._validator.validate(
            prompt,
            params,
            max_model_len=self.max_model_len,
            kv_cache_tokens=self.scheduler.pool.num_blocks * BLOCK_SIZE,
        )

    def create_requests(
        self, prompt: ModelInput, params: SamplingParams, *, index: int = 0
    ) -> list[Request]:
        """Create the `params.n` engine requests of a prompt that `validate` has accepted."""
        limit = min(self.max_model_len, self.scheduler.pool.num_blocks * BLOCK_SIZE)
        return self._validator.create_requests(prompt, params, max_total_tokens=limit, index=index)
