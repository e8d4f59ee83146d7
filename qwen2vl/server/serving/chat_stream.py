"""The stream of a chat completion: deltas of the engine in, chunks of OpenAI's form out.

For each sample: a chunk with the role, chunks with text or pieces of tool calls, and a chunk with
the finish reason; after all samples, with include_usage, a chunk with the usage. Log probabilities
and token ids go with the first chunk of their delta. Joined, the chunks equal the response that is
not streamed. (vLLM: chat_completion_stream_generator.)
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass, field
from typing import Any

from qwen2vl.engine import Delta, PreparedRequest
from qwen2vl.processor.tokenizer import Tokenizer
from qwen2vl.processor.tools import ArgumentsDelta, TextDelta, ToolCallParser, ToolEvent
from qwen2vl.server.protocol.chat import (
    ChatCompletionChunk,
    ChatCompletionRequest,
    ChatDelta,
    ChatFinishReason,
    ChunkChoice,
    FunctionDelta,
    GroundingResult,
    ToolCallDelta,
)
from qwen2vl.server.protocol.logprobs import ChatLogprobs, chat_logprobs, without_end_token
from qwen2vl.server.protocol.usage import Usage
from qwen2vl.server.serving.generation import generate
from qwen2vl.server.serving.grounding import find_groundings
from qwen2vl.server.serving.tool_choice import ToolPlan
from qwen2vl.server.serving.usage import build_usage, partial_usage
from qwen2vl.server.state import Caller, ServerState

__all__ = ["ChunkWriter", "PreparedChat", "chat_finish_reason", "new_call_id", "stream_chat"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedChat:
    """A chat request that was validated and prepared; what responses of both forms need."""

    body: ChatCompletionRequest
    model: str  # name in responses
    plan: ToolPlan
    prepared: PreparedRequest
    paths: list[str]  # of images and videos in the request
    tokenizer: Tokenizer
    end_ids: frozenset[int]  # tokens that may end the output
    began: float  # when the request arrived
    id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))

    def groundings(self, token_ids: list[int]) -> list[GroundingResult] | None:
        """Return the shapes of an output; None if the request does not ask for them."""
        if not self.body.return_grounding:
            return None
        return find_groundings(token_ids, self.tokenizer, self.prepared.prompt.items, self.paths)

    def stop_reason(self, delta: Delta) -> str | int | None:
        """Return the stop string or token of the client that ended a sample."""
        reason = delta.stop_reason
        return reason if isinstance(reason, int) or reason in (self.body.stop or ()) else None

    def logprobs(self, delta: Delta) -> ChatLogprobs | None:
        """Return the log probabilities of a delta; None if the request does not ask for them."""
        if not self.body.logprobs:
            return None
        kept = without_end_token(delta.logprobs, delta.finish_reason, self.end_ids)
        return chat_logprobs(kept, self.tokenizer)


def chat_finish_reason(reason: str | None, num_calls: int) -> ChatFinishReason:
    """Return OpenAI's finish reason of a sample that has called `num_calls` tools."""
    if reason == "length":
        return "length"
    return "tool_calls" if num_calls else "stop"


def new_call_id() -> str:
    """Return the id of a tool call."""
    return f"call_{secrets.token_hex(12)}"


async def stream_chat(
    state: ServerState, caller: Caller, chat: PreparedChat
) -> AsyncGenerator[str, None]:
    """Yield an empty string once the request is submitted, then the JSON of each chunk.

    Raises:
        APIError: the engine has stopped, or a sample failed.
    """
    async with generate(state, caller, chat.prepared, began=chat.began) as generation:
        yield ""
        writer = ChunkWriter(chat)
        async for delta in generation.deltas():
            for chunk in writer.write(delta):
                yield chunk
        completions = await generation.completions()
        if writer.includes_usage:
            yield writer.dump([], build_usage(completions, chat.paths))


@dataclass(slots=True)
class _Sample:
    """What has been streamed of one sample."""

    index: int
    parser: ToolCallParser | None
    token_ids: list[int] = field(default_factory=list)
    has_begun: bool = False

    def feed(self, delta: Delta) -> list[ChatDelta]:
        """Return the message deltas of new text."""
        if self.parser is None:
            return [ChatDelta(content=delta.text)] if delta.text else []
        events = self.parser.feed(delta.text)
        if delta.finish_reason is not None:
            events += self.parser.finish()
        return [_event_delta(event) for event in events]

    @property
    def num_calls(self) -> int:
        """Number of tool calls that have begun."""
        return 0 if self.parser is None else self.parser.num_calls


