"""The door of the engine: conversations in, Completions out, in order.

Requests become sequences, and `step` moves all of them on: plan -> run -> commit. The prompts of a
call are all made and checked before the first is answered; after an interrupt or an error the LLM
is ready for the next. What one request computed (keys and values, vision rows) serves the next one
that begins alike. It must not know the command line or HTTP. (HF: GenerationMixin.generate.)
Back up: cli/commands/ask.py, which is this door for people; async_llm.py, the same door for many at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qwen2vl.compile.regions import compile_for_answers
from qwen2vl.config import Qwen2VLConfig
from qwen2vl.engine.config import EngineConfig
from qwen2vl.engine.decode.compiled import SingleDecode
from qwen2vl.engine.decode.decoder import Decode
from qwen2vl.engine.embed import Embedder, Pooling
from qwen2vl.engine.encoder_cache.manager import VisionShelf
from qwen2vl.engine.kv_cache.arena import Arena
from qwen2vl.engine.kv_cache.block_pool import BLOCK, BlockPool
from qwen2vl.engine.kv_cache.capacity import cache_blocks
from qwen2vl.engine.outputs import Completion, Delta
from qwen2vl.engine.request import Sequence
from qwen2vl.engine.runner import OverloadError, Runner
from qwen2vl.engine.sampling.params import SamplingParams
from qwen2vl.engine.scheduler.output import Limits
from qwen2vl.engine.scheduler.scheduler import News, Scheduler
from qwen2vl.engine.speculative import Drafter
from qwen2vl.engine.validation import (
    Conversation,
    Reception,
    as_batch,
    is_unfinished,
    one_each,
    seen_through,
)
from qwen2vl.errors import InputError
from qwen2vl.loading import DTypeName, load, load_adapters
from qwen2vl.lora.multi import AdapterSwitch
from qwen2vl.model import Qwen2VL
from qwen2vl.processor.inputs import ModelInput
from qwen2vl.processor.media.source import MediaLimits
from qwen2vl.processor.processor import Processor
from qwen2vl.processor.tools import STOP_WORDS
from qwen2vl.quantization.scheme import AnyMode
from qwen2vl.weights import GenerationDefaults, find, read_generation_defaults

__all__ = ["LLM", "OnDelta", "Prepared"]

OnDelta = Callable[[Delta], None]


class Prepared(NamedTuple):
    """A request that may be answered."""

    prompt: ModelInput
    params: SamplingParams
    seconds: float  # that making the prompt took


class LLM:
    """A model with everything it takes to answer: words, pixels, cache, sampling."""

    def __init__(
        self,
        model: str | Path = "nano",
        *,
        device: str = "auto",
        dtype: DTypeName = "auto",
        quantize: AnyMode | None = None,
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
        """Load a model; arguments as for `load`, and device "auto" takes a GPU where there is one.

        Of `adapters` (name -> folder) each request may ask for one: SamplingParams(adapter=name).
        `compile` takes half a minute once, and less when it is asked for again; without a C++
        compiler it says so and does nothing.

        Raises:
            CheckpointError, ConfigError, CapacityError, InputError: as `load` does.
        """
        if compile and adapters:
            raise InputError(
                "compile: layers of adapters that stay unmerged cannot be compiled; leave either "
                "out, or merge one by adapter="
            )
        folder = find(model)
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
        habits = read_generation_defaults(folder)
        self._take(network, processor, habits, engine, adapters, max_model_len, compile)

    @classmethod
    def of(
        cls,
        model: Qwen2VL,
        processor: Processor,
        *,
        generation: GenerationDefaults | None = None,
        engine: EngineConfig | None = None,
        adapters: Mapping[str, str | Path] | None = None,
    ) -> LLM:
        """Answer with a model that is already in memory, up to the whole of its context."""
        llm = cls.__new__(cls)
        llm._take(model, processor, generation or GenerationDefaults(), engine, adapters)
        return llm

    def _take(
        self,
        model: Qwen2VL,
        processor: Processor,
        generation: GenerationDefaults,
        engine: EngineConfig | None,
        adapters: Mapping[str, str | Path] | None,
        max_model_len: int | None = None,
        compile: bool = False,
    ) -> None:
        self.model = model
        self._engine = engine or EngineConfig()
        self.processor = processor.keeping(self._engine.item_cache_bytes)
        self.generation = generation
        # `load` has checked it.
        self.max_model_len = max_model_len or model.config.text.max_position_embeddings
        self._switch = AdapterSwitch(model)
        self._reception = Reception(
            model, processor.tokenizer, generation, load_adapters(model, adapters or {})
        )
        num_blocks = cache_blocks(model, self._engine.cache_tokens, max_model_len)
        self._arena: Arena | None = None
        self._decode: Decode | None = None
        self.compile_seconds: float | None = None  # None: it was not compiled
        began = time.perf_counter()
        if compile and compile_for_answers(model):
            if model.device.type == "cpu":
                self._decode = SingleDecode.compiled(model)
            self.compile_seconds = time.perf_counter() - began
        if model.device.type == "cuda":
            self._arena = Arena(model.config.text, num_blocks * BLOCK, model.dtype, model.device)
            if self._engine.graphs:
                from qwen2vl.engine.decode.cuda_graphs import (
                    DecodeGraphs,  # a room that may be missing
                )

                self._decode = DecodeGraphs(model, self._arena, self._engine.max_sequences)
        self._begin(num_blocks)

    def _begin(self, num_blocks: int) -> None:
        """Set up the engine: nothing waits, runs or is kept, but for vision rows on disk."""
        config = self._engine
        shelf = VisionShelf.of(self.model, config, self._switch)
        self.runner = Runner(self.model, shelf, self._switch, self._arena, self._decode)
        self.scheduler = Scheduler(
            BlockPool(num_blocks),
            shelf,
            Limits(
                tokens=config.max_step_tokens,
                patches=config.max_step_patches,
                sequences=config.max_sequences,
            ),
            Drafter(config.num_drafts) if config.num_drafts else None,
        )

    def _mend(self) -> None:
        """Begin anew where an interrupt has come while the books were written."""
        if self.runner.is_torn:
            self.scheduler.is_torn = True  # until both are new
        if self.scheduler.is_torn:
            self._begin(self.scheduler.pool.num_blocks)

    @property
    def config(self) -> Qwen2VLConfig:
        """What the model is."""
        return self.model.config

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self.model.device

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
        batch = as_batch(conversations)
        prepared = [
            self.prepare(conversation, wish, tools)
            for conversation, wish in zip(batch, one_each(params, len(batch)), strict=True)
        ]
        return self._answer_all(prepared, on_delta)

    def embed(
        self,
        conversations: Conversation | SequenceOf[Conversation],
        *,
        pooling: Pooling = "last",
        adapter: str | None = None,
    ) -> Tensor:
        """Give each conversation a vector of length one: (S, D) float32, on the CPU.

        The states are those after the final norm, as the model or an adapter of its reads: of the
        last token of the prompt (which opens the assistant's turn), or the mean over all tokens.

        Raises:
            InputError, CapacityError: as `chat` does.
        """
        wish = SamplingParams(max_tokens=1, adapter=adapter)
        prompts = [self.prepare(one, wish).prompt for one in as_batch(conversations)]
        if not prompts:
            return torch.empty(0, self.config.text.hidden_size)
        self._mend()
        reader = self._reception.adapter(adapter)
        embedder = Embedder(
            model=self.model,
            shelf=self.runner.shelf,
            switch=self._switch,
            limits=self.scheduler.limits,
            adapter=reader,
        )
        return embedder.embed([seen_through(prompt, reader) for prompt in prompts], pooling)

    def prepare(
        self,
        conversation: Conversation,
        params: SamplingParams,
        tools: SequenceOf[Mapping[str, Any]] | None = None,
    ) -> Prepared:
        """Make the prompt of a conversation and check it; may run in any thread.

        Raises:
            InputError, CapacityError: as `chat` does.
        """
        began = time.perf_counter()
        prompt = self.processor(
            conversation, tools=tools, continue_final=is_unfinished(conversation)
        )
        if tools:  # what a tool returns is for the caller to say, not for the model to make up
            params = replace(params, stop=(*params.stop, *STOP_WORDS))
        self.check(prompt, params)
        return Prepared(prompt, params, time.perf_counter() - began)

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
        each = one_each(params, len(batch))
        strange = [type(p).__name__ for p in batch if not isinstance(p, (str, ModelInput))]
        if strange:
            raise InputError(
                f"prompts: got {strange[0]}, must be text or what the processor makes; messages "
                "go to LLM.chat"
            )
        prepared: list[Prepared] = []
        for prompt, wish in zip(batch, each, strict=True):
            made = self.processor.from_text(prompt) if isinstance(prompt, str) else prompt
            self.check(made, wish)
            prepared.append(Prepared(made, wish, 0.0))
        return self._answer_all(prepared, on_delta)

    def _answer_all(
        self, prepared: SequenceOf[Prepared], on_delta: OnDelta | None
    ) -> list[Completion]:
        self._mend()
        mine: list[Sequence] = []
        bills: list[float] = []
        for prompt, params, seconds in prepared:
            mine += self.sequences(prompt, params, index=len(mine))
            bills += [seconds] * params.n
        try:
            self._finish(mine, on_delta or (lambda delta: None))
        except BaseException:
            if not self.scheduler.is_torn:
                for sequence in mine:
                    self.cancel(sequence)
            raise
        if len(mine) == 1 and mine[0].error is not None:
            raise mine[0].error
        return [s.completion(process=seconds) for s, seconds in zip(mine, bills, strict=True)]

    def _finish(self, sequences: SequenceOf[Sequence], say: OnDelta) -> None:
        """Step until all of `sequences` are over."""
        for sequence in sequences:
            self.scheduler.add(sequence)
        left = set(sequences)
        while left:
            for news in self.step():
                one = news.sequence
                if one in left:
                    say(Delta(index=one.index, text=news.text, finish_reason=one.finish_reason))
                if one.finish_reason is not None:
                    left.discard(one)

    def step(self) -> list[News]:
        """Move every sequence that can move; returns what became certain."""
        if not self.scheduler.has_work:
            return []
        plan = self.scheduler.plan()
        try:
            results = self.runner.run(plan)
        except OverloadError as overload:
            if self._give_up_rest():
                return []  # and the next step tries again
            news = [self.scheduler.fail(overload.sequence, overload.error)]
        else:
            news = self.scheduler.commit(plan, results)
        self.runner.free(self.scheduler.pool.orders)
        return news

    def _give_up_rest(self) -> bool:
        """Give up what is kept for requests to come; False: nothing was."""
        pool, cache = self.scheduler.pool, self.runner.shelf.cache
        if not pool.num_resting and cache.pinned_bytes == cache.stats.num_bytes:
            return False
        self.scheduler.forget()
        self.runner.free(pool.orders)
        cache.clear()
        return True

    def forget(self) -> None:
        """Drop all keys, values and vision rows at rest; call it after changing the weights."""
        self._give_up_rest()
        if self._decode is not None:
            self._decode.forget()

    def cancel(self, sequence: Sequence) -> None:
        """Stop answering; what it computed rests until somebody needs the room."""
        self.scheduler.cancel(sequence)
        self.runner.free(self.scheduler.pool.orders)

    def check(self, prompt: ModelInput, params: SamplingParams) -> None:
        """Refuse what cannot be answered, before anything is computed.

        Raises:
            InputError: a stop token or adapter is not there, or a grammar allows nothing.
            CapacityError: the prompt does not fit into the context.
        """
        self._reception.check(
            prompt,
            params,
            max_model_len=self.max_model_len,
            cache_tokens=self.scheduler.pool.num_blocks * BLOCK,
        )

    @property
    def _longest(self) -> int:
        """Tokens of prompt and answer at most: the context, or a smaller cache."""
        return min(self.max_model_len, self.scheduler.pool.num_blocks * BLOCK)

    def sequences(
        self, prompt: ModelInput, params: SamplingParams, *, index: int = 0
    ) -> list[Sequence]:
        """Make the `params.n` sequences of a request that `check` has let pass."""
        return self._reception.sequences(prompt, params, longest=self._longest, index=index)
