"""The door of the engine: conversations in, Completions out, in order.

The walk of one request is `_answer`: encode what is to be seen, prefill, then decode token by
token; the prompts of a call are all made and checked before the first is answered. One sequence
at a time, and nothing of a request outlives it: after an interrupt or an error the LLM is ready
for the next. It must not know the command line or HTTP. (HF: GenerationMixin.generate.)
Back up: cli/ask.py, which is this door for people.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwen2vl.config import Qwen2VLConfig
from qwen2vl.engine.capacity import check_context, memory_errors_named
from qwen2vl.engine.params import Completion, Delta, SamplingParams, Seconds
from qwen2vl.engine.sampler import Rule, Sampler
from qwen2vl.engine.sequence import Sequence
from qwen2vl.errors import InputError
from qwen2vl.geometry import AttnMeta
from qwen2vl.load import DTypeName, load
from qwen2vl.model import KVCache, Qwen2VL
from qwen2vl.processor.inputs import ModelInput
from qwen2vl.processor.media import MediaLimits
from qwen2vl.processor.processor import Processor
from qwen2vl.processor.tokenizer import TextStream
from qwen2vl.processor.tools import STOP_WORDS
from qwen2vl.weights import GenerationDefaults, find, read_generation_defaults

__all__ = ["LLM", "Conversation", "OnDelta"]

Conversation = SequenceOf[Mapping[str, Any]]
OnDelta = Callable[[Delta], None]


class LLM:
    """A model with everything it takes to answer: words, pixels, cache, sampling."""

    def __init__(
        self,
        model: str | Path = "nano",
        *,
        device: str = "auto",
        dtype: DTypeName = "auto",
        adapter: str | Path | None = None,
        max_model_len: int | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        video_preset: str = "paper",
        limits: MediaLimits | None = None,
    ) -> None:
        """Load a model; arguments as for `load`, and device "auto" takes a GPU where there is one.

        Raises:
            CheckpointError, ConfigError, CapacityError, InputError: as `load` does.
        """
        folder = find(model)
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        network, processor = load(
            folder,
            device=device,
            dtype=dtype,
            adapter=adapter,
            max_model_len=max_model_len,
            min_pixels=min_pixels,
            max_pixels=max_pixels,
            video_preset=video_preset,
            limits=limits,
        )
        self._take(network, processor, read_generation_defaults(folder))
        self.max_model_len = max_model_len or self.max_model_len  # `load` has checked it

    @classmethod
    def of(
        cls,
        model: Qwen2VL,
        processor: Processor,
        *,
        generation: GenerationDefaults | None = None,
    ) -> LLM:
        """Answer with a model that is already in memory, up to the whole of its context."""
        llm = cls.__new__(cls)
        llm._take(model, processor, generation or GenerationDefaults())
        return llm

    def _take(self, model: Qwen2VL, processor: Processor, generation: GenerationDefaults) -> None:
        self.model = model
        self.processor = processor
        self.generation = generation
        self.max_model_len = model.config.text.max_position_embeddings
        ends = generation.eos_token_ids or ()
        self._end_ids = frozenset((model.config.eos_token_id, *ends))

    @property
    def config(self) -> Qwen2VLConfig:
        """What the model is."""
        return self.model.config

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self.model.head_weight.device

    def chat(
        self,
        conversations: Conversation | SequenceOf[Conversation],
        params: SamplingParams | SequenceOf[SamplingParams] | None = None,
        *,
        tools: SequenceOf[Mapping[str, Any]] | None = None,
        on_delta: OnDelta | None = None,
    ) -> list[Completion]:
        """Answer one conversation, or each of a list of them, in order.

        A conversation is a list of messages; one that ends with an assistant's is continued.
        `params` are for all, or one for each. `on_delta` hears each piece of text as it comes. With
        `tools` an answer ends where a tool's result belongs; processor.tools.parse_calls reads it.

        Raises:
            InputError: a message, medium or parameter cannot be used.
            CapacityError: a prompt does not fit into the context.
        """
        batch = _as_batch(conversations)
        each = _one_each(params, len(batch))
        if tools:  # what a tool returns is for the caller to say, not for the model to make up
            each = [replace(wish, stop=(*wish.stop, *STOP_WORDS)) for wish in each]
        clock = _Clock(self.device)
        prompts: list[ModelInput] = []
        process: list[float] = []
        for conversation in batch:
            prompt = self.processor(
                conversation, tools=tools, continue_final=_is_unfinished(conversation)
            )
            prompts.append(prompt)
            process.append(clock.lap())
        return self._answer_all(prompts, each, process, on_delta)

    def generate(
        self,
        prompts: str | ModelInput | SequenceOf[str | ModelInput],
        params: SamplingParams | SequenceOf[SamplingParams] | None = None,
        *,
        on_delta: OnDelta | None = None,
    ) -> list[Completion]:
        """Continue raw text (special tokens and all), or prompts that the processor has made.

        Raises:
            InputError: a prompt or parameter cannot be used.
            CapacityError: a prompt does not fit into the context.
        """
        batch = [prompts] if isinstance(prompts, (str, ModelInput)) else list(prompts)
        each = _one_each(params, len(batch))
        strange = [type(p).__name__ for p in batch if not isinstance(p, (str, ModelInput))]
        if strange:
            raise InputError(
                f"prompts: got {strange[0]}, must be text or what the processor makes; messages "
                "go to LLM.chat"
            )
        made = [self.processor.from_text(p) if isinstance(p, str) else p for p in batch]
        return self._answer_all(made, each, [0.0] * len(made), on_delta)

    def _answer_all(
        self,
        prompts: SequenceOf[ModelInput],
        params: SequenceOf[SamplingParams],
        process: SequenceOf[float],
        on_delta: OnDelta | None,
    ) -> list[Completion]:
        for prompt, wish in zip(prompts, params, strict=True):
            self.check(prompt, wish)
        say = on_delta or (lambda delta: None)
        completions: list[Completion] = []
        for index, request in enumerate(zip(prompts, params, process, strict=True)):
            with memory_errors_named(request[0]):
                completions.append(self._answer(index, *request, say))
        return completions

    def check(self, prompt: ModelInput, params: SamplingParams) -> None:
        """Refuse what cannot be answered, before anything is computed.

        Raises:
            InputError: a stop token is not of this model.
            CapacityError: the prompt does not fit into the context.
        """
        vocab_size = self.config.text.vocab_size
        strangers = [token for token in params.stop_token_ids if token >= vocab_size]
        if strangers:
            raise InputError(
                f"stop_token_ids: {strangers[0]} is not a token of this model, whose ids end at "
                f"{vocab_size - 1}"
            )
        check_context(
            prompt, self.config, max_model_len=self.max_model_len, max_tokens=params.max_tokens
        )

    @torch.inference_mode()
    def _answer(
        self, index: int, prompt: ModelInput, params: SamplingParams, process: float, say: OnDelta
    ) -> Completion:
        clock = _Clock(self.device)
        sequence = self._sequence(prompt, params)
        sampler = self._sampler(prompt, params)
        cache = self._cache(len(prompt.input_ids) + sequence.max_tokens)
        vision_MD = self._encode(prompt)
        vision = clock.lap()
        hidden_TD = self._prefill(prompt, vision_MD, cache)
        prefill = clock.lap()
        while True:
            token, logprob = sampler.sample(self.model.logits(hidden_TD[-1:])[0])
            text = sequence.append(token, logprob)
            if text or sequence.finish_reason:
                say(Delta(index=index, text=text, finish_reason=sequence.finish_reason))
            if sequence.finish_reason:
                break
            hidden_TD = self._step(token, prompt.rope_delta, cache)
        seconds = Seconds(process=process, vision=vision, prefill=prefill, decode=clock.lap())
        return sequence.completion(seconds)

    def _sequence(self, prompt: ModelInput, params: SamplingParams) -> Sequence:
        return Sequence(
            prompt,
            params,
            TextStream(self.processor.tokenizer),
            end_ids=(frozenset() if params.ignore_eos else self._end_ids)
            | frozenset(params.stop_token_ids),
            max_model_len=self.max_model_len,
        )

    def _sampler(self, prompt: ModelInput, params: SamplingParams) -> Sampler:
        return Sampler(
            Rule.resolve(params, self.generation),
            prompt.input_ids,
            vocab_size=self.config.text.vocab_size,
            device=self.device,
            seed=params.seed,
            num_logprobs=params.logprobs,
        )

    def _cache(self, capacity: int) -> KVCache:
        dtype = self.model.head_weight.dtype
        return KVCache.allocate(self.config.text, capacity, dtype, self.device)

    def _encode(self, prompt: ModelInput) -> Tensor | None:
        """Turn the pixels of all items into vision_MD; None for a prompt of text alone."""
        if prompt.patches_NP is None or prompt.vision_meta is None:
            return None
        return self.model.encode(
            prompt.patches_NP.to(self.device), prompt.vision_meta.to(self.device)
        )

    def _prefill(self, prompt: ModelInput, vision_MD: Tensor | None, cache: KVCache) -> Tensor:
        """Run the whole prompt at once and fill the cache."""
        return self.model(
            torch.tensor(prompt.input_ids, device=self.device),
            prompt.position_ids_3T.to(self.device),
            AttnMeta.build([len(prompt.input_ids)]).to(self.device),
            vision_MD=vision_MD,
            pad_index_M=None if vision_MD is None else prompt.pad_index_M.to(self.device),
            caches=[cache],
        )

    def _step(self, token: int, rope_delta: int, cache: KVCache) -> Tensor:
        """Run one new token; past the prompt its position is index + rope_delta on all axes."""
        position = cache.length + rope_delta
        return self.model(
            torch.tensor([token], device=self.device),
            torch.full((3, 1), position, device=self.device),
            AttnMeta.build([1], [cache.length + 1]),
            caches=[cache],
        )


class _Clock:
    """Measure laps; waits for the device, whose work runs behind the program's."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._last = time.perf_counter()

    def lap(self) -> float:
        """Return the seconds since the lap before."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        return seconds


def _as_batch(conversations: Conversation | SequenceOf[Conversation]) -> list[Conversation]:
    """Tell one conversation (its first element is a message) from a list of them."""
    if not isinstance(conversations, SequenceOf) or isinstance(conversations, str):
        raise InputError(
            "conversations: expected a list of messages or a list of such lists, got "
            f"{type(conversations).__name__}; wrap text as "
            '[{"role": "user", "content": text}]'
        )
    if conversations and isinstance(conversations[0], Mapping):
        return [conversations]  # type: ignore[list-item]
    return list(conversations)  # type: ignore[arg-type]


def _is_unfinished(conversation: Conversation) -> bool:
    """Tell whether the assistant has the last word; what is no message the processor names."""
    last = conversation[-1] if conversation else None
    return isinstance(last, Mapping) and last.get("role") == "assistant"


def _one_each(
    params: SamplingParams | SequenceOf[SamplingParams] | None, count: int
) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if len(params) != count:
        raise InputError(f"params: got {len(params)} for {count} prompts; give one, or one each")
    strange = [type(wish).__name__ for wish in params if not isinstance(wish, SamplingParams)]
    if strange:
        raise InputError(f"params: got {strange[0]}, must be SamplingParams, one or one each")
    return list(params)
