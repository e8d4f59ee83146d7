"""When the frames of a clip are shown: what video.py chooses from, without a pixel decoded.

`Timeline` is measured from the frames' own time stamps; what a container says about itself is used
only where they confirm it. `Clip` is what every source of frames offers. Plain numbers: no files,
no decoders. Next rooms: clip.py (lists, arrays, animations) and film.py (video files).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Protocol, TypeAlias

import numpy as np
from torch import Tensor

from qwen2vl.errors import InputError
from qwen2vl.processor.media.source import MediaLimits

__all__ = ["Clip", "Deadline", "Shrink", "Timeline", "check_count", "clip_seconds", "frame_rate"]

Shrink: TypeAlias = Callable[[np.ndarray], Tensor]  # (H, W, 3) uint8 -> what is kept of a frame


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """When each frame of a clip is shown, in display order."""

    times: tuple[float, ...]  # seconds from the first frame, never decreasing
    rate: float | None  # frames a second where the times are uniform, else None
    seconds: float  # length, the last frame's own time included
    height: int  # pixels of an upright frame
    width: int
    listed: bool = False  # frames that the user listed: all of them are meant to be seen
    notes: tuple[str, ...] = ()


class Clip(Protocol):
    """What video.py needs of any source of frames."""

    timeline: Timeline

    def frames(self, indices: Sequence[int], shrink: Shrink) -> list[Tensor] | None:
        """Decode the frames `indices` (ascending, distinct) and keep `shrink` of each.

        Returns None where decoding showed other frames than the timeline promised: the timeline
        is then the true one, and the caller chooses again.
        """
        ...


class Deadline:
    """The time that one video may take to decode."""

    def __init__(self, limits: MediaLimits, name: str) -> None:
        self._seconds, self._name = limits.decode_timeout, name
        self._end = time.monotonic() + limits.decode_timeout

    def check(self) -> None:
        """Raise InputError once the time is over."""
        if time.monotonic() > self._end:
            raise InputError(
                f"{self._name} took more than {self._seconds:g} s to decode; cut it or make it "
                "smaller first"
            )


def check_count(count: int, limits: MediaLimits, name: str) -> None:
    """Raise InputError where a clip has more frames than may be decoded."""
    if count > limits.max_frames:
        raise InputError(
            f"{name} has more than {limits.max_frames:,} frames, which is the limit; cut it first"
        )


def frame_rate(times: Sequence[float], *, tick: float, hint: float | None) -> float | None:
    """Measure the rate of uniform times; None where they are not uniform within 1 %.

    `tick` is the resolution of the clock, which rounds every time (1 ms in Matroska). `hint`, the
    container's own rate, is taken for its exactness where the measured one agrees within 1 %.
    """
    if len(times) < 2:
        return hint
    gap = (times[-1] - times[0]) / (len(times) - 1)
    if gap <= 0:
        return None
    slack = 0.01 * gap + tick
    if any(abs(t - times[0] - i * gap) > slack for i, t in enumerate(times)):
        return None
    if hint is not None and abs(hint * gap - 1) <= 0.01:
        return hint
    return 1 / gap


def clip_seconds(times: Sequence[float], rate: float | None) -> float:
    """Measure a clip's length: the last frame is shown as long as frames usually are."""
    if rate is not None:
        return len(times) / rate
    gaps = [b - a for a, b in pairwise(times)]
    return times[-1] - times[0] + (median(gaps) if gaps else 0.0)
