"""Options of one image or video in a message: pixel limits, sampling of frames, segments.

`MediaOptions` checks each value by itself, and those that exclude each other; what depends on the
image or video is checked where it is opened. (qwen_vl_utils: the keys of a content item; vLLM:
mm_processor_kwargs.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from qwen2vl.errors import InputError, abbreviate

__all__ = ["LOW_DETAIL_PIXELS", "NO_OPTIONS", "Detail", "MediaOptions"]

Detail = Literal["low", "high", "auto", "original"]
LOW_DETAIL_PIXELS = 512 * 512  # the size to which OpenAI shrinks an image with detail "low"

# Field -> smallest and largest meaningful value; the largest keep a typing error or a malicious
# request from allocating gigabytes.
_RANGES: dict[str, tuple[float, float]] = {
    "min_pixels": (1, 100_000_000),
    "max_pixels": (1, 100_000_000),
    "total_pixels": (1, 10_000_000_000),
    "resized_height": (1, 100_000),
    "resized_width": (1, 100_000),
    "nframes": (1, 100_000),
    "min_frames": (1, 100_000),
    "max_frames": (1, 100_000),
    "segment_frames": (2, 100_000),
    "fps": (1e-6, 1e6),
    "frame_interval": (1e-6, 1e6),
    "video_start": (0, 1e9),
    "video_end": (0, 1e9),
    "frame_times": (0, 1e9),  # each of them
}
_FRACTIONAL = frozenset({"fps", "frame_interval", "video_start", "video_end", "frame_times"})
_MAX_FRAME_TIMES = 10_000
_EXCLUSIVE = (
    ("fps", "nframes"),
    ("frame_interval", "fps"),
    ("frame_interval", "nframes"),
    ("frame_interval", "frame_times"),
    ("frame_times", "fps"),
    ("frame_times", "nframes"),
    ("resized_height", "min_pixels"),
    ("resized_height", "max_pixels"),
)
_ORDERED = (
    ("min_pixels", "max_pixels"),
    ("min_frames", "max_frames"),
    ("video_start", "video_end"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaOptions:
    """Options of one image or video; None: the default of the model's folder.

    Names are those of qwen-vl-utils' messages. Validated when built.

    Raises:
        InputError: a value is out of range, or two of them contradict each other.
    """

    min_pixels: int | None = None  # of one image or frame after resizing
    max_pixels: int | None = None  # the same, as an upper limit
    detail: Detail | None = None  # OpenAI's: low is at most 512 x 512 pixels, others change nothing
    resized_height: int | None = None  # resize to this size, rounded to whole tokens
    resized_width: int | None = None  # given together with resized_height
    fps: float | None = None  # sampled frames per second; for a list of frames: its frame rate
    frame_interval: float | None = None  # seconds between frames, instead of fps: from the first on
    nframes: int | None = None  # number of sampled frames, instead of fps
    min_frames: int | None = None  # fewest sampled frames
    max_frames: int | None = None  # most sampled frames
    total_pixels: int | None = None  # budget of a video: area of a frame, summed over pairs
    video_start: float | None = None  # seconds from the first frame
    video_end: float | None = None  # the same
    frame_times: tuple[float, ...] | None = None  # seconds of the frames, each shown as a still
    segment_frames: int | None = None  # sampled frames of a segment, with its time before it
    subtitles: Any = None  # a file, its bytes, or "embedded": those of the video

    def __post_init__(self) -> None:
        if self.frame_times is not None:
            object.__setattr__(self, "frame_times", _check_frame_times(self.frame_times))
        options = self.to_dict()
        self._check_detail()
        for name, value in options.items():
            _check_range(name, value)
        for first, second in _EXCLUSIVE:
            if getattr(self, first) is not None and getattr(self, second) is not None:
                raise InputError(
                    f"{first} {getattr(self, first)} and {second} {getattr(self, second)} exclude "
                    "each other; use either one"
                )
        for low, high in _ORDERED:
            if low in options and high in options and options[low] > options[high]:
                raise InputError(
                    f"{low} {options[low]} is greater than {high} {options[high]}; lower the first "
                    "or raise the second"
                )
        if ("resized_height" in options) != ("resized_width" in options):
            raise InputError("resized_height and resized_width go together; give both or neither")

    def _check_detail(self) -> None:
        if self.detail is not None and self.detail not in get_args(Detail):
            known = ", ".join(get_args(Detail))
            raise InputError(f"detail is {abbreviate(self.detail)}, must be one of {known}")
        if self.detail != "low":
            return
        for name in ("max_pixels", "resized_height", "resized_width"):
            if getattr(self, name) is not None:
                raise InputError(
                    f"{name} {getattr(self, name)} and detail 'low', which is max_pixels "
                    f"{LOW_DETAIL_PIXELS}, exclude each other; use either one"
                )

    def to_dict(self) -> dict[str, int | float]:
        """Return the options that are set and are numbers, with their values."""
        names = (f.name for f in fields(self) if f.name in _RANGES and f.name != "frame_times")
        pairs = ((name, getattr(self, name)) for name in names)
        return {name: value for name, value in pairs if value is not None}


def _check_frame_times(times: Any) -> tuple[float, ...]:
    """Return times in seconds, in order.

    Raises:
        InputError: it is no list of times.
    """
    if not isinstance(times, list | tuple) or not 1 <= len(times) <= _MAX_FRAME_TIMES:
        raise InputError(
            f"frame_times is {abbreviate(times)}, must be a list of 1 to {_MAX_FRAME_TIMES:,} "
            "times in seconds"
        )
    for time in times:
        _check_range("frame_times", time)
    return tuple(sorted(times))


def _check_range(name: str, value: int | float) -> None:
    low, high = _RANGES[name]
    types = (int, float) if name in _FRACTIONAL else (int,)
    is_nan = isinstance(value, float) and math.isnan(value)
    if isinstance(value, bool) or not isinstance(value, types) or is_nan:
        want = "a number" if name in _FRACTIONAL else "a whole number"
        raise InputError(f"{name} is {abbreviate(value)}, must be {want}")
    if not low <= value <= high:
        raise InputError(f"{name} is {abbreviate(value)}, must lie between {low:g} and {high:g}")


NO_OPTIONS = MediaOptions()
