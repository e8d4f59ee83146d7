"""Events of a streamed response, in the order in which OpenAI sends them.

    response.created, response.in_progress
    for each item:     response.output_item.added
        a message:     response.content_part.added, response.output_text.delta ...,
                       response.output_text.done, response.content_part.done
        a call:        response.function_call_arguments.delta ..., .done
                       response.output_item.done
    response.completed, response.incomplete or response.failed

Each has a `sequence_number`, from 0. (OpenAI: ResponseStreamEvent.)
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

from qwen2vl.server.protocol.logprobs import ChatTokenLogprob
from qwen2vl.server.protocol.responses import OutputItem, OutputText, ResponsesResponse

__all__ = [
    "ContentPartEvent",
    "FunctionCallArgumentsDelta",
    "FunctionCallArgumentsDone",
    "OutputItemEvent",
    "OutputTextDelta",
    "OutputTextDone",
    "ResponseEvent",
    "ResponseStateEvent",
]


class ResponseEvent(BaseModel):
    """An event of any kind; its `type` is the name of the server-sent event too."""

    sequence_number: int


class ResponseStateEvent(ResponseEvent):
    """The status of the response has changed; the last one has its output and usage."""

    type: Literal[
        "response.created",
        "response.in_progress",
        "response.completed",
        "response.incomplete",
        "response.failed",
    ]
    response: ResponsesResponse


class OutputItemEvent(ResponseEvent):
    """An output item begins, or is complete."""

    type: Literal["response.output_item.added", "response.output_item.done"]
    output_index: int
    item: OutputItem


class ContentPartEvent(ResponseEvent):
    """A part of a message begins, or is complete."""

    type: Literal["response.content_part.added", "response.content_part.done"]
    item_id: str
    output_index: int
    content_index: int
    part: OutputText


class OutputTextDelta(ResponseEvent):
    """New text of a message."""

    type: Literal["response.output_text.delta"] = "response.output_text.delta"
    item_id: str
    output_index: int
    content_index: int
    delta: str
    logprobs: list[ChatTokenLogprob]


class OutputTextDone(ResponseEvent):
    """The text of a message is complete."""

    type: Literal["response.output_text.done"] = "response.output_text.done"
    item_id: str
    output_index: int
    content_index: int
    text: str
    logprobs: list[ChatTokenLogprob]


class FunctionCallArgumentsDelta(ResponseEvent):
    """New text of the arguments of a call."""

    type: Literal["response.function_call_arguments.delta"] = (
        "response.function_call_arguments.delta"
    )
    item_id: str
    output_index: int
    delta: str


class FunctionCallArgumentsDone(ResponseEvent):
    """The arguments of a call are complete."""

    type: Literal["response.function_call_arguments.done"] = "response.function_call_arguments.done"
    item_id: str
    output_index: int
    name: str
    arguments: str
