"""A question about a long video, answered window by window; the answers are joined.

Every window is a prompt of its own, of a length that the model was trained on, so nothing is
extrapolated: the default for videos of more frames than in training. Windows share what they have
in common: frame pairs are encoded once, and only the frames of a window are decoded. Joining is
one more prompt, of text alone, with the answers and their times as notes. (map-reduce)
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from itertools import pairwise
from math import ceil
from typing import Any, NamedTuple

from qwen2vl.engine import LLM, Completion, SamplingParams
from qwen2vl.errors import InputError
from qwen2vl.processor.media.video_metadata import VideoMetadata
from qwen2vl.processor.video.presets import find_video_preset
from qwen2vl.processor.video.segments import format_time

__all__ = ["Window", "answer_windows", "join_windows"]

MAX_WINDOWS = 10_000


class Window(NamedTuple):
    """The answer to the question in one part of a video."""

    start: float  # seconds
    end: float
    completion: Completion

    @property
    def times(self) -> str:
        """The interval, as 12:30-14:30."""
        return f"{format_time(self.start)}-{format_time(self.end)}"


def answer_windows(
    llm: LLM,
    video: Any,
    question: str,
    *,
    seconds: float,
    params: SamplingParams | None = None,
    options: Mapping[str, Any] | None = None,
) -> Iterator[Window]:
    """Answer a question in each window of a video, in order, as they are computed.

    Args:
        llm: answers.
        video: as in a message.
        question: asked in every window.
        seconds: of a window; the last one may be shorter.
        params: of sampling.
        options: keys of the video's content part, such as fps; video_start and video_end limit the
            whole.

    Raises:
        InputError: the video cannot be used, or there would be too many windows.
    """
    keys = dict(options or {})
    windows = _divide(_read_metadata(llm, video, keys), keys, seconds)
    for start, end in windows:
        part = {"type": "video", "video": video, **keys, "video_start": start, "video_end": end}
        content = [part, {"type": "text", "text": question}]
        (completion,) = llm.chat([{"role": "user", "content": content}], params)
        yield Window(start, end, completion)


def join_windows(
    llm: LLM, question: str, windows: Sequence[Window], params: SamplingParams | None = None
) -> Completion:
    """Answer the question from the answers of all windows, as notes with their times."""
    notes = "\n".join(f"<{window.times}> {window.completion.text.strip()}" for window in windows)
    text = (
        f"These notes were taken while watching a video from beginning to end:\n{notes}\n\n"
        f"Answer from the notes, and give the time, as mm:ss, of what you rely on. {question}"
    )
    (completion,) = llm.chat([{"role": "user", "content": text}], params)
    return completion


def _read_metadata(llm: LLM, video: Any, options: Mapping[str, Any]) -> VideoMetadata:
    processor = llm.processor
    preset = find_video_preset(processor.video_preset)
    reader = processor.decoder.open_video(
        video,
        processor.limits,
        "video",
        fps=options.get("fps") or preset.fps,
        apply_exif_orientation=preset.apply_exif_orientation,
    )
    with closing(reader):
        return reader.metadata


def _divide(
    metadata: VideoMetadata, options: Mapping[str, Any], seconds: float
) -> list[tuple[float, float]]:
    """Return the beginning and end of each window that has frames, in seconds."""
    start = options.get("video_start") or 0.0
    end = min(options.get("video_end") or metadata.duration, metadata.duration)
    if not seconds > 0 or (end - start) / seconds > MAX_WINDOWS:
        raise InputError(
            f"windows of {seconds:g} s: {end - start:,.0f} s of video would be more than "
            f"{MAX_WINDOWS:,}; make them longer"
        )
    count = max(1, ceil((end - start) / seconds))
    bounds = [min(start + number * seconds, end) for number in range(count + 1)]
    # A window may lie in a gap between two frames, and the last one after the last frame.
    first = [bisect_left(metadata.timestamps, bound) for bound in bounds]
    return [
        window
        for window, one, next_one in zip(pairwise(bounds), first, first[1:], strict=False)
        if one < next_one
    ]
