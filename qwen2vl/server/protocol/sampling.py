"""Fields that several requests share: sampling and stopping, ignored and unsupported fields.

The request models of chat, completions and Responses inherit them. `RequestModel` is strict: a
string is no number, NaN is no number, an unknown field is an error. `Unsupported` marks a field
that changes the meaning of a request and does not exist here: it is accepted with the value that
changes nothing, and refused by name otherwise. (vLLM: ChatCompletionRequest, SamplingParams.)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    WithJsonSchema,
)
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from qwen2vl.engine import Grammar, SamplingParams
from qwen2vl.errors import InputError

__all__ = [
    "MAX_CACHE_SALT",
    "MAX_N",
    "MAX_STOPS",
    "MAX_STOP_LENGTH",
    "MAX_TOKENS",
    "MAX_TOKEN_ID",
    "MAX_TOP_LOGPROBS",
    "Ignored",
    "RequestModel",
    "SamplingFields",
    "StopList",
    "StreamOptions",
    "TokenIds",
    "Unsupported",
    "build_sampling_params",
    "invalid_field",
    "name_parameter",
]

MAX_N = 8
MAX_TOKENS = 1_000_000
MAX_STOPS = 16
MAX_STOP_LENGTH = 256
MAX_LOGIT_BIASES = 1024
MAX_STOP_TOKENS = 1024
MAX_CACHE_SALT = 1024
MAX_TOKEN_ID = 2**31 - 1
MAX_TOP_LOGPROBS = 20


def invalid_field(param: str, text: str) -> InputError:
    """Return the error of one field of a request, or of its combination with others."""
    return InputError(f"{param}: {text}", param=param)


class RequestModel(BaseModel):
    """A part of a request body: strict types, no unknown fields."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Unsupported:
    """Annotation of a field that only its neutral values, or null, may have."""

    def __init__(self, reason: str, *neutral: Any) -> None:
        """Accept `neutral` values and null; refuse others for `reason`, which holds the remedy."""
        self.reason = reason
        self.neutral = neutral

    def __get_pydantic_core_schema__(self, _: Any, __: GetCoreSchemaHandler) -> CoreSchema:
        """Validate by `check`."""
        return core_schema.no_info_plain_validator_function(self.check)

    def __get_pydantic_json_schema__(self, _: CoreSchema, __: GetJsonSchemaHandler) -> Any:
        """Show the values that are accepted."""
        return {"enum": [*self.neutral, None], "description": f"Not supported: {self.reason}."}

    def check(self, value: Any) -> Any:
        """Return a neutral value; refuse any other."""
        if value is None or any(type(value) is type(one) and value == one for one in self.neutral):
            return value
        raise InputError(self.reason)


Ignored = Annotated[
    Any,
    BeforeValidator(lambda value: None),  # not kept in memory while the request runs
    Field(description="Accepted and ignored."),
]
TokenId = Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)]
TokenIds = Annotated[list[TokenId], Field(max_length=MAX_STOP_TOKENS)]
_BiasedToken = Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,9})$")]
_Bias = Annotated[float, Field(ge=-100, le=100)]
_StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
_STOP_STRING_SCHEMA = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_LENGTH}


def _as_stops(value: Any) -> Any:
    """Return a list of stop strings: a union of both forms would report both its branches."""
    if not isinstance(value, str | list):
        raise PydanticCustomError("string_or_list_type", "a string or a list of strings")
    return [value] if isinstance(value, str) else value


StopList = Annotated[
    list[_StopString],
    Field(max_length=MAX_STOPS),
    BeforeValidator(_as_stops),
    WithJsonSchema(
        {
            "anyOf": [
                _STOP_STRING_SCHEMA,
                {"type": "array", "items": _STOP_STRING_SCHEMA, "maxItems": MAX_STOPS},
            ]
        }
    ),
]


class StreamOptions(RequestModel):
    """Options of a stream. (OpenAI, and vLLM's continuous_usage_stats.)"""

    include_usage: bool | None = Field(default=None, description="Send the usage in a last chunk.")
    continuous_usage_stats: bool | None = Field(
        default=None, description="Send the usage so far in each chunk; with include_usage."
    )
    include_obfuscation: Ignored = None


