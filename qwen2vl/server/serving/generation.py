"""Preparation and submission of a request; what all generating handlers share.

    messages -> MediaConnector -> processor (a worker thread) -> validated PreparedRequest
    PreparedRequest -> AsyncLLM -> AsyncDeltaStream, aborted when its user leaves

Text waits for no media: requests with media are prepared in a pool of threads of their own, in
which they wait for a decoding process. Short texts are prepared in the event loop, because a
change of threads costs more than their tokens.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any, Self, TypeVar

from qwen2vl.engine import AsyncDeltaStream, Completion, Delta, PreparedRequest, SamplingParams
from qwen2vl.errors import (
    CapacityError,
    EngineDeadError,
    EngineError,
    InputError,
    Qwen2VLError,
)
from qwen2vl.processor.content import MediaPart, TextPart
from qwen2vl.processor.inputs import ModelInput
from qwen2vl.processor.media_options import NO_OPTIONS, MediaOptions
from qwen2vl.processor.messages import Message
from qwen2vl.server.errors import APIError, to_api_error
from qwen2vl.server.media.options import with_media_defaults
from qwen2vl.server.protocol.sampling import name_parameter
from qwen2vl.server.state import Caller, ServerState

__all__ = [
    "MAX_INLINE_CHARACTERS",
    "Generation",
    "PromptSource",
    "check_output_fits",
    "check_samples",
    "engine_failure",
    "generate",
    "prepare",
    "prepare_prompt",
    "whole_delta",
    "with_cache_salt",
]

logger = logging.getLogger(__name__)

T = TypeVar("T")

MAX_INLINE_CHARACTERS = 1024  # of a text that is tokenized in the event loop: below 1 ms
TURN_CHARACTERS = 32  # that a message or content item counts for besides its text
MAX_MEDIA_THREADS = 8
MAX_SEQUENCES = 64  # completions of one request: it takes one place in the queue

_media_threads = ThreadPoolExecutor(MAX_MEDIA_THREADS, thread_name_prefix="prepare-media")


# Preparation ------------------------------------------------------------------------------------


async def prepare(
    state: ServerState,
    caller: Caller,
    messages: Sequence[Message],
    params: SamplingParams,
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    continue_final_message: bool = False,
    add_generation_prompt: bool = True,
    media_defaults: MediaOptions = NO_OPTIONS,
    grammar_param: str = "response_format",
) -> PreparedRequest:
    """Fetch the media of a conversation, build its prompt and validate it.

    Args:
        state: of the server.
        caller: the sender; its salt keeps cache entries apart.
        messages: from `parse_messages`.
        params: of the request.
        tools: definitions of functions, for the system turn.
        continue_final_message: leave the assistant's last turn open.
        add_generation_prompt: end with the header of the assistant's next turn.
        media_defaults: options for media that leave them out.
        grammar_param: field that the grammar comes from, for errors of its compilation.

    Raises:
        APIError: a medium may not be fetched.
        InputError, CapacityError: as `LLM.prepare` does; `param` names the item or the field.
    """
    resolved = await state.connector.resolve(with_media_defaults(messages, media_defaults))
    source = PromptSource.of_messages(
        state,
        caller,
        resolved,
        tools=tools,
        continue_final_message=continue_final_message,
        add_generation_prompt=add_generation_prompt,
    )
    return await prepare_prompt(state, source, params, grammar_param=grammar_param)


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSource:
    """How a prompt is built, and where: a short text costs less than a change of threads."""

    build: Callable[[], ModelInput]
    param: str  # field of the request that holds the prompt, for errors without a place
    is_short: bool = False  # built in less than a millisecond
    has_media: bool = False  # images or videos have to be decoded

    @classmethod
    def of_messages(
        cls, state: ServerState, caller: Caller, messages: Sequence[Message], **options: Any
    ) -> Self:
        """Return the source of a conversation whose media are resolved.

        `options` are those of the processor: tools, continue_final_message,
        add_generation_prompt.
        """
        texts = [text for message in messages for text in _texts(message)]
        num_items = sum(1 + len(message.parts) for message in messages)
        has_media = any(isinstance(p, MediaPart) for message in messages for p in message.parts)
        processor = state.engine.llm.processor

        def build() -> ModelInput:
            state.engine.llm.check_text_fits(texts)
            return processor(messages, cache_salt=caller.cache_salt, **options)

        return cls(
            build=build,
            param="messages",
            is_short=sum(map(len, texts)) + TURN_CHARACTERS * num_items <= MAX_INLINE_CHARACTERS
            and not (has_media or options.get("tools")),
            has_media=has_media,
        )

    @classmethod
    def of_prompt(
        cls, state: ServerState, caller: Caller, prompt: str | list[int], param: str
    ) -> Self:
        """Return the source of a raw text, in which control tokens are text, or of token ids."""
        processor, salt = state.engine.llm.processor, caller.cache_salt

        def build() -> ModelInput:
            if not isinstance(prompt, str):
                return processor.from_token_ids(prompt, cache_salt=salt)
            state.engine.llm.check_text_fits([prompt])
            return processor.from_text(prompt, allow_special_tokens=False, cache_salt=salt)

        return cls(build=build, param=param, is_short=len(prompt) <= MAX_INLINE_CHARACTERS)

    async def run(self, work: Callable[[], T], *, inline: bool = True) -> T:
        """Call `work` in the event loop or in a thread; add the param to its errors."""
        try:
            if self.is_short and inline:
                return work()
            if self.has_media:
                return await asyncio.get_running_loop().run_in_executor(_media_threads, work)
            return await asyncio.to_thread(work)
        except (InputError, CapacityError) as error:
            if error.param is None:
                error.param = self.param
            raise


def _texts(message: Message) -> list[str]:
    """Return what becomes text in the prompt of a message; the numbers of boxes are not long."""
    texts = [part.text for part in message.parts if isinstance(part, TextPart)]
    return texts + [text for call in message.tool_calls for text in (call.name, call.arguments)]


async def prepare_prompt(
    state: ServerState,
    source: PromptSource,
    params: SamplingParams,
    *,
    grammar_param: str = "response_format",
) -> PreparedRequest:
    """Build a prompt and validate it; arguments as of `prepare`.

    Raises:
        InputError, CapacityError: the prompt or the parameters cannot be used.
    """

    def build_and_validate() -> PreparedRequest:
        began = time.perf_counter()
        prompt = source.build()
        _validate(state, prompt, params, grammar_param)
        return PreparedRequest(prompt, params, time.perf_counter() - began)

    # A grammar is compiled by `validate`, which may take long.
    return await source.run(build_and_validate, inline=params.grammar is None)


def _validate(
    state: ServerState, prompt: ModelInput, params: SamplingParams, grammar_param: str
) -> None:
    try:
        with name_parameter():
            state.engine.llm.validate(prompt, params)
    except InputError as error:
        # That the grammar cannot be compiled; `grammar` is the engine's name for it.
        if params.grammar is None or error.param not in (None, "grammar"):
            raise
        text = str(error)
        if text.startswith("grammar: "):
            text = f"{grammar_param}{text.removeprefix('grammar')}"
        raise InputError(text, param=grammar_param) from error


def with_cache_salt(caller: Caller, salt: str | None) -> Caller:
    """Return the caller with the salt of one request mixed into its own. (vLLM: cache_salt.)"""
    if salt is None:
        return caller
    mixed = blake2b(salt.encode(), key=caller.cache_salt[:64], digest_size=16, person=b"request")
    return replace(caller, cache_salt=mixed.digest())


# Submission -------------------------------------------------------------------------------------


def check_samples(state: ServerState, params: SamplingParams, num_prompts: int = 1) -> None:
    """Refuse more samples of a prompt than the engine runs at once, or too many in all.

    Raises:
        InputError: `n` is above max_num_seqs, or with several prompts above MAX_SEQUENCES.
    """
    limit = state.engine.llm.engine_config.max_num_seqs
    if params.n > limit:
        raise InputError(f"n: got {params.n}, must be at most {limit} (max_num_seqs)", param="n")
    if params.n * num_prompts > MAX_SEQUENCES:
        raise InputError(
            f"n: got {params.n} for {num_prompts} prompts, {params.n * num_prompts} completions, "
            f"at most {MAX_SEQUENCES} of one request are allowed; send several requests",
            param="n",
        )


def check_output_fits(
    state: ServerState, prompt: ModelInput, max_tokens: int | None, param: str = "max_tokens"
) -> None:
    """Refuse an explicit limit of output tokens that the context cannot hold, as vLLM does.

    Raises:
        CapacityError: prompt and output exceed the context; the text has the arithmetic.
    """
    llm = state.engine.llm
    limit = min(llm.max_model_len, llm.kv_cache_tokens)
    total = len(prompt.input_ids)
    if max_tokens is None or total + max_tokens <= limit:
        return
    counts = {"image": prompt.image_tokens, "video": prompt.video_tokens}
    text = total - sum(counts.values())
    parts = [f"{text:,} text", *(f"{n:,} {kind}" for kind, n in counts.items() if n)]
    remedy = f"lower {param} to {limit - total:,} or leave it out"
    free = limit - (total - prompt.image_tokens) - max_tokens
    pixels = llm.fitting_max_pixels(prompt, free) if prompt.image_tokens else None
    if pixels is not None:
        remedy += f", or lower max_pixels to {pixels:,}"
    raise CapacityError(
        f"{' + '.join(parts)} tokens of the prompt + {max_tokens:,} of the output ({param}) = "
        f"{total + max_tokens:,} > {limit:,}, the context (max_model_len); {remedy}",
        param=param,
    )


@asynccontextmanager
async def generate(
    state: ServerState,
    caller: Caller,
    prepared: PreparedRequest,
    *,
    began: float,
    final_only: bool = False,
) -> AsyncIterator[Generation]:
    """Run a prepared request while the context lasts; what is unfinished then is aborted.

    Args:
        state: of the server.
        caller: the sender.
        prepared: from `prepare`.
        began: when the request arrived, by `time.perf_counter`.
        final_only: only the last delta of each sample is needed.

    Raises:
        APIError: 503, the engine has stopped.
    """
    try:
        stream = state.engine.stream_prepared(prepared, final_only=final_only)
    except EngineError as error:
        raise engine_failure(state, caller, error) from error
    try:
        yield Generation(state, caller, stream, began)
    finally:
        stream.abort()


class Generation:
    """A request that the engine runs; its times and tokens are counted in the metrics."""

    def __init__(
        self, state: ServerState, caller: Caller, stream: AsyncDeltaStream, began: float
    ) -> None:
        self._state = state
        self._caller = caller
        self._stream = stream
        self._began = began
        self._first_token_at: float | None = None  # None: not seen

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        """Yield the new output of all samples.

        Raises:
            APIError: a sample failed, and the others with it, as in vLLM; or the engine stopped.
        """
        try:
            async for delta in self._stream:
                if delta.finish_reason == "error":
                    self._check_samples()
                self._first_token_at = self._first_token_at or time.perf_counter()
                yield delta
        except Qwen2VLError as error:
            raise engine_failure(self._state, self._caller, error) from error

    async def completions(self) -> list[Completion]:
        """Wait for all samples, and count them in the metrics.

        Raises:
            APIError: as of `deltas`.
        """
        try:
            completions = await self._stream.completions()
        except Qwen2VLError as error:
            raise engine_failure(self._state, self._caller, error) from error
        first = self._first_token_at
        self._state.metrics.observe_completions(
            completions,
            e2e_seconds=time.perf_counter() - self._began,
            first_token_seconds=None if first is None else first - self._began,
        )
        self._check_samples()
        return completions

    def _check_samples(self) -> None:
        for request in self._stream.requests:
            if request.error is not None:
                raise engine_failure(self._state, self._caller, request.error)


def whole_delta(completion: Completion, index: int = 0) -> Delta:
    """Return a completion as its only delta, for what streams and responses share."""
    return Delta(
        index=index,
        text=completion.text,
        finish_reason=completion.finish_reason,
        stop_reason=completion.stop_reason,
        token_ids=completion.token_ids,
        logprobs=completion.logprobs or (),
    )


def engine_failure(state: ServerState, caller: Caller, error: BaseException) -> APIError:
    """Return the APIError of a request that failed while it ran.

    An EngineError of one request, such as logits that are not finite, is an internal error (500);
    if the engine has died with all its requests, or the server has shut down, the client may send
    it again (503).
    """
    if isinstance(error, EngineError) and not isinstance(error, EngineDeadError):
        logger.error("request %s failed in the engine: %s", caller.request_id, error)
        return to_api_error(RuntimeError(), caller.request_id)
    return to_api_error(error, caller.request_id, is_draining=state.is_draining)
