"""Bodies of /tokenize and /detokenize, in vLLM's forms.

A request to /tokenize has a prompt or messages; with messages, the tokens are those of the prompt
that a chat completion would have, images and videos included. (vLLM: TokenizeChatRequest,
TokenizeCompletionRequest, DetokenizeRequest.)
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, FailFast, Field

from qwen2vl.server.protocol.chat import ToolList
from qwen2vl.server.protocol.content import ChatTemplateFields, MessageList
from qwen2vl.server.protocol.sampling import MAX_TOKEN_ID, RequestModel, Unsupported, invalid_field
from qwen2vl.server.protocol.usage import is_none

__all__ = ["DetokenizeRequest", "DetokenizeResponse", "TokenizeRequest", "TokenizeResponse"]

MAX_TOKENS = 300_000
MAX_PROMPT_CHARS = 1_000_000  # seconds of tokenization


class TokenizeRequest(ChatTemplateFields):
    """A prompt or messages to tokenize."""

    model: str | None = None
    prompt: str | None = Field(
        default=None,
        max_length=MAX_PROMPT_CHARS,
        description="Raw text; control tokens in it are text.",
    )
    messages: MessageList | None = None
    tools: ToolList | None = None
    return_token_strs: bool | None = None
    add_special_tokens: Annotated[
        Any, Unsupported("no special tokens are added to a prompt", True, False)
    ] = None

    def check_combinations(self) -> None:
        """Refuse a request with both a prompt and messages, or neither.

        Raises:
            InputError: names the field, in `param` as well.
        """
        if self.prompt is None and self.messages is None:
            raise invalid_field("prompt", "is missing; give prompt or messages")
        if self.prompt is not None and self.messages is not None:
            raise invalid_field("prompt", "excludes messages; give either one")
        self.check_chat_template()


class TokenizeResponse(BaseModel):
    """The tokens of a prompt."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = Field(default=None, exclude_if=is_none)


class DetokenizeRequest(RequestModel):
    """Tokens to decode."""

    model: str | None = None
    tokens: Annotated[
        list[Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)]],
        Field(max_length=MAX_TOKENS),
        FailFast(),  # not an error for each token
    ]


class DetokenizeResponse(BaseModel):
    """The text of tokens, special tokens included."""

    prompt: str
