"""Usage of a request: tokens by kind, how each image and video was seen, time by phase.

The token counts are OpenAI's; `media` and `timings_ms` are additions, which its clients ignore.
`is_none` is for fields that are left out, not null, when they have no value.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

__all__ = [
    "CompletionTokensDetails",
    "ImageSize",
    "MediaUsage",
    "PhaseTimings",
    "PromptTokensDetails",
    "Usage",
    "is_none",
]


def is_none(value: object) -> bool:
    """Return whether a field has no value."""
    return value is None


class ImageSize(BaseModel):
    """A size in pixels."""

    width: int
    height: int


class MediaUsage(BaseModel):
    """How one image or video of the prompt was preprocessed."""

    param: str = Field(description='Path of the item in the request: "messages[0].content[1]".')
    type: Literal["image", "video"]
    original_size: ImageSize = Field(description="As sent, with EXIF orientation applied.")
    resized_size: ImageSize = Field(description="As the model saw it.")
    tokens: int
    frames: int | None = Field(
        default=None, description="Sampled frames of a video.", exclude_if=is_none
    )
    frame_timestamps: list[float] | None = Field(
        default=None, description="Seconds of the sampled frames.", exclude_if=is_none
    )
    notes: list[str] = Field(description="What was adjusted, as text.")


class PromptTokensDetails(BaseModel):
    """Tokens of the prompt, by kind."""

    cached_tokens: int = Field(default=0, description="Found in the prefix cache.")
    image_tokens: int = 0
    video_tokens: int = 0
    audio_tokens: int = 0


class CompletionTokensDetails(BaseModel):
    """Tokens of the output, by kind."""

    reasoning_tokens: int = 0


class PhaseTimings(BaseModel):
    """Milliseconds by phase; of several samples, the longest."""

    preprocess: float = Field(description="Messages and media to the prompt.")
    queue: float = Field(description="Submission to first scheduled.")
    encoder: float = Field(description="Vision tower.")
    prefill: float
    decode: float


class Usage(BaseModel):
    """Tokens, media and time of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | None = Field(default=None, exclude_if=is_none)
    completion_tokens_details: CompletionTokensDetails | None = Field(
        default=None, exclude_if=is_none
    )
    media: list[MediaUsage] | None = Field(default=None, exclude_if=is_none)
    timings_ms: PhaseTimings | None = Field(default=None, exclude_if=is_none)
