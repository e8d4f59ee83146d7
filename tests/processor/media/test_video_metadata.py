"""Video metadata: measured frame rates, durations, and limits."""

from __future__ import annotations

import time
from collections.abc import Generator

import pytest

from qwen2vl.errors import InputError
from qwen2vl.processor.media.source import MediaLimits
from qwen2vl.processor.media.video_metadata import (
    Deadline,
    check_frame_count,
    frame_rate,
    video_duration,
)


def uniform_timestamps(count: int, rate: float, time_base: float = 0.0) -> list[float]:
    exact = [i / rate for i in range(count)]
    return [round(t / time_base) * time_base for t in exact] if time_base else exact


@pytest.mark.parametrize("rate", [1.0, 23.976, 29.97, 60.0, 240.0])
@pytest.mark.parametrize("time_base", [1 / 90_000, 0.001])
def test_uniform_timestamps_have_a_frame_rate(rate: float, time_base: float) -> None:
    """Matroska rounds to milliseconds, which is more than 1 % of a frame's duration."""
    timestamps = uniform_timestamps(50, rate, time_base)
    assert frame_rate(timestamps, time_base=time_base, nominal_fps=rate) == rate
    assert frame_rate(timestamps, time_base=time_base, nominal_fps=None) == pytest.approx(
        rate, rel=0.01
    )


def test_wrong_nominal_fps_is_ignored() -> None:
    assert frame_rate(uniform_timestamps(50, 30), time_base=0, nominal_fps=25.0) == pytest.approx(
        30
    )
    assert frame_rate(uniform_timestamps(50, 30), time_base=0, nominal_fps=29.97) == 29.97


@pytest.mark.parametrize(
    "timestamps",
    [[0, 1, 2, 50, 51, 100], [0.0, 0.1, 0.2, 0.25, 0.4], [0.0, 0.0, 0.0], [0, 1, 1, 3, 4]],
)
def test_timestamps_with_gaps_have_no_frame_rate(timestamps: list[float]) -> None:
    assert frame_rate(timestamps, time_base=0, nominal_fps=10.0) is None


def test_tolerance_is_one_percent() -> None:
    assert frame_rate([0, 1.0, 2.009, 3], time_base=0, nominal_fps=None) == pytest.approx(1)
    assert frame_rate([0, 1.0, 2.011, 3], time_base=0, nominal_fps=None) is None


def test_duration_includes_the_last_frame() -> None:
    assert video_duration(uniform_timestamps(30, 10), 10.0) == 3.0
    assert video_duration([0, 1, 2, 50, 51, 100], None) == 101
    assert video_duration([0.0], None) == 0.0


def test_limits() -> None:
    with pytest.raises(InputError, match="video 1 has more than 5 frames"):
        check_frame_count(6, MediaLimits(max_frames=5), "video 1")
    check_frame_count(5, MediaLimits(max_frames=5), "video 1")


def test_deadline_counts_the_time_of_decoding_only(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    deadline = Deadline(MediaLimits(decode_timeout=2.5), "video 1")

    def frames() -> Generator[int, None, None]:
        try:
            for i in range(4):
                clock[0] += 1.0  # decoding
                deadline.check()
                yield i
        finally:
            closed.append(True)

    closed: list[bool] = []
    counted = deadline.counted(frames())
    for i in range(2):
        assert next(counted) == i
        clock[0] += 1000.0  # the frame is used
    with pytest.raises(InputError, match=r"video 1 took more than 2\.5 s to decode; cut it"):
        next(counted)
    assert closed


def test_closing_counted_frames_closes_the_decoder() -> None:
    closed: list[bool] = []

    def frames() -> Generator[int, None, None]:
        try:
            yield from range(9)
        finally:
            closed.append(True)

    counted = Deadline(MediaLimits(), "video 1").counted(frames())
    assert next(counted) == 0 and not closed
    counted.close()
    assert closed


def test_deadline() -> None:
    deadline = Deadline(MediaLimits(), "video 1")
    with deadline.running():
        deadline.check()
    deadline = Deadline(MediaLimits(decode_timeout=0), "video 1")
    deadline.check()  # nothing was decoded yet
    with deadline.running(), pytest.raises(InputError, match="video 1 took more than 0 s to"):
        deadline.check()