def _event_delta(event: ToolEvent) -> ChatDelta:
    if isinstance(event, TextDelta):
        return ChatDelta(content=event.text)
    if isinstance(event, ArgumentsDelta):
        call = ToolCallDelta(index=event.index, function=FunctionDelta(arguments=event.text))
    else:
        call = ToolCallDelta(
            index=event.index,
            id=new_call_id(),
            type="function",
            function=FunctionDelta(name=event.name, arguments=""),
        )
    return ChatDelta(tool_calls=[call])


class ChunkWriter:
    """Writes the chunks of one request."""

    def __init__(self, chat: PreparedChat) -> None:
        options = chat.body.stream_options
        self.includes_usage = bool(options and options.include_usage)
        self._usage_in_all = self.includes_usage and bool(
            options and options.continuous_usage_stats
        )
        # Nothing but text can be in a chunk before the last.
        self._is_plain = not (
            chat.body.logprobs
            or chat.body.return_token_ids
            or self._usage_in_all
            or chat.plan.create_parser()
        )
        self._head: str | None = None  # of all chunks, up to the choices
        self._chat = chat
        self._num_tokens = 0  # of all samples
        self._samples = [
            _Sample(index, chat.plan.create_parser()) for index in range(chat.prepared.params.n)
        ]

    def write(self, delta: Delta) -> Iterator[str]:
        """Yield the chunks of one delta of the engine."""
        sample = self._samples[delta.index]
        self._num_tokens += len(delta.token_ids)
        sample.token_ids += delta.token_ids
        if not sample.has_begun:
            sample.has_begun = True
            opening = ChatDelta(role="assistant", content="")
            yield self._dump_choice(ChunkChoice(index=sample.index, delta=opening), is_first=True)
        if self._is_plain and delta.finish_reason is None:
            if delta.text:
                yield self.dump_text(sample.index, delta.text)
            return
        for choice in self._choices(sample, delta):
            yield self._dump_choice(choice)

    def dump_text(self, index: int, text: str) -> str:
        """Return the JSON of a chunk with text alone, equal to that of `dump`.

        Most chunks are of this kind, and pydantic takes most of the time that one costs.
        """
        if self._head is None:
            self._head = self.dump([], None).removesuffix("]}")
        return (
            f'{self._head}{{"index":{index},"delta":{{"content":{json.dumps(text)}}},'
            '"logprobs":null,"finish_reason":null,"stop_reason":null}]}'
        )

    def dump(self, choices: list[ChunkChoice], usage: Usage | None, **extra: Any) -> str:
        """Return the JSON of a chunk."""
        chat = self._chat
        chunk = ChatCompletionChunk(
            id=chat.id,
            created=chat.created,
            model=chat.model,
            choices=choices,
            usage=usage,
            **extra,
        )
        return chunk.model_dump_json()

    def _dump_choice(self, choice: ChunkChoice, *, is_first: bool = False) -> str:
        prompt_ids = self._chat.prepared.prompt.input_ids
        usage = partial_usage(len(prompt_ids), self._num_tokens) if self._usage_in_all else None
        if is_first and choice.index == 0 and self._chat.body.return_token_ids:
            return self.dump([choice], usage, prompt_token_ids=prompt_ids)
        return self.dump([choice], usage)

    def _choices(self, sample: _Sample, delta: Delta) -> list[ChunkChoice]:
        """Return the choices of the chunks of one delta, the last with the finish reason."""
        chat = self._chat
        messages = sample.feed(delta)
        logprobs = chat.logprobs(delta)
        if logprobs is not None and not logprobs.content:
            logprobs = None
        token_ids = list(delta.token_ids) if chat.body.return_token_ids else None
        is_last = delta.finish_reason is not None
        if not messages and not is_last and (token_ids or logprobs):
            messages = [ChatDelta(content="")]
        if is_last:
            messages.append(ChatDelta(grounding=chat.groundings(sample.token_ids)))
        choices = [ChunkChoice(index=sample.index, delta=message) for message in messages]
        if choices:
            choices[0].logprobs, choices[0].token_ids = logprobs, token_ids
        if is_last:
            choices[-1].finish_reason = chat_finish_reason(delta.finish_reason, sample.num_calls)
            choices[-1].stop_reason = chat.stop_reason(delta)
        return choices
