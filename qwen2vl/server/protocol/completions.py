"""Bodies of /v1/completions: request, response and the chunks of a stream.

The prompt is raw text or token ids, one or several; no chat template is applied. In text, control
tokens are text; in ids, only vision tokens are refused. (OpenAI: legacy completions; vLLM:
CompletionRequest.)
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from qwen2vl.errors import InputError
from qwen2vl.server.protocol.chat import StopReason
from qwen2vl.server.protocol.logprobs import CompletionLogprobs
from qwen2vl.server.protocol.sampling import (
    MAX_TOKEN_ID,
    MAX_TOKENS,
    MAX_TOP_LOGPROBS,
    SamplingFields,
    StreamOptions,
    Unsupported,
    invalid_field,
)
from qwen2vl.server.protocol.structured_output import StructuredOutputFields
from qwen2vl.server.protocol.usage import Usage, is_none

__all__ = [
    "MAX_PROMPTS",
    "CompletionChoice",
    "CompletionRequest",
    "CompletionResponse",
    "PromptList",
    "as_prompts",
    "check_prompt",
    "prompt_list_schema",
]

MAX_PROMPTS = 64
MAX_PROMPT_CHARS = 4_000_000


def as_prompts(value: Any) -> Any:
    """Return a list of prompts: a text or a list of ids becomes a list of one."""
    if not isinstance(value, str | list):
        raise PydanticCustomError("prompt_type", "a text, token ids, or a list of them")
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value and all(type(one) is int for one in value):
        return [value]
    return value


def check_prompt(value: Any) -> Any:
    """Check one prompt: text, or a list of token ids."""
    if isinstance(value, str):
        if len(value) > MAX_PROMPT_CHARS:
            raise InputError(
                f"the prompt has {len(value):,} characters, the limit is {MAX_PROMPT_CHARS:,}; "
                "shorten it"
            )
        return value
    if isinstance(value, list) and value:
        if wrong := [one for one in value if type(one) is not int or not 0 <= one <= MAX_TOKEN_ID]:
            raise InputError(f"got {wrong[0]!r:.40} among token ids, which are 0 or more")
        return value
    raise InputError("must be a text, or a list of token ids that is not empty")


def prompt_list_schema(max_items: int) -> WithJsonSchema:
    """Return the JSON schema of one prompt, or a list of at most `max_items`."""
    text = {"type": "string", "maxLength": MAX_PROMPT_CHARS}
    ids = {
        "type": "array",
        "items": {"type": "integer", "minimum": 0, "maximum": MAX_TOKEN_ID},
        "minItems": 1,
    }
    prompts = {
        "type": "array",
        "items": {"anyOf": [text, ids]},
        "minItems": 1,
        "maxItems": max_items,
    }
    return WithJsonSchema({"anyOf": [text, ids, prompts]})


PromptList = Annotated[
    list[Annotated[Any, BeforeValidator(check_prompt)]],
    Field(min_length=1, max_length=MAX_PROMPTS),
    BeforeValidator(as_prompts),
    prompt_list_schema(MAX_PROMPTS),
]


class CompletionRequest(SamplingFields, StructuredOutputFields):
    """Prompts, each of which is continued."""

    model: str | None = Field(default=None, description="Null: the first served model.")
    prompt: PromptList
    max_tokens: int | None = Field(default=16, ge=1, le=MAX_TOKENS)
    best_of: int | None = Field(default=None, ge=1, description="Only the value of n is supported.")
    echo: bool | None = Field(default=None, description="Repeat the prompt before the output.")
    logprobs: int | None = Field(
        default=None,
        ge=0,
        le=MAX_TOP_LOGPROBS,
        description="Number of most likely tokens to report.",
    )
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    suffix: Annotated[
        Any, Unsupported("the model cannot insert text before a suffix; leave it out", "")
    ] = None
    prompt_embeds: Annotated[
        Any, Unsupported("embeddings are not accepted as input; give text or token ids")
    ] = None
    add_special_tokens: Annotated[
        Any, Unsupported("no special tokens are added to a prompt", True, False)
    ] = None

    def check_combinations(self) -> None:
        """Refuse fields that need or exclude others.

        Raises:
            InputError: names the field, in `param` as well.
        """
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise invalid_field(
                "best_of",
                f"got {self.best_of} with n {self.n or 1}, must be equal, since samples are not "
                "ranked; give n alone",
            )
        if self.stream_options is not None and not self.stream:
            raise invalid_field("stream_options", "needs stream true; leave it out")
        if self.echo and self.logprobs is not None:
            raise invalid_field(
                "logprobs",
                "excludes echo, since log probabilities of the prompt are not computed; leave "
                "either out",
            )


class CompletionChoice(BaseModel):
    """One sample, or what is new in it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: Literal["stop", "length"] | None = None
    stop_reason: StopReason = None
    token_ids: list[int] | None = Field(default=None, exclude_if=is_none)
    prompt_token_ids: list[int] | None = Field(default=None, exclude_if=is_none)


class CompletionResponse(BaseModel):
    """The answer to a completion request, and each event of its stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = Field(default=None, exclude_if=is_none)