class SamplingFields(RequestModel):
    """Sampling and stopping; null: the default of the model's generation_config.json."""

    temperature: float | None = Field(
        default=None, ge=0, le=10, description="0 is greedy; from 0.001 to 10 otherwise."
    )
    top_p: float | None = Field(default=None, ge=0, le=1)
    top_k: int | None = Field(
        default=None, ge=-1, le=MAX_TOKEN_ID, description="0 or -1 turns it off."
    )
    min_p: float | None = Field(default=None, ge=0, le=1)
    # A penalty near 0 makes logits infinite.
    repetition_penalty: float | None = Field(default=None, ge=0.001, le=10)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    logit_bias: Annotated[dict[_BiasedToken, _Bias], Field(max_length=MAX_LOGIT_BIASES)] | None = (
        Field(default=None, description="Token id, as a string, to the addend of its logit.")
    )
    n: int | None = Field(
        default=None, ge=1, le=MAX_N, description="Number of completions of a prompt."
    )
    seed: int | None = Field(default=None, ge=-(2**63), le=2**64 - 1)
    stop: StopList | None = Field(default=None, description="Strings before which the output ends.")
    stop_token_ids: TokenIds | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = Field(
        default=None, description="False keeps special tokens in the text; the default drops them."
    )
    cache_salt: str | None = Field(
        default=None,
        min_length=1,
        max_length=MAX_CACHE_SALT,
        description="Requests of different salts share no cache entry.",
    )
    return_token_ids: bool | None = Field(
        default=None, description="Return token_ids of each choice, and prompt_token_ids."
    )

    # Of vLLM, and not supported.
    min_tokens: Annotated[
        Any, Unsupported("min_tokens is not supported; ignore_eos with max_tokens is", 0)
    ] = None
    prompt_logprobs: Annotated[
        Any, Unsupported("log probabilities of the prompt are not computed; leave it out")
    ] = None
    use_beam_search: Annotated[
        Any, Unsupported("there is no beam search; n samples several completions", False)
    ] = None
    length_penalty: Annotated[
        Any, Unsupported("there is no beam search; leave length_penalty out", 1, 1.0)
    ] = None
    include_stop_str_in_output: Annotated[
        Any, Unsupported("stop strings are never part of the output; leave it out", False)
    ] = None
    bad_words: Annotated[Any, Unsupported("give logit_bias -100 for their tokens", [])] = None
    allowed_token_ids: Annotated[Any, Unsupported("give structured_outputs, or logit_bias", [])] = (
        None
    )
    truncate_prompt_tokens: Annotated[
        Any, Unsupported("prompts are never truncated; shorten the prompt")
    ] = None
    spaces_between_special_tokens: Annotated[
        Any, Unsupported("no spaces are added between special tokens", True)
    ] = None
    logits_processors: Annotated[
        Any, Unsupported("requests cannot bring code; give logit_bias", [])
    ] = None
    priority: Annotated[Any, Unsupported("requests are served in order; leave it out", 0)] = None
    return_tokens_as_token_ids: Annotated[
        Any, Unsupported("tokens are returned as text; set return_token_ids for their ids", False)
    ] = None
    repetition_detection: Annotated[
        Any, Unsupported("repetitions do not end an output; set repetition_penalty")
    ] = None
    thinking_token_budget: Annotated[Any, Unsupported("the model does not think; leave it out")] = (
        None
    )
    kv_transfer_params: Annotated[
        Any, Unsupported("the KV cache is not transferred between servers; leave it out")
    ] = None
    vllm_xargs: Annotated[
        Any, Unsupported("there are no extensions that take arguments; leave it out", {})
    ] = None

    # Of vLLM and OpenAI, without a meaning here.
    request_id: Ignored = None
    user: Ignored = None
    metadata: Ignored = None


def build_sampling_params(
    body: SamplingFields,
    *,
    max_tokens: int | None,
    max_model_len: int,
    logprobs: int | None = None,
    grammar: Grammar | None = None,
    adapter: str | None = None,
    stop: Iterable[str] = (),
) -> SamplingParams:
    """Convert the fields of a request.

    Args:
        body: the request.
        max_tokens: of the request; None: what is left of the context.
        max_model_len: the context.
        logprobs: number of most likely tokens to report; None: no log probabilities.
        grammar: of the output.
        adapter: name of the LoRA adapter.
        stop: stop strings in addition to the client's, such as those of tool calls.

    Raises:
        InputError: a value is out of range; its `param` is the name of the field.
    """
    keep_all = body.skip_special_tokens is False
    with name_parameter():
        return SamplingParams(
            temperature=body.temperature,
            top_p=body.top_p,
            top_k=0 if body.top_k == -1 else body.top_k,
            min_p=body.min_p or 0.0,
            repetition_penalty=body.repetition_penalty,
            presence_penalty=body.presence_penalty or 0.0,
            frequency_penalty=body.frequency_penalty or 0.0,
            logit_bias={int(token): bias for token, bias in (body.logit_bias or {}).items()},
            n=body.n or 1,
            seed=None if body.seed is None else body.seed % 2**64,
            max_tokens=min(max_tokens or max_model_len, MAX_TOKENS),
            stop=(*(body.stop or ()), *stop),
            stop_token_ids=body.stop_token_ids or (),
            ignore_eos=body.ignore_eos or False,
            skip_special_tokens=not keep_all,
            skip_grounding_tokens=not keep_all,
            logprobs=logprobs,
            grammar=grammar,
            adapter=adapter,
        )


@contextmanager
def name_parameter() -> Iterator[None]:
    """Set the `param` of an InputError whose text begins with a sampling parameter: "seed: ..."."""
    try:
        yield
    except InputError as error:
        name = str(error).partition(":")[0]
        if error.param is None and name in SamplingParams.__dataclass_fields__:
            error.param = name
        raise
