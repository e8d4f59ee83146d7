"""Bodies of /v1/embeddings: raw inputs in OpenAI's form, or one conversation in vLLM's.

`input` is text or token ids, one or several, without a chat template; `messages` is a conversation
that may hold images and videos, and becomes one vector. `pooling` is an addition.
(OpenAI: embeddings; vLLM: EmbeddingCompletionRequest, EmbeddingChatRequest.)
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field

from qwen2vl.server.protocol.completions import (
    as_prompts,
    check_prompt,
    prompt_list_schema,
)
from qwen2vl.server.protocol.content import ChatTemplateFields, MessageList
from qwen2vl.server.protocol.sampling import (
    MAX_CACHE_SALT,
    Ignored,
    Unsupported,
    invalid_field,
)
from qwen2vl.server.protocol.usage import Usage

__all__ = [
    "MAX_INPUTS",
    "MAX_INPUT_TOKENS",
    "EmbeddingData",
    "EmbeddingRequest",
    "EmbeddingResponse",
]

# Both are OpenAI's limits, which its clients split their inputs by.
MAX_INPUTS = 2048
MAX_INPUT_TOKENS = 300_000  # of all inputs of a request

InputList = Annotated[
    list[Annotated[Any, BeforeValidator(check_prompt)]],
    Field(min_length=1, max_length=MAX_INPUTS),
    BeforeValidator(as_prompts),
    prompt_list_schema(MAX_INPUTS),
]


class EmbeddingRequest(ChatTemplateFields):
    """What is embedded, and how the vectors are returned."""

    model: str | None = Field(default=None, description="Null: the first served model.")
    input: InputList | None = Field(
        default=None, description="Raw text or token ids; control tokens in text are text."
    )
    messages: MessageList | None = Field(
        default=None, description="A conversation in place of input, through the chat template."
    )
    encoding_format: Literal["float", "base64"] | None = Field(
        default=None, description="base64: little-endian float32. The default is float."
    )
    dimensions: int | None = Field(
        default=None, ge=1, le=1_000_000, description="The hidden size of the model, or null."
    )
    pooling: Literal["last", "mean"] | None = Field(
        default=None, description="Hidden state of the last token, or mean over all; then L2 norm."
    )
    cache_salt: str | None = Field(default=None, min_length=1, max_length=MAX_CACHE_SALT)

    # Of vLLM, accepted with what changes nothing.
    normalize: Annotated[
        Any, Unsupported("embeddings are always L2-normalized; leave it out", True)
    ] = None
    use_activation: Annotated[
        Any, Unsupported("embeddings are always L2-normalized; leave it out", True)
    ] = None
    truncate_prompt_tokens: Annotated[
        Any, Unsupported("inputs are never truncated; shorten the input")
    ] = None
    add_special_tokens: Annotated[
        Any, Unsupported("no special tokens are added to an input", True, False)
    ] = None
    embed_dtype: Annotated[Any, Unsupported("values are float32; leave it out", "float32")] = None
    endianness: Annotated[
        Any, Unsupported("bytes are little-endian; leave it out", "little", "native")
    ] = None
    priority: Annotated[Any, Unsupported("requests are served in order; leave it out", 0)] = None

    # Of vLLM and OpenAI, without a meaning here.
    request_id: Ignored = None
    user: Ignored = None

    def check_combinations(self, hidden_size: int) -> None:
        """Refuse a request with both input and messages, or neither, and other dimensions.

        Raises:
            InputError: names the field, in `param` as well.
        """
        if self.input is None and self.messages is None:
            raise invalid_field("input", "is missing; give input or messages")
        if self.input is not None and self.messages is not None:
            raise invalid_field("input", "excludes messages; give either one")
        self.check_chat_template()
        if self.dimensions not in (None, hidden_size):
            raise invalid_field(
                "dimensions",
                f"got {self.dimensions}, but the vectors of this model have {hidden_size} and are "
                "not shortened; leave it out",
            )


class EmbeddingData(BaseModel):
    """The vector of one input."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str = Field(description="Numbers, or base64 of float32.")


class EmbeddingResponse(BaseModel):
    """The vectors, in the order of the inputs."""

    object: Literal["list"] = "list"
    data: list[EmbeddingData]
    model: str
    usage: Usage
