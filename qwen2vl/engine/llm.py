"""The LLM class: offline inference with continuous batching, chat, generate and embed.

Takes conversations (`chat`, `embed`) or prompts (`generate`) and returns completions or vectors in
order. All prompts of a call are validated before the first one runs. `step` runs one engine step:
schedule, execute, update. KV blocks and vision embeddings are reused between requests (prefix
caching, encoder cache). After an interrupt or an error the LLM stays usable. (vLLM: LLM; HF:
GenerationMixin.generate.)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwen2vl.compile.regions import compile_for_inference
from qwen2vl.config import Qwen2VLConfig
from qwen2vl.engine.config import EngineConfig
from qwen2vl.engine.embed import Embedder, Pooling
from qwen2vl.engine.engine_core import EngineCore, EngineResources
from qwen2vl.engine.kv_cache.block_pool import BLOCK_SIZE
from qwen2vl.engine.kv_cache.capacity import num_cache_blocks, out_of_memory_as_capacity_error
from qwen2vl.engine.outputs import Completion, Delta
from qwen2vl.engine.request import Request
from qwen2vl.engine.sampling.params import SamplingParams
from qwen2vl.engine.scheduler.scheduler import RequestOutput
from qwen2vl.engine.validation import (
    Conversation,
    PreparedRequest,
    RequestValidator,
    as_batch,
    broadcast_params,
    ends_with_assistant,
    with_adapter_digest,
)
from qwen2vl.errors import InputError, Qwen2VLError
from qwen2vl.loading import load, load_adapters, resolve_max_model_len
from qwen2vl.lora.multi import LoraManager
from qwen2vl.memory import DTypeName
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
        model: str | Path | Qwen2VL = "nano",
        processor: Processor | None = None,
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
        generation_defaults: GenerationDefaults | None = None,
    ) -> None:
        """Load a model; arguments as for `load`, and device "auto" uses a GPU if available.

        A `Qwen2VL` in memory is used as it is, with its `processor`; arguments of `load` are
        refused then. `adapters` (name -> folder) are LoRA adapters that stay unmerged; each request
        selects one by SamplingParams(adapter=name). `compile` is experimental; it takes half a
        minute the first time and less later, and without a C++ compiler it logs a warning only.
        `generation_defaults` replace those of the folder's generation_config.json.

        Raises:
            CheckpointError, ConfigError, CapacityError, InputError: as `load` does.
        """
        if compile and adapters:
            raise InputError(
                "compile: layers of adapters that stay unmerged cannot be compiled; leave either "
                "out, or merge one by adapter="
            )
        load_options: dict[str, Any] = {
            "device": device,
            "dtype": dtype,
            "quantize": quantize,
            "adapter": adapter,
            "min_pixels": min_pixels,
            "max_pixels": max_pixels,
            "video_preset": video_preset,
            "limits": limits,
        }
        if isinstance(model, Qwen2VL):
            _refuse_load_options(load_options)
            if processor is None:
                raise InputError("processor: got none; a model in memory needs its Processor")
        else:
            if processor is not None:
                raise InputError("processor: a folder has its own; give one with a Qwen2VL only")
            folder = resolve_model(model)
            if device == "auto":
                load_options["device"] = "cuda" if torch.cuda.is_available() else "cpu"
            model, processor = load(folder, max_model_len=max_model_len, **load_options)
            generation_defaults = generation_defaults or read_generation_defaults(folder)
        self.model = model
        self.engine_config = engine or EngineConfig()
        self.processor = processor.with_item_cache(self.engine_config.item_cache_bytes)
        self.generation_defaults = generation_defaults or GenerationDefaults()
        self.max_model_len = resolve_max_model_len(model.config, max_model_len)
        self._lora_manager = LoraManager(model)
        self._validator = RequestValidator(
            model,
            processor.tokenizer,
            self.generation_defaults,
            load_adapters(model, adapters or {}),
        )
        self._num_blocks = num_cache_blocks(
            model, self.engine_config.kv_cache_tokens, max_model_len
        )
        began = time.perf_counter()
        is_compiled = compile and compile_for_inference(model)
        self._resources = EngineResources.create(
            model, self.engine_config, self._num_blocks, is_compiled=is_compiled
        )
        # None: not compiled
        self.compile_seconds = time.perf_counter() - began if is_compiled else None
        self._core: EngineCore | None = None

    @property
    def engine_core(self) -> EngineCore:
        """The engine's scheduler, runner and caches; a new one after an interrupt or an error."""
        if self._core is None:
            self._core = EngineCore(
                self.model,
                self.engine_config,
                self._num_blocks,
                self._lora_manager,
                self._resources,
            )
        return self._core

    @contextmanager
    def _using_core(self) -> Iterator[EngineCore]:
        """Yield the engine core; discard it on an interrupt or an unexpected error.

        Either may have come in the middle of a change of its state. Errors of this library are
        raised before or after one.
        """
        core = self.engine_core
        try:
            yield core
        except Qwen2VLError:
            raise
        except BaseException:
            self._core = None
            raise

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
        return self.generate_prepared(prepared, on_delta=on_delta)

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
        lora_adapter = self._validator.get_adapter(adapter)
        prompts = [with_adapter_digest(prompt, lora_adapter) for prompt in prompts]
        with self._using_core() as core:
            embedder = Embedder(
                model=self.model,
                encoder_cache=core.encoder_cache,
                lora_manager=self._lora_manager,
                limits=core.scheduler.limits,
                adapter=lora_adapter,
            )
            longest = max(prompts, key=lambda prompt: len(prompt.input_ids))
            with out_of_memory_as_capacity_error(longest):
                return embedder.embed(prompts, pooling)

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
        return self.generate_prepared(prepared, on_delta=on_delta)

    def generate_prepared(
        self,
        prepared: Sequence[PreparedRequest],
        *,
        on_delta: OnDelta | None = None,
        on_step: Callable[[], None] | None = None,
    ) -> list[Completion]:
        """Generate the completions of requests that `prepare` returned, `n` of each, in order.

        `on_step` is called after each engine step. An exception of `on_step` or `on_delta` aborts
        the requests and keeps the caches.
        """
        requests: list[Request] = []
        process_seconds: list[float] = []
        for prompt, params, seconds in prepared:
            requests += self.create_requests(prompt, params, index=len(requests))
            process_seconds += [seconds] * params.n
        try:
            self._run_engine(requests, on_delta or (lambda delta: None), on_step or (lambda: None))
        except BaseException:
            for request in requests if self._core is not None else ():
                self.abort(request)
            raise
        if len(requests) == 1 and requests[0].error is not None:
            raise requests[0].error
        pairs = zip(requests, process_seconds, strict=True)
        return [request.completion(process_seconds=seconds) for request, seconds in pairs]

    def _run_engine(
        self, requests: Sequence[Request], on_delta: OnDelta, on_step: Callable[[], None]
    ) -> None:
        """Run engine steps until all of `requests` are finished."""
        for request in requests:
            self.add_request(request)
        unfinished = set(requests)
        while unfinished:
            for output in self.step():
                request, reason = output.request, output.request.finish_reason
                if request in unfinished:
                    on_delta(Delta(index=request.index, text=output.text, finish_reason=reason))
                if reason is not None:
                    unfinished.discard(request)
            on_step()

    @property
    def has_unfinished_requests(self) -> bool:
        """Whether any request is waiting or running."""
        return self._core is not None and self._core.scheduler.has_unfinished_requests

    def add_request(self, request: Request) -> None:
        """Queue a request for the next steps."""
        with self._using_core() as core:
            core.add_request(request)

    def step(self) -> list[RequestOutput]:
        """Run one engine step: schedule, execute, update; return new text of its requests.

        After an exception all requests are gone, and the next call starts with empty caches.
        """
        with self._using_core() as core:
            return core.step()

    def abort(self, request: Request) -> None:
        """Stop a request; what it computed stays in the prefix cache until it is evicted."""
        with self._using_core() as core:
            core.abort(request)

    def reset_caches(self) -> None:
        """Evict all cached KV blocks and vision embeddings; call it after changing the weights."""
        with self._using_core() as core:
            core.evict_cached()
        if self._resources.decode_backend is not None:
            self._resources.decode_backend.on_weights_changed()

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
            kv_cache_tokens=self._num_blocks * BLOCK_SIZE,
        )

    def create_requests(
        self, prompt: ModelInput, params: SamplingParams, *, index: int = 0
    ) -> list[Request]:
        """Create the `params.n` engine requests of a prompt that `validate` has accepted."""
        limit = min(self.max_model_len, self._num_blocks * BLOCK_SIZE)
        return self._validator.create_requests(prompt, params, max_total_tokens=limit, index=index)


def _refuse_load_options(options: Mapping[str, Any]) -> None:
    defaults = {"device": "auto", "dtype": "auto", "video_preset": "paper"}
    if given := [name for name, value in options.items() if value != defaults.get(name)]:
        raise InputError(
            f"{given[0]}: got {options[given[0]]!r}, but the model is in memory already; give it "
            "to `load`"
        )
