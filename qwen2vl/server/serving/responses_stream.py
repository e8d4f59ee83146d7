"""Output items of a response, and the events that tell of them while they are generated.

`ResponseWriter` takes the engine's deltas and builds the items: at most one message, then function
calls. It is used for both forms, so that the items of a stream and those of a response that is not
streamed are the same. Log probabilities are those of the message. A failure in the middle of a
stream ends it with response.failed. (vLLM: OpenAIServingResponses.responses_stream_generator.)
"""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any

from qwen2vl.engine import Completion, Delta, PreparedRequest
from qwen2vl.processor.tokenizer import Tokenizer
from qwen2vl.processor.tools import ArgumentsDelta, TextDelta, ToolCallStart, ToolEvent
from qwen2vl.server.errors import APIError
from qwen2vl.server.protocol.logprobs import ChatTokenLogprob, chat_logprobs, without_end_token
from qwen2vl.server.protocol.response_events import (
    ContentPartEvent,
    FunctionCallArgumentsDelta,
    FunctionCallArgumentsDone,
    OutputItemEvent,
    OutputTextDelta,
    OutputTextDone,
    ResponseEvent,
    ResponseStateEvent,
)
from qwen2vl.server.protocol.responses import (
    FunctionCallItem,
    IncompleteDetails,
    OutputMessage,
    OutputText,
    ResponseError,
    ResponsesRequest,
    ResponsesResponse,
    ResponsesUsage,
)
from qwen2vl.server.serving.generation import generate
from qwen2vl.server.serving.grounding import find_groundings
from qwen2vl.server.serving.tool_choice import ToolPlan
from qwen2vl.server.serving.usage import build_usage
from qwen2vl.server.state import Caller, ServerState

__all__ = ["NamedEvent", "PreparedResponse", "ResponseWriter", "stream_response"]

NamedEvent = tuple[str, str]  # name and JSON of a server-sent event


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedResponse:
    """A request that was validated and prepared."""

    body: ResponsesRequest
    response: ResponsesResponse  # without output
    plan: ToolPlan
    prepared: PreparedRequest
    paths: list[str]  # of images and videos in the request
    tokenizer: Tokenizer
    end_ids: frozenset[int]  # tokens that may end the output
    began: float  # when the request arrived


async def stream_response(
    state: ServerState, caller: Caller, work: PreparedResponse
) -> AsyncGenerator[NamedEvent, None]:
    """Yield a pair of empty strings once the request is submitted, then the events."""
    writer = ResponseWriter(work)
    async with generate(state, caller, work.prepared, began=work.began) as generation:
        yield "", ""
        for event in writer.begin():
            yield event
        try:
            async for delta in generation.deltas():
                for event in writer.write(delta):
                    yield event
            (completion,) = await generation.completions()
        except APIError as error:
            for event in writer.fail(error):
                yield event
            return
    for event in writer.end(completion):
        yield event


