"""Bodies of /v1/chat/completions: request, response and the chunks of a stream.

Fields are OpenAI's, then vLLM's (sampling.py, structured_output.py, content.py), then
`return_grounding` of this server. (vLLM: ChatCompletionRequest.)
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, WithJsonSchema

from qwen2vl.server.protocol.content import ChatTemplateFields, MessageList
from qwen2vl.server.protocol.logprobs import ChatLogprobs
from qwen2vl.server.protocol.sampling import (
    MAX_TOKENS,
    MAX_TOP_LOGPROBS,
    Ignored,
    SamplingFields,
    StreamOptions,
    Unsupported,
    invalid_field,
)
from qwen2vl.server.protocol.structured_output import StructuredOutputFields
from qwen2vl.server.protocol.usage import Usage, is_none

__all__ = [
    "FUNCTION_PROPERTIES",
    "MAX_TOOLS",
    "ChatChoice",
    "ChatCompletionChunk",
    "ChatCompletionRequest",
    "ChatCompletionResponse",
    "ChatDelta",
    "ChatFinishReason",
    "ChatMessage",
    "ChunkChoice",
    "FunctionCall",
    "FunctionDelta",
    "GroundingInPixels",
    "GroundingResult",
    "StopReason",
    "ToolCallDelta",
    "ToolCallResult",
    "ToolChoiceField",
    "ToolList",
]

MAX_TOOLS = 128

_NO_AUDIO = "audio is not supported; leave it out"
_USE_TOOLS = "functions are deprecated; give tools and tool_choice"

ToolChoiceField = Annotated[
    Any,
    WithJsonSchema(
        {
            "anyOf": [
                {"enum": ["none", "auto", "required", None]},
                {
                    "type": "object",
                    "properties": {
                        "type": {"const": "function"},
                        "function": {
                            "type": "object",
                            "properties": {"name": {"type": "string"}},
                            "required": ["name"],
                        },
                    },
                    "required": ["type", "function"],
                },
            ]
        }
    ),
]


# Of a definition; ToolPlan validates it, and takes null for a field that is left out.
FUNCTION_PROPERTIES: dict[str, Any] = {
    "name": {"type": "string", "pattern": "^[a-zA-Z0-9_-]{1,64}$"},
    "description": {"type": ["string", "null"]},
    "parameters": {"type": ["object", "null"], "description": "JSON Schema of an object."},
    "strict": {"type": ["boolean", "null"]},
}
_TOOL = {
    "type": "object",
    "title": "Tool",
    "properties": {
        "type": {"const": "function"},
        "function": {
            "type": "object",
            "properties": FUNCTION_PROPERTIES,
            "required": ["name"],
            "additionalProperties": False,
        },
    },
    "required": ["type", "function"],
    "additionalProperties": False,
}
ToolList = Annotated[
    list[Any],
    Field(max_length=MAX_TOOLS),
    WithJsonSchema({"type": "array", "items": _TOOL, "maxItems": MAX_TOOLS}),
]


class ChatCompletionRequest(SamplingFields, StructuredOutputFields, ChatTemplateFields):
    """A conversation, of which the next assistant message is generated."""

    model: str | None = Field(default=None, description="Null: the first served model.")
    messages: MessageList
    max_tokens: int | None = Field(
        default=None, ge=1, le=MAX_TOKENS, description="Null: what is left of the context."
    )
    max_completion_tokens: int | None = Field(default=None, ge=1, le=MAX_TOKENS)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    tools: ToolList | None = None
    tool_choice: ToolChoiceField = None
    parallel_tool_calls: bool | None = None
    return_grounding: bool | None = Field(
        default=None, description="Return boxes, points and quads of the answer in pixels."
    )

    # Accepted with what changes nothing.
    modalities: Annotated[Any, Unsupported(_NO_AUDIO, ["text"])] = None
    audio: Annotated[Any, Unsupported(_NO_AUDIO)] = None
    prediction: Annotated[Any, Unsupported("predicted outputs are not supported; leave it out")] = (
        None
    )
    web_search_options: Annotated[Any, Unsupported("this server searches no web; leave it out")] = (
        None
    )
    moderation: Annotated[Any, Unsupported("nothing is moderated; leave it out")] = None
    functions: Annotated[Any, Unsupported(_USE_TOOLS, [])] = None
    function_call: Annotated[Any, Unsupported(_USE_TOOLS, "none", "auto")] = None
    documents: Annotated[Any, Unsupported("give documents as text of a message", [])] = None
    echo: Annotated[Any, Unsupported("the prompt is not repeated; leave echo out", False)] = None
    add_special_tokens: Annotated[
        Any, Unsupported("the chat template has all special tokens", False)
    ] = None

    # Of vLLM and OpenAI, without a meaning here.
    include_reasoning: Ignored = None
    store: Ignored = None
    service_tier: Ignored = None
    safety_identifier: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_options: Ignored = None
    prompt_cache_retention: Ignored = None
    reasoning_effort: Ignored = None
    verbosity: Ignored = None

    @property
    def num_logprobs(self) -> int | None:
        """Number of most likely tokens to report; None: no log probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None

    def check_combinations(self) -> None:
        """Refuse fields that need or exclude others.

        Raises:
            InputError: names the field, in `param` as well.
        """
        if self.top_logprobs and not self.logprobs:
            raise invalid_field("top_logprobs", "needs logprobs true; set it")
        if self.stream_options is not None and not self.stream:
            raise invalid_field("stream_options", "needs stream true; leave it out")
        self.check_chat_template()


