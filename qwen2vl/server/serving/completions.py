"""Handler of /v1/completions: raw prompts, each continued `n` times, streamed or not.

Choices are numbered over all prompts: prompt i has i * n to i * n + n - 1. All prompts are prepared
before the first is submitted; their outputs are streamed as they come.
(vLLM: OpenAIServingCompletion.create_completion.)
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

from qwen2vl.engine import Delta, PreparedRequest, SamplingParams
from qwen2vl.processor.tokenizer import Tokenizer
from qwen2vl.server.errors import APIError
from qwen2vl.server.protocol.completions import (
    CompletionChoice,
    CompletionRequest,
    CompletionResponse,
)
from qwen2vl.server.protocol.logprobs import (
    CompletionLogprobs,
    completion_logprobs,
    end_token_ids,
    without_end_token,
)
from qwen2vl.server.protocol.sampling import build_sampling_params
from qwen2vl.server.protocol.usage import Usage
from qwen2vl.server.serving.generation import (
    Generation,
    PromptSource,
    check_output_fits,
    check_samples,
    generate,
    prepare_prompt,
    whole_delta,
    with_cache_salt,
)
from qwen2vl.server.serving.usage import add_usages, build_usage, partial_usage
from qwen2vl.server.state import Caller, ServerState

__all__ = ["create_completion"]


async def create_completion(
    state: ServerState, body: CompletionRequest, caller: Caller
) -> CompletionResponse | AsyncIterator[str]:
    """Continue raw prompts.

    Raises:
        APIError: the model is unknown, or the engine failed.
        InputError, CapacityError: the request cannot be answered; `param` names the part.
    """
    work = await _prepare(state, body, caller)
    if body.stream:
        events = _stream(state, caller, work)
        await anext(events)  # submits the prompts, so that a refusal has a status
        return events
    async with AsyncExitStack() as stack:
        generations = await _generate_all(stack, state, caller, work, final_only=True)
        results = [await one.completions() for one in generations]
    choices = [
        work.choice(i * len(completions) + j, whole_delta(one))
        for i, completions in enumerate(results)
        for j, one in enumerate(completions)
    ]
    return work.response(choices, add_usages([build_usage(one) for one in results]))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Work:
    """A request that was validated and prepared."""

    body: CompletionRequest
    model: str
    prepared: list[PreparedRequest]
    tokenizer: Tokenizer
    end_ids: frozenset[int]
    began: float
    id: str = field(default_factory=lambda: f"cmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))

    def prompt_text(self, choice: int) -> str:
        """Return what `echo` puts before the output of a choice."""
        if not self.body.echo:
            return ""
        prompt = self.body.prompt[choice // self.prepared[0].params.n]
        if isinstance(prompt, str):
            return prompt
        return self.tokenizer.decode(prompt, keep_special="all")

    def prompt_token_ids(self, choice: int) -> list[int] | None:
        """Return the prompt of a choice; None if the request does not ask for token ids."""
        if not self.body.return_token_ids:
            return None
        return self.prepared[choice // self.prepared[0].params.n].prompt.input_ids

    def choice(
        self, index: int, delta: Delta, *, is_first: bool = True, offset: int = 0
    ) -> CompletionChoice:
        """Return a choice, or a chunk of it.

        Args:
            index: of the choice.
            delta: what is new in it.
            is_first: whether nothing of it was sent before.
            offset: characters of its tokens so far, for the log probabilities.
        """
        logprobs: CompletionLogprobs | None = None
        if self.body.logprobs is not None:
            kept = without_end_token(delta.logprobs, delta.finish_reason, self.end_ids)
            logprobs = completion_logprobs(kept, self.tokenizer, offset)
        reason = delta.finish_reason
        return CompletionChoice(
            index=index,
            text=(self.prompt_text(index) if is_first else "") + delta.text,
            logprobs=logprobs,
            finish_reason=None if reason == "error" else reason,
            stop_reason=delta.stop_reason,
            token_ids=list(delta.token_ids) if self.body.return_token_ids else None,
            prompt_token_ids=self.prompt_token_ids(index) if is_first else None,
        )

    def response(
        self, choices: list[CompletionChoice], usage: Usage | None = None
    ) -> CompletionResponse:
        """Return a response, or a chunk."""
        return CompletionResponse(
            id=self.id, created=self.created, model=self.model, choices=choices, usage=usage
        )


async def _prepare(state: ServerState, body: CompletionRequest, caller: Caller) -> _Work:
    began = time.perf_counter()
    adapter = state.adapter_of(body.model)
    body.check_combinations()
    grammar = await asyncio.to_thread(body.grammar) if body.constrains_output else None
    params = build_sampling_params(
        body,
        max_tokens=body.max_tokens,
        max_model_len=state.engine.llm.max_model_len,
        logprobs=body.logprobs,
        grammar=grammar,
        adapter=adapter,
    )
    check_samples(state, params, len(body.prompt))
    salted = with_cache_salt(caller, body.cache_salt)
    prepared = [
        await _prepare_prompt(state, salted, body, params, i) for i in range(len(body.prompt))
    ]
    tokenizer = state.engine.llm.processor.tokenizer
    return _Work(
        body=body,
        model=body.model or state.config.served_model_names[0],
        prepared=prepared,
        tokenizer=tokenizer,
        end_ids=end_token_ids(tokenizer, body.stop_token_ids or ()),
        began=began,
    )


async def _prepare_prompt(
    state: ServerState, caller: Caller, body: CompletionRequest, params: SamplingParams, index: int
) -> PreparedRequest:
    prompt = body.prompt[index]
    param = f"prompt[{index}]" if len(body.prompt) > 1 else "prompt"
    source = PromptSource.of_prompt(state, caller, prompt, param)
    if index:
        await asyncio.sleep(0)  # other requests go on between two of many prompts
    prepared = await prepare_prompt(
        state, source, params, grammar_param=body.grammar_path or "prompt"
    )
    # The default of 16 is not what the client asked for.
    max_tokens = body.max_tokens if "max_tokens" in body.model_fields_set else None
    check_output_fits(state, prepared.prompt, max_tokens)
    return prepared


# Stream -----------------------------------------------------------------------------------------


async def _stream(state: ServerState, caller: Caller, work: _Work) -> AsyncGenerator[str, None]:
    """Yield an empty string once all prompts are submitted, then the JSON of each chunk."""
    async with AsyncExitStack() as stack:
        generations = await _generate_all(stack, state, caller, work)
        yield ""
        writer = _ChunkWriter(work)
        merged = _merge(generations)
        stack.push_async_callback(merged.aclose)
        async for index, delta in merged:
            if chunk := writer.write(index, delta):
                yield chunk
        results = [await one.completions() for one in generations]
        if writer.includes_usage:
            usage = add_usages([build_usage(one) for one in results])
            yield work.response([], usage).model_dump_json()


async def _generate_all(
    stack: AsyncExitStack,
    state: ServerState,
    caller: Caller,
    work: _Work,
    *,
    final_only: bool = False,
) -> list[Generation]:
    """Submit all prompts; `stack` aborts them."""
    return [
        await stack.enter_async_context(
            generate(state, caller, prepared, began=work.began, final_only=final_only)
        )
        for prepared in work.prepared
    ]


async def _merge(generations: Sequence[Generation]) -> AsyncGenerator[tuple[int, Delta], None]:
    """Yield (index of the prompt, delta) of several prompts as they come, until one fails."""
    if len(generations) == 1:
        async for delta in generations[0].deltas():
            yield 0, delta
        return
    queue: asyncio.Queue[tuple[int, Delta | APIError | None]] = asyncio.Queue()

    async def read(index: int, generation: Generation) -> None:
        try:
            async for delta in generation.deltas():
                queue.put_nowait((index, delta))
            queue.put_nowait((index, None))
        except APIError as error:
            queue.put_nowait((index, error))

    tasks = [asyncio.ensure_future(read(i, one)) for i, one in enumerate(generations)]
    try:
        num_open = len(tasks)
        while num_open:
            index, delta = await queue.get()
            if isinstance(delta, APIError):
                raise delta
            if delta is None:
                num_open -= 1
            else:
                yield index, delta
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class _ChunkWriter:
    """Writes the chunks of one request."""

    def __init__(self, work: _Work) -> None:
        options = work.body.stream_options
        self.includes_usage = bool(options and options.include_usage)
        self._usage_in_all = self.includes_usage and bool(
            options and options.continuous_usage_stats
        )
        self._work = work
        self._num_tokens = 0
        self._offsets: dict[int, int] = {}  # choice -> characters of its tokens so far

    def write(self, index: int, delta: Delta) -> str:
        """Return the chunk of a delta of prompt `index`; "" if it has nothing to say."""
        work = self._work
        number = index * work.prepared[index].params.n + delta.index
        is_first = number not in self._offsets
        offset = self._offsets.setdefault(number, 0)
        self._num_tokens += len(delta.token_ids)
        choice = work.choice(number, delta, is_first=is_first, offset=offset)
        tokens = choice.logprobs.tokens if choice.logprobs else []
        self._offsets[number] += sum(map(len, tokens))
        if not (choice.text or tokens or choice.token_ids or choice.finish_reason):
            return ""
        prompt_tokens = sum(len(one.prompt.input_ids) for one in work.prepared)
        usage = partial_usage(prompt_tokens, self._num_tokens) if self._usage_in_all else None
        return work.response([choice], usage).model_dump_json()
