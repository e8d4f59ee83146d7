"""Bodies of /v1/responses: request, response and its output items.

The API is stateless: nothing is stored, and what would need a stored response is refused by name.
Fields are OpenAI's, then vLLM's (sampling.py, content.py). `ResponsesResponse` repeats the request,
as OpenAI does; its usage has this server's additions. (vLLM: ResponsesRequest.)
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, WithJsonSchema

from qwen2vl.engine import Grammar
from qwen2vl.errors import InputError
from qwen2vl.server.protocol.chat import FUNCTION_PROPERTIES, MAX_TOOLS, GroundingResult
from qwen2vl.server.protocol.content import MediaFields
from qwen2vl.server.protocol.logprobs import ChatTokenLogprob
from qwen2vl.server.protocol.sampling import (
    MAX_TOKENS,
    MAX_TOP_LOGPROBS,
    Ignored,
    RequestModel,
    SamplingFields,
    StreamOptions,
    Unsupported,
    invalid_field,
)
from qwen2vl.server.protocol.structured_output import (
    ANY_OBJECT,
    JsonObjectFormat,
    JsonSchemaFormat,
    TextFormat,
)
from qwen2vl.server.protocol.usage import MediaUsage, PhaseTimings, Usage, is_none

__all__ = [
    "MAX_INPUT_ITEMS",
    "FunctionCallItem",
    "IncompleteDetails",
    "OutputItem",
    "OutputMessage",
    "OutputText",
    "ResponseError",
    "ResponseStatus",
    "ResponsesRequest",
    "ResponsesResponse",
    "ResponsesUsage",
    "TextOptions",
]

MAX_INPUT_ITEMS = 1024
MAX_METADATA = 16

_STATELESS = "responses are not stored; send the whole conversation as input"
_LOGPROBS = "message.output_text.logprobs"

Includable = Literal[
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
    "message.input_image.image_url",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
]
_Metadata = Annotated[
    dict[
        Annotated[str, Field(max_length=64)],
        Annotated[str, Field(max_length=512)],
    ],
    Field(max_length=MAX_METADATA),
]

_STRING: dict[str, Any] = {"type": "string"}
_ITEM = {
    "type": "object",
    "description": "A message, a function_call, or a function_call_output.",
    "properties": {
        "type": {"enum": ["message", "function_call", "function_call_output"]},
        "role": {"enum": ["user", "assistant", "system", "developer"]},
        "content": {"anyOf": [_STRING, {"type": "array", "items": {"type": "object"}}]},
        "call_id": _STRING,
        "name": _STRING,
        "arguments": _STRING,
        "output": {"anyOf": [_STRING, {"type": "array", "items": {"type": "object"}}]},
    },
}
InputField = Annotated[
    Any,
    WithJsonSchema(
        {
            "anyOf": [
                _STRING,
                {"type": "array", "items": _ITEM, "minItems": 1, "maxItems": MAX_INPUT_ITEMS},
            ]
        }
    ),
]
_FUNCTION = {
    "type": "object",
    "properties": {"type": {"const": "function"}, **FUNCTION_PROPERTIES},
    "required": ["type", "name"],
}
_ToolsField = Annotated[
    list[Any],
    Field(max_length=MAX_TOOLS),
    WithJsonSchema({"type": "array", "items": _FUNCTION, "maxItems": MAX_TOOLS}),
]
_ToolChoiceField = Annotated[
    Any,
    WithJsonSchema(
        {
            "anyOf": [
                {"enum": ["none", "auto", "required", None]},
                {
                    "type": "object",
                    "properties": {"type": {"const": "function"}, "name": _STRING},
                    "required": ["type", "name"],
                },
            ]
        }
    ),
]


class FlatSchemaFormat(JsonSchemaFormat):
    """JSON of a schema; without the nested object that chat completions have."""

    type: Literal["json_schema"]


class TextOptions(RequestModel):
    """Options of the text."""

    format: (
        Annotated[TextFormat | JsonObjectFormat | FlatSchemaFormat, Field(discriminator="type")]
        | None
    ) = None
    verbosity: Ignored = None

    def grammar(self) -> Grammar | None:
        """Build the grammar of the format; None for free text.

        Raises:
            InputError: the schema cannot be obeyed; `param` is its path.
        """
        if isinstance(self.format, JsonObjectFormat):
            return Grammar.json_schema(ANY_OBJECT)
        if not isinstance(self.format, FlatSchemaFormat):
            return None
        try:
            return Grammar.json_schema(self.format.schema_)
        except InputError as error:
            error.param = "text.format.schema"
            raise


class ResponsesRequest(SamplingFields, MediaFields):
    """A conversation, of which the next items are generated."""

    model: str | None = Field(None, description="Null: the first served model.")
    input: InputField
    instructions: str | None = Field(None, description="A system message before the input.")
    max_output_tokens: int | None = Field(
        None, ge=1, le=MAX_TOKENS, description="Null: what is left of the context."
    )
    text: TextOptions | None = None
    tools: _ToolsField | None = None
    tool_choice: _ToolChoiceField = None
    parallel_tool_calls: bool | None = None
    include: Annotated[list[Includable], Field(max_length=16)] | None = Field(
        None, description=f"{_LOGPROBS}; the others have no effect."
    )
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    metadata: _Metadata | None = Field(None, description="Returned with the response.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_grounding: bool | None = Field(
        None, description="Return boxes, points and quads of the message in pixels."
    )

    n: Annotated[Any, Unsupported("a response has one sample; send several requests", 1)] = None
    return_token_ids: Annotated[
        Any, Unsupported("a response has no token ids; use /v1/chat/completions", False)
    ] = None
    previous_response_id: Annotated[Any, Unsupported(_STATELESS)] = None
    conversation: Annotated[Any, Unsupported(_STATELESS)] = None
    background: Annotated[
        Any, Unsupported("responses are not stored; leave it out and wait, or stream", False)
    ] = None
    prompt: Annotated[
        Any, Unsupported("no prompt templates are stored; send instructions and input")
    ] = None
    truncation: Annotated[
        Any, Unsupported("prompts are never truncated; shorten the input", "disabled")
    ] = None
    context_management: Annotated[
        Any, Unsupported("nothing is compacted; shorten the input", [])
    ] = None
    moderation: Annotated[Any, Unsupported("nothing is moderated; leave it out")] = None

    # Of OpenAI, without a meaning here.
    access_programs: Ignored = None
    background_options: Ignored = None
    image: Ignored = None
    max_tool_calls: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_options: Ignored = None
    prompt_cache_retention: Ignored = None
    reasoning: Ignored = None
    safety_identifier: Ignored = None
    service_tier: Ignored = None
    store: Ignored = None

    @property
    def num_logprobs(self) -> int | None:
        """Number of most likely tokens to report; None: no log probabilities."""
        return (self.top_logprobs or 0) if _LOGPROBS in (self.include or ()) else None

    def check_combinations(self) -> None:
        """Refuse fields that need others.

        Raises:
            InputError: names the field, in `param` as well.
        """
        if self.top_logprobs and self.num_logprobs is None:
            raise invalid_field("top_logprobs", f'needs include ["{_LOGPROBS}"]; add it')
        if self.stream_options is not None and not self.stream:
            raise invalid_field("stream_options", "needs stream true; leave it out")


# Response ---------------------------------------------------------------------------------------

ItemStatus = Literal["in_progress", "completed", "incomplete"]
ResponseStatus = Literal["in_progress", "completed", "incomplete", "failed"]


class OutputText(BaseModel):
    """Text of a message."""

    type: Literal["output_text"] = "output_text"
    text: str
    annotations: list[Any] = []
    logprobs: list[ChatTokenLogprob] = []


class OutputMessage(BaseModel):
    """The assistant's message."""

    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    status: ItemStatus = "in_progress"
    content: list[OutputText] = []
    grounding: list[GroundingResult] | None = Field(default=None, exclude_if=is_none)