class ResponseWriter:
    """Builds the output of one response; its methods return the events of what they did."""

    def __init__(self, work: PreparedResponse) -> None:
        self.response = work.response
        self._work = work
        self._parser = work.plan.create_parser()
        self._events: list[NamedEvent] = []
        self._num_events = 0
        self._item: OutputMessage | FunctionCallItem | None = None  # the one that is being written
        self._pieces: list[str] = []  # of its text or arguments
        self._logprobs: list[ChatTokenLogprob] = []  # of the message, in no event yet
        self._all_logprobs: list[ChatTokenLogprob] = []

    def begin(self) -> list[NamedEvent]:
        """Tell that the response exists."""
        for kind in ("response.created", "response.in_progress"):
            self._emit(ResponseStateEvent, type=kind, response=self.response)
        return self._take_events()

    def write(self, delta: Delta) -> list[NamedEvent]:
        """Add new output."""
        if self._work.body.num_logprobs is not None and self._awaits_text:
            kept = without_end_token(delta.logprobs, delta.finish_reason, self._work.end_ids)
            self._logprobs += chat_logprobs(kept, self._work.tokenizer).content
        if self._parser is not None:
            self._apply(self._parser.feed(delta.text))
        elif delta.text:
            self._add_text(delta.text)
        return self._take_events()

    def end(self, completion: Completion) -> list[NamedEvent]:
        """Complete the response."""
        if self._parser is not None:
            self._apply(self._parser.finish())
        if self._item is None and not self.response.output:
            self._open_message()  # an answer without text
        if self._work.body.return_grounding:
            self._add_grounding(completion)
        is_cut = completion.finish_reason == "length"
        self._close_item(is_cut=is_cut)
        usage = build_usage([completion], self._work.paths)
        self.response.usage = ResponsesUsage.from_usage(usage)
        self.response.status = "incomplete" if is_cut else "completed"
        if is_cut:
            self.response.incomplete_details = IncompleteDetails(reason="max_output_tokens")
        else:
            self.response.completed_at = int(time.time())
        kind = f"response.{self.response.status}"
        self._emit(ResponseStateEvent, type=kind, response=self.response)
        return self._take_events()

    def fail(self, error: APIError) -> list[NamedEvent]:
        """End the response with an error; its output stays as far as it was generated."""
        self._close_item(is_cut=True)
        self.response.status = "failed"
        self.response.error = ResponseError(code="server_error", message=error.message)
        self._emit(ResponseStateEvent, type="response.failed", response=self.response)
        return self._take_events()

    @property
    def _awaits_text(self) -> bool:
        return self._parser is None or self._parser.num_calls == 0

    def _apply(self, events: Sequence[ToolEvent]) -> None:
        for event in events:
            if isinstance(event, TextDelta):
                self._add_text(event.text)
            elif isinstance(event, ToolCallStart):
                self._open_call(event.name)
            else:
                self._add_arguments(event)

    # Message

    def _open_message(self) -> OutputMessage:
        item = OutputMessage(id=f"msg_{secrets.token_hex(12)}")
        self._open_item(item)
        item.content.append(OutputText(text=""))
        self._emit_part("response.content_part.added", item)
        return item

    def _add_text(self, text: str) -> None:
        item = self._item
        if not isinstance(item, OutputMessage):
            item = self._open_message()
        self._pieces.append(text)
        logprobs, self._logprobs = self._logprobs, []
        self._all_logprobs += logprobs
        self._emit(
            OutputTextDelta,
            item_id=item.id,
            output_index=self._index,
            content_index=0,
            delta=text,
            logprobs=logprobs,
        )

    def _close_message(self, item: OutputMessage) -> None:
        if self._awaits_text:
            self._all_logprobs += self._logprobs
        part = item.content[0]
        part.text, part.logprobs = "".join(self._pieces), self._all_logprobs
        self._emit(
            OutputTextDone,
            item_id=item.id,
            output_index=self._index,
            content_index=0,
            text=part.text,
            logprobs=part.logprobs,
        )
        self._emit_part("response.content_part.done", item)

    def _add_grounding(self, completion: Completion) -> None:
        for item in self.response.output:
            if isinstance(item, OutputMessage):
                item.grounding = find_groundings(
                    list(completion.token_ids),
                    self._work.tokenizer,
                    self._work.prepared.prompt.items,
                    self._work.paths,
                )

    # Function calls

    def _open_call(self, name: str) -> None:
        if self._item is not None:
            self._close_item()
        self._open_item(
            FunctionCallItem(
                id=f"fc_{secrets.token_hex(12)}",
                call_id=f"call_{secrets.token_hex(12)}",
                name=name,
                arguments="",
            )
        )

    def _add_arguments(self, event: ArgumentsDelta) -> None:
        assert isinstance(self._item, FunctionCallItem)
        self._pieces.append(event.text)
        self._emit(
            FunctionCallArgumentsDelta,
            item_id=self._item.id,
            output_index=self._index,
            delta=event.text,
        )

    def _close_call(self, item: FunctionCallItem) -> None:
        item.arguments = "".join(self._pieces)
        self._emit(
            FunctionCallArgumentsDone,
            item_id=item.id,
            output_index=self._index,
            name=item.name,
            arguments=item.arguments,
        )

    # Items and events

    @property
    def _index(self) -> int:
        return len(self.response.output) - 1

    def _open_item(self, item: OutputMessage | FunctionCallItem) -> None:
        self._item, self._pieces = item, []
        self.response.output.append(item)
        self._emit_item("response.output_item.added", item)

    def _close_item(self, *, is_cut: bool = False) -> None:
        """Complete the item that is being written; `is_cut`: the output ended within it."""
        item = self._item
        if item is None:
            return
        if isinstance(item, OutputMessage):
            self._close_message(item)
        else:
            self._close_call(item)
        item.status = "incomplete" if is_cut else "completed"
        self._emit_item("response.output_item.done", item)
        self._item = None

    def _emit_item(self, kind: str, item: OutputMessage | FunctionCallItem) -> None:
        self._emit(OutputItemEvent, type=kind, output_index=self._index, item=item)

    def _emit_part(self, kind: str, item: OutputMessage) -> None:
        self._emit(
            ContentPartEvent,
            type=kind,
            item_id=item.id,
            output_index=self._index,
            content_index=0,
            part=item.content[0],
        )

    def _emit(self, model: type[ResponseEvent], **fields: Any) -> None:
        """Write an event at once, because the items change; not needed without a stream."""
        if not self._work.body.stream:
            return
        event: Any = model(sequence_number=self._num_events, **fields)
        self._num_events += 1
        self._events.append((event.type, event.model_dump_json()))

    def _take_events(self) -> list[NamedEvent]:
        events, self._events = self._events, []
        return events
