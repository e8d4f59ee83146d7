"""Usage of finished requests: from completions of the engine to the body's `usage`.

Samples of one prompt share its tokens: they are counted once. Of several prompts, as in completions
of a list, the counts are added.
"""

from __future__ import annotations

from collections.abc import Sequence

from qwen2vl.engine import Completion, ItemReport
from qwen2vl.processor.content import MediaPart
from qwen2vl.processor.inputs import Item
from qwen2vl.processor.messages import Message
from qwen2vl.processor.tools import merge_turns
from qwen2vl.server.protocol.usage import (
    CompletionTokensDetails,
    ImageSize,
    MediaUsage,
    PhaseTimings,
    PromptTokensDetails,
    Usage,
)

__all__ = ["add_usages", "build_usage", "media_paths", "media_usages", "partial_usage"]


# Phase in the body -> field of Timings.
_NAME_OF_PHASE = {
    "preprocess": "process",
    "queue": "queue",
    "encoder": "vision",
    "prefill": "prefill",
    "decode": "decode",
}


def media_paths(messages: Sequence[Message]) -> list[str]:
    """Return the path of each image and video in the request, in the order of the prompt."""
    return [p.path for t in merge_turns(messages) for p in t.parts if isinstance(p, MediaPart)]


def build_usage(completions: Sequence[Completion], paths: Sequence[str] = ()) -> Usage:
    """Return the usage of all samples of one prompt.

    Args:
        completions: one for each sample.
        paths: of the prompt's images and videos, from `media_paths`.
    """
    first = completions[0]
    output_tokens = sum(len(completion.token_ids) for completion in completions)
    return Usage(
        prompt_tokens=first.prompt_tokens,
        completion_tokens=output_tokens,
        total_tokens=first.prompt_tokens + output_tokens,
        prompt_tokens_details=PromptTokensDetails(
            # Samples after the first find the prompt in the cache; that is no saving for the user.
            cached_tokens=min(completion.cached_tokens for completion in completions),
            image_tokens=first.image_tokens,
            video_tokens=first.video_tokens,
        ),
        completion_tokens_details=CompletionTokensDetails(),
        media=media_usages(first.items, paths),
        timings_ms=_timings(completions),
    )


def partial_usage(prompt_tokens: int, output_tokens: int) -> Usage:
    """Return the usage of a request that runs."""
    return Usage(
        prompt_tokens=prompt_tokens,
        completion_tokens=output_tokens,
        total_tokens=prompt_tokens + output_tokens,
    )


def add_usages(usages: Sequence[Usage]) -> Usage:
    """Return the usage of several prompts without media; of times, the longest."""
    if len(usages) == 1:
        return usages[0]
    prompt_tokens = sum(usage.prompt_tokens for usage in usages)
    output_tokens = sum(usage.completion_tokens for usage in usages)
    details = [u.prompt_tokens_details for u in usages if u.prompt_tokens_details is not None]
    timings = [usage.timings_ms for usage in usages if usage.timings_ms is not None]
    return Usage(
        prompt_tokens=prompt_tokens,
        completion_tokens=output_tokens,
        total_tokens=prompt_tokens + output_tokens,
        prompt_tokens_details=PromptTokensDetails(
            cached_tokens=sum(one.cached_tokens for one in details)
        ),
        completion_tokens_details=CompletionTokensDetails(),
        media=[],
        timings_ms=PhaseTimings(
            **{
                name: max(getattr(one, name) for one in timings)
                for name in PhaseTimings.model_fields
            }
        ),
    )


def media_usages(items: Sequence[ItemReport | Item], paths: Sequence[str]) -> list[MediaUsage]:
    """Return how each image and video was preprocessed; `paths` are of `media_paths`."""
    return [_media_usage(item, path) for item, path in zip(items, paths, strict=True)]


def _media_usage(item: ItemReport | Item, path: str) -> MediaUsage:
    is_video = item.kind == "video"
    timestamps = [round(seconds, 3) for seconds in item.frame_timestamps]
    return MediaUsage(
        param=path,
        type=item.kind,
        original_size=_size(item.original_size),
        resized_size=_size(item.resized_size),
        tokens=item.num_tokens if isinstance(item, Item) else item.tokens,
        frames=len(timestamps) if is_video else None,
        frame_timestamps=timestamps if is_video else None,
        notes=list(item.notes),
    )


def _size(height_width: tuple[int, int]) -> ImageSize:
    height, width = height_width
    return ImageSize(width=width, height=height)


def _timings(completions: Sequence[Completion]) -> PhaseTimings:
    longest = {
        phase: max(getattr(completion.seconds, name) for completion in completions)
        for phase, name in _NAME_OF_PHASE.items()
    }
    return PhaseTimings(**{phase: round(1e3 * value, 3) for phase, value in longest.items()})