class FunctionCallItem(BaseModel):
    """A call of a function that the client runs."""

    id: str
    type: Literal["function_call"] = "function_call"
    call_id: str = Field(description="Names the call in its function_call_output.")
    name: str
    arguments: str = Field(description="JSON text, as the model generated it.")
    status: ItemStatus = "in_progress"


OutputItem = OutputMessage | FunctionCallItem


class InputTokensDetails(BaseModel):
    """Tokens of the prompt, by kind."""

    cached_tokens: int
    cache_write_tokens: int = 0
    image_tokens: int
    video_tokens: int


class OutputTokensDetails(BaseModel):
    """Tokens of the output, by kind."""

    reasoning_tokens: int = 0


class ResponsesUsage(BaseModel):
    """Tokens, media and time of a request."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int
    media: list[MediaUsage]
    timings_ms: PhaseTimings | None

    @classmethod
    def from_usage(cls, usage: Usage) -> ResponsesUsage:
        """Convert the usage of a chat completion."""
        details = usage.prompt_tokens_details
        assert details is not None
        return cls(
            input_tokens=usage.prompt_tokens,
            input_tokens_details=InputTokensDetails(
                cached_tokens=details.cached_tokens,
                image_tokens=details.image_tokens,
                video_tokens=details.video_tokens,
            ),
            output_tokens=usage.completion_tokens,
            output_tokens_details=OutputTokensDetails(),
            total_tokens=usage.total_tokens,
            media=usage.media or [],
            timings_ms=usage.timings_ms,
        )


class IncompleteDetails(BaseModel):
    """Why a response is incomplete."""

    reason: Literal["max_output_tokens"]


class ResponseError(BaseModel):
    """Why a response failed."""

    code: str
    message: str


class ResponsesResponse(BaseModel):
    """A response, as far as it has been generated."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    completed_at: int | None = None
    status: ResponseStatus = "in_progress"
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    model: str
    output: list[OutputItem] = []
    usage: ResponsesUsage | None = None

    # Of the request.
    background: Literal[False] = False
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    parallel_tool_calls: bool
    previous_response_id: None = None
    store: Literal[False] = False
    temperature: float | None
    text: dict[str, Any]
    tool_choice: Any
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float | None
    truncation: Literal["disabled"] = "disabled"
