"""Rates are measured, never believed."""

from __future__ import annotations

import pytest

from qwen2vl.errors import InputError
from qwen2vl.processor.media.source import MediaLimits
from qwen2vl.processor.media.timeline import Deadline, check_count, clip_seconds, frame_rate


def steps(count: int, rate: float, tick: float = 0.0) -> list[float]:
    exact = [i / rate for i in range(count)]
    return [round(t / tick) * tick for t in exact] if tick else exact


@pytest.mark.parametrize("rate", [1.0, 23.976, 29.97, 60.0, 240.0])
@pytest.mark.parametrize("tick", [1 / 90_000, 0.001])
def test_uniform_times_have_a_rate(rate: float, tick: float) -> None:
    """Matroska rounds to milliseconds, which is more than 1 % of a frame's time."""
    times = steps(50, rate, tick)
    assert frame_rate(times, tick=tick, hint=rate) == rate
    assert frame_rate(times, tick=tick, hint=None) == pytest.approx(rate, rel=0.01)


def test_a_wrong_claim_is_not_believed() -> None:
    assert frame_rate(steps(50, 30), tick=0, hint=25.0) == pytest.approx(30)
    assert frame_rate(steps(50, 30), tick=0, hint=29.97) == 29.97


@pytest.mark.parametrize(
    "times", [[0, 1, 2, 50, 51, 100], [0.0, 0.1, 0.2, 0.25, 0.4], [0.0, 0.0, 0.0], [0, 1, 1, 3, 4]]
)
def test_gaps_have_no_rate(times: list[float]) -> None:
    assert frame_rate(times, tick=0, hint=10.0) is None


def test_one_percent_is_the_bound() -> None:
    assert frame_rate([0, 1.0, 2.009, 3], tick=0, hint=None) == pytest.approx(1)
    assert frame_rate([0, 1.0, 2.011, 3], tick=0, hint=None) is None


def test_length_counts_the_last_frame() -> None:
    assert clip_seconds(steps(30, 10), 10.0) == 3.0
    assert clip_seconds([0, 1, 2, 50, 51, 100], None) == 101
    assert clip_seconds([0.0], None) == 0.0


def test_limits_speak() -> None:
    with pytest.raises(InputError, match="video 1 has more than 5 frames"):
        check_count(6, MediaLimits(max_frames=5), "video 1")
    check_count(5, MediaLimits(max_frames=5), "video 1")
    Deadline(MediaLimits(), "video 1").check()
    with pytest.raises(InputError, match="video 1 took more than 0 s to decode"):
        Deadline(MediaLimits(decode_timeout=0), "video 1").check()
