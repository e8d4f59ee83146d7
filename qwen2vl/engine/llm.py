"""The LLM class: offline inference with continuous batching: chat, stream, generate and embed.

Takes conversations (`chat`, `stream`, `embed`) or prompts (`generate`) and returns completions,
deltas or vectors in order. All prompts of a call are validated before the first one runs. A call is
`prepare` for each conversation, then engine steps (schedule, execute, update) until all of its
requests are finished, then their completions. KV blocks and vision embeddings are reused between
requests (prefix caching, encoder cache). After an interrupt or an error the LLM stays usable.
(vLLM: LLM; HF: GenerationMixin.generate.)
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from qwen2vl.engine.arguments.conversations import (
    NOT_GIVEN,
    Batch,
    ConversationForm,
    PromptForm,
    TextPrompt,
    as_batch,
    as_conversation,
    as_prepared,
    as_prompts,
    ends_with_assistant,
    is_list,
    naming,
)
from qwen2vl.engine.arguments.keyword_hints import check_keywords
from qwen2vl.engine.arguments.options import (
    as_params,
    as_params_list,
    check_callable,
    check_choice,
    check_llm_arguments,
    check_sampling_keywords,
    refuse_load_options,
)
from qwen2vl.engine.config import EngineConfig
from qwen2vl.engine.embed import Pooling
from qwen2vl.engine.engine_core import EngineSession
from qwen2vl.engine.llm_engine import DeltaStream, LLMEngine
from qwen2vl.engine.outputs import Completion, Delta
from qwen2vl.engine.request import Request, collect_completions
from qwen2vl.engine.sampling.params import SamplingParams
from qwen2vl.engine.validation import PreparedRequest
from qwen2vl.errors import InputError
from qwen2vl.loading import load
from qwen2vl.memory import DTypeName, KVCacheDTypeName
from qwen2vl.model import Qwen2VL
from qwen2vl.processor.media.source import MediaLimits
from qwen2vl.processor.processor import Processor
from qwen2vl.processor.tools import STOP_WORDS
from qwen2vl.quantization.scheme import QuantizationMode
from qwen2vl.threads import warn_if_preempted
from qwen2vl.weights import GenerationDefaults, read_generation_defaults, resolve_model

__all__ = ["LLM", "OnDelta", "llm_argument_names"]

OnDelta = Callable[[Delta], None]


def llm_argument_names() -> list[str]:
    """Return the names of the arguments of `LLM`."""
    parameters = inspect.signature(LLM).parameters.values()
    return [one.name for one in parameters if one.kind != one.VAR_KEYWORD]


class LLM(LLMEngine):
    """A model with its processor and inference engine.

    As a context manager it is closed at the end. It has one owner at a time: while a call runs, a
    stream is open or an AsyncLLM owns it, calls of others raise an EngineError. Only `prepare` may
    be called by any thread at any time.
    """

    def __init__(
        self,
        model: str | Path | Qwen2VL = "nano",
        processor: Processor | None = None,
        *,
        device: str = "auto",
        dtype: DTypeName | torch.dtype = "auto",
        quantize: QuantizationMode | None = None,
        compile: bool = False,
        adapter: str | Path | None = None,
        adapters: Mapping[str, str | Path] | None = None,
        max_model_len: int | None = None,
        kv_cache_dtype: KVCacheDTypeName = "auto",
        hf_overrides: Mapping[str, Any] | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        video_preset: str = "paper",
        limits: MediaLimits | None = None,
        engine: EngineConfig | None = None,
        generation_defaults: GenerationDefaults | None = None,
        **unknown: Any,
    ) -> None:
        """Load a model; arguments as for `load`, and device "auto" uses a GPU if available.

        A `Qwen2VL` in memory is used as it is, with its `processor`; arguments of `load` are
        refused then. `adapters` (name -> folder) are LoRA adapters that stay unmerged; each request
        selects one by SamplingParams(adapter=name). `kv_cache_dtype` is that of keys and values:
        auto, the model's, or on a CPU int8, half the bytes of bfloat16. `compile` is experimental;
        it takes half a minute the first time and less later, and without a C++ compiler it logs a
        warning only. `generation_defaults` replace those of the folder's generation_config.json.
        Any other argument is an error, which says what is written in place of a name of vLLM or
        transformers.

        Raises:
            CheckpointError, ConfigError, CapacityError, InputError: as `load` does.
        """
        check_keywords(unknown, llm_argument_names())
        check_llm_arguments(
            processor=processor,
            compile=compile,
            adapters=adapters,
            engine=engine,
            generation_defaults=generation_defaults,
        )
        load_options: dict[str, Any] = {
            "device": device,
            "dtype": dtype,
            "quantize": quantize,
            "adapter": adapter,
            "hf_overrides": hf_overrides,
            "min_pixels": min_pixels,
            "max_pixels": max_pixels,
            "video_preset": video_preset,
            "limits": limits,
        }
        name, defaults_source = str(model), "generation_defaults"
        if isinstance(model, Qwen2VL):
            name = "Qwen2VL"
            refuse_load_options(load_options, "the model", "give it to `load`")
            if processor is None:
                raise InputError("processor: got none; a model in memory needs its Processor")
        else:
            if processor is not None:
                raise InputError("processor: a folder has its own; give one with a Qwen2VL only")
            folder = resolve_model(model)
            if device == "auto":
                load_options["device"] = "cuda" if torch.cuda.is_available() else "cpu"
            model, processor = load(
                folder, max_model_len=max_model_len, kv_cache_dtype=kv_cache_dtype, **load_options
            )
            if generation_defaults is None:
                generation_defaults = read_generation_defaults(folder)
                defaults_source = "the checkpoint's generation_config.json"
        super().__init__(
            model,
            processor,
            engine or EngineConfig(),
            generation_defaults or GenerationDefaults(),
            name=name,
            adapters=adapters or {},
            max_model_len=max_model_len,
            kv_cache_dtype=kv_cache_dtype,
            compile=compile,
            defaults_source=defaults_source,
        )

    def chat(
        self,
        conversations: ConversationForm | Sequence[ConversationForm] = NOT_GIVEN,
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        images: Any = None,
        videos: Any = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        on_delta: OnDelta | None = None,
        **sampling: Any,
    ) -> list[Completion]:
        """Generate the next assistant message of one conversation, or of each in a list, in order.

        A conversation is a text, a message or a list of messages; a final assistant message is
        continued. `images` and `videos`, one source or a list, come before the text of a single
        conversation, or replace the placeholders {"type": "image"} in its messages. `params` are
        for all, or one for each; or give its fields as keywords, as in `chat("Hi", temperature=0)`.
        `on_delta` receives each piece of text as it is generated. With `tools`, generation stops
        where a tool's result belongs; parse calls by `parse_tool_calls`.

        Raises:
            InputError: a message, image, video or parameter is invalid; of a list, the text names
                the index.
            CapacityError: a prompt does not fit into the context.
            EngineError: the LLM is in use, or was closed.
        """
        check_callable("on_delta", on_delta)
        check_sampling_keywords(sampling)
        batch = as_batch(conversations, images, videos)
        params_list = as_params_list(params, sampling, len(batch.conversations))
        with self.engine.session("LLM.chat") as session:
            prepared = self._prepare_batch(batch, params_list, tools)
            return self._run(session, prepared, on_delta)

    def stream(
        self,
        conversation: ConversationForm = NOT_GIVEN,
        params: SamplingParams | None = None,
        *,
        images: Any = None,
        videos: Any = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **sampling: Any,
    ) -> DeltaStream:
        """Return an iterable over the deltas of one conversation; arguments as for `chat`.

        Nothing is generated before the first delta is read; `completions` are available after the
        last one.

        Raises:
            InputError, CapacityError, EngineError: as `chat` does, before the first delta.
        """
        with self.engine.session("LLM.stream"):
            prompt, request_params, seconds = self.prepare(
                conversation, params, tools, images=images, videos=videos, **sampling
            )
            requests = self.create_requests(prompt, request_params)
        return DeltaStream(self.engine, requests, seconds)

    def embed(
        self,
        conversations: ConversationForm | Sequence[ConversationForm],
        *,
        images: Any = None,
        videos: Any = None,
        pooling: Pooling = "last",
        adapter: str | None = None,
    ) -> Tensor:
        """Return one L2-normalized embedding for each conversation: (S, D) float32, on the CPU.

        Conversations are given as for `chat`. Pools the hidden states after the final norm,
        computed with `adapter` if given: that of the last prompt token (which opens the
        assistant's turn), or the mean over all tokens.

        Raises:
            InputError, CapacityError, EngineError: as `chat` does.
        """
        check_choice("pooling", pooling, get_args(Pooling))
        request_params = SamplingParams(max_tokens=1, adapter=adapter)
        batch = as_batch(conversations, images, videos)
        with self.engine.session("LLM.embed"), self.engine.using_core() as core:
            prepared = self._prepare_batch(batch, [request_params] * len(batch.conversations))
            if not prepared:
                return torch.empty(0, self.config.text.hidden_size)
            prompts = [one.prompt for one in prepared]
            return self.embed_prompts(prompts, core, pooling=pooling, adapter=adapter)

    def prepare(
        self,
        conversation: ConversationForm = NOT_GIVEN,
        params: SamplingParams | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        images: Any = None,
        videos: Any = None,
        **sampling: Any,
    ) -> PreparedRequest:
        """Preprocess a conversation into a prompt and validate it; thread-safe.

        Arguments are those of `chat`.

        Raises:
            InputError, CapacityError: as `chat` does.
            EngineError: the LLM was closed.
        """
        self.engine.check_open("LLM.prepare")
        check_sampling_keywords(sampling)
        began = time.perf_counter()
        messages = as_conversation(conversation, images, videos)
        request_params = as_params(params, sampling)
        prompt = self.processor(
            messages, tools=tools, continue_final_message=ends_with_assistant(messages)
        )
        if tools:  # stop before the model invents the tool's result
            request_params = replace(request_params, stop=(*request_params.stop, *STOP_WORDS))
        self.validate(prompt, request_params)
        return PreparedRequest(prompt, request_params, time.perf_counter() - began)

    def generate(
        self,
        prompts: PromptForm | Sequence[PromptForm] = NOT_GIVEN,
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        on_delta: OnDelta | None = None,
        **sampling: Any,
    ) -> list[Completion]:
        """Continue raw text (special tokens are parsed), or prompts built by the processor.

        A prompt may have vLLM's form, {"prompt": TEXT, "multi_modal_data": {"image": ...}}, with
        one source or a list for the <|image_pad|> and <|video_pad|> of the text.

        Raises:
            InputError, CapacityError, EngineError: as `chat` does.
        """
        check_callable("on_delta", on_delta)
        check_sampling_keywords(sampling)
        batch = as_prompts(prompts)
        params_list = as_params_list(params, sampling, len(batch))
        with self.engine.session("LLM.generate") as session:
            prepared: list[PreparedRequest] = []
            for index, (prompt, request_params) in enumerate(zip(batch, params_list, strict=True)):
                with naming(f"prompts[{index}]" if is_list(prompts) else "prompts"):
                    if isinstance(prompt, TextPrompt):
                        prompt = self.processor.from_text(prompt.text, prompt.media)
                    self.validate(prompt, request_params)
                prepared.append(PreparedRequest(prompt, request_params, 0.0))
            return self._run(session, prepared, on_delta)

    def generate_prepared(
        self,
        prepared: PreparedRequest | Sequence[PreparedRequest],
        *,
        on_delta: OnDelta | None = None,
        on_step: Callable[[], None] | None = None,
    ) -> list[Completion]:
        """Generate the completions of requests that `prepare` returned, `n` of each, in order.

        `on_step` is called after each engine step. An exception of `on_step` or `on_delta` aborts
        the requests and keeps the caches.

        Raises:
            Qwen2VLError: the only request failed; or the LLM is in use, or was closed.
        """
        check_callable("on_delta", on_delta)
        check_callable("on_step", on_step)
        batch = as_prepared(prepared)
        with self.engine.session("LLM.generate_prepared") as session:
            return self._run(session, batch, on_delta, on_step)

    def _prepare_batch(
        self,
        batch: Batch,
        params_list: Sequence[SamplingParams],
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[PreparedRequest]:
        prepared: list[PreparedRequest] = []
        for index, conversation in enumerate(batch.conversations):
            with batch.naming(index):
                prepared.append(self.prepare(conversation, params_list[index], tools))
        return prepared

    def _run(
        self,
        session: EngineSession,
        prepared: Sequence[PreparedRequest],
        on_delta: OnDelta | None = None,
        on_step: Callable[[], None] | None = None,
    ) -> list[Completion]:
        """Create the requests of a call, run engine steps until they finish, return completions."""
        requests: list[Request] = []
        process_seconds: list[float] = []
        for prompt, params, seconds in prepared:
            requests += self.create_requests(prompt, params, index=len(requests))
            process_seconds += [seconds] * params.n
        with warn_if_preempted() if self.device.type == "cpu" else nullcontext():
            for outputs in session.run(requests):
                if on_delta is not None:
                    for output in outputs:
                        on_delta(output.delta)
                if on_step is not None:
                    on_step()
        return collect_completions(requests, process_seconds)
