"""Log probabilities of output tokens, in the form of chat completions and of completions.

The end token is left out, as OpenAI does: the bytes of the tokens, joined, are the text of a
completion that ended by itself. Bytes that are no whole characters are written as \\xNN in the text
of a token; `bytes` has them all. A probability of zero is -9999.0, because JSON has no infinity.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from pydantic import BaseModel, Field

from qwen2vl.engine import TokenLogprob
from qwen2vl.grounding import GROUNDING_TOKENS
from qwen2vl.processor.tokenizer import Tokenizer

__all__ = [
    "ChatLogprobs",
    "ChatTokenLogprob",
    "CompletionLogprobs",
    "TopLogprob",
    "chat_logprobs",
    "completion_logprobs",
    "end_token_ids",
    "token_text",
    "without_end_token",
]

LEAST_LOGPROB = -9999.0


class TopLogprob(BaseModel):
    """One of the most likely tokens at a position."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChatTokenLogprob(TopLogprob):
    """One output token, with the most likely tokens at its position."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """Log probabilities of a chat completion. (OpenAI: ChoiceLogprobs.)"""

    content: list[ChatTokenLogprob]
    refusal: None = None


class CompletionLogprobs(BaseModel):
    """Log probabilities of a completion. (OpenAI: completion_choice.Logprobs.)"""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int] = Field(description="Where each token begins, in characters.")


def chat_logprobs(logprobs: Sequence[TokenLogprob], tokenizer: Tokenizer) -> ChatLogprobs:
    """Convert the log probabilities of output tokens."""
    return ChatLogprobs(content=[_chat_logprob(one, tokenizer) for one in logprobs])


def completion_logprobs(
    logprobs: Sequence[TokenLogprob], tokenizer: Tokenizer, offset: int = 0
) -> CompletionLogprobs:
    """Convert the log probabilities of output tokens.

    Args:
        logprobs: of the tokens.
        tokenizer: of the model.
        offset: characters before the first token.
    """
    result = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
    for one in logprobs:
        token = token_text(one.token_id, tokenizer)
        logprob = _finite(one.logprob)
        top = {token_text(other, tokenizer): _finite(value) for other, value in one.top}
        result.tokens.append(token)
        result.token_logprobs.append(logprob)
        result.top_logprobs.append({**top, token: logprob})
        result.text_offset.append(offset)
        offset += len(token)
    return result


def without_end_token(
    logprobs: Sequence[TokenLogprob],
    finish_reason: str | None,
    end_ids: Collection[int],
) -> Sequence[TokenLogprob]:
    """Return log probabilities without that of the token that ended the output.

    Args:
        logprobs: of the last tokens of a sample.
        finish_reason: of the sample, if they are its last.
        end_ids: tokens that may end it.
    """
    if finish_reason == "stop" and logprobs and logprobs[-1].token_id in end_ids:
        return logprobs[:-1]
    return logprobs


def end_token_ids(tokenizer: Tokenizer, stop_token_ids: Sequence[int]) -> frozenset[int]:
    """Return the tokens that may end an output: control tokens, and those of the request."""
    control = [i for t, i in tokenizer.special_ids.items() if t not in GROUNDING_TOKENS]
    return frozenset((*control, *stop_token_ids))


def token_text(token: int, tokenizer: Tokenizer) -> str:
    """Return the text of one token; bytes that are no characters are written as \\xNN."""
    return tokenizer.id_to_bytes(token).decode("utf-8", errors="backslashreplace")


def _chat_logprob(one: TokenLogprob, tokenizer: Tokenizer) -> ChatTokenLogprob:
    top = [_top_logprob(token, logprob, tokenizer) for token, logprob in one.top]
    own = _top_logprob(one.token_id, one.logprob, tokenizer)
    return ChatTokenLogprob(token=own.token, logprob=own.logprob, bytes=own.bytes, top_logprobs=top)


def _top_logprob(token: int, logprob: float, tokenizer: Tokenizer) -> TopLogprob:
    return TopLogprob(
        token=token_text(token, tokenizer),
        logprob=_finite(logprob),
        bytes=list(tokenizer.id_to_bytes(token)),
    )


def _finite(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)