# Response ---------------------------------------------------------------------------------------


class FunctionCall(BaseModel):
    """Name and arguments of a call."""

    name: str
    arguments: str = Field(description="JSON text, as the model generated it.")


class ToolCallResult(BaseModel):
    """A tool call of the assistant."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class GroundingInPixels(BaseModel):
    """A shape in pixels of one image of the prompt, as it was sent."""

    param: str = Field(description='Path of the image in the request: "messages[0].content[1]".')
    coordinates: list[float] = Field(
        description="x, y of a point; x1, y1, x2, y2 of a box; of a quad, four corners in order."
    )


class GroundingResult(BaseModel):
    """A box, point or quad of the answer."""

    type: Literal["box", "point", "quad"]
    label: str | None = Field(description="The phrase that it refers to.")
    normalized: list[int] = Field(description="Thousandths of the upright image, as generated.")
    pixels: list[GroundingInPixels] = Field(
        description="In each image of the prompt, EXIF orientation and resizing undone."
    )


class ChatMessage(BaseModel):
    """The assistant's message."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    tool_calls: list[ToolCallResult] | None = Field(default=None, exclude_if=is_none)
    grounding: list[GroundingResult] | None = Field(default=None, exclude_if=is_none)


ChatFinishReason = Literal["stop", "length", "tool_calls"]
StopReason = Annotated[
    str | int | None,
    Field(description="The stop string or stop token of the request that ended the output."),
]


class ChatChoice(BaseModel):
    """One sample."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: ChatFinishReason
    stop_reason: StopReason = None
    token_ids: list[int] | None = Field(default=None, exclude_if=is_none)


class ChatCompletionResponse(BaseModel):
    """The answer to a chat request."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] | None = Field(default=None, exclude_if=is_none)


# Stream -----------------------------------------------------------------------------------------


class FunctionDelta(BaseModel):
    """A piece of a call: the name comes first, then pieces of the arguments."""

    name: str | None = Field(default=None, exclude_if=is_none)
    arguments: str | None = Field(default=None, exclude_if=is_none)


class ToolCallDelta(BaseModel):
    """A piece of a tool call; id and type come with the first."""

    index: int
    id: str | None = Field(default=None, exclude_if=is_none)
    type: Literal["function"] | None = Field(default=None, exclude_if=is_none)
    function: FunctionDelta


class ChatDelta(BaseModel):
    """What is new in the assistant's message."""

    role: Literal["assistant"] | None = Field(default=None, exclude_if=is_none)
    content: str | None = Field(default=None, exclude_if=is_none)
    tool_calls: list[ToolCallDelta] | None = Field(default=None, exclude_if=is_none)
    grounding: list[GroundingResult] | None = Field(default=None, exclude_if=is_none)


class ChunkChoice(BaseModel):
    """What is new in one sample."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: ChatFinishReason | None = None
    stop_reason: StopReason = None
    token_ids: list[int] | None = Field(default=None, exclude_if=is_none)


class ChatCompletionChunk(BaseModel):
    """One event of a stream."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = Field(default=None, exclude_if=is_none)
    prompt_token_ids: list[int] | None = Field(default=None, exclude_if=is_none)
