"""Video metadata (timestamps, fps, duration) and the interface of video readers.

`VideoMetadata` is measured from the frames' own timestamps; what a container declares is used only
where they confirm it. `VideoReader` is the interface of every source of frames: video_source.py
(lists, arrays, animations) and video_reader.py (video files). `Deadline` limits the time of
decoding, without the time in which the user of the frames does something else. No files are opened
here.
(HF: VideoMetadata.)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Protocol, TypeAlias, TypeVar

import numpy as np

from qwen2vl.errors import MediaTooLargeError
from qwen2vl.processor.media.source import MediaLimits

__all__ = [
    "Deadline",
    "FrameTransform",
    "FramesDifferError",
    "VideoMetadata",
    "VideoReader",
    "check_frame_count",
    "frame_rate",
    "video_duration",
]

T = TypeVar("T")
# (H, W, 3) uint8 -> the frame as it is returned, for example a resized tensor
FrameTransform: TypeAlias = Callable[[np.ndarray], T]


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoMetadata:
    """Timestamps of all frames in display order, frame rate, duration and frame size."""

    timestamps: tuple[float, ...]  # seconds from the first frame, never decreasing
    fps: float | None  # frames per second where the timestamps are uniform, else None
    duration: float  # seconds, the last frame's own duration included
    height: int  # upright, in square pixels: a frame may have fewer pixels than this
    width: int
    is_frame_list: bool = False  # frames listed by the user, all of which are sampled by default
    notes: tuple[str, ...] = ()


class FramesDifferError(Exception):
    """The decoded frames differ from the metadata, which have been replaced by theirs."""


class VideoReader(Protocol):
    """Source of video frames: metadata first, then selected frames; closed by its user."""

    metadata: VideoMetadata

    def frames_at(
        self, indices: Sequence[int], transform: FrameTransform[T]
    ) -> Generator[T, None, None]:
        """Decode the frames `indices` (ascending, distinct); yield `transform` of each.

        Each frame is decoded when it is asked for, or shortly before. Files and decoders are open
        from the first frame to the last, or until the generator is closed. One generator of a
        reader at a time.

        Frames are upright, of the size that is stored: where pixels are not square, `transform`
        resizes them to the aspect ratio of the metadata.

        Raises:
            FramesDifferError: the decoded frames differ from the metadata. These are then those of
                the decoded frames, and the caller has to choose indices again; frames that were
                yielded before are frames of the video.
            InputError: a frame cannot be decoded, or decoding takes longer than the limit.
        """
        ...

    def close(self) -> None:
        """Release what decodes the video; a second call does nothing."""
        ...


class Deadline:
    """Time limit for decoding one video. Time counts within `running` only."""

    def __init__(self, limits: MediaLimits, name: str) -> None:
        self._limit, self._name = limits.decode_timeout, name
        self._used = 0.0
        self._start: float | None = None  # None: not running

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count the time of the block."""
        self._start = time.monotonic()
        try:
            yield
        finally:
            self._used += time.monotonic() - self._start
            self._start = None

    def counted(self, frames: Generator[T, None, None]) -> Generator[T, None, None]:
        """Yield what a generator yields; count its time, but not that of the frames' user."""
        with closing(frames):
            while True:
                with self.running():
                    try:
                        frame = next(frames)
                    except StopIteration:
                        return
                yield frame

    def check(self) -> None:
        """Raise InputError where the limit is exceeded."""
        running = 0.0 if self._start is None else time.monotonic() - self._start
        if self._used + running > self._limit:
            raise MediaTooLargeError(
                f"{self._name} took more than {self._limit:g} s to decode; cut it or make it "
                "smaller first"
            )


def check_frame_count(count: int, limits: MediaLimits, name: str) -> None:
    """Raise InputError if a video has more frames than the limit."""
    if count > limits.max_frames:
        raise MediaTooLargeError(
            f"{name} has more than {limits.max_frames:,} frames, which is the limit; cut it first"
        )


def frame_rate(
    timestamps: Sequence[float], *, time_base: float, nominal_fps: float | None
) -> float | None:
    """Return the frame rate of uniform timestamps; None where they are not uniform within 1 %.

    Args:
        timestamps: seconds.
        time_base: resolution of the timestamps in seconds; they are rounded to it (1 ms in
            Matroska).
        nominal_fps: frame rate that the container declares; returned where the measured one
            agrees within 1 %, because it is exact.
    """
    if len(timestamps) < 2:
        return nominal_fps
    gap = (timestamps[-1] - timestamps[0]) / (len(timestamps) - 1)
    if gap <= 0:
        return None
    tolerance = 0.01 * gap + time_base
    if any(abs(t - timestamps[0] - i * gap) > tolerance for i, t in enumerate(timestamps)):
        return None
    if nominal_fps is not None and abs(nominal_fps * gap - 1) <= 0.01:
        return nominal_fps
    return 1 / gap


def video_duration(timestamps: Sequence[float], fps: float | None) -> float:
    """Return the duration in seconds; the last frame lasts as long as the median frame."""
    if fps is not None:
        return len(timestamps) / fps
    gaps = [b - a for a, b in pairwise(timestamps)]
    return timestamps[-1] - timestamps[0] + (median(gaps) if gaps else 0.0)
