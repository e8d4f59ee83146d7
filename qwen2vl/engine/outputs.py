"""What a request returns: completions, streamed deltas, log probabilities and timings.

Plain data, JSON-able by `Completion.to_dict`. (vLLM: CompletionOutput; transformers:
GenerateDecoderOnlyOutput.)
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

__all__ = ["Completion", "Delta", "FinishReason", "ItemReport", "Seconds", "TokenLogprob"]

FinishReason = Literal["stop", "length", "error"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    """How likely one token of the answer was, before penalty, temperature and cuts."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]  # the likeliest (id, logprob), best first


@dataclass(frozen=True, slots=True, kw_only=True)
class ItemReport:
    """How one picture or clip was seen; sizes are (height, width) in pixels."""

    kind: Literal["image", "video"]
    name: str
    size_given: tuple[int, int]
    size_seen: tuple[int, int]
    tokens: int
    frame_times: tuple[float, ...] = ()  # seconds of the frames used; empty for an image
    notes: tuple[str, ...] = ()  # what was adjusted on the way, in words for people


@dataclass(frozen=True, slots=True, kw_only=True)
class Seconds:
    """Where the time went."""

    process: float = 0.0  # files and words -> ModelInput
    vision: float = 0.0  # patches -> vision tokens
    prefill: float = 0.0  # prompt -> its last hidden state, from which the first token comes
    decode: float = 0.0  # choosing every token, and running all but the last


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """News of one answer while it is being written; `text` never ends inside a character."""

    index: int  # which of the conversations
    text: str
    finish_reason: FinishReason | None = None  # set on the last one


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One answer. `text` keeps the six grounding tokens and drops the other special ones."""

    text: str
    token_ids: tuple[int, ...]  # as sampled, the end token included
    finish_reason: FinishReason
    prompt_tokens: int
    image_tokens: int
    video_tokens: int
    cached_tokens: int = 0  # of the prompt, found in the cache and not computed again
    items: tuple[ItemReport, ...] = ()
    seconds: Seconds = Seconds()
    logprobs: tuple[TokenLogprob, ...] | None = None
    error: str | None = None  # why it ended, where finish_reason is "error"

    def to_dict(self) -> dict[str, Any]:
        """Give the answer as plain JSON values."""
        return asdict(self)
