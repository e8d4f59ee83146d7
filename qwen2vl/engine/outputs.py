"""Request outputs: completions, streamed deltas, log probabilities and timings.

Plain data; `Completion.to_dict` returns values that `json` can serialize.
(vLLM: CompletionOutput; transformers: GenerateDecoderOnlyOutput.)
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from qwen2vl.errors import abbreviate

__all__ = ["Completion", "Delta", "FinishReason", "ItemReport", "Timings", "TokenLogprob"]

FinishReason = Literal["stop", "length", "error"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    """Log probability of one output token, before penalties, temperature and top-k/top-p/min-p."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]  # most likely (token id, logprob), best first


@dataclass(frozen=True, slots=True, kw_only=True)
class ItemReport:
    """How one image or video was preprocessed; sizes are (height, width) in pixels."""

    kind: Literal["image", "video"]
    name: str
    original_size: tuple[int, int]
    resized_size: tuple[int, int]
    tokens: int
    frame_timestamps: tuple[float, ...] = ()  # seconds of the sampled frames; empty for images
    notes: tuple[str, ...] = ()  # human-readable notes on adjustments of the input
    orientation: int = 1  # EXIF orientation that was applied, 1 to 8: stored -> upright pixels


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """Time spent on one request, by phase, in seconds."""

    process: float = 0.0  # messages and media -> ModelInput
    queue: float = 0.0  # submission -> first scheduled
    vision: float = 0.0  # patches -> vision tokens
    prefill: float = 0.0  # prompt -> its last hidden state, from which the first token is sampled
    decode: float = 0.0  # sampling of all tokens, and the forwards of all but the last


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """A piece of streamed output text; `text` never ends inside a character.

    Token ids and log probabilities are those of all tokens sampled since the last delta of the same
    completion, also of tokens whose text is still held back.
    """

    index: int  # which completion of the call
    text: str  # what is new
    finish_reason: FinishReason | None = None  # set on the last one
    stop_reason: str | int | None = None  # with it; as in Completion
    token_ids: tuple[int, ...] = ()  # as sampled, including the end token
    logprobs: tuple[TokenLogprob, ...] = ()  # of the same tokens, if they were asked for


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """The output of one request: text, tokens and usage.

    `text` keeps the six grounding tokens and drops the other special tokens, unless
    `SamplingParams` say otherwise (skip_special_tokens, skip_grounding_tokens).
    """

    text: str  # without what a stop string cuts off
    token_ids: tuple[int, ...]  # as sampled, including the end token
    finish_reason: FinishReason  # stop: end token or stop string; length: a limit was reached
    stop_reason: str | int | None = None  # the stop string or stop token id that ended it (vLLM)
    prompt_tokens: int  # those of images and videos included
    image_tokens: int  # placeholder tokens of images
    video_tokens: int  # placeholder tokens of videos
    cached_tokens: int = 0  # prompt tokens found in the prefix cache
    items: tuple[ItemReport, ...] = ()  # how each image and video was preprocessed
    seconds: Timings = Timings()  # by phase
    logprobs: tuple[TokenLogprob, ...] | None = None  # of each token, if they were asked for
    cumulative_logprob: float | None = None  # their sum, of the end token too (vLLM)
    error: str | None = None  # the reason, if finish_reason is "error"

    def __repr__(self) -> str:
        usage = f"{self.prompt_tokens} + {len(self.token_ids)} tokens"
        failed = "" if self.error is None else f", error={abbreviate(self.error)}"
        return f"Completion({abbreviate(self.text)}, {self.finish_reason!r}, {usage}{failed})"

    def to_dict(self) -> dict[str, Any]:
        """Return the completion as plain JSON values."""
        return asdict(self)
